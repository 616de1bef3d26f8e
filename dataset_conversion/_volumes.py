"""Reads, checks and writes one case. Runs in worker processes, so everything here can be pickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_conversion._facts import Raters, SourceCase
from dataset_conversion._nifti import Unreadable, Volume, disagreement, read_volume, sizes
from dataset_conversion._scans import put_on_grid, read_scan
from dataset_conversion._slices import read_arrays, read_stack
from dataset_conversion._sources import Arrays, Scan, Source, Stack
from nnunet_dgplugins.errors import Problem
from nnunet_dgplugins.files import VALIDATION_MASKS, replacing, take

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
        min_pixels: foreground pixels of a slice that make its tag positive; 0 where no tags are wanted.
        neighbours: write the one image as three channels, slice z-1, z and z+1, the edge slices repeated.
    """

    mapping: Mapping[int, int]
    window: tuple[int, int] | None = None
    drop_empty_slices: bool = False
    link: bool = False
    ignore: int = 0
    raters: Raters | None = None
    min_pixels: int = 0
    neighbours: bool = False


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
        tags: 0 or 1 per slice, where tags are wanted and the mask could be read.
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
    tags: list[int] = field(default_factory=list)


def check_case(case: SourceCase, recipe: Recipe) -> Checked:
    """Read a case completely and say everything that is wrong with it; of an unlabelled case no mask is opened."""
    report = Checked(case.name)
    images = _read_all([(source, _frame(case, index)) for index, source in enumerate(case.images)], report)
    for path, volume in images:
        _check_image(path, volume, recipe, report)
    masks = _read_all([(source, case.frame) for source in case.masks], report)
    report.files = [volume.sha256 for _, volume in (*images, *masks)]
    if case.own_grid and len(images) == len(case.images):
        masks = _place(masks, images[0][1], report)
    fused = None
    if len(masks) < len(case.masks):
        return report
    checked = [_check_label(path, mask, recipe, report) for path, mask in masks]
    rounded = [values for values in checked if values is not None]
    if len(rounded) == len(checked) and len({values.shape for values in rounded}) == 1:
        fused = recipe.raters.fuse(rounded) if recipe.raters else rounded[0]
        _count_label(case, fused, recipe, report)
        if recipe.min_pixels:
            report.tags = slice_tags(fused, recipe)
    if len(images) < len(case.images):
        return report
    first = images[0][1]
    report.shape, report.spacing = first.array.shape, tuple(np.linalg.norm(first.affine[:3, :3], axis=0).tolist())
    report.voxels = hashlib.sha256(repr(first.array.shape).encode() + first.array.tobytes()).hexdigest()
    for path, volume in [*images[1:], *masks]:
        if volume.array.shape != first.array.shape:
            found, wanted = sizes(volume.array.shape), sizes(first.array.shape)
            report.problems.append(Problem(str(path), f"shape {found}", f"{wanted} as {case.images[0].name}"))
            continue
        distance = disagreement(first.affine, volume.affine, first.array.shape)
        if distance > GEOMETRY_TOLERANCE:
            report.warnings.append(
                f"{path}: its header disagrees with the image's by up to {distance:.3g} mm; the image's is used"
            )
    _plan(case, [volume for _, volume in images], [mask for _, mask in masks], fused, recipe, report)
    return report


def slice_tags(label: npt.NDArray[np.integer], recipe: Recipe) -> list[int]:
    """Return whether each slice (last axis, the reader's first) of a label in source values shows foreground enough."""
    organ = np.isin(label, [value for value, written in recipe.mapping.items() if written])
    return [int(count >= recipe.min_pixels) for count in organ.sum(axis=(0, 1)).tolist()]


def _frame(case: SourceCase, channel: int) -> int | None:
    return case.volumes[channel] if case.volumes else case.frame


def _read(source: Source, frame: int | None) -> Volume:
    if isinstance(source, Scan):
        return read_scan(source)
    if isinstance(source, Arrays):
        return read_arrays(source)
    return read_stack(source) if isinstance(source, Stack) else read_volume(source, frame)


def _place(masks: list[tuple[Source, Volume]], image: Volume, report: Checked) -> list[tuple[Source, Volume]]:
    """Put masks on the image's grid and say so; those that do not belong there become problems and are left out."""
    placed = []
    for source, mask in masks:
        try:
            mask, notes = put_on_grid(mask, image)
        except Unreadable as error:
            fix = f"Leave the case out with --exclude {report.name}."
            report.problems.append(Problem(str(source), str(error), fix=fix))
            continue
        report.warnings += [f"{source}: {note}" for note in notes]
        placed.append((source, mask))
    return placed


def _read_all(sources: list[tuple[Source, int | None]], report: Checked) -> list[tuple[Source, Volume]]:
    """Read images or masks; those that cannot be read become problems, once for each file, and are left out."""
    volumes = []
    for source, frame in sources:
        try:
            volume = _read(source, frame)
            volumes.append((source, volume))
            report.warnings += [f"{source}: {note}" for note in volume.notes]
        except Unreadable as error:
            fix = f"Download or export it again, or leave the case out with --exclude {report.name}."
            problem = Problem(str(source), str(error), fix=fix)
            report.problems += [problem] if problem not in report.problems else []
    return volumes


def _check_image(path: Source, volume: Volume, recipe: Recipe, report: Checked) -> None:
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


