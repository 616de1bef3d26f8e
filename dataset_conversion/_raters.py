"""Several raters' masks of one volume become one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

GREY, WHITE = 1, 2


def fuse(masks: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.uint8]:
    """Fuse spinal-cord masks by strict majority, as Liu et al. (MICCAI 2021) do: more than half must agree.

    Grey matter is where more than half of the raters say grey matter, the cord where more than half say grey or white
    matter; a tie (2 of 4) is not enough. Grey matter lies in the cord by construction.

    Args:
        masks: one array per rater, equal shapes, 0 background, 1 grey matter, 2 white matter.

    Returns:
        The fused mask with the same values; white matter is cord that is not grey matter.
    """
    grey = sum((np.asarray(mask) == GREY).astype(np.uint8) for mask in masks)
    cord = sum((np.asarray(mask) > 0).astype(np.uint8) for mask in masks)
    fused = np.where(2 * cord > len(masks), WHITE, 0)
    return np.where(2 * grey > len(masks), GREY, fused).astype(np.uint8)
