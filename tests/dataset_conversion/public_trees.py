"""Tiny trees in the layouts of NCI-ISBI 2013, I2CVB and PROMISE12; DICOM is written by SimpleITK."""

from __future__ import annotations

import locale
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE = (10, 12, 6)  # x, y, slices
SPACING = (0.6, 0.6, 3.5)
ORIGIN = (-20.0, 15.0, -40.0)
# slices tilted about the first axis, as prostate protocols have it
TILTED = (1.0, 0.0, 0.0, 0.0, 0.96, 0.28, 0.0, -0.28, 0.96)


def scan(seed: int, shape: tuple[int, int, int] = SHAPE) -> sitk.Image:
    """An oblique image, in ITK's axes."""
    return placed(np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16))


def placed(array: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(TILTED)
    return image


def gland(values: tuple[int, ...] = (1,), shape: tuple[int, int, int] = SHAPE) -> sitk.Image:
    """A gland in slices 1 to 4, no side of it like another, zones one above the other."""
    array = np.zeros(shape, np.uint8)
    for index, value in enumerate(values):
        array[2:6, 3 + 3 * index : 6 + 3 * index, 1:5] = value
    array[2, 3, 1] = 0
    array[6, 4, 2] = values[0]
    return placed(array)


def write_dicom(
    folder: Path,
    image: sitk.Image,
    uid: str = "1.2.3",
    description: str = "t2_tse_tra",
    pattern: str = "IM{:03d}.dcm",
    shear: float = 0.0,
) -> list[Path]:
    """Write a series, one file per slice from below; ``shear`` shifts each slice by so many mm along a row."""
    folder.mkdir(parents=True, exist_ok=True)
    spoken = locale.setlocale(locale.LC_ALL)  # the writer leaves C behind, and other tests could not read their texts
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    direction = np.array(image.GetDirection()).reshape(3, 3)
    paths = []
    for index in range(image.GetSize()[2]):
        piece = image[:, :, index]
        position = np.array(image.TransformIndexToPhysicalPoint((0, 0, index))) + shear * index * direction[:, 0]
        tags = {
            "0008|0060": "MR",
            "0008|0018": f"{uid}.{index + 1}",
            "0020|000d": "1.2",
            "0020|000e": uid,
            "0020|0013": str(index + 1),
            "0008|103e": description,
            "0020|0032": "\\".join(f"{value:.10g}" for value in position),
            "0020|0037": "\\".join(f"{value:.10g}" for value in (*direction[:, 0], *direction[:, 1])),
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        path = folder / pattern.format(index)
        plain = path.with_name(f"{path.name}.dcm")
        writer.SetFileName(str(plain))
        writer.Execute(piece)
        locale.setlocale(locale.LC_ALL, spoken)
        paths.append(plain.rename(path))
    return paths


def write(path: Path, image: sitk.Image, packed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), packed)
    return path


def nci_isbi(root: Path) -> Path:
    """Two subjects of each hospital; masks with zones."""
    for hospital, collection in (("Prostate3T", "Prostate-3T"), ("ProstateDx", "PROSTATE-DIAGNOSIS")):
        for number in (1, 2):
            subject = f"{hospital}-01-{number:04d}"
            write_dicom(root / collection / subject / "study" / "3-T2", scan(number + 10 * (hospital == "ProstateDx")))
            challenge = root / "NCI-ISBI 2013 Prostate Challenge - Training" / "Training"
            write(challenge / f"{subject}.nrrd", gland((1, 2)), packed=True)
    return root


def i2cvb(root: Path) -> Path:
    """Two patients of the Siemens, one of the GE; masks 0 and 255."""
    for number, (vendor, patient) in enumerate((("Siemens", 383), ("Siemens", 90), ("GE", 383))):
        folder = root / vendor / f"Patient {patient}"
        write_dicom(folder / "T2W", scan(20 + number))
        write_dicom(folder / "GT" / "prostate", gland() * 255, uid="1.2.9", description="prostate")
    return root


def promise12(root: Path, count: int = 4) -> Path:
    for number in range(count):
        folder = root / f"TrainingData_Part{1 + number // 2}"
        write(folder / f"Case{number:02d}.mhd", scan(30 + number))
        write(folder / f"Case{number:02d}_segmentation.mhd", sitk.Cast(gland(), sitk.sitkInt8))
    return root
