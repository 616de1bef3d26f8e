"""Saliency-balancing fusion: where the loss looks, keep the global augmentation; elsewhere, take the local one.

Su et al., SLAug (AAAI 2023), section 3.3; part of SAM-SDG's released code, which never calls it. A training step with
it: backward of the loss on the global version (parameter gradients stay), the map from the gradient of its input,
backward of the loss on the fused version, one step of the optimiser with both gradients.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_ORDER = 2  # convolutions of the kernel with its box
_FLOOR = 1e-20


def input_saliency(gradient: Tensor) -> Tensor:
    """Return the root mean square over channels (B, 1, H, W) of the loss's gradient by its input (B, C, H, W)."""
    return gradient.detach().square().mean(1, keepdim=True).sqrt()


def saliency_map(gradient: Tensor, grid: int) -> Tensor:
    """Return the smooth map of where the loss looks.

    Pooled to grid x grid, spread by a quadratic B-spline of the cells' size, enlarged to the image. All of that is
    linear and separable, so it is one small matrix on either side.

    Args:
        gradient: (B, C, H, W), of :func:`input_saliency`.
        grid: cells per side (published: 3 for abdomen, 18 for heart).

    Returns:
        (B, C, H, W) in [0, 1]; minimum and maximum of each map are 0 and 1, and a constant one is 1.
    """
    rows, columns = (_spread(size, grid).to(gradient) for size in gradient.shape[-2:])
    smooth = rows @ F.adaptive_avg_pool2d(gradient, (grid, grid)) @ columns.T
    low, high = smooth.amin((-2, -1), keepdim=True), smooth.amax((-2, -1), keepdim=True)
    return (smooth - low + _FLOOR) / (high - low + _FLOOR)


def fuse(global_image: Tensor, local_image: Tensor, saliency: Tensor) -> Tensor:
    """Return the global version where the map is 1, the local one where it is 0, and mixtures between; detached."""
    return (global_image * saliency + local_image * (1 - saliency)).detach()


def spline(cell: int) -> Tensor:
    """Return the B-spline of one axis for cells of that many pixels, (5 * cell + 2,); in two axes its outer product."""
    box = torch.ones(1, 1, cell)
    kernel = box
    for index in range(1, _ORDER + 1):
        kernel = F.conv1d(kernel, box, padding=index * cell) / cell
    return kernel[0, 0]


@lru_cache(maxsize=16)
def _spread(size: int, grid: int) -> Tensor:
    """Return the matrix (size, grid) from cells to pixels of one axis."""
    cell = size // grid
    if not cell:
        raise ValueError(f"{grid} cells do not fit into {size} pixels.")
    kernel = spline(cell)
    spread = F.conv_transpose1d(
        torch.eye(grid)[:, None], kernel[None, None], stride=cell, padding=(len(kernel) - 1) // 2
    )
    return F.interpolate(spread, size=size, mode="linear", align_corners=True)[:, 0].T.contiguous()
