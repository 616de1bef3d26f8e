"""Finds the DICOM series below a folder and puts the slices of one in order, by their headers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_conversion._folders import walk
from dataset_conversion._nifti import Unreadable, sizes

SERIES, DESCRIPTION, POSITION, ORIENTATION = "0020|000e", "0008|103e", "0020|0032", "0020|0037"
SAME_PLACE = 0.01  # mm; scanners write positions to a thousandth
UNEVEN = 0.1  # of the distance between slices; rounded headers stay far below, a missing slice does not
NOT_AXIAL = re.compile(r"(?<![a-z])(cor|sag)", re.IGNORECASE)


@dataclass(frozen=True)
class Slice:
    """What the header of one file says.

    Args:
        path: the file.
        series: UID of its series.
        description: what the scanner called the series.
        position: centre of the first voxel in mm (x to the left, y to the back, z up).
        orientation: directions of a row and of a column, six numbers.
        shape: columns, rows.
        spacing: mm between columns and between rows.
        kind: SimpleITK's number of the voxel type once the file's scale factor is applied.
    """

    path: Path
    series: str
    description: str
    position: npt.NDArray[np.float64]
    orientation: npt.NDArray[np.float64]
    shape: tuple[int, int]
    spacing: tuple[float, float]
    kind: int


@dataclass(frozen=True)
class Series:
    """One series: its files in the order of their names, and what the scanner called it."""

    files: tuple[Path, ...]
    description: str

    def __str__(self) -> str:
        called = f"'{self.description}'" if self.description else "without description"
        return f"{self.files[0].parent.name} ({called}, {len(self.files)} files)"


def is_dicom(path: Path) -> bool:
    """Return whether a file starts as DICOM files do, or says by its name that it is one.

    Raises:
        Unreadable: it cannot be opened.
    """
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error})") from error


def find_series(folder: Path) -> list[Series]:
    """Return the series below a folder, by folder and UID; several may share a folder, or one have several copies.

    Raises:
        Unreadable: a DICOM file cannot be read.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    names: dict[tuple[str, str], str] = {}
    for place, _, files in walk(folder):
        for name in files:
            path = place / name
            if name.upper() == "DICOMDIR" or not is_dicom(path):
                continue
            reader = _header(path)
            key = (str(place), _text(reader, SERIES))
            found.setdefault(key, []).append(path)
            names.setdefault(key, _text(reader, DESCRIPTION))
    return [Series(tuple(paths), names[key]) for key, paths in found.items()]


def axial_t2(series: Sequence[Series]) -> Series | None:
    """Return the one series that can be the axial T2, None if that is not clear from folders and descriptions."""
    if len(series) == 1:
        return series[0]

    def named(one: Series) -> str:
        return f"{one.files[0].parent.name} {one.description}"

    fitting = [one for one in series if "t2" in named(one).casefold() and not NOT_AXIAL.search(named(one))]
    return fitting[0] if len(fitting) == 1 else None


def in_order(files: Sequence[Path]) -> tuple[list[Path], npt.NDArray[np.float64], list[str]]:
    """Return the slices of a series from below, the affine of voxels to mm (DICOM's axes), and what was put right.

    Copies of a slice are dropped. The third axis is the true way from slice to slice, also where the gantry was tilted.

    Raises:
        Unreadable: several series or orientations, slices that are missing or differ in size, two images of one place.
    """
    slices = [_slice(path) for path in files]
    first = slices[0]
    for other in slices[1:]:
        if other.series != first.series:
            raise Unreadable(f"several series in one: {first.path.name} and {other.path.name} have different UIDs")
        if other.shape != first.shape:
            found, wanted = sizes(other.shape), sizes(first.shape)
            raise Unreadable(f"{other.path.name} has {found} pixels, {first.path.name} has {wanted}")
        if np.abs(other.orientation - first.orientation).max() > 1e-3 or not np.allclose(other.spacing, first.spacing):
            raise Unreadable(f"{other.path.name} has another orientation or pixel size than {first.path.name}")
        if other.kind != first.kind:  # SimpleITK would squeeze all slices into the type of the first
            raise Unreadable(f"{other.path.name} has another voxel type or kind of scale factor than {first.path.name}")
    row, column = first.orientation[:3], first.orientation[3:]
    normal = np.cross(row, column)
    slices.sort(key=lambda one: (float(normal @ one.position), one.path.name))
    kept, notes = _without_copies(slices)
    step = _step(kept, normal)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * first.spacing[0], column * first.spacing[1], step
    affine[:3, 3] = kept[0].position
    return [one.path for one in kept], affine, notes


