"""The SAM-SDG paper's own number (arXiv 2401.02076), its ``paper_dice``, as the released code computes it.

The unit is a canvas of four slices, not a case. For each unseen site and each class:

1. Slices: the cases sorted by name, slices in order, those without the class in the reference skipped, and the first
   and the last slice of a volume left out (the method's images hold three adjacent slices as channels). A dataset
   whose case table says ``ends_left_out`` in its protocol has lost them already, and one of ``drop_empty_slices`` ends
   where the organ does, seldom where the scan does: all of its slices count. So does a volume of one slice, an image.
2. Each slice is resized to 512 x 512 by nearest neighbour. The released code resizes masks bilinearly, which shrinks
   them, and predicts at 512 x 512; here both masks take the same resize.
3. Four consecutive slices, also of neighbouring volumes, make a canvas; an incomplete last canvas is dropped.
4. Dice of a canvas = (2|P∩R| + 1) / (|P| + |R| + 1), pooled over its four slices.

A site's number is the mean over its canvases; the paper's number is the unweighted mean of the unseen sites' numbers
(column "mean of sites"). It is a 2-D number: organ-free slices never count. The released code also picks the best
epoch on this number of the target sites; that is not imitated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.evaluation.metrics import Mask, Metric, class_masks

SIZE, TILES = 512, 4
METRICS = {
    "dice_samsdg": Metric(
        "Dice (SAM-SDG)",
        "",
        "higher",
        "(2|P∩R| + 1) / (|P| + |R| + 1) pooled over canvases of four consecutive 512 x 512 slices with organ, mean "
        "over a site's canvases; the paper's number is the mean of the unseen sites",
    )
}
Counts = tuple[int, int]
"""Of one slice: voxels in both masks, and the sum of the voxels of either."""


def slice_counts(
    reference: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    classes: Mapping[str, Sequence[int]],
    ignore: int | None = None,
    *,
    ends_left_out: bool = False,
) -> dict[str, list[Counts]]:
    """Return for each class the counts of the slices of one volume (z, y, x) that count; an image is one slice.

    Args:
        reference: label values.
        prediction: label values, of the same shape.
        classes: class name to its label values.
        ignore: label value of the reference that counts nowhere.
        ends_left_out: the volume's first and last slice are not the scan's, so that every slice may count.
    """
    result = {}
    for name, truth, guess in class_masks(reference, prediction, classes, ignore):
        # an image has no neighbours to lack, so only volumes lose their ends
        end = 0 if ends_left_out or len(truth) == 1 else 1
        slices = range(end, len(truth) - end) if truth.ndim == 3 else range(1)
        truths, guesses = (mask if mask.ndim == 3 else mask[None] for mask in (truth, guess))
        result[name] = [_counts(truths[index], guesses[index]) for index in slices if truths[index].any()]
    return result


def canvas_dice(counts: Iterable[Counts]) -> Iterator[float]:
    """Yield the Dice of each complete canvas of consecutive slices of one site."""
    slices = list(counts)
    for start in range(0, len(slices) - TILES + 1, TILES):
        both = sum(pair[0] for pair in slices[start : start + TILES])
        either = sum(pair[1] for pair in slices[start : start + TILES])
        yield (2 * both + 1) / (either + 1)


def _counts(truth: Mask, guess: Mask) -> Counts:
    large_truth, large_guess = (_resize(mask) for mask in (truth, guess))
    return int((large_truth & large_guess).sum()), int(large_truth.sum()) + int(large_guess.sum())


def _resize(mask: Mask) -> Mask:
    """Nearest neighbour between pixel centres to 512 x 512."""
    rows, columns = ((np.arange(SIZE) + 0.5) * size / SIZE for size in mask.shape)
    picked: Mask = mask[np.ix_(rows.astype(int), columns.astype(int))]
    return picked
