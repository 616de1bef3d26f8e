"""Reads, checks and writes one case. Runs in worker processes, so everything here can be pickled."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_conversion._facts import Raters, SourceCase
from dataset_conversion._nifti import Unreadable, Volume, read_volume, sizes
from nnunet_dgplugins.errors import Problem
from nnunet_dgplugins.files import replacing

GEOMETRY_TOLERANCE = 1e-3  # mm; rounding of headers stays below, one shifted voxel does not


@dataclass(frozen=True)
class Recipe:
    """How a case is changed on its way.

    Args:
        mapping: source label value to written label value.
        window: see :class:`dataset_conversion._facts.Facts`; None for cases that are never windowed.
        drop_empty_slices: cut to the slices from the first to the last with organ.
        link: link files that need no change.
        ignore: value that fills the label of a case without annotation.
        raters: how several masks become one label; None for one mask.
    """

    mapping: Mapping[int, int]
    window: tuple[int, int] | None = None
    drop_empty_slices: bool = False
    link: bool = False
    ignore: int = 0
    raters: Raters | None = None


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


def check_case(case: SourceCase, recipe: Recipe) -> Checked:
    """Read a case completely and say everything that is wrong with it; of an unlabelled case no mask is opened."""
    report = Checked(case.name)
    images = _read_all(case.images, case.frame, report)
    for path, volume in images.items():
        _check_image(path, volume, recipe, report)
    masks = _read_all(case.masks, case.frame, report)
    report.files = [volume.sha256 for volume in (*images.values(), *masks.values())]
    fused = None
    if len(masks) < len(case.masks):
        return report
    checked = [_check_label(path, mask, recipe, report) for path, mask in masks.items()]
    rounded = [values for values in checked if values is not None]
    if len(rounded) == len(checked) and len({values.shape for values in rounded}) == 1:
        fused = recipe.raters.fuse(rounded) if recipe.raters else rounded[0]
        _count_label(case, fused, recipe, report)
    if len(images) < len(case.images):
        return report
    first = images[case.images[0]]
    report.shape, report.spacing = first.array.shape, tuple(np.linalg.norm(first.affine[:3, :3], axis=0).tolist())
    report.voxels = hashlib.sha256(repr(first.array.shape).encode() + first.array.tobytes()).hexdigest()
    for path, volume in [*list(images.items())[1:], *masks.items()]:
        if volume.array.shape != first.array.shape:
            found, wanted = sizes(volume.array.shape), sizes(first.array.shape)
            report.problems.append(Problem(str(path), f"shape {found}", f"{wanted} as {case.images[0].name}"))
            continue
        distance = _disagreement(first.affine, volume.affine, first.array.shape)
        if distance > GEOMETRY_TOLERANCE:
            report.warnings.append(
                f"{path}: its header disagrees with the image's by up to {distance:.3g} mm; the image's is used"
            )
    _plan(case, list(images.values()), list(masks.values()), fused, recipe, report)
    return report


def _read_all(paths: Sequence[Path], frame: int | None, report: Checked) -> dict[Path, Volume]:
    """Read files; those that cannot be read become problems and are left out."""
    volumes = {}
    for path in paths:
        try:
            volumes[path] = read_volume(path, frame)
        except Unreadable as error:
            report.problems.append(Problem(str(path), str(error), fix="Download or export it again."))
    return volumes


def _check_image(path: Path, volume: Volume, recipe: Recipe, report: Checked) -> None:
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


def _check_label(path: Path, label: Volume, recipe: Recipe, report: Checked) -> npt.NDArray[np.int64] | None:
    """Return the label's values, rounded, None if they are no whole numbers; unknown ones become a problem too."""
    array = label.array
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            report.problems.append(Problem(str(path), f"{bad} label voxels are NaN or infinite", "whole numbers"))
            return None
        odd = np.abs(array - np.rint(array)) > 1e-3  # scale factors leave 0.99999997
        if odd.any():
            examples = ", ".join(f"{value:g}" for value in np.unique(array[odd])[:3])
            report.problems.append(
                Problem(
                    str(path), f"{int(odd.sum())} label voxels are no whole numbers ({examples} ...)", "whole numbers",
                    "It was resampled with interpolation: resample it again with nearest neighbour.",
                )
            )  # fmt: skip
            return None
    values = np.rint(array).astype(np.int64)
    present = _count(values)
    unknown = [value for value in present if value not in recipe.mapping]
    if unknown:
        seen = ", ".join(f"{value} ({present[value]} voxels)" for value in unknown[:5])
        known = ", ".join(map(str, sorted(recipe.mapping)))
        report.problems.append(Problem(str(path), f"unknown label value {seen}", known))
    return values


