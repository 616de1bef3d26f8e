"""Volumes as one grey PNG per slice, as Patel and Dolz (MedIA 2022) released their prostate splits and read BraTS.

Tree: ``{train,val}/{T2,ADC,GT}/<patient>_<slice>.png`` (``MR_T1`` and the like for brains), a folder or a tar file.
Several roots (``prostate_data_1`` to ``_3``) are the folds of one dataset. Any mask pixel but 0 is foreground.
"""

from __future__ import annotations

import filecmp
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from dataset_conversion import _tags
from dataset_conversion._archive import unpack
from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import Facts, Listing, Request, SourceCase, Trouble, entries
from dataset_conversion._sources import Stack
from nnunet_dgplugins.data.names import safe_name
from nnunet_dgplugins.errors import Problem, UserError

MODALITIES = ("T2", "ADC", "T1", "T1c", "Flair")
DEFAULT = "T2,ADC"
PREFIX = "MR_"
SIDES = ("train", "val")
FACTS = Facts(
    command="slice-tree",
    dataset_id=516,
    name="ProstateSlices",
    sites=(),
    channel_names={"0": "T2", "1": "ADC"},
    labels={"background": 0, "prostate": 1},
    mapping={0: 0, 1: 1},
    tags=True,
    reference="https://github.com/gaurav104/WSS-CMER",
    licence="as the data that the slices were made from",
)
FILE = re.compile(r"(?P<patient>.+)_(?P<slice>\d+)\.png", re.IGNORECASE)
Slices = dict[int, tuple[Path, ...]]  # slice number to its file in each folder: modalities, then mask


