"""Tiny trees of M&Ms and of the Spinal Cord Grey Matter Challenge in the true layouts, with what is odd about them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from trees import AFFINE, save

VENDORS = {"A": "Siemens", "B": "Philips", "C": "GE", "D": "Canon"}
HEADER = ("", "External code", "VendorName", "Vendor", "Centre", "ED", "ES", "Age", "Pathology")
SERIES = (10, 12, 3, 8)  # x, y, slices, frames
CINE = np.array([[1.2, 0, 0, 5], [0, 1.2, 0, 7], [0, 0, 9.6, -30], [0, 0, 0, 1.0]])


def heart(frame: int, dtype: type = np.uint8) -> np.ndarray:
    """LV 1, MYO 2, RV 3 of one frame; its place depends on the frame."""
    mask = np.zeros(SERIES[:3], dtype)
    x = 1 + frame % 4
    mask[x : x + 2, 2:5], mask[x : x + 2, 5:7], mask[x : x + 2, 7:10] = 1, 2, 3
    return mask


def cine(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, SERIES).astype(np.int16)


def patient(
    folder: Path,
    seed: int,
    frames: Sequence[int] | None = (0, 5),
    affine: np.ndarray = CINE,
    dtype: type = np.uint8,
) -> None:
    """A patient's folder; masks in the given frames, or no mask file at all."""
    code = folder.name
    save(folder / f"{code}_sa.nii.gz", cine(seed), affine)
    if frames is not None:
        mask = np.zeros(SERIES, dtype)
        for frame in frames:
            mask[..., frame] = heart(frame)
        save(folder / f"{code}_sa_gt.nii.gz", mask, affine)


def mnms(root: Path, name: str = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv") -> Path:
    """Eleven patients: A 3, B 2 + 1 at two centres, C 2 and one without masks, D 2. ED is later than ES at B."""
    rows, seed = [], 0
    for vendor, centre, part, codes in (
        ("A", 1, "Training/Labeled", ("A0A0A1", "A0A0A2")),
        ("A", 1, "Testing", ("A0A0A3",)),
        ("B", 2, "Training/Labeled", ("B0A0A1", "B0A0A3")),
        ("B", 3, "Validation", ("B0A0A2",)),
        ("C", 4, "Testing", ("C0A0A1", "C0A0A2")),
        ("C", 4, "Training/Unlabeled", ("C0A0A9",)),
        ("D", 5, "Testing", ("D0A0A1", "D0A0A2")),
    ):
        for code in codes:
            seed += 1
            annotated = "Unlabeled" not in part
            ed, es = ((7, 3) if vendor == "B" else (0, 5)) if annotated else (0, 0)
            folder = root / part / code
            patient(folder, seed, (ed, es) if annotated else None, dtype=np.float32 if vendor == "C" else np.uint8)
            rows.append([seed, code, VENDORS[vendor], vendor, centre, ed, es, 50, "NOR"])
    write_table(root / name, rows)
    return root


def write_table(path: Path, rows: list[list[object]], header: Sequence[str] = HEADER, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def read_rows(path: Path) -> list[list[str]]:
    """The table's lines below its header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


CORD = (14, 15, 3)
TRAIN, TEST = "training-data-gm-sc-challenge-ismrm16-v20160302b", "test-data-gm-sc-challenge-ismrm16-v20160401"


def rater(number: int) -> np.ndarray:
    """One rater's mask: grey 1 in white 2; each rater sees a part that the others do not."""
    mask = np.zeros(CORD, np.uint8)
    mask[3:11, 3:11] = 2
    mask[5:9, 5:9] = 1
    mask[12, number] = 2  # one rater only: never in the result
    mask[3, 3 : 3 + number] = 0  # cord of voxel (3, 3): no rater, (3, 4): rater 1, (3, 5): 2, (3, 6): 3
    mask[9, 5 : 5 + number] = 1  # grey at (9, 5): all four, (9, 6): three, (9, 7): two, (9, 8): one
    return mask


def scgm(root: Path, subjects: int = 3) -> Path:
    """Four sites with annotated subjects from sc01 and one test subject, sc11, each."""
    for site in range(1, 5):
        for number in [*range(1, subjects + 1), 11]:
            folder = root / (TRAIN if number <= 10 else TEST)
            plain = f"site{site}-sc{number:02d}"
            voxels = np.random.default_rng(100 * site + number).random(CORD).astype(np.float32)
            save(folder / f"{plain}-image.nii.gz", voxels, AFFINE)
            (folder / f"{plain}-levels.txt").write_text("0,C3")
            for index in range(1, 5) if number <= 10 else ():
                save(folder / f"{plain}-mask-r{index}.nii.gz", rater(index), AFFINE)
    (root / TRAIN / "license.txt").write_text("terms")
    return root
