"""Scores of a whole data set from one confusion matrix over all its pixels, as weakly supervised papers report them.

Not averages over cases: a class that is rare in one image counts by its pixels, and a class that an image lacks costs
that image nothing. Rows are truth, columns prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DatasetScores:
    """What a confusion matrix says; NaN where nothing can be said. Of many matrices, every number is an array (...).

    Args:
        ious: intersection over union of each class (..., C), NaN where neither truth nor prediction has it.
        miou: mean over the classes that have a value.
        fwiou: mean weighted by the frequency of the class in the truth.
        accuracy: share of right pixels.
        class_accuracy: mean over classes of the share of right pixels among the class's own.
    """

    ious: npt.NDArray[np.float64]
    miou: float
    fwiou: float
    accuracy: float
    class_accuracy: float


def confusion(
    truth: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer], classes: Sequence[int]
) -> Matrix:  # fmt: skip
    """Count pixels; matrices of several cases are added.

    Args:
        truth: label map of any shape; pixels of other values than ``classes`` (excluded, ignored) do not count.
        prediction: same shape.
        classes: label values of the C classes.

    Returns:
        (C, C + 1); the last column counts predictions that are none of the classes, which are wrong.

    Raises:
        ValueError: the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape}, prediction {prediction.shape}")
    count = len(classes)
    rows, columns = (_positions(labels, classes) for labels in (truth, prediction))
    known = rows < count
    pairs = rows[known] * (count + 1) + columns[known]
    return np.bincount(pairs, minlength=count * (count + 1)).reshape(count, count + 1)


def dataset_scores(matrix: Matrix) -> DatasetScores:
    """Return the scores of a matrix (C, C) or (C, C + 1), see :func:`confusion`."""
    return count_scores(np.diagonal(matrix), matrix.sum(1), matrix[:, : len(matrix)].sum(0))


def count_scores(
    right: npt.NDArray[Any], truth: npt.NDArray[Any], predicted: npt.NDArray[Any]
) -> DatasetScores:  # fmt: skip
    """Return the scores from what a matrix boils down to.

    Args:
        right: pixels of each class in truth and prediction alike (..., C).
        truth: pixels of each class in the truth.
        predicted: pixels of known truth that are predicted as the class.
    """
    right, truth, predicted = (np.asarray(values, np.float64) for values in (right, truth, predicted))
    ious = _ratio(right, truth + predicted - right)
    total = truth.sum(-1)
    return DatasetScores(
        ious=ious,
        miou=_mean(ious),
        fwiou=_ratio((truth * np.nan_to_num(ious)).sum(-1), total),  # without a value there is no truth either
        accuracy=_ratio(right.sum(-1), total),
        class_accuracy=_mean(_ratio(right, truth)),
    )


def _positions(labels: npt.NDArray[np.integer], classes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return each pixel's place among the classes, their number where it is none of them."""
    found = np.full(labels.shape, len(classes), np.int64)
    for place, value in enumerate(classes):
        found[labels == value] = place
    return found


def _ratio(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> Any:
    """Return quotients, NaN where there is nothing to divide by; a number where both are one."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)[()]


def _mean(values: npt.NDArray[np.float64]) -> Any:
    """Return the mean over the last axis of the values that are known."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(np.float64))
