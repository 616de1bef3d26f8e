"""CutMix masks of several boxes, drawn and painted apart (EPL, Yao et al., AAAI 2022; the released mask generator).

Each box takes a share a ~ U(0.25, 0.5) of the image; its height takes ``a**u``, u ~ U(0, 1), its width the rest, both
times sqrt(1 / boxes), and it lies anywhere inside. A mask starts at 0 and every box flips what it covers, so where two
boxes overlap it is 0 again. 1 means: take the second image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BOXES = 3
AREA = (0.25, 0.5)


def sample_masks(
    count: int,
    size: Sequence[int],
    generator: torch.Generator | None = None,
    boxes: int = BOXES,
    area: tuple[float, float] = AREA,
) -> Tensor:
    """Return ``count`` masks (count, 1, *size), bool, on the CPU.

    Args:
        count: number of masks.
        size: (H, W), or (D, H, W): then boxes are drawn in the plane of the last two axes and go through all slices.
        generator: a CPU generator; None: torch's global one.
        boxes: boxes per mask.
        area: range of a box's share of the image before the division among boxes, within (0, 1].
    """
    return paint_boxes(sample_boxes(count, generator, boxes, area), size)


def sample_boxes(
    count: int,
    generator: torch.Generator | None = None,
    boxes: int = BOXES,
    area: tuple[float, float] = AREA,
) -> Tensor:
    """Draw the random numbers of the boxes: all areas, then all aspects, then all positions.

    Returns:
        (count, boxes, 4) in float64: area in its range, and in [0, 1) aspect, row and column position.
    """
    low, high = area
    if not 0 < low <= high <= 1:
        raise ValueError(f"area is a range within (0, 1], got {area}.")
    shape = (count, boxes)
    areas = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    aspects = torch.rand(shape, generator=generator, dtype=torch.float64)
    positions = torch.rand((*shape, 2), generator=generator, dtype=torch.float64)
    return torch.cat([areas[..., None], aspects[..., None], positions], dim=-1)


def paint_boxes(drawn: Tensor, size: Sequence[int]) -> Tensor:
    """Paint masks from what :func:`sample_boxes` drew; nothing random is left.

    Args:
        drawn: (count, boxes, 4).
        size: (H, W) or (D, H, W).

    Returns:
        (count, 1, *size) bool, true inside an odd number of boxes, on the device of ``drawn``.
    """
    if len(size) not in (2, 3):
        raise ValueError(f"size is (H, W) or (D, H, W), got {tuple(size)}.")
    height, width = size[-2:]
    area, aspect = drawn[..., 0], drawn[..., 1]
    tall = area**aspect
    shrink = (1 / drawn.shape[1]) ** 0.5  # several boxes share the area of one
    rows = _covered(tall * shrink, drawn[..., 2], height)
    columns = _covered(area / tall * shrink, drawn[..., 3], width)
    inside = rows[..., :, None] & columns[..., None, :]  # (count, boxes, H, W)
    masks = inside.sum(dim=1, keepdim=True) % 2 == 1
    return masks if len(size) == 2 else masks.unsqueeze(2).expand(-1, -1, size[0], -1, -1)


def _covered(share: Tensor, position: Tensor, side: int) -> Tensor:
    """Return which of ``side`` places each box covers: (count, boxes, side)."""
    length = torch.round(share * side)
    start = torch.round((side - length) * position)[..., None]
    places = torch.arange(side, device=share.device)
    return (places >= start) & (places < start + length[..., None])


def mix(first: Tensor, second: Tensor, masks: Tensor) -> Tensor:
    """Return ``first`` where the mask is 0 and ``second`` where it is 1; images, logits and label maps alike.

    Args:
        first: (B, C, *size), or (B, *size) for label maps.
        second: same shape.
        masks: (B, 1, *size), any device and type.
    """
    where = masks.to(first.device, torch.bool)
    return torch.where(where if first.ndim == where.ndim else where.squeeze(1), second, first)
