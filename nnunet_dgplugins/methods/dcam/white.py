"""The white-background rule of lung tissue: air is no tissue (Han et al., MedIA 2022, for LUAD-HistoSeg)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WHITE_ABOVE = 200
SMALLEST_COMPONENT = 50


def grey(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the grey levels of RGB pixels (..., 3) by OpenCV's integer formula.

    PIL's differs by one level on a thousandth of all colours, which can lie on either side of the threshold.
    """
    weights = np.array([9798, 19235, 3735], np.uint32)
    return ((rgb.astype(np.uint32) @ weights + 16384) >> 15).astype(np.uint8)


def white_background(
    rgb: npt.NDArray[np.uint8], above: int = WHITE_ABOVE, smallest: int = SMALLEST_COMPONENT
) -> npt.NDArray[np.bool_]:
    """Return which pixels are white background.

    Args:
        rgb: image (H, W, 3).
        above: grey levels beyond this one are white; published: 200.
        smallest: connected white regions (pixels that share an edge) of fewer pixels are tissue; published: 50.

    Returns:
        (H, W).
    """
    from scipy.ndimage import label

    regions, count = label(grey(rgb) > above)  # joins pixels that share an edge
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    sizes[0] = 0  # what is not white
    return (sizes >= smallest)[regions]
