"""Reads, checks and writes one case. Runs in worker processes, so everything here can be pickled."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_conversion._facts import SourceCase
from nnunet_dgplugins.errors import Problem
from nnunet_dgplugins.files import replacing

GEOMETRY_TOLERANCE = 1e-3  # mm; rounding of headers stays below, one shifted voxel does not
SHEAR_TOLERANCE = 1e-4  # ITK, which nnU-Net reads with, refuses axes that are further from a right angle


@dataclass(frozen=True)
class Recipe:
    """How a case is changed on its way.

    Args:
        mapping: source label value to written label value.
        window: see :class:`dataset_conversion._facts.Facts`; None for cases that are never windowed.
        drop_empty_slices: cut to the slices from the first to the last with organ.
        link: link files that need no change.
    """

    mapping: Mapping[int, int]
    window: tuple[int, int] | None = None
    drop_empty_slices: bool = False
    link: bool = False


@dataclass
class Checked:
    """What is known of a case after every byte of it was read.

    Args:
        name: case id.
        problems: what makes the case unusable.
        warnings: what was put right.
        files: SHA-256 of each source file, images first.
        voxels: SHA-256 of the first image's voxels, the same for two copies of one volume.
        shape: (x, y, z).
        spacing: mm.
        values: label values present, with their voxel counts.
        image_as_is: whether each image can be used without a change.
        label_as_is: whether the label can be used without a change.
        bytes: upper estimate of what is written.
    """

    name: str
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    voxels: str = ""
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    values: dict[int, int] = field(default_factory=dict)
    image_as_is: list[bool] = field(default_factory=list)
    label_as_is: bool = False
    bytes: int = 0


@dataclass
class _Volume:
    """A NIfTI file in memory: image object, 3D array in file units (scaled), affine and what was put right."""

    image: Any
    array: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    sha256: str
    squeezed: bool
    straightened: bool


class _Unreadable(Exception):
    """The file is no volume we can use; the text says why."""


def _read(path: Path) -> _Volume:
    """Read a NIfTI file whatever its ending says.

    Raises:
        _Unreadable: missing, empty, truncated, no NIfTI, or not a 3D volume of real numbers.
    """
    import nibabel

    try:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Unreadable(f"truncated or damaged gzip ({error})") from error
    except OSError as error:
        raise _Unreadable(f"cannot be read ({error.strerror or error})") from error
    try:
        second = len(content) >= 4 and 540 in (int.from_bytes(content[:4], order) for order in ("little", "big"))
        image = (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_bytes(content)
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises many kinds for files that are no NIfTI
        raise _Unreadable(f"not a readable NIfTI volume ({error})") from error
    if array.dtype.kind not in "iufb":
        raise _Unreadable(f"voxels of type {array.dtype}, expected real numbers")
    squeezed = array.ndim > 3 and all(size == 1 for size in array.shape[3:])
    if squeezed:
        array = array.reshape(array.shape[:3])
    if array.ndim != 3:
        raise _Unreadable(f"shape {_sizes(array.shape)}, expected one 3D volume")
    if array.size == 0:
        raise _Unreadable(f"shape {_sizes(array.shape)}, expected voxels")
    affine, straightened = _straight(np.asarray(image.affine, float))
    return _Volume(image, array, affine, sha256, squeezed, straightened)


def _straight(affine: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], bool]:
    """Return the affine with axes at right angles, and whether that took a change.

    Raises:
        _Unreadable: the affine is no geometry at all.
    """
    if not np.isfinite(affine).all() or np.any(np.linalg.norm(affine[:3, :3], axis=0) <= 0):
        raise _Unreadable("the header's geometry has a voxel size that is zero or not a number")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() <= SHEAR_TOLERANCE:
        return affine, False
    left, _, right = np.linalg.svd(axes)
    straight = affine.copy()
    straight[:3, :3] = (left @ right) * spacing  # the nearest rotation
    return straight, True


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "none"


def check_case(case: SourceCase, recipe: Recipe) -> Checked:
    """Read a case completely and say everything that is wrong with it."""
    report = Checked(case.name)
    images = []
    for path in case.images:
        try:
            volume = _read(path)
        except _Unreadable as error:
            report.problems.append(Problem(str(path), str(error), fix="Download or export it again."))
            continue
        images.append(volume)
        _check_image(path, volume, recipe, report)
    try:
        label = _read(case.label)
    except _Unreadable as error:
        report.problems.append(Problem(str(case.label), str(error), fix="Download or export it again."))
        return report
    report.files = [volume.sha256 for volume in (*images, label)]
    values = _check_label(case.label, label, recipe, report)
    if len(images) < len(case.images):
        return report
    first = images[0]
    report.shape, report.spacing = first.array.shape, tuple(np.linalg.norm(first.affine[:3, :3], axis=0).tolist())
    report.voxels = hashlib.sha256(repr(first.array.shape).encode() + first.array.tobytes()).hexdigest()
    for path, volume in [*zip(case.images[1:], images[1:], strict=True), (case.label, label)]:
        if volume.array.shape != first.array.shape:
            found, wanted = _sizes(volume.array.shape), _sizes(first.array.shape)
            report.problems.append(Problem(str(path), f"shape {found}", f"{wanted} as {case.images[0].name}"))
            continue
        distance = _disagreement(first.affine, volume.affine, first.array.shape)
        if distance > GEOMETRY_TOLERANCE:
            report.warnings.append(
                f"{path}: its header disagrees with the image's by up to {distance:.3g} mm; the image's is used"
            )
    _plan(case, images, label, values, recipe, report)
    return report


def _check_image(path: Path, volume: _Volume, recipe: Recipe, report: Checked) -> None:
    if volume.array.dtype.kind == "f":
        bad = int(volume.array.size - np.count_nonzero(np.isfinite(volume.array)))
        if bad:
            report.problems.append(Problem(str(path), f"{bad} voxels are NaN or infinite", "finite numbers"))
    if volume.squeezed:
        report.warnings.append(f"{path}: 4D with a single volume, written as 3D")
    if volume.straightened:
        report.warnings.append(f"{path}: axes not at right angles, refused by nnU-Net's reader; nearest rotation used")
    if _windowed(volume.array, recipe):
        report.warnings.append(f"{path}: Hounsfield units, windowed to {recipe.window}")


def _windowed(array: npt.NDArray[Any], recipe: Recipe) -> bool:
    # air is -1000 HU; volumes that somebody windowed or normalised already never reach below the window
    return recipe.window is not None and float(array.min()) < recipe.window[0]


def _check_label(path: Path, label: _Volume, recipe: Recipe, report: Checked) -> npt.NDArray[np.int64]:
    """Return the label's values, rounded; anything that is no known whole number becomes a problem."""
    array = label.array
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            report.problems.append(Problem(str(path), f"{bad} label voxels are NaN or infinite", "whole numbers"))
            return np.zeros(array.shape, np.int64)
        odd = np.abs(array - np.rint(array)) > 1e-3  # scale factors leave 0.99999997
        if odd.any():
            examples = ", ".join(f"{value:g}" for value in np.unique(array[odd])[:3])
            report.problems.append(
                Problem(
                    str(path), f"{int(odd.sum())} label voxels are no whole numbers ({examples} ...)", "whole numbers",
                    "It was resampled with interpolation: resample it again with nearest neighbour.",
                )
            )  # fmt: skip
            return np.zeros(array.shape, np.int64)
    values = np.rint(array).astype(np.int64)
    found, counts = np.unique(values, return_counts=True)
    report.values = dict(zip(found.tolist(), counts.tolist(), strict=True))
    unknown = [value for value in report.values if value not in recipe.mapping]
    if unknown:
        seen = ", ".join(f"{value} ({report.values[value]} voxels)" for value in unknown[:5])
        known = ", ".join(map(str, sorted(recipe.mapping)))
        report.problems.append(Problem(str(path), f"unknown label value {seen}", known))
    elif not any(recipe.mapping[value] for value in report.values):
        report.warnings.append(f"{path}: no organ is marked in it")
    return values


