"""Tagged tissue patches: what is known of such a set before a picture is opened, and what its tree holds.

Trees: ``{train or training}/<patch>[flags].png`` and ``{val,test}/{img,mask}/<patch>.png``. A flag says whether a
tissue occurs in a training patch; masks show where, in classes from 0, and exist for validation and test only.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataset_conversion._facts import Trouble
from nnunet_dgplugins.data.names import near, safe_name
from nnunet_dgplugins.errors import UserError

TRAIN, VAL, TEST = "train", "val", "test"
TAGS, MASKS = "tags", "masks"
STRICT, RELEASE = "strict", "release"
WHITE = (255, 255, 255)
#: order of label values that sets have in common when asked for; it is that of BCSS-WSSS
COMMON = ("tumour", "stroma", "lymphocyte", "necrosis", "normal")
TWO = COMMON[:2]
PUBLISHED, COMMON_ORDER = "published", "common"
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Tissue:
    """One class of a set.

    Args:
        name: name of the label; a tissue has one name in all sets.
        published: what the set calls it.
        colour: (red, green, blue) in masks.
    """

    name: str
    published: str
    colour: Colour


@dataclass(frozen=True)
class PatchFacts:
    """Everything a converter knows of its set before it opens a file.

    Args:
        command: name after ``dgplugins convert``.
        dataset_id: nnU-Net id by default.
        name: middle of ``DatasetXXX_<name>_...``.
        site: name in the case table and first part of case ids.
        tissues: in the order of the flags, which is that of the mask values: 0, 1, ...
        patient: pattern of patch names with a group ``patient``.
        folders: part to the names its folder may have.
        excluded: colour of the value after the last tissue: pixels that count nowhere.
        reference: where the data come from.
        licence: what they may be used for, as far as known.
        tags: such sets become weak datasets.
        simulated: whether the sites are made by a program.
        white: whether white pixels are no tissue, so that pseudo masks leave them out (with all classes, as published).
    """

    command: str
    dataset_id: int
    name: str
    site: str
    tissues: tuple[Tissue, ...]
    patient: re.Pattern[str]
    folders: Mapping[str, tuple[str, ...]]
    excluded: Colour = WHITE
    reference: str = ""
    licence: str = ""
    tags: bool = True
    simulated: bool = False
    white: bool = False

    def classes(self, count: int | None, order: str = PUBLISHED) -> tuple[str, ...]:
        """Return the names of the labels 1, 2, ... of a protocol with ``count`` classes; None for all of them."""
        if count == len(TWO):
            return TWO
        names = [tissue.name for tissue in self.tissues]
        return tuple(sorted(names, key=COMMON.index) if order == COMMON_ORDER else names)

    def code(self, classes: Sequence[str]) -> Code:
        """Return how this set's masks become labels of ``classes``; tissues that are none of them are excluded.

        Raises:
            UserError: the set lacks a class.
        """
        names = [tissue.name for tissue in self.tissues]
        missing = [name for name in classes if name not in names]
        if missing:
            raise UserError(
                f"{self.command} has no {' and no '.join(missing)}, only {', '.join(names)}. Use --classes {len(TWO)}."
            )
        ignore = len(classes) + 1
        values = {i: classes.index(name) + 1 if name in classes else ignore for i, name in enumerate(names)}
        colours = {i: tissue.colour for i, tissue in enumerate(self.tissues)}
        return Code({**values, len(names): ignore}, {**colours, len(names): self.excluded})


@dataclass(frozen=True)
class Code:
    """How pixels of a mask file become labels.

    Args:
        values: value in a grey or palette file to label.
        colours: the same values to their colour, for RGB files and to check palettes; empty where none is published.
    """

    values: Mapping[int, int]
    colours: Mapping[int, Colour] = field(default_factory=dict)


@dataclass(frozen=True)
class Patch:
    """One patch of the download.

    Args:
        name: case id in nnU-Net.
        image: the picture.
        mask: its voxel truth; None where there is none or training must not see it.
        part: ``train``, ``val`` or ``test``.
        site: set or hospital; None if unknown.
        patient: patient; None where the name does not tell.
        original: path relative to the set's folder, flags included.
        tags: 0 or 1 for each class; None where the mask says it (validation) or nothing may (test).
        code: how the mask is read.
    """

    name: str
    image: Path
    mask: Path | None
    part: str
    site: str | None
    patient: str | None
    original: str
    tags: tuple[int, ...] | None
    code: Code

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return (self.image,) if self.mask is None else (self.image, self.mask)


@dataclass(frozen=True)
class PatchRequest:
    """What the user asked for, as typed.

    Args:
        root: folder of the download.
        dataset_id: nnU-Net id.
        supervision: ``tags``, or ``masks`` for the fully supervised twin.
        classes: number of classes of the protocol; None for all of the set's.
        order: ``published`` or ``common`` order of label values.
        targets: ``NAME=ROOT`` of other sets to test on.
        protocol: ``strict``, or ``release``: tagged training patches of the targets come along.
        train_masks: folder with masks of the training patches; the public sets have none.
        resize: side in pixels that every patch gets; None for their own.
        exclude: case ids or patients to leave out.
        link: link pictures that need no change instead of copying them.
        overwrite: replace an earlier conversion of other input or options.
        jobs: processes.
    """

    root: Path
    dataset_id: int
    supervision: str = TAGS
    classes: int | None = None
    order: str = PUBLISHED
    targets: tuple[str, ...] = ()
    protocol: str = STRICT
    train_masks: Path | None = None
    resize: int | None = None
    exclude: tuple[str, ...] = ()
    link: bool = False
    overwrite: bool = False
    jobs: int = 2


@dataclass
class PatchSet:
    """What a converter found and decided.

    Args:
        command: name after ``dgplugins convert``.
        name: ``DatasetXXX_...``.
        classes: names of the labels 1, 2, ...
        options: what the user chose, as the case table keeps it.
        reference: where the data come from.
        licence: what they may be used for.
        source: site that is trained on; None for a set without sites.
        background: whether pixels of no class are a target, label 0. Else every pixel is a class or excluded.
        mask_code: how masks are read, where the user says it; part of what a dataset that reads them depends on.
        patches: all of them.
        troubles: everything wrong with the tree.
        notes: what the user should know.
    """

    command: str
    name: str
    classes: tuple[str, ...]
    options: dict[str, Any]
    reference: str = ""
    licence: str = ""
    source: str | list[str] | None = None
    background: bool = False
    mask_code: Mapping[str, Any] = field(default_factory=dict)
    patches: list[Patch] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def close(self, exclude: Sequence[str]) -> None:
        """Give every patch an id of its own and leave out what the user excludes.

        Raises:
            UserError: an excluded case does not exist.
        """
        counts = Counter(patch.name for patch in self.patches)
        # names that differ in signs only, or in the folder: the path tells them apart, whatever else is there
        self.patches = [
            replace(patch, name=told_apart(patch.name, patch.original)) if counts[patch.name] > 1 else patch
            for patch in self.patches
        ]
        known = {patch.name for patch in self.patches} | {trouble.case for trouble in self.troubles if trouble.case}
        people = {p.name: case_name(p.site, p.patient) for p in self.patches if p.patient is not None}
        known |= {*people.values()}
        for name in exclude:
            if name not in known:
                raise UserError(f"--exclude {name}: no such patch{near(name, known)}")
        out = set(exclude)
        self.patches = [p for p in self.patches if p.name not in out and people.get(p.name) not in out]
        self.troubles = [trouble for trouble in self.troubles if trouble.case not in out]
        self.patches.sort(key=lambda patch: patch.name)


def told_apart(name: str, original: str) -> str:
    """Return an id for one of several patches of the same name."""
    return f"{name}-{zlib.crc32(original.encode()):08x}"


def some(names: Sequence[str], count: int = 5) -> str:
    """Return the first names for a message."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def case_name(site: str | None, bare: str) -> str:
    """Return the case id of a patch, made of the letters that file names may have anywhere."""
    return safe_name(bare) if site is None else f"{safe_name(site)}_{safe_name(bare)}"
