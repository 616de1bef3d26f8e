"""Tiny trees of the weak datasets' sources in the true layouts; every mask has slices with and without foreground."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from trees import AFFINE, SHAPE, image, save
from trees import convert as convert_any
from trees import refused as refused_any

TAGS = [0, 1, 1, 0, 0]  # of every mask below
IDS = ("BraTS19_CBICA_AAP_1", "BraTS19_TMC_06290_1", "BraTS19_TCIA02_117_1", "BraTS19_2013_10_1")


def mask(values: Sequence[int] = (1,), shift: int = 0) -> np.ndarray:
    """The values side by side in slices 1 and 2 of 5; another shift has other voxels and the same tags."""
    array = np.zeros(SHAPE, np.uint8)
    for index, value in enumerate(values):
        array[2 + 2 * index : 4 + 2 * index, 4 + shift : 9, 1:3] = value
    return array


def brats(root: Path, high: int = 6, low: int = 4, shift: int = 0, ending: str = ".nii.gz") -> Path:
    """High- and low-grade patients of four centres with all modalities; two tables beside the grades."""
    for grade, count in (("HGG", high), ("LGG", low)):
        for number in range(count):
            name = [*IDS, *(f"BraTS19_TMC_{extra}_1" for extra in range(4, count))][number]
            name = name if grade == "HGG" else name.replace("BraTS19_", "BraTS19_TCIA09_")
            brats_patient(root / grade / name, 100 * (grade == "LGG") + 10 * number, shift, ending)
    (root / "name_mapping.csv").write_text("Grade,BraTS_2019_subject_ID\n")
    (root / "survival_data.csv").write_text("BraTS19ID,Age,Survival\n")
    return root


def brats_patient(folder: Path, seed: int, shift: int = 0, ending: str = ".nii.gz") -> None:
    for index, suffix in enumerate(("t1", "t1ce", "t2", "flair")):
        save(folder / f"{folder.name}_{suffix}{ending}", image(seed + index), AFFINE)
    save(folder / f"{folder.name}_seg{ending}", mask((1, 2, 4), shift), AFFINE)


def decathlon(root: Path, cases: int = 6, shift: int = 0) -> Path:
    """Numbers with gaps, test images without masks, and what archives of a Mac add."""
    for number in [*range(0, 2 * cases, 2), 3]:
        part = "Ts" if number == 3 else "Tr"
        both = np.stack([image(number), image(1000 + number)], axis=-1)
        save(root / f"images{part}" / f"prostate_{number:02d}.nii.gz", both, AFFINE)
        if part == "Tr":
            save(root / "labelsTr" / f"prostate_{number:02d}.nii.gz", mask((1, 2), shift), AFFINE)
    for part in ("imagesTr", "labelsTr"):
        (root / part / "._prostate_00.nii.gz").write_bytes(b"Mac OS X")
    (root / "dataset.json").write_text("{}")
    return root


def slice_patient(
    folder: Path, patient: str, seed: int, names: Sequence[str] = ("T2", "ADC"), shift: int = 0, masks: str = "GT"
) -> None:
    """Slices 8 to 12, unpadded: as text, 10 comes before 8. Masks hold 0 and 255."""
    for index in range(SHAPE[2]):
        for channel, name in enumerate(names):
            picture(folder / name / f"{patient}_{index + 8}.png", image(seed + channel)[..., index] % 256)
        picture(folder / masks / f"{patient}_{index + 8}.png", 255 * mask(shift=shift)[..., index])


def picture(path: Path, array: np.ndarray) -> None:
    """Write an (x, y) array as a grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.T.astype(np.uint8)).save(path)


def slice_roots(root: Path, folds: int = 3, shift: int = 0) -> list[Path]:
    """``prostate_data_1`` and so on: every patient is in every root, and validates in one."""
    patients = [f"case_{number}" for number in range(folds + 1)]
    for fold in range(folds):
        for number, patient in enumerate(patients):
            side = "val" if number % folds == fold else "train"
            slice_patient(root / f"prostate_data_{fold + 1}" / side, patient, 10 * number, shift=shift)
    return [root / f"prostate_data_{fold + 1}" for fold in range(folds)]


def tar(folder: Path, ending: str = ".tar") -> Path:
    """Pack a folder under its own name."""
    path = folder.with_name(folder.name + ending)
    with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as file:
        file.add(folder, folder.name)
    return path


def convert(module: ModuleType, root: Path, **options: object) -> Path:
    return convert_any(module, root, **{"sources": (), "supervision": "tags", **options})


def refused(module: ModuleType, root: Path, **options: object) -> str:
    return str(refused_any(module, root, **{"sources": (), "supervision": "tags", **options}))


def names(folder: Path) -> list[str]:
    """Cases of a folder of labels."""
    return sorted(path.name[: -len(".nii.gz")] for path in folder.iterdir()) if folder.is_dir() else []
