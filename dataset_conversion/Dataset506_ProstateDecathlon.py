"""Prostate MR of the Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022), Task05.

Tree: ``Task05_Prostate/{imagesTr,labelsTr,imagesTs}/prostate_XX.nii.gz``. An image is 4-D, volume 0 T2 and
volume 1 ADC on one grid. Labels hold 1 = peripheral and 2 = transition zone. The images of ``imagesTs`` have no labels.
"""

from __future__ import annotations

import re
from pathlib import Path

from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import Facts, Listing, Request, SourceCase, Trouble, entries, is_volume, stem
from nnunet_dgplugins.errors import Problem, UserError

FACTS = Facts(
    command="prostate-decathlon",
    dataset_id=506,
    name="ProstateDecathlon",
    sites=(),
    channel_names={"0": "T2", "1": "ADC"},
    labels={"background": 0, "prostate": 1},
    mapping={0: 0, 1: 1, 2: 1},
    zone_labels={"background": 0, "PZ": 1, "TZ": 2},
    zone_mapping={0: 0, 1: 1, 2: 2},
    tags=True,
    reference="http://medicaldecathlon.com/",
    licence="CC BY-SA 4.0",
)
FILE = re.compile(r"prostate_(?P<number>\d+)", re.IGNORECASE)
FOLDER = "Task05_Prostate"


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Pair images and labels by number."""
    folder = root / FOLDER if (root / FOLDER).is_dir() else root
    for name in ("imagesTr", "labelsTr"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder}: no folder {name} in it. Name the folder {FOLDER}.")
    images, labels = (_numbered(folder / name, listing) for name in ("imagesTr", "labelsTr"))
    for number in sorted({*images, *labels}):
        name = f"prostate_{number:02d}"
        wrong = _wrong(folder, name, {"imagesTr": images.get(number, []), "labelsTr": labels.get(number, [])})
        if wrong is not None:
            listing.troubles.append(Trouble(wrong, case=name))
            continue
        image, label = images[number][0], labels[number][0]
        original = image.relative_to(root).as_posix()
        listing.cases.append(
            SourceCase(name, (image, image), label, "", name, original, order=(number, ""), volumes=(0, 1))
        )


def _numbered(folder: Path, listing: Listing) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    for path in entries(folder):  # without the ._ files of the archive
        match = FILE.fullmatch(stem(path)) if is_volume(path) else None
        if match is None:
            listing.warnings.append(f"{path}: not prostate_XX.nii.gz, left out")
        else:
            found.setdefault(int(match["number"]), []).append(path)
    return found


def _wrong(folder: Path, name: str, found: dict[str, list[Path]]) -> Problem | None:
    leave_out = f"Leave the case out with --exclude {name}."
    for part, paths in found.items():
        if not paths:
            return Problem(str(folder / part / f"{name}.nii.gz"), "no such file", fix=leave_out)
        if len(paths) > 1:
            listed = " and ".join(path.name for path in paths)
            return Problem(str(folder / part), f"{listed}: two files for one case", "one", leave_out)
    image = found["imagesTr"][0]
    volumes = _count(image)
    if volumes not in (None, 2):
        return Problem(str(image), f"volumes in it: {volumes}", "two, T2 and ADC", leave_out)
    return None


def _count(image: Path) -> int | None:
    """Return how many volumes a file holds; None if it is no NIfTI, which the check of its voxels reports."""
    from dataset_conversion._nifti import Unreadable, count_frames

    try:
        return count_frames(image)
    except Unreadable:
        return None


command = make_command(
    FACTS, list_cases, "Convert Task05 of the Medical Decathlon at ROOT (Task05_Prostate, or the folder above)."
)

if __name__ == "__main__":
    run_as_script(command)
