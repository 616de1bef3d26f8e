"""What a converter says about its source: sites, labels, channels, and the cases it found."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion._folders import hidden
from dataset_conversion._sources import Source, Stack
from nnunet_dgplugins.errors import Problem, UserError, nearest

if TYPE_CHECKING:
    import numpy.typing as npt

    from nnunet_dgplugins.data.splits import Split

WITHOUT = "without_"  # in names of datasets and sources: trained on every site but the one that follows
VOLUME = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """One hospital, scanner or modality of a source dataset.

    Args:
        name: name in the case table and in case ids.
        folders: names under which releases keep it; also accepted on the command line, whatever the case.
        default: whether it becomes a target when the user names none.
    """

    name: str
    folders: tuple[str, ...] = ()
    default: bool = True

    def answers_to(self, text: str) -> bool:
        """Return whether ``text`` means this site."""
        return text.casefold() in {name.casefold() for name in (self.name, *self.folders)}


@dataclass(frozen=True)
class Raters:
    """Several masks of one case.

    Args:
        count: masks of a case where none is missing.
        fuse: makes one label, in values of the source, of the whole-numbered masks that are there; a function of a
            module, so that worker processes find it.
    """

    count: int
    fuse: Callable[[Sequence[npt.NDArray[Any]]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Facts:
    """Everything a source dataset's converter knows before it opens a file.

    Args:
        command: name after ``dgplugins convert``.
        dataset_id: nnU-Net id by default.
        name: middle of ``DatasetXXX_<name>_<source>``.
        sites: every site of the source.
        channel_names: nnU-Net's, by channel index.
        labels: nnU-Net's label names, background included.
        mapping: label value in the source files to label value written.
        zone_labels: label names when zones are kept; None when the source has no zones.
        zone_mapping: mapping when zones are kept.
        window: lowest and highest value kept where a volume of ``window_sites`` reaches below the lowest.
        window_sites: sites whose volumes may be windowed (CT in Hounsfield units).
        splits: names of the ways to split, the default first.
        few_labels: whether a share of the patients can be labelled only, and the rest kept as unlabelled cases.
        counts: ways to count the labelled patients of a share, the default first (:mod:`dataset_conversion._labelled`).
        raters: how several masks per case become one label; None where each case has one.
        zones_flag: option that keeps the zones, where ``--zones keep`` would be the wrong word.
        reference: where the data come from.
        licence: what the data may be used for, as far as known.
        simulated: whether the sites are made by a program; said in the case table and in every study's tables.
        tags: whether the dataset can be a weak one, of image tags in place of masks (:mod:`dataset_conversion._tags`).
            Such sources have several modalities, no source and target sites, and ``sites`` is empty.
        neighbours: whether the slices below and above can be written as further channels.
        ends_left_out: whether the source lacks the first and the last slice of every scan; said in the case table, and
            the SAM-SDG protocol then leaves out no more of them.
    """

    command: str
    dataset_id: int
    name: str
    sites: tuple[Site, ...]
    channel_names: Mapping[str, str]
    labels: Mapping[str, int]
    mapping: Mapping[int, int]
    zone_labels: Mapping[str, int] | None = None
    zone_mapping: Mapping[int, int] | None = None
    window: tuple[int, int] | None = None
    window_sites: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("kfold",)
    few_labels: bool = False
    counts: tuple[str, ...] = ("honest",)
    raters: Raters | None = None
    zones_flag: str = ""
    reference: str = ""
    licence: str = ""
    simulated: bool = False
    tags: bool = False
    neighbours: bool = False
    ends_left_out: bool = False

    def site(self, text: str) -> Site:
        """Return the site that ``text`` means; ``without_X`` stands for every site but X, as one source.

        Raises:
            UserError: no site is called so.
        """
        for site in self.sites:
            if site.answers_to(text):
                return site
        if text.casefold().startswith(WITHOUT):
            return Site(WITHOUT + self.site(text[len(WITHOUT) :]).name)
        raise UserError(f"{self.command}: unknown site '{text}'{nearest(text, [site.name for site in self.sites])}")


@dataclass(frozen=True)
class SourceCase:
    """One case of the download.

    Args:
        name: case id in nnU-Net, already safe in file names.
        images: one file or stack of slices per channel.
        label: voxel annotation; None for an unlabelled case, whose label is filled with the ignore value.
        site: name of the site; empty where it is not known.
        patient: patient within the site.
        original: path of the first image relative to the download's root.
        order: position within the site; numbers count as numbers.
        raters: masks by further raters, fused with ``label``.
        frame: time point of images and label, counted from 0; None where files hold one volume.
        centre: part of the site whose patients a published protocol counts by themselves.
        spare: a case without annotation that is used only while all of its patient is unlabelled.
        volumes: which volume of its file each image is, where one file holds the channels; empty where it does not.
        stratum: patients of which a random split gives each part its share (grade of the tumour).
        own_grid: the mask lies on a grid of its own and is put on the image's by physical coordinates.
    """

    name: str
    images: tuple[Source, ...]
    label: Source | None
    site: str
    patient: str
    original: str
    order: tuple[int, str] = (0, "")
    raters: tuple[Path, ...] = ()
    frame: int | None = None
    centre: str = ""
    spare: bool = False
    volumes: tuple[int, ...] = ()
    stratum: str = ""
    own_grid: bool = False

    @property
    def masks(self) -> tuple[Source, ...]:
        """Every mask that is read; none of an unlabelled case."""
        return () if self.label is None else (self.label, *self.raters)

    @property
    def files(self) -> set[Path]:
        """Every file that is read."""
        sources = (*self.images, *self.masks)
        return {file for source in sources for file in (source.files if isinstance(source, Stack) else (source,))}

    def answers_to(self, names: Collection[str]) -> bool:
        """Return whether one of ``names`` is this case or its whole patient (``<site>_<patient>``)."""
        return self.name in names or f"{self.site}_{self.patient}" in names


@dataclass(frozen=True)
class Trouble:
    """A problem of the tree, with the site and case it concerns, so that leaving those out settles it."""

    problem: Problem
    site: str | None = None
    case: str | None = None


@dataclass
class Listing:
    """What a converter found: cases, and everything that is wrong with the tree.

    Args:
        cases: every case of the tree.
        troubles: everything wrong with it.
        warnings: what the user should know.
        facts: the converter's facts as the request changes them; None for no change.
        folds: the tree's own folds; None where the converter splits.
        resources: what must live until the last file is written, such as a folder with an unpacked archive.
    """

    cases: list[SourceCase] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: Facts | None = None
    folds: list[Split] | None = None
    resources: ExitStack = field(default_factory=ExitStack)


ListCases = Callable[[Path, "Request", Listing], None]


@dataclass(frozen=True)
class Request:
    """What the user asked for, as typed.

    Args:
        root: folder of the download.
        dataset_id: nnU-Net id, None for the converter's own.
        sources: source sites; their cases are trained on. Empty for every one but the targets.
        targets: sites that become test cases; empty for every one but the sources.
        exclude: case ids to leave out.
        zones: ``merge`` or ``keep``.
        split: one of the facts' ``splits``; None for the default.
        drop_empty_slices: cut each volume to the slices from the first to the last with organ.
        link: link files that need no change instead of copying them.
        overwrite: replace an earlier conversion of other input or options.
        jobs: processes.
        site_map: CSV or JSON file that says the site of each case, where the tree does not.
        ratio: share of each source site's annotated patients that stays labelled; None for all.
        labelled: number of labelled patients per source site, in place of ``ratio``.
        count: one of the facts' ``counts``.
        unannotated: take the patients of source sites that the download has no masks for as unlabelled cases.
        frames: time points of unlabelled patients: ``edes``, ``every=N`` or ``all``.
        supervision: ``masks``, or ``tags`` for a weak dataset.
        min_pixels: foreground pixels that make a slice's tag positive.
        modalities: channels in their order, with commas between them; empty for the converter's own.
        label_code: which numbering of labels the masks follow, where a source has several.
        val: share of the patients that validates, where the converter draws one.
        folds: number of folds of a cross-validation in place of ``val``.
        test: share of the patients that is kept for testing, likewise.
        seed: of that draw; None for nnU-Net's own.
        name: middle of the dataset's name, None for the converter's own.
        folders: ``MODALITY=FOLDER`` for folders that are called otherwise than their modality.
        masks: name of the folder of masks.
        label_name: what masks show, where the tree does not say.
        more_roots: further downloads that go into the same dataset, one fold each.
        neighbours: write the slices below and above as channels, too.
        nci_isbi: folder of NCI-ISBI 2013, where a dataset is built from several downloads; so the next two.
        i2cvb: folder of I2CVB.
        promise12: folder of PROMISE12.
    """

    root: Path
    dataset_id: int | None = None
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    zones: str = "merge"
    split: str | None = None
    drop_empty_slices: bool = False
    link: bool = False
    overwrite: bool = False
    jobs: int = 2
    site_map: Path | None = None
    ratio: float | None = None
    labelled: int | None = None
    count: str = "honest"
    unannotated: bool = False
    frames: str = "edes"
    supervision: str = "masks"
    min_pixels: int = 1
    modalities: str = ""
    label_code: str = ""
    val: float = 0.1
    folds: int | None = None
    test: float = 0.1
    seed: int | None = None
    name: str | None = None
    folders: tuple[str, ...] = ()
    masks: str = "GT"
    label_name: str = "prostate"
    more_roots: tuple[Path, ...] = ()
    neighbours: bool = False
    nci_isbi: Path | None = None
    i2cvb: Path | None = None
    promise12: Path | None = None

    @property
    def few_labels(self) -> bool:
        """Whether only some of the annotated patients are to be labelled."""
        return self.ratio is not None or self.labelled is not None


def entries(folder: Path) -> list[Path]:
    """Return what lies in a folder, sorted, without hidden files and the litter of archive programs."""
    return sorted(
        (path for path in folder.iterdir() if not hidden(path.name)),
        key=lambda path: path.name,
    )


def is_volume(path: Path) -> bool:
    """Return whether the name is that of a NIfTI file, in lower or upper case; a link may lead nowhere."""
    return VOLUME.search(path.name) is not None and (path.is_file() or path.is_symlink())


def stem(path: Path) -> str:
    """Return the file name without its NIfTI ending."""
    return VOLUME.sub("", path.name)


def site_folders(root: Path, facts: Facts, inner: tuple[str, ...], listing: Listing) -> dict[str, Path]:
    """Return the folder of each site, looked for in ``root`` and in the folder inside it that archives add.

    Args:
        root: what the user named.
        facts: the sites.
        inner: names of folders between the root and the sites, tried one below another.
        listing: takes a warning for each folder that is no site.

    Raises:
        UserError: no site folder is there.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder.")
    names = {name.casefold() for name in inner}
    candidates = [root]
    for folder in candidates:
        candidates += [path for path in entries(folder) if path.is_dir() and path.name.casefold() in names]
    for folder in candidates:
        found: dict[str, Path] = {}
        strange = []
        for path in entries(folder):
            site = next((site for site in facts.sites if site.answers_to(path.name)), None)
            if site is None or not path.is_dir():
                strange.append(path.name)
            elif site.name in found:
                problem = Problem(str(path), f"a second folder of {site.name}, beside {found[site.name].name}")
                listing.troubles.append(Trouble(problem, site.name))
            else:
                found[site.name] = path
        if found:
            if strange:
                listing.warnings.append(f"{folder}: not a site, left out: {', '.join(strange)}")
            return found
    looked = ", ".join(site.folders[0] if site.folders else site.name for site in facts.sites)
    raise UserError(f"{root}: none of the folders {looked} is there. Name the folder that holds them.")
