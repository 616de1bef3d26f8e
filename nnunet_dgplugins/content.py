"""The part of a slice that shows something, and the way back to the slice.

nnU-Net's predictor pads a slice with exact zeros up to its patch size. Networks that need whole slices look only at the
box of non-zero pixels, in training, embedding and prediction alike, so padding never changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

Box = tuple[int, int, int, int]
Field = tuple[int, int]
#: logit of everything that is not there; finite, because nnU-Net sums tiles in half precision
CLOSED = -50.0


def content_box(x: torch.Tensor) -> Box | None:
    """Return the bounding box of pixels that are non-zero in any channel.

    Args:
        x: one slice (C, H, W), any type.

    Returns:
        (top, bottom, left, right), bottom and right exclusive; None for a slice of zeros.
    """
    filled = (x != 0).any(dim=0)
    rows, columns = filled.any(dim=1).nonzero(), filled.any(dim=0).nonzero()
    if not len(rows):
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def crop(x: torch.Tensor, box: Box | None) -> torch.Tensor:
    """Return the part of (..., H, W) inside the box, contiguous; all of it without a box."""
    if box is None:
        return x.contiguous()
    top, bottom, left, right = box
    return x[..., top:bottom, left:right].contiguous()


def margins(height: int, width: int, field: Field | None) -> tuple[int, int, int, int]:
    """Return how far the field reaches beyond content of this size: (left, right, top, bottom), none negative."""
    rows, columns = (max(0, f - have) for f, have in zip(field or (0, 0), (height, width), strict=True))
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def from_canvas(
    logits: torch.Tensor,
    box: Box | None,
    size: tuple[int, int],
    closed: float = CLOSED,
    field: Field | None = None,
) -> torch.Tensor:
    """Bring mask logits back to the slice.

    Args:
        logits: (K, h, w) on the canvas.
        box: what :func:`content_box` said of the slice.
        size: (H, W) of the slice.
        closed: value outside the box, and everywhere without a box; finite, because nnU-Net sums in half precision.
        field: as for :func:`margins`; what lies around the content is cut off again.

    Returns:
        (K, H, W), bilinear inside the box.
    """
    full = logits.new_full((logits.shape[0], *size), closed)
    if box is None:
        return full
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    before, after, above, below = margins(height, width, field)
    shown = (above + height + below, before + width + after)
    inside = F.interpolate(logits[None], size=shown, mode="bilinear", align_corners=False)[0]
    full[:, top:bottom, left:right] = inside[:, above : above + height, before : before + width]
    return full


def tiled_warning(boxes: Sequence[Box | None], size: tuple[int, int]) -> str | None:
    """Return what to say where a slice with one of these boxes fills a patch of this size, None where none does."""
    if not any(box and (box[1] - box[0] == size[0] or box[3] - box[2] == size[1]) for box in boxes):
        return None
    return (
        f"A slice fills the whole patch of {size[0]}x{size[1]} pixels: larger slices are cut into "
        "tiles, and each tile is segmented as if it were a slice. A larger patch_size in the plans avoids that."
    )
