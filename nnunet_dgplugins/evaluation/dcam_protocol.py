"""The numbers of weakly supervised histology papers (D-CAM; Han et al., MedIA 2022): one confusion matrix per site.

Pixels of all patches of a site are counted together; patches are never averaged. Pixels whose true label is excluded
(the ignore value) count nowhere. Background is one of the classes where the dataset says so, as it does not in the
published sets, whose every pixel is tissue or excluded.

The tidy table keeps three counts per case and class, from which every number of any group of cases follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.evaluation.confusion import confusion, count_scores
from nnunet_dgplugins.evaluation.metrics import Metric

if TYPE_CHECKING:
    import pandas

ALL_CLASSES = "all classes"
BACKGROUND = "background"
#: what the tidy table holds of each case and class, in pixels: both say so, the truth says so, the prediction says so
COUNTS = ("pixels_right", "pixels_truth", "pixels_predicted")
_SITE = "one confusion matrix over all pixels of a site's patches, ignored truth left out: "
METRICS = {
    "miou": Metric("mIoU", "", "higher", f"{_SITE}mean of IoU over the classes that truth or prediction has"),
    "fwiou": Metric("FwIoU", "", "higher", "mean of IoU weighted by each class's share of the true pixels"),
    "acc": Metric("ACC", "", "higher", "share of right pixels"),
    "class_acc": Metric("class ACC", "", "higher", "mean over classes of the share of right pixels among the class's"),
    "iou": Metric("IoU", "", "higher", "|P∩R| / |P∪R| of a class over all pixels of the site"),
}


def case_counts(
    reference: npt.NDArray[np.integer], prediction: npt.NDArray[np.integer], classes: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Return :data:`COUNTS` for each class of one case.

    Args:
        reference: label values; those of no class are excluded.
        prediction: same shape.
        classes: name to its one label value.
    """
    matrix = confusion(reference, prediction, [value for (value,) in classes.values()])
    counts = (np.diagonal(matrix), matrix.sum(1), matrix[:, : len(matrix)].sum(0))
    return {
        name: {count: float(values[place]) for count, values in zip(COUNTS, counts, strict=True)}
        for place, name in enumerate(classes)
    }


def pooled(table: pandas.DataFrame) -> dict[tuple[str, str], float]:
    """Return each number of a tidy table's cases taken together, by class and metric."""
    sums = counts_of(table, ["class"])
    found = count_scores(*(sums[count].to_numpy() for count in COUNTS))
    whole = {
        "miou": found.miou, "fwiou": found.fwiou, "acc": found.accuracy, "class_acc": found.class_accuracy,
    }  # fmt: skip
    result = {(ALL_CLASSES, metric): float(value) for metric, value in whole.items()}
    return result | {(str(name), "iou"): float(value) for name, value in zip(sums.index, found.ious, strict=True)}


def counts_of(table: pandas.DataFrame, by: Sequence[str]) -> pandas.DataFrame:
    """Return the sums of :data:`COUNTS` as columns, grouped by columns of a tidy table in order of appearance."""
    chosen = table[table["metric"].isin(COUNTS)]
    columns = {count: chosen["value"].where(chosen["metric"] == count, 0.0) for count in COUNTS}
    return chosen.assign(**columns).groupby([*by], sort=False, dropna=False)[list(COUNTS)].sum()


def score(counts: npt.NDArray[np.floating], metric: str) -> npt.NDArray[Any]:
    """Return one number over all classes for each of many groups.

    Args:
        counts: (..., classes, 3), the last axis as :data:`COUNTS`.
        metric: a key of :data:`METRICS`; ``iou`` is the mean over classes, as ``miou``.

    Returns:
        (...).
    """
    found = count_scores(*np.moveaxis(counts, -1, 0))
    names = {"fwiou": found.fwiou, "acc": found.accuracy, "class_acc": found.class_accuracy}
    return np.asarray(names.get(metric, found.miou))