def _disagreement(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return the largest distance in mm between where two headers place the volume's corners."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())


def _plan(
    case: SourceCase,
    images: list[_Volume],
    label: _Volume,
    values: npt.NDArray[np.int64],
    recipe: Recipe,
    report: Checked,
) -> None:
    """Decide which files can be used as they are, and estimate the bytes."""
    cut = slice(None)
    if recipe.drop_empty_slices and values.shape == images[0].array.shape:
        cut = organ_range(values)
    whole = cut in (slice(None), slice(0, images[0].array.shape[2]))
    if recipe.drop_empty_slices and not any(report.values.get(value) for value in recipe.mapping if value):
        report.problems.append(Problem(str(case.label), "no organ, so every slice would be dropped"))
    for path, volume in zip(case.images, images, strict=True):
        same_grid = np.array_equal(volume.affine, images[0].affine)
        as_is = whole and same_grid and not (volume.squeezed or volume.straightened or _windowed(volume.array, recipe))
        as_is = as_is and path.name.lower().endswith(".nii.gz")
        report.image_as_is.append(as_is)
        if not (as_is and recipe.link):
            report.bytes += path.stat().st_size if as_is else volume.array.nbytes
    report.label_as_is = (
        report.image_as_is[0]
        and case.label.name.lower().endswith(".nii.gz")
        and label.array.dtype.kind in "iu"
        and not label.squeezed
        and all(recipe.mapping.get(value) == value for value in report.values)
        and np.array_equal(label.affine, images[0].affine)
        and all(label.image.header[code] == images[0].image.header[code] for code in ("qform_code", "sform_code"))
    )
    if not (report.label_as_is and recipe.link):
        report.bytes += label.array.size // 8  # masks compress well


def organ_range(label: npt.NDArray[Any]) -> slice:
    """Return the slices from the first to the last with organ; gaps between them stay, or the geometry would lie."""
    marked = np.flatnonzero(label.any(axis=(0, 1)))
    return slice(int(marked[0]), int(marked[-1]) + 1) if marked.size else slice(None)


def write_case(case: SourceCase, recipe: Recipe, checked: Checked, folder: Path, part: str) -> None:
    """Write one case's images and label; files that are there already are left as they are.

    Args:
        case: the case.
        recipe: what to change.
        checked: result of :func:`check_case` for the same recipe.
        folder: dataset folder.
        part: ``Tr`` or ``Ts``.
    """
    image_paths = [folder / f"images{part}" / f"{case.name}_{i:04d}.nii.gz" for i in range(len(case.images))]
    label_path = folder / f"labels{part}" / f"{case.name}.nii.gz"
    need_label = not label_path.exists() and not (checked.label_as_is and recipe.link)
    need_volumes = need_label or any(
        not path.exists() and not as_is for path, as_is in zip(image_paths, checked.image_as_is, strict=True)
    )
    volumes = [_read(path) for path in case.images] if need_volumes else []
    label = _read(case.label) if need_volumes else None
    cut = organ_range(label.array) if label is not None and recipe.drop_empty_slices else slice(None)
    for index, (source, target) in enumerate(zip(case.images, image_paths, strict=True)):
        if target.exists():
            continue
        if checked.image_as_is[index]:
            _take(source, target, recipe.link)
            continue
        volume = volumes[index]
        array = volume.array[:, :, cut]
        if recipe.window is not None and _windowed(volume.array, recipe):
            array = np.clip(array, *recipe.window)
        _save(target, array, volumes[0], cut)
    if label_path.exists():
        return
    if label is None:
        _take(case.label, label_path, link=True)
        return
    mapped = np.zeros(label.array.shape, np.uint8)
    for source_value, value in recipe.mapping.items():
        mapped[np.abs(label.array - source_value) <= 1e-3] = value
    _save(label_path, mapped[:, :, cut], volumes[0], cut)


def _take(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        relative = os.path.relpath(source.resolve(), target.parent.resolve())
        os.symlink(relative, target)
        return
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def _save(target: Path, array: npt.NDArray[Any], geometry: _Volume, cut: slice) -> None:
    """Write an array on the grid of ``geometry``; image and label go this way, so their headers agree to the bit."""
    import nibabel

    affine = geometry.affine.copy()
    affine[:3, 3] += affine[:3, 2] * (cut.start or 0)
    header = geometry.image.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0  # display range of the source, wrong for a mask
    header.set_slope_inter(1, 0)
    image = type(geometry.image)(array, affine, header)
    with replacing(target) as temporary:
        nibabel.save(image, temporary)  # nibabel writes gzip without name and time: same input, same bytes
