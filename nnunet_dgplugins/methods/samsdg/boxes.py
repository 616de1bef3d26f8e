"""Boxes that prompt SAM: found in the coarse network's probabilities, jittered in training, compared.

SAM-SDG (arXiv 2401.02076), sections 3.2 and 3.3. A box is (x_min, y_min, x_max, y_max) in pixels, the maxima being the
last pixels inside, float32. "Refined" in the paper means: made coarser, thresholded, only the largest component kept;
nothing is learned. The released code searches components in Python, pixel by pixel; here SciPy does.

Drawing the jitter and applying it are separate. The released code also jitters at test time; here that is training's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

KINDS = ("refined", "unfiltered", "tile")
PUBLISHED_SIDE = 512  # of a tile; jitter is given in its pixels
GRID = 128
THRESHOLD = 0.75
JITTER = 9


@dataclass(frozen=True)
class BoxRule:
    """How a box comes from a probability map.

    Args:
        kind: ``refined`` (published): of the largest component; ``unfiltered``: of everything above the threshold,
            the paper's ablation; ``tile``: of the whole tile whatever the map says, its lower bound.
        threshold: theta 1; a pixel counts when its probability is above.
        grid: side of the map on which components are searched; larger maps are made that small first.
    """

    kind: str = "refined"
    threshold: float = THRESHOLD
    grid: int = GRID

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {KINDS}, got {self.kind!r}.")


def find_boxes(probability: Tensor, rule: BoxRule | None = None) -> tuple[Tensor, Tensor]:
    """Return one box for each probability map, on the device of the maps.

    Args:
        probability: (N, S, S) in [0, 1].
        rule: the published one if None.

    Returns:
        Boxes (N, 4) in pixels of the map, and where anything was found (N,) bool. Nothing found gives the box of the
        whole map, as in the released code.
    """
    rule = rule or BoxRule()
    if rule.kind == "refined":
        return refined_boxes(probability, rule.threshold, rule.grid)
    if rule.kind == "unfiltered":
        return unfiltered_boxes(probability, rule.threshold)
    whole = _whole(probability.shape[-1], probability.device)
    return whole.repeat(len(probability), 1), torch.ones(len(probability), dtype=torch.bool, device=probability.device)


def refined_boxes(
    probability: Tensor, threshold: float = THRESHOLD, grid: int = GRID, antialias: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the boxes of the largest components; see :func:`find_boxes` for shapes.

    The map is made smaller before the threshold, as in the released code (the paper says the mask is). Its boxes are
    multiples of S / grid and end up to that much before the true right and lower edge; nothing found gives
    (0, 0, S - S / grid, S - S / grid).

    Args:
        probability: (N, S, S) in [0, 1].
        threshold: theta 1.
        grid: side of the smaller map.
        antialias: as torchvision from 0.17 on resizes; the released code is older than that.
    """
    side = min(grid, probability.shape[-1])
    boxes, found = component_boxes((smaller(probability, side, antialias) > threshold).cpu().numpy())
    boxes[~found] = (0, 0, side - 1, side - 1)
    boxes *= probability.shape[-1] / side
    return _on(boxes, probability), torch.from_numpy(found).to(probability.device)


def unfiltered_boxes(probability: Tensor, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor]:
    """Return the boxes of all pixels above the threshold (the paper's "SAM + coarse boxes"); see :func:`find_boxes`."""
    boxes, found = mask_boxes((probability > threshold).cpu().numpy())
    boxes[~found] = (0, 0, probability.shape[-1], probability.shape[-1])
    return _on(boxes, probability), torch.from_numpy(found).to(probability.device)


def smaller(probability: Tensor, side: int, antialias: bool = False) -> Tensor:
    """Return maps (N, S, S) as (N, side, side), bilinear between pixel centres."""
    if probability.shape[-1] == side:
        return probability
    return F.interpolate(
        probability[:, None].float(), size=(side, side), mode="bilinear", align_corners=False, antialias=antialias
    )[:, 0]


def mask_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes around whole masks (N, H, W), not 0 inside: (N, 4) float32, zeros for an empty one, and (N,)."""
    rows, columns = (masks != 0).any(2), (masks != 0).any(1)
    found = rows.any(1)
    sides = [
        columns.argmax(1),
        rows.argmax(1),
        masks.shape[2] - 1 - columns[:, ::-1].argmax(1),
        masks.shape[1] - 1 - rows[:, ::-1].argmax(1),
    ]
    return np.where(found[:, None], np.stack(sides, 1), 0).astype(np.float32), found


def component_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes around the largest components of masks (N, H, W); as :func:`mask_boxes`."""
    boxes, found = mask_boxes(masks)
    for index in np.flatnonzero(found):
        left, top, right, bottom = boxes[index].astype(int)
        labels, count = ndimage.label(masks[index, top : bottom + 1, left : right + 1])
        if count > 1:
            kept = _largest(labels)
            rows, columns = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
            boxes[index] = (left + columns[0], top + rows[0], left + columns[-1], top + rows[-1])
    return boxes, found


def filter_mask(mask: np.ndarray) -> np.ndarray:
    """Return the largest component of a mask (H, W) as bool; where several are equally large, all of them.

    Pixels that touch at a corner only are not connected.
    """
    labels, count = ndimage.label(mask)
    return _largest(labels) if count else np.zeros(mask.shape, dtype=bool)


def _largest(labels: np.ndarray) -> np.ndarray:
    """Return where the largest components are, given each pixel's number, 0 outside."""
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: np.ndarray = (sizes == sizes.max())[labels]
    return kept


def draw_jitter(shape: tuple[int, ...], generator: np.random.Generator, largest: int = JITTER) -> np.ndarray:
    """Draw whole numbers 0 to ``largest`` for boxes of this shape: (*shape, 4), in the released code's order.

    That order is x_min, x_max, y_min, y_max, unlike a box's.
    """
    return generator.integers(0, largest + 1, size=(*shape, 4))


def jittered(
    boxes: Tensor, draw: np.ndarray | Tensor, side: int, found: Tensor | None = None, step: float = 1.0
) -> Tensor:
    """Move each edge of boxes outward by its draw, within the tile.

    Args:
        boxes: (..., 4) in pixels of the tile.
        draw: (..., 4) as from :func:`draw_jitter`.
        side: of the tile.
        found: (...) bool; boxes where it is False stay as they are. None: all move.
        step: pixels per unit drawn; 1 for the published tile of 512.
    """
    amount = torch.as_tensor(draw).to(boxes) * step
    left, right, up, down = amount.unbind(-1)
    moved = torch.stack(
        [
            (boxes[..., 0] - left).clamp(min=0),
            (boxes[..., 1] - up).clamp(min=0),
            (boxes[..., 2] + right).clamp(max=side),
            (boxes[..., 3] + down).clamp(max=side),
        ],
        -1,
    )
    return moved if found is None else torch.where(found[..., None], moved, boxes)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of pairs of boxes (..., 4), edges taken as lines; 0 for empty ones."""
    corner, other = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    both = (other - corner).clamp(min=0).prod(-1)
    areas = sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (first, second))
    return both / (areas - both + 1e-6)


def _whole(side: int, device: torch.device) -> Tensor:
    return torch.tensor([[0.0, 0.0, side, side]], device=device)


def _on(boxes: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(boxes).to(like.device)