def _check_label(path: Source, label: Volume, recipe: Recipe, report: Checked) -> npt.NDArray[np.int64] | None:
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
        as_is = as_is and case.frame is None and not case.volumes and _is_packed(path)
        report.image_as_is.append(as_is)
        if not (as_is and recipe.link):
            report.bytes += path.stat().st_size if as_is and isinstance(path, Path) else volume.array.nbytes
        report.bytes += 2 * volume.array.nbytes if recipe.neighbours else 0
    report.label_as_is = (
        report.image_as_is[0]
        and len(masks) == 1
        and recipe.raters is None
        and _is_packed(case.masks[0])
        and masks[0].array.dtype.kind in "iu"
        and not masks[0].squeezed
        and all(recipe.mapping.get(value) == value for value in report.values)
        and np.array_equal(masks[0].affine, images[0].affine)
        and all(masks[0].image.header[code] == images[0].image.header[code] for code in ("qform_code", "sform_code"))
    )
    if not (report.label_as_is and recipe.link):
        report.bytes += images[0].array.size // 8  # masks compress well


def _is_packed(source: Source) -> bool:
    return isinstance(source, Path) and source.name.lower().endswith(".nii.gz")


def organ_range(label: npt.NDArray[Any]) -> slice:
    """Return the slices from the first to the last with organ; gaps between them stay, or the geometry would lie."""
    marked = np.flatnonzero(label.any(axis=(0, 1)))
    return slice(int(marked[0]), int(marked[-1]) + 1) if marked.size else slice(None)


def write_case(
    case: SourceCase, recipe: Recipe, checked: Checked, folder: Path, part: str, validates: bool = False
) -> None:
    """Write one case's images and label; files that are there already are left as they are.

    A training case whose tags are wanted gets them as its label; its masks are opened only if it validates.

    Args:
        case: the case.
        recipe: what to change.
        checked: result of :func:`check_case` for the same recipe.
        folder: dataset folder.
        part: ``Tr`` or ``Ts``.
        validates: whether the mask of a tagged training case goes to ``labelsVal``.
    """
    channels = _channels(case, recipe, checked)
    image_paths = [folder / f"images{part}" / f"{case.name}_{i:04d}.nii.gz" for i in range(len(channels))]
    mask_path: Path | None = folder / f"labels{part}" / f"{case.name}.nii.gz"
    tag_path = mask_path if recipe.min_pixels and part == "Tr" else None
    if tag_path is not None:
        mask_path = folder / VALIDATION_MASKS / tag_path.name if validates else None
    need_mask = mask_path is not None and not mask_path.exists() and not (checked.label_as_is and recipe.link)
    need_tags = tag_path is not None and not tag_path.exists()
    need_volumes = (
        need_mask
        or need_tags
        or any(not path.exists() and not as_is for path, (_, _, as_is) in zip(image_paths, channels, strict=True))
    )
    volumes = [_read(source, _frame(case, i)) for i, source in enumerate(case.images)] if need_volumes else []
    need_label = need_mask if tag_path is not None else need_volumes  # to drop slices of images, the mask says which
    label = _label(case, recipe, volumes[0]) if need_label else None
    cut = organ_range(label) if label is not None and case.masks and recipe.drop_empty_slices else slice(None)
    for (index, step, as_is), target in zip(channels, image_paths, strict=True):
        if target.exists():
            continue
        if as_is:
            _take(case.images[index], target, recipe.link)
            continue
        whole = shifted(volumes[index].array, step)
        array = whole[:, :, cut]
        if recipe.window is not None and _windowed(volumes[index].array, recipe):
            array = np.clip(array, *recipe.window)
        _save(target, array, volumes[0], cut)
    if need_tags and tag_path is not None:
        _save(tag_path, np.broadcast_to(np.array(checked.tags, np.uint8), checked.shape), volumes[0], cut)
    if mask_path is None or mask_path.exists():
        return
    if label is None:
        _take(case.masks[0], mask_path, link=True)
        return
    _save(mask_path, label[:, :, cut], volumes[0], cut)


def _channels(case: SourceCase, recipe: Recipe, checked: Checked) -> list[tuple[int, int, bool]]:
    """Return of each channel its image, by how many slices it is shifted, and whether the file can be taken."""
    if recipe.neighbours:
        return [(0, -1, False), (0, 0, checked.image_as_is[0]), (0, 1, False)]
    return [(index, 0, as_is) for index, as_is in enumerate(checked.image_as_is)]


def shifted(array: npt.NDArray[Any], step: int) -> npt.NDArray[Any]:
    """Return the volume whose slice z is slice z + step of ``array`` (x, y, z); beyond an edge, the edge's slice."""
    count = array.shape[2]
    return array[:, :, np.clip(np.arange(count) + step, 0, count - 1)] if step else array


def _label(case: SourceCase, recipe: Recipe, image: Volume) -> npt.NDArray[np.uint8]:
    """Return the label to write: mapped, fused from several raters, or filled with the ignore value."""
    if not case.masks:
        return np.full(image.array.shape, recipe.ignore, np.uint8)
    masks = [_read(source, case.frame) for source in case.masks]
    arrays = [(put_on_grid(mask, image)[0] if case.own_grid else mask).array for mask in masks]
    array = arrays[0]
    if recipe.raters:
        array = recipe.raters.fuse([np.rint(values).astype(np.int64) for values in arrays])
    mapped = np.zeros(array.shape, np.uint8)
    for source_value, value in recipe.mapping.items():
        mapped[np.abs(array - source_value) <= 1e-3] = value
    return mapped


def _take(source: Source, target: Path, link: bool) -> None:
    assert isinstance(source, Path), "a stack of slices is never taken as it is"
    take(source, target, link)


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