def chosen_facts(request: Request) -> Facts:
    """Return what the options make of the converter's facts."""
    channels = _tags.modalities(request.modalities or DEFAULT, MODALITIES)
    return replace(
        FACTS,
        name=safe_name(request.name or FACTS.name),
        channel_names={str(index): name for index, name in enumerate(channels)},
        labels={"background": 0, request.label_name: 1},
    )


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Make a case of each patient, and a fold of each root."""
    listing.facts = chosen_facts(request)
    channels = list(listing.facts.channel_names.values())
    names = _folder_names(channels, request)
    first: dict[str, tuple[Path, Slices]] = {}  # patient to the place it was found at first
    trees = [tree for path in (root, *request.more_roots) for tree in _trees(path, listing)]
    listing.folds = [_fold(tree, names, first, listing) for tree in trees]
    listing.cases = [_case(patient, place, slices) for patient, (place, slices) in sorted(first.items())]
    listing.warnings.append("PNG files carry no spacing; 1 mm is written in all directions")
    gaps = [patient for patient, (_, slices) in sorted(first.items()) if max(slices) - min(slices) + 1 > len(slices)]
    if gaps:
        some = ", ".join(gaps[:5]) + (", ..." if gaps[5:] else "")
        listing.warnings.append(f"slice numbers of {len(gaps)} patients have gaps ({some}); their slices are stacked")


def _fold(
    tree: Path, names: Sequence[Sequence[str]], first: dict[str, tuple[Path, Slices]], listing: Listing
) -> dict[str, list[str]]:
    """Return who trains and who validates in a root, and note in ``first`` the patients that are new."""
    fold: dict[str, set[str]] = {side: set() for side in SIDES}
    for side in SIDES:
        place = tree / side
        for patient, slices in _patients(place, names, listing).items():
            case = safe_name(patient)
            fold[side].add(case)
            if side == "val" and case in fold["train"]:
                text = f"patient {patient} is in {tree / 'train'} too"
                _trouble(listing, place, text, patient, "a patient on one side of a fold")
            elif patient in first and _differ(first[patient][1], slices):
                text = f"patient {patient} has other slices in {first[patient][0]}"
                _trouble(listing, place, text, patient, "the same slices in every root")
            first.setdefault(patient, (place, slices))
    return {side: sorted(cases) for side, cases in fold.items()}


def _trouble(listing: Listing, where: Path, found: str, patient: str, expected: str = "") -> None:
    name = safe_name(patient)
    problem = Problem(str(where), found, expected, f"Leave the patient out with --exclude {name}.")
    listing.troubles.append(Trouble(problem, case=name))


def _folder_names(channels: Sequence[str], request: Request) -> list[list[str]]:
    """Return the names that each folder may have, in lower case: those of the modalities, then that of the masks.

    Raises:
        UserError: ``--folder`` is not MODALITY=FOLDER, or names no chosen modality.
    """
    renamed: dict[str, str] = {}
    for text in request.folders:
        modality, _, folder = text.partition("=")
        if not folder or modality.casefold() not in {channel.casefold() for channel in channels}:
            raise UserError(f"--folder {text}: expected MODALITY=FOLDER with a modality of {', '.join(channels)}.")
        renamed[modality.casefold()] = folder.casefold()
    names = [channel.casefold() for channel in channels]
    return [*([renamed[n]] if n in renamed else [n, PREFIX.casefold() + n] for n in names), [request.masks.casefold()]]


def _trees(root: Path, listing: Listing) -> Iterator[Path]:
    """Yield each folder that holds ``train`` and ``val``: the root, or those inside it; a tar file is unpacked.

    Raises:
        UserError: there is none.
        BadInput: a tar file with members that would leave its folder.
    """
    place = root
    if root.is_file():
        scratch = Path(listing.resources.enter_context(tempfile.TemporaryDirectory(prefix="dgplugins-")))
        place = scratch / root.name.split(".")[0]
        place.mkdir()
        unpack(root, place, (".png",))
    if not place.is_dir():
        raise UserError(f"{root}: no such folder or tar file.")
    found = [folder for folder in (place, *entries(place)) if all((folder / side).is_dir() for side in SIDES)]
    if not found:
        raise UserError(f"{root}: no folders train and val in it, nor in a folder of it.")
    for tree in [place] if place in found else found:
        others = [path.name for path in entries(tree) if path.name not in SIDES]
        if others:
            listing.warnings.append(f"{tree}: neither train nor val, left out: {', '.join(others)}")
        yield tree


def _patients(folder: Path, names: Sequence[Sequence[str]], listing: Listing) -> dict[str, Slices]:
    """Return the slices of each patient below ``train`` or ``val``; files are paired by patient and slice number."""
    there = {path.name.casefold(): path for path in entries(folder) if path.is_dir()}
    folders = [next((there[name] for name in wanted if name in there), None) for wanted in names]
    for wanted, path in zip(names, folders, strict=True):
        if path is None:
            found = f"no folder {' or '.join(wanted)}; there are {', '.join(sorted(there)) or 'none'}"
            fix = "Name it with --folder MODALITY=FOLDER, or --masks FOLDER."
            listing.troubles.append(Trouble(Problem(str(folder), found, fix=fix)))
    present = [path for path in folders if path is not None]
    if len(present) < len(names):
        return {}
    files = [_numbered(path, listing) for path in present]
    patients: dict[str, Slices] = {}
    for patient in sorted(set().union(*files)):
        numbers = [set(of_folder.get(patient, {})) for of_folder in files]
        for path, own in zip(present, numbers, strict=True):
            missing = sorted(set().union(*numbers) - own)
            if missing:
                listed = ", ".join(f"{patient}_{number}" for number in missing[:5]) + (", ..." if missing[5:] else "")
                _trouble(listing, path, f"no {listed}", patient, "every slice in every folder")
        both = set.intersection(*numbers)
        patients[patient] = {n: tuple(of_folder[patient][n] for of_folder in files) for n in sorted(both)}
    return {patient: slices for patient, slices in patients.items() if slices}


def _numbered(folder: Path, listing: Listing) -> dict[str, dict[int, Path]]:
    """Return patient to slice number to file."""
    found: dict[str, dict[int, Path]] = {}
    for path in entries(folder):
        match = FILE.fullmatch(path.name)
        if match is None:
            listing.warnings.append(f"{path}: not <patient>_<slice>.png, left out")
            continue
        slices = found.setdefault(match["patient"], {})
        other = slices.setdefault(int(match["slice"]), path)
        if other != path:
            _trouble(listing, path, f"the same slice as {other.name}", match["patient"])
    return found


def _differ(one: Slices, two: Slices) -> bool:
    """Return whether a patient's slices in two roots have other numbers or other content."""
    if one.keys() != two.keys():
        return True
    pairs = [pair for number in one for pair in zip(one[number], two[number], strict=True)]
    return not all(filecmp.cmp(first, second, shallow=False) for first, second in pairs)


def _case(patient: str, place: Path, slices: Slices) -> SourceCase:
    *images, masks = zip(*slices.values(), strict=True)
    stacks = tuple(Stack(files) for files in images)
    original = f"{place.parent.name}/{place.name}/{patient}, slices {min(slices)} to {max(slices)}"
    return SourceCase(safe_name(patient), stacks, Stack(masks, mask=True), "", patient, original)


command = make_command(
    FACTS,
    list_cases,
    "Convert trees of PNG slices at ROOT and MORE_ROOTS (folders or tar files): one case per patient, a fold per root.",
    click.argument("more_roots", nargs=-1, type=click.Path(path_type=Path)),
    click.option("--modalities", default=DEFAULT, show_default=True, metavar="A,B,...",
                 help=f"Channels in their order, of {', '.join(MODALITIES)}; folders may be called MR_T1 and so on."),
    click.option("--folder", "folders", multiple=True, metavar="MODALITY=FOLDER",
                 help="Another name of a modality's folder; may be repeated."),
    click.option("--masks", default="GT", show_default=True, metavar="FOLDER", help="Folder of the masks."),
    click.option("--label", "label_name", default="prostate", show_default=True, metavar="NAME",
                 help="What the masks show."),
    click.option("--name", default=FACTS.name, show_default=True, help="Middle of the dataset's name."),
)  # fmt: skip

if __name__ == "__main__":
    run_as_script(command)
