"""The DeSAM paper's own number (Gao et al., MICCAI 2024), as its released code computes it.

For each case of an unseen site and each class:

1. Slices: first to last slice of the volume in which the class occurs in the reference, *without the last one* (the
   released code loops over ``range(z_min, z_max)``), less those whose reference is empty after step 2. A case whose
   reference is empty, or that keeps no slice, is left out.
2. Each slice is resized to 256 x 256, without regard to its aspect, by scikit-image's nearest-neighbour resize with
   anti-aliasing, which erodes masks of larger slices a little. The released code predicts at 256 x 256; predictions
   here are whole volumes, so they take the same resize as the reference and a perfect prediction stays perfect.
3. Predictions are set to 0 in a frame of 50 pixels; the reference is not.
4. One 3-D Dice over the stacked slices; 0 if both are empty (medpy's rule).

The paper's number is one mean over all cases of the unseen sites (column "pooled"). It ignores false positives on
slices without organ and favours a centred organ, so it is higher than the standard protocol's Dice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.evaluation.metrics import Mask, Metric, class_masks

SIZE, FRAME = 256, 50
METRICS = {
    "dice_desam": Metric(
        "Dice (DeSAM)",
        "",
        "higher",
        "3-D Dice over the reference's foreground slices but the last, at 256 x 256, prediction cleared in a 50-pixel "
        "frame, both empty = 0; the paper's number is the mean over all cases of the unseen sites (pooled)",
    )
}


def case_dice(
    reference: npt.NDArray[np.integer],
    prediction: npt.NDArray[np.integer],
    classes: Mapping[str, Sequence[int]],
    ignore: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return ``{class: {"dice_desam": value}}`` for one case, (z, y, x) or (y, x); NaN where the case is left out."""
    return {
        name: {"dice_desam": _dice(*(mask if mask.ndim == 3 else mask[None] for mask in (truth, guess)))}
        for name, truth, guess in class_masks(reference, prediction, classes, ignore)
    }


def kept_slices(reference: Mask, size: int = SIZE) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """Return the indices of the slices that count and the resized reference on them, (n, size, size)."""
    occupied = np.flatnonzero(reference.any(axis=(1, 2)))
    if not occupied.size:
        return [], np.zeros((0, size, size), np.uint8)
    candidates = range(int(occupied[0]), int(occupied[-1]))
    resized = {index: resize_mask(reference[index], size) for index in candidates}
    kept = [index for index in candidates if resized[index].any()]
    return kept, np.array([resized[index] for index in kept], np.uint8).reshape(-1, size, size)


def resize_mask(mask: Mask, size: int = SIZE) -> npt.NDArray[np.uint8]:
    """Resize one slice to ``size`` x ``size`` as the released preprocessing resizes labels."""
    from skimage.transform import resize

    return resize(
        mask.astype(np.uint8), (size, size), order=0, preserve_range=True, mode="constant", anti_aliasing=True
    ).astype(np.uint8)


def clear_frame(masks: npt.NDArray[np.uint8], frame: int = FRAME) -> npt.NDArray[np.uint8]:
    """Return masks (n, h, w) that are 0 within ``frame`` pixels of the border."""
    cleared = np.zeros_like(masks)
    cleared[:, frame:-frame, frame:-frame] = masks[:, frame:-frame, frame:-frame]
    return cleared


def _dice(reference: Mask, prediction: Mask) -> float:
    kept, truth = kept_slices(reference)
    if not kept:
        return float("nan")
    guess = clear_frame(np.array([resize_mask(prediction[index]) for index in kept]))
    total = int(truth.sum()) + int(guess.sum())
    return 2 * int((truth & guess).sum()) / total if total else 0.0
