"""Your own tissue patches: a folder of RGB pictures and a CSV that says which classes occur in each.

Tree: ``<root>/<file>`` for each line of the CSV; masks, where there are any, in a folder of their own under the same
names. Columns and mask values: docs/data.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from dataset_conversion._command import run_as_script
from dataset_conversion._facts import Trouble
from dataset_conversion._patch_command import build, shared_options
from dataset_conversion._patches import (
    MASKS,
    RELEASE,
    STRICT,
    TAGS,
    TEST,
    TRAIN,
    VAL,
    Code,
    Colour,
    Patch,
    PatchFacts,
    PatchRequest,
    PatchSet,
    case_name,
    some,
    told_apart,
)
from dataset_conversion._tag_table import BACKGROUND, Row, check_classes, make_code, read_code, read_tags
from nnunet_dgplugins.data.case_table import Case, CaseTable
from nnunet_dgplugins.data.names import near, safe_name
from nnunet_dgplugins.data.splits import SEED
from nnunet_dgplugins.errors import Problem, UserError

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
FACTS = PatchFacts(
    command="patch-folder",
    dataset_id=519,
    name="Patches",
    site="",
    tissues=(),
    patient=re.compile("(?P<patient>.+)"),
    folders={},
)


@dataclass(frozen=True)
class FolderRequest(PatchRequest):
    """What the user asked for, as typed.

    Args:
        tags: CSV of files and tags.
        masks: folder of masks; None where there are none.
        classes_file: CSV of classes and mask values.
        sources: sites that are trained on; empty for all.
        val: share of the patients that validates, where the CSV does not say.
        test: share that is kept for testing, likewise.
        seed: of that draw.
        name: middle of the dataset's name.
    """

    tags: Path = Path("tags.csv")
    masks: Path | None = None
    classes_file: Path | None = None
    sources: tuple[str, ...] = ()
    val: float = 0.1
    test: float = 0.0
    seed: int = SEED
    name: str = FACTS.name

    @property
    def title(self) -> str:
        """Name of the dataset."""
        parts = [safe_name(self.name), *([safe_name("-".join(self.sources))] if self.sources else [])]
        parts += [RELEASE] if self.protocol == RELEASE else []
        return f"Dataset{self.dataset_id:03d}_{'_'.join(parts)}_{self.supervision}"


def make_request(values: Mapping[str, Any]) -> FolderRequest:
    """Return the request of a command line."""
    rest = {key: value for key, value in values.items() if key != "copy"}
    rest["tags"] = rest["tags"] or rest["root"] / "tags.csv"
    return FolderRequest(link=not values["copy"], **rest)


def dataset_name(values: Mapping[str, Any]) -> str:
    """Return the name of the dataset that a command line would write; no file is opened."""
    return make_request(values).title


def collect(request: FolderRequest) -> PatchSet:
    """List the patches of the CSV and say who trains, validates and tests.

    Raises:
        BadInput: what is wrong with the tables.
        UserError: a folder is missing, or options contradict each other.
    """
    if request.supervision == MASKS and (request.masks is None or request.protocol == RELEASE):
        raise UserError(f"--supervision {MASKS} needs --masks FOLDER, and goes with --protocol {STRICT} only.")
    if request.protocol == RELEASE and not request.sources:
        raise UserError(
            f"--protocol {RELEASE} is about training patches of other sites; name the source with --source."
        )
    if request.val + request.test >= 1:
        raise UserError(f"--val {request.val:g} and --test {request.test:g} leave no patch to train on.")
    if not request.root.is_dir():
        raise UserError(f"{request.root}: no such folder.")
    table = read_tags(request.tags)
    rows, classes = table.rows, table.classes
    values: dict[str, list[int]] | None = None
    colours: dict[int, Colour] = {}
    if request.classes_file is not None:
        classes, values, colours = read_code(request.classes_file)
    check_classes(request.tags, table, classes)
    sites = {row.site for row in rows if row.site}
    for site in request.sources:
        if site not in sites:
            raise UserError(f"--source {site}: no patch of that site{near(site, sites)}")
    source = request.sources[0] if len(request.sources) == 1 else list(request.sources) or None
    options = {
        "converter": FACTS.command,
        "supervision": request.supervision,
        "classes": classes,
        "targets": sorted(sites - set(request.sources)) if request.sources else [],
        "protocol": request.protocol,
        "resize": request.resize,
        "excluded": sorted(request.exclude),
        "val": request.val,
        "test": request.test,
        "seed": request.seed,
    }
    found = PatchSet(
        FACTS.command, request.title, tuple(classes), options, source=source, background=BACKGROUND in (values or {}),
        mask_code={"values": values, "colours": colours} if values else {},
    )  # fmt: skip
    code = make_code(classes, values, colours)
    masks = _masks(request, rows)
    bare = {row.file: case_name(row.site, Path(row.file).stem) for row in rows}
    count = Counter(bare.values())
    for row in rows:  # names do not depend on which files are there: --exclude leaves out the patch that it names
        name = bare[row.file] if count[bare[row.file]] == 1 else told_apart(bare[row.file], row.file)
        _add(found, request, row, name, code, masks.get(row.file))
    listed = {request.root / row.file for row in rows}
    others = [path for path in sorted(request.root.glob("*")) if path.suffix.casefold() in PICTURES]
    unlisted = [path.name for path in others if path not in listed]
    if unlisted:
        found.notes.append(f"{request.root}: not in {request.tags.name}, left out: {some(unlisted)}")
    found.close(request.exclude)
    if not found.troubles:  # they are told together; that too few patches are left may be due to them
        _draw(found, request)
    own = [p for p in found.patches if p.patient is not None and (not request.sources or p.site in request.sources)]
    sides = [{case_name(p.site, p.patient or "") for p in own if p.part == part} for part in (TRAIN, VAL)]
    for patient in sorted(sides[0] & sides[1]):
        fix = "Give all patches of a patient one part, or leave the column out and let --val draw."
        problem = Problem(str(request.tags), f"patient {patient} trains and validates", "one side for a patient", fix)
        found.troubles.append(Trouble(problem))
    _hide(found, request)
    return found


def _add(found: PatchSet, request: FolderRequest, row: Row, name: str, code: Code, mask: Path | None) -> None:
    """Add the patch of a row; of a site that is no source it is a test case, or left out."""
    path = request.root / row.file
    wrong = [] if path.is_file() else [f"{path}: no such file"]
    outside = Path(row.file).is_absolute() or ".." in Path(row.file).parts
    wrong += [f"{row.file}: not below {request.root}"] if outside else []
    wrong += ["no site, and --source chooses by site"] if request.sources and row.site is None else []
    if wrong:
        fix = f"Correct the line, or leave the patch out with --exclude {name}."
        found.troubles.append(Trouble(Problem(row.where, "; ".join(wrong), fix=fix), case=name))
        return
    part = row.part or TRAIN
    if request.sources and row.site not in request.sources:
        if row.part == TRAIN and request.protocol != RELEASE:
            return  # a target's training patches are none of our business
        part = TRAIN if row.part == TRAIN else TEST
    tags = tuple(int(label in row.tags) for label in found.classes)
    found.patches.append(Patch(name, path, mask, part, row.site, row.patient, row.file, tags, code))


def _masks(request: FolderRequest, rows: Sequence[Row]) -> dict[str, Path]:
    """Return the masks of the pictures that have one: under the same path, or under the same name without folders.

    A path or name that several pictures share is none of them.
    """
    if request.masks is None:
        return {}
    relative = {row.file: Path(row.file).with_suffix(".png") for row in rows}
    paths, names = Counter(relative.values()), Counter(path.name for path in relative.values())
    found: dict[str, Path] = {}
    for file, path in relative.items():
        places = [path] * (paths[path] == 1) + [Path(path.name)] * (names[path.name] == 1)
        masks = [request.masks / place for place in places if (request.masks / place).is_file()]
        found |= {file: masks[0]} if masks else {}
    return found


def _draw(found: PatchSet, request: FolderRequest) -> None:
    """Draw the patches that validate and test, by patient, unless the CSV says who validates."""
    own = [p for p in found.patches if p.part != TEST and (not request.sources or p.site in request.sources)]
    if not own or any(patch.part == VAL for patch in own):
        return
    from dataset_conversion._protocols import shares

    table = CaseTable({patch.name: Case(patch.site, patch.patient) for patch in own})
    held_out, (fold,) = shares(table, list(table.cases), {}, request.val, request.test, request.seed)
    parts = {**dict.fromkeys(held_out, TEST), **dict.fromkeys(fold["val"], VAL)}
    found.patches = [replace(patch, part=parts.get(patch.name, patch.part)) for patch in found.patches]


def _hide(found: PatchSet, request: FolderRequest) -> None:
    """Take from training what it must not see: masks of a weak dataset, tags of test patches."""
    weak = request.supervision == TAGS
    without = [patch.name for patch in found.patches if patch.mask is None and patch.part != TRAIN]
    if request.masks is not None and without:
        found.notes.append(f"{request.masks}: no mask of {len(without)} patches that validate or test: {some(without)}")
    for patch in found.patches if not weak else ():
        if patch.mask is None and patch.part != TEST:
            fix = f"Leave it out with --exclude {patch.name}."
            found.troubles.append(Trouble(Problem(str(patch.image), f"no mask in {request.masks}", fix=fix)))
    found.patches = [
        replace(
            patch,
            mask=None if weak and patch.part == TRAIN else patch.mask,
            tags=None if patch.part == TEST else patch.tags,
        )
        for patch in found.patches
    ]


def _convert(**values: Any) -> None:
    from dataset_conversion._patch_dataset import convert_patches

    request = make_request(values)
    convert_patches(collect(request), request)


_FILE = click.Path(path_type=Path, dir_okay=False)
_SHARE = click.FloatRange(0, 1, max_open=True)
command = build(
    FACTS.command,
    "Convert your own RGB patches at ROOT with a CSV of tags, any number of classes.",
    [
        *shared_options(FACTS.dataset_id),
        click.option("--tags", type=_FILE, metavar="CSV",
                     help="Columns file and one per class (0 or 1), or file and tags (names with ; between them); "
                          "patient, site and part (train, val, test) if known. [default: ROOT/tags.csv]"),
        click.option("--masks", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
                     help="Masks of the patches that validate and test, under the names of the pictures."),
        click.option("--classes-file", type=_FILE, metavar="CSV",
                     help="Columns class, value and colour of the masks. [default: 1, 2, ... as the tags]"),
        click.option("--source", "sources", multiple=True, metavar="SITE",
                     help="Site to train on; may be repeated. Other sites are tested on. [default: all]"),
        click.option("--protocol", type=click.Choice([STRICT, RELEASE]), default=STRICT, show_default=True,
                     help="release: patches of other sites whose part is train come along with their tags."),
        click.option("--val", type=_SHARE, default=0.1, show_default=True,
                     help="Share of the patients that validates, where no part says it."),
        click.option("--test", type=_SHARE, default=0.0, show_default=True, help="Share that is kept in imagesTs."),
        click.option("--seed", type=click.IntRange(0), default=SEED, show_default=True, help="Seed of that draw."),
        click.option("--name", default=FACTS.name, show_default=True, help="Middle of the dataset's name."),
    ],
    _convert,
)  # fmt: skip

if __name__ == "__main__":
    run_as_script(command)
