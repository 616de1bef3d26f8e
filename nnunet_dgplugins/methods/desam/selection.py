"""Choosing one mask among those of a grid of points: the reference, all masks at hand.

Gao et al., DeSAM, MICCAI 2024, section 2.2, with the details of the released code (an adapted automatic mask generator
of segment-anything): threshold on the predicted IoU, non-maximum suppression of boxes, removal of small holes and
islands, suppression again, first survivor. No averaging over points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PUBLISHED_MASK_SIZE = 256  # region areas and frames of the released code are pixels of a 256 x 256 mask
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_TURNED = 1.0  # magnitude of a logit whose sign clean-up turned: clear enough to survive a resize


@dataclass(frozen=True)
class SelectionRule:
    """What decides between masks.

    Args:
        iou_threshold: a mask counts when its predicted IoU is above this.
        nms_threshold: box IoU above which the lower-scored mask is dropped.
        min_region_area: holes and islands below this are removed, in pixels of a 256 x 256 mask; 0: no clean-up.
        border: frame set to background, in pixels of a 256 x 256 mask (the released metric uses 50, a prostate prior).
    """

    iou_threshold: float = 0.5
    nms_threshold: float = 0.7
    min_region_area: float = 1000
    border: int = 0

    def area_in(self, shape: tuple[int, ...]) -> float:
        """Return the region area in pixels of a mask of ``shape`` (..., H, W)."""
        return self.min_region_area * shape[-2] * shape[-1] / PUBLISHED_MASK_SIZE**2

    def frame_in(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the frame's width in rows and columns of a mask of ``shape`` (..., H, W)."""
        rows, columns = (round(self.border * side / PUBLISHED_MASK_SIZE) for side in shape[-2:])
        return rows, columns


@dataclass(frozen=True)
class Kept:
    """Masks that survive the selection, best first.

    Args:
        points: (M,) index of each mask's grid point.
        masks: (M, H, W) bool, cleaned.
        iou: (M,) predicted IoU.
    """

    points: np.ndarray
    masks: np.ndarray
    iou: np.ndarray

    @property
    def selected(self) -> np.ndarray:
        """The final mask (H, W), empty where nothing survives."""
        return self.masks[0] if len(self.masks) else np.zeros(self.masks.shape[1:], dtype=bool)


def select_masks(
    logits: Tensor, iou: Tensor, rule: SelectionRule | None = None, occupied: np.ndarray | None = None
) -> Kept:
    """Select among the masks of all points, for one class.

    Args:
        logits: (N, H, W) mask logits, one per point.
        iou: (N,) predicted IoU.
        rule: thresholds; default: the published ones.
        occupied: (N, H, W) bool, see :func:`clean`.
    """
    rule = rule or SelectionRule()
    scores = iou.detach().float().cpu()
    binary = (logits.detach() > 0).cpu().numpy()
    passing = np.flatnonzero((scores > rule.iou_threshold).numpy())
    boxes = np.array([mask_box(mask) for mask in binary[passing]]).reshape(-1, 4)
    survivors = passing[non_maximum_suppression(boxes, scores[passing], rule.nms_threshold)]

    masks, area = binary[survivors], rule.area_in(binary.shape)
    order = np.arange(len(survivors))
    if area > 0 and len(survivors):
        others = [None] * len(masks) if occupied is None else occupied[survivors]
        cleaned = [clean(mask, area, other) for mask, other in zip(masks, others, strict=True)]
        masks = np.stack([mask for mask, _ in cleaned])
        unchanged = torch.tensor([0.0 if changed else 1.0 for _, changed in cleaned])
        order = non_maximum_suppression(np.array([mask_box(m) for m in masks]), unchanged, rule.nms_threshold)
    points = survivors[order]
    return Kept(points=points, masks=masks[order], iou=scores.numpy()[points])


def non_maximum_suppression(boxes: np.ndarray, scores: Tensor, threshold: float) -> np.ndarray:
    """Return the indices of kept boxes (N, 4) in descending score, equal scores in their order."""
    from torchvision.ops import nms

    if not len(boxes):
        return np.zeros(0, dtype=np.int64)
    return nms(torch.as_tensor(boxes, dtype=torch.float32), scores, threshold).numpy()


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box (x0, y0, x1, y1) of a mask (H, W), inclusive pixel indices; zeros when it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def clean(mask: np.ndarray, area: float, occupied: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
    """Fill holes below ``area`` pixels, then remove islands below it; keep the largest island if all are small.

    Regions are 8-connected. A mask counts as changed as soon as one region was small, even where the largest island is
    all there is and no pixel differs: that decides its rank in the second suppression.

    Args:
        mask: (H, W) bool.
        area: in pixels of this mask.
        occupied: (H, W) bool, what the same decode gives to other classes. It is no hole: the cavity inside a ring of
            heart muscle must not make the ring count as changed. None with one class, as published.

    Returns:
        The mask (H, W) and whether it counts as changed.
    """
    mask, filled = _fill_small_holes(mask, area, occupied)
    mask, removed = _remove_small_islands(mask, area)
    return mask, filled or removed


def with_sign(logits: Tensor, mask: np.ndarray | Tensor) -> Tensor:
    """Return logits (H, W) that are above 0 exactly where ``mask`` is set; those that already agree stay.

    The others become plus or minus one: with several classes a hole filled in one must not outvote the class that the
    network sees there (the cavity inside a ring of heart muscle is such a hole).
    """
    wanted = torch.as_tensor(mask, device=logits.device)
    turned = torch.where(wanted, _TURNED, -_TURNED).to(logits.dtype)
    return torch.where((logits > 0) == wanted, logits, turned)


def suppress_border(mask: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
    """Return a copy of the mask (H, W) with a frame of so many rows and columns set to background."""
    rows, columns = frame
    inside = np.zeros_like(mask)
    inner = (slice(rows, mask.shape[0] - rows), slice(columns, mask.shape[1] - columns))
    inside[inner] = mask[inner]
    return inside


def _regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return region labels (0 outside the mask) and the size of each region 1, 2, ..."""
    from scipy.ndimage import label

    regions, count = label(mask, structure=_EIGHT_NEIGHBOURS)
    return regions, np.bincount(regions.ravel(), minlength=count + 1)[1:]


def _fill_small_holes(mask: np.ndarray, area: float, occupied: np.ndarray | None) -> tuple[np.ndarray, bool]:
    free = ~mask if occupied is None else ~(mask | occupied)
    regions, sizes = _regions(free)
    small = sizes < area
    if not small.any():
        return mask, False
    return mask | np.concatenate([[False], small])[regions], True


def _remove_small_islands(mask: np.ndarray, area: float) -> tuple[np.ndarray, bool]:
    regions, sizes = _regions(mask)
    large = sizes >= area
    if large.all():
        return mask, False
    if not large.any():
        large[_first_in_blocks(regions, np.flatnonzero(sizes == sizes.max()))] = True
    return np.concatenate([[False], large])[regions], True


def _first_in_blocks(regions: np.ndarray, candidates: np.ndarray) -> int:
    """Return which of equally large regions (index from 0) OpenCV, which the released code uses, would number first.

    It scans blocks of 2 x 2 pixels row by row, not pixels.
    """
    if len(candidates) == 1:
        return int(candidates[0])
    rows, columns = np.nonzero(np.isin(regions, candidates + 1))
    first = np.lexsort((columns // 2, rows // 2))[0]
    return int(regions[rows[first], columns[first]]) - 1
