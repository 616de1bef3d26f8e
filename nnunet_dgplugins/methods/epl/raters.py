"""Several raters into one truth, for SCGM (Spinal Cord Grey Matter Challenge 2016). NumPy only: converters import this.

The rule is that of DGNet's preparation (Liu et al., MICCAI 2021), on which EPL builds: a voxel is what more than half
of the raters say. Of four, three must agree, and a tie goes to the background.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GREY, WHITE = 1, 2  # in a rater's mask; 0 is background


@dataclass(frozen=True)
class FusedRaters:
    """What most raters say; grey matter always lies within the cord.

    Args:
        cord: bool, grey or white matter.
        grey: bool, grey matter.
    """

    cord: NDArray[np.bool_]
    grey: NDArray[np.bool_]

    def labels(self, white_matter: bool = False) -> NDArray[np.uint8]:
        """Return 0 background and 1 grey matter, with ``white_matter`` also 2 for the rest of the cord."""
        labels = self.grey.astype(np.uint8)
        if white_matter:
            labels[self.cord & ~self.grey] = WHITE
        return labels


def fuse_raters(raters: NDArray) -> FusedRaters:
    """Fuse masks by strict majority of the raters present.

    Args:
        raters: (R, *shape) with 0 background, 1 grey, 2 white matter. Four raters are published; with fewer the
            majority is that of those present.

    Raises:
        ValueError: no rater at all.
    """
    if len(raters) == 0:
        raise ValueError("At least one rater's mask is needed.")

    def majority(votes: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return 2 * votes.sum(axis=0) > len(raters)

    return FusedRaters(cord=majority(raters > 0), grey=majority(raters == GREY))


def divide_by_slice_maximum(image: NDArray) -> NDArray[np.float32]:
    """Return (Z, H, W) with each slice divided by its own maximum; a slice without positive values is left alone."""
    maximum = image.max(axis=(-2, -1), keepdims=True)
    return (image / np.where(maximum > 0, maximum, 1)).astype(np.float32)