def _without_copies(slices: list[Slice]) -> tuple[list[Slice], list[str]]:
    """Return the slices without second copies of one, which some downloads hold."""
    kept, copies = slices[:1], []
    for one in slices[1:]:
        if np.linalg.norm(one.position - kept[-1].position) > SAME_PLACE:
            kept.append(one)
        elif np.array_equal(_pixels(one.path), _pixels(kept[-1].path)):
            copies.append(one.path.name)
        else:
            raise Unreadable(f"{kept[-1].path.name} and {one.path.name} show one place in two ways (two acquisitions?)")
    return kept, [f"copies of slices left out: {', '.join(copies)}"] if copies else []


def _step(slices: Sequence[Slice], normal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the way from each slice to the next in mm.

    Raises:
        Unreadable: it is not the same all through, or there is one slice only.
    """
    if len(slices) < 2:
        raise Unreadable("a single slice, whose thickness is not known")
    places = np.array([one.position for one in slices])
    steps = np.diff(places, axis=0)
    usual = np.median(steps, axis=0)
    distance = float(np.linalg.norm(usual))
    odd = np.flatnonzero(np.linalg.norm(steps - usual, axis=1) > UNEVEN * distance)
    if odd.size:
        below, above = slices[odd[0]], slices[odd[0] + 1]
        gap = float(np.linalg.norm(steps[odd[0]]))
        what = "a slice is missing" if gap > (2 - 2 * UNEVEN) * distance else "slices are not evenly spaced"
        where = f"between {below.path.name} and {above.path.name}"
        raise Unreadable(f"{what} {where}: {gap:.4g} mm, {distance:.4g} mm elsewhere")
    mean: npt.NDArray[np.float64] = (places[-1] - places[0]) / (len(places) - 1)
    if normal @ mean < 0.5 * distance:
        raise Unreadable("slices lie beside each other, not above each other")
    return mean


def _slice(path: Path) -> Slice:
    reader = _header(path)
    size = reader.GetSize()
    if len(size) > 2 and size[2] != 1:
        raise Unreadable(f"{path.name} holds {size[2]} frames, expected one slice per file")
    numbers = {}
    for tag, what, count in ((POSITION, "position", 3), (ORIENTATION, "orientation", 6)):
        try:
            numbers[tag] = np.array([float(part) for part in _text(reader, tag).split("\\")])
        except ValueError:
            numbers[tag] = np.zeros(0)
        if numbers[tag].size != count or not np.isfinite(numbers[tag]).all():
            raise Unreadable(f"{path.name} does not say its {what} in the patient ({tag.replace('|', ',')})")
    spacing = reader.GetSpacing()
    row, column = (part / (np.linalg.norm(part) or 1) for part in np.split(numbers[ORIENTATION], 2))
    return Slice(
        path=path,
        series=_text(reader, SERIES),
        description=_text(reader, DESCRIPTION),
        position=numbers[POSITION],
        orientation=np.concatenate([row, column]),
        shape=(size[0], size[1]),
        spacing=(spacing[0], spacing[1]),
        kind=reader.GetPixelID(),
    )


def _header(path: Path) -> Any:
    """Return a reader that has read a file's header.

    Raises:
        Unreadable: it is no DICOM file.
    """
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise Unreadable(f"{path.name} is no readable DICOM file") from error
    return reader


def _text(reader: Any, tag: str) -> str:
    return str(reader.GetMetaData(tag)).strip().strip("\0") if reader.HasMetaDataKey(tag) else ""


def _pixels(path: Path) -> npt.NDArray[Any]:
    import SimpleITK

    try:
        return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))
    except RuntimeError as error:
        raise Unreadable(f"{path.name} is a damaged DICOM file") from error
