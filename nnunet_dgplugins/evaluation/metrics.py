"""Overlap, surface distance and volume of two masks, in millimetres.

Definitions are those of MONAI (``compute_hausdorff_distance(percentile=95)``, ``compute_average_surface_distance(
symmetric=True)``, ``compute_surface_dice``), which the tests hold them against. P is the prediction, R the reference;
the surface of a mask is the set of its voxels that touch the outside through a face; d(p, R) is the distance in mm
between voxel centres, from p to the nearest surface voxel of R.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
TOLERANCE_MM = 1.0
_ROUNDING_MM = 1e-6  # headers hold spacings as float32, so "exactly 1 mm" is not exact


@dataclass(frozen=True)
class Metric:
    """How one number is to be read.

    Args:
        title: heading of its column.
        unit: unit of the value, empty for a ratio.
        better: ``higher``, ``lower`` or ``zero``; empty for a description of the case.
        definition: the formula in one line, shown beside the numbers.
    """

    title: str
    unit: str
    better: str
    definition: str


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "", "higher", "2|P∩R| / (|P| + |R|) over all voxels of the case"),
    "hd95": Metric(
        "HD95", "mm", "lower", "larger of the 95th percentiles of d(p, R) over P's surface and d(r, P) over R's"
    ),
    "assd": Metric("ASSD", "mm", "lower", "mean of d(p, R) and d(r, P) over the voxels of both surfaces"),
    "nsd": Metric(
        "NSD 1 mm", "", "higher", "share of both surfaces' voxels no further than 1 mm from the other surface"
    ),
    "volume_error_ml": Metric("|ΔV|", "ml", "lower", "absolute difference of the volumes of P and R"),
    "volume_error_relative": Metric(
        "ΔV/V", "", "zero", "(volume of P − volume of R) / volume of R; above 0: too large"
    ),
    "reference_ml": Metric("V reference", "ml", "", "volume of R"),
    "prediction_ml": Metric("V predicted", "ml", "", "volume of P"),
}
"""Every metric of the standard protocol, in the order in which it is printed."""

EMPTY_RULES: dict[tuple[bool, bool], dict[str, float | str]] = {
    # (reference empty, prediction empty): metric -> value
    (True, True): {"dice": np.nan, "hd95": np.nan, "assd": np.nan, "nsd": np.nan, "volume_error_relative": np.nan},
    (True, False): {"dice": 0.0, "hd95": "diagonal", "assd": "diagonal", "nsd": 0.0, "volume_error_relative": np.nan},
    (False, True): {"dice": 0.0, "hd95": "diagonal", "assd": "diagonal", "nsd": 0.0, "volume_error_relative": -1.0},
}
"""What an empty mask means. NaN is left out of every mean and count (as in nnU-Net's own summary); ``diagonal`` is the
length of the image's diagonal in mm, the largest distance there is: a missed organ costs, and the mean stays finite."""


def mask_metrics(
    reference: Mask, prediction: Mask, spacing: Sequence[float], tolerance: float = TOLERANCE_MM
) -> dict[str, float]:
    """Compare two masks on one grid.

    Args:
        reference: (z, y, x) or (y, x) boolean. A volume with one slice is compared as an image, because otherwise
            each of its voxels would lie on the surface.
        prediction: same shape.
        spacing: voxel size in mm, in the order of the array's axes.
        tolerance: distance in mm that still counts as agreement for NSD.

    Returns:
        A value for each of :data:`METRICS`; volumes are NaN for (y, x) images, which have no thickness.

    Raises:
        ValueError: the shapes differ, or the spacing does not fit them.
    """
    if reference.shape != prediction.shape or len(spacing) != reference.ndim:
        raise ValueError(f"reference {reference.shape}, prediction {prediction.shape}, spacing {tuple(spacing)}")
    voxel_ml = float(np.prod(spacing)) / 1000 if reference.ndim == 3 else np.nan
    in_reference, in_prediction = int(np.count_nonzero(reference)), int(np.count_nonzero(prediction))
    result = {
        "volume_error_ml": abs(in_prediction - in_reference) * voxel_ml,
        "reference_ml": in_reference * voxel_ml,
        "prediction_ml": in_prediction * voxel_ml,
    }
    if in_reference and in_prediction:
        both = int(np.count_nonzero(reference & prediction))
        result["dice"] = 2 * both / (in_reference + in_prediction)
        result["volume_error_relative"] = (in_prediction - in_reference) / in_reference
        result |= _surface_metrics(reference, prediction, spacing, tolerance)
    else:
        longest = _diagonal(reference.shape, spacing)
        for name, value in EMPTY_RULES[not in_reference, not in_prediction].items():
            result[name] = longest if isinstance(value, str) else value
    return {name: float(result[name]) for name in METRICS}


def surface_distances(
    reference: Mask, prediction: Mask, spacing: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return d(r, P) for each surface voxel r of the reference and d(p, R) for each of the prediction, in mm.

    Both masks must hold something. Work is confined to their joint bounding box, which changes no distance.
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt

    axes = [axis for axis, size in enumerate(reference.shape) if size > 1] or [0]
    flat = tuple(axis for axis in range(reference.ndim) if axis not in axes)
    box = joint_box(reference | prediction)
    masks = [np.squeeze(mask[box], axis=flat) for mask in (reference, prediction)]
    # outside of the box counts as background, so a mask that touches the image's edge has its surface there
    surfaces = [mask & ~binary_erosion(mask) for mask in masks]
    sampling = [float(spacing[axis]) for axis in axes]
    to_prediction, to_reference = (distance_transform_edt(~s, sampling=sampling) for s in reversed(surfaces))
    return to_prediction[surfaces[0]], to_reference[surfaces[1]]


def joint_box(mask: Mask) -> tuple[slice, ...]:
    """Return the smallest box that holds every true voxel of a mask that is not empty."""
    box = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(box)


def class_metrics(
    reference: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[int]],
    ignore: int | None = None,
) -> dict[str, dict[str, float]]:
    """Compare two label maps class by class.

    Args:
        reference: label map, (z, y, x) or (y, x).
        prediction: label map of the same shape.
        spacing: voxel size in mm, in the order of the axes.
        classes: class or region name to the label values it consists of.
        ignore: value of the reference that means "not annotated"; such voxels count as background in both maps.

    Returns:
        Class name to metric name to value.
    """
    return {
        name: mask_metrics(truth, guess, spacing)
        for name, truth, guess in class_masks(reference, prediction, classes, ignore)
    }


def class_masks(
    reference: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    classes: Mapping[str, Sequence[int]],
    ignore: int | None = None,
) -> Iterator[tuple[str, Mask, Mask]]:
    """Yield (class, reference mask, predicted mask) of each class in turn; ignored voxels belong to neither mask."""
    known = None if ignore is None else reference != ignore
    for name, values in classes.items():
        truth, guess = (_members(labels, values) for labels in (reference, prediction))
        if known is not None:
            truth, guess = truth & known, guess & known
        yield name, truth, guess


def _members(labels: npt.NDArray[np.integer], values: Sequence[int]) -> Mask:
    return labels == values[0] if len(values) == 1 else np.isin(labels, list(values))


def _surface_metrics(reference: Mask, prediction: Mask, spacing: Sequence[float], tolerance: float) -> dict[str, float]:
    from_reference, from_prediction = surface_distances(reference, prediction, spacing)
    together = np.concatenate([from_reference, from_prediction])
    return {
        "hd95": max(float(np.percentile(from_reference, 95)), float(np.percentile(from_prediction, 95))),
        "assd": float(together.mean()),
        "nsd": float((together <= tolerance + _ROUNDING_MM).mean()),
    }


def _diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Return the image's diagonal in mm; an axis of one voxel has no length, as for the surfaces."""
    return float(np.sqrt(sum((size * step) ** 2 for size, step in zip(shape, spacing, strict=True) if size > 1)))