def _count(values: npt.NDArray[np.integer]) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _count_label(case: SourceCase, label: npt.NDArray[np.integer], recipe: Recipe, report: Checked) -> None:
    """Note the values of the label as it is going to be, and what is suspicious about it."""
    report.values = _count(label)
    if recipe.raters and 0 < len(case.masks) < recipe.raters.count:
        report.warnings.append(
            f"{case.label}: {len(case.masks)} of {recipe.raters.count} raters; those there are decide"
        )
    if any(recipe.mapping.get(value, value) for value in report.values):
        return
    if case.frame is None:
        report.warnings.append(f"{case.label}: no organ is marked in it")
    else:  # a table that is off by one would teach the network that there is no heart
        fix = f"Correct the frame in the table, or leave the case out with --exclude {case.name}."
        report.problems.append(Problem(str(case.label), f"no organ is marked in frame {case.frame}", fix=fix))


def _disagreement(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return the largest distance in mm between where two headers place the volume's corners."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())


def _plan(
    case: SourceCase,
    images: list[Volume],
    masks: list[Volume],
    label: npt.NDArray[np.integer] | None,
    recipe: Recipe,
    report: Checked,
) -> None:
    """Decide which files can be used as they are, and estimate the bytes."""
    cut, organ = slice(None), [value for value, written in recipe.mapping.items() if written]
    if recipe.drop_empty_slices and label is not None and label.shape == images[0].array.shape:
        cut = organ_range(np.isin(label, organ))
    whole = cut in (slice(None), slice(0, images[0].array.shape[2]))
    if recipe.drop_empty_slices and masks and not any(report.values.get(value) for value in organ):
        report.problems.append(Problem(str(case.label), "no organ, so every slice would be dropped"))
    for path, volume in zip(case.images, images, strict=True):
        same_grid = np.array_equal(volume.affine, images[0].affine)
        as_is = whole and same_grid and not (volume.squeezed or volume.straightened or _windowed(volume.array, recipe))
        as_is = as_is and case.frame is None and path.name.lower().endswith(".nii.gz")
        report.image_as_is.append(as_is)
        if not (as_is and recipe.link):
            report.bytes += path.stat().st_size if as_is else volume.array.nbytes
    report.label_as_is = (
        report.image_as_is[0]
        and len(masks) == 1
        and recipe.raters is None
        and case.masks[0].name.lower().endswith(".nii.gz")
        and masks[0].array.dtype.kind in "iu"
        and not masks[0].squeezed
        and all(recipe.mapping.get(value) == value for value in report.values)
        and np.array_equal(masks[0].affine, images[0].affine)
        and all(masks[0].image.header[code] == images[0].image.header[code] for code in ("qform_code", "sform_code"))
    )
    if not (report.label_as_is and recipe.link):
        report.bytes += images[0].array.size // 8  # masks compress well


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
    volumes = [read_volume(path, case.frame) for path in case.images] if need_volumes else []
    label = _label(case, recipe, volumes[0].array.shape) if need_volumes else None
    cut = organ_range(label) if label is not None and case.masks and recipe.drop_empty_slices else slice(None)
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
        _take(case.masks[0], label_path, link=True)
        return
    _save(label_path, label[:, :, cut], volumes[0], cut)


def _label(case: SourceCase, recipe: Recipe, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return the label to write: mapped, fused from several raters, or filled with the ignore value."""
    if not case.masks:
        return np.full(shape, recipe.ignore, np.uint8)
    arrays = [read_volume(path, case.frame).array for path in case.masks]
    array = arrays[0]
    if recipe.raters:
        array = recipe.raters.fuse([np.rint(values).astype(np.int64) for values in arrays])
    mapped = np.zeros(array.shape, np.uint8)
    for source_value, value in recipe.mapping.items():
        mapped[np.abs(array - source_value) <= 1e-3] = value
    return mapped


def _take(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        relative = os.path.relpath(source.resolve(), target.parent.resolve())
        os.symlink(relative, target)
        return
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def _save(target: Path, array: npt.NDArray[Any], geometry: Volume, cut: slice) -> None:
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
