"""The paper's measure: Dice of a patient's stack of maps at several thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def volume_dice(
    maps: npt.NDArray[np.floating], truth: npt.NDArray[np.bool_], thresholds: Sequence[float] | npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Return the Dice of ``maps > threshold`` with the truth over the whole stack, one value per threshold.

    Args:
        maps: (Z, H, W), in [0, 1].
        truth: same shape.
        thresholds: T of them.

    Returns:
        (T,); 1 where both are empty.
    """
    masks = maps[None] > np.asarray(thresholds, maps.dtype)[:, None, None, None]
    overlap = 2 * (masks & truth).sum((1, 2, 3), dtype=np.float64)
    size = masks.sum((1, 2, 3), dtype=np.float64) + truth.sum()
    return np.divide(overlap, size, out=np.ones_like(size), where=size > 0)
