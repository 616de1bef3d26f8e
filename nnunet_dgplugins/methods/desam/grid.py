"""Inference with a grid of points, without waste.

The published order of work runs nine batches of nine points through the whole decoder. Here the contexts of a slice are
computed once, the IoU of all points is predicted first, and masks are decoded in descending IoU only until the final
one is certain. The result is that of :func:`selection.select_masks` on all masks:

- Suppression goes through the masks in descending score, so whether a mask survives the first round depends only on
  masks of higher score, and a point at or below the IoU threshold plays no part at all.
- In the second round unchanged masks score 1 and changed ones 0, each group still in descending IoU, and the first of
  all is always kept. So the first survivor that needs no clean-up is the final mask, whatever follows; a clear winner
  needs one decode.
- Only when no survivor is clean does the highest-scored one win, cleaned, after all passing points were decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_dgplugins.methods.desam.decoder import DeSAMDecoder
from nnunet_dgplugins.methods.desam.prompts import EncodedPrompts
from nnunet_dgplugins.methods.desam.selection import (
    SelectionRule,
    clean,
    mask_box,
    non_maximum_suppression,
    suppress_border,
    with_sign,
)

CLOSED = -50.0  # logit of a class that is absent: finite and moderate for half-precision accumulation
PRIM_BATCH = 9


@dataclass
class GridStats:
    """Work done: evaluations of the contexts, points scored by PRIM, masks decoded."""

    contexts: int = 0
    prim_points: int = 0
    masks_decoded: int = 0


@dataclass(frozen=True)
class Prediction:
    """What comes out for one slice.

    Args:
        logits: (K, 4g, 4g); a class is where its logit is above 0, and ``CLOSED`` everywhere if no point passed.
        iou: (K,) predicted IoU of the selected mask; of the best point where none passed. The method's own doubt.
        points: index of the selected grid point per class, -1 where none passed.
        stats: work done.
    """

    logits: Tensor
    iou: Tensor
    points: tuple[int, ...]
    stats: GridStats


@torch.no_grad()
def predict_grid(
    decoder: DeSAMDecoder,
    taps: Sequence[Tensor],
    neck: Tensor,
    prompts: EncodedPrompts,
    rule: SelectionRule | None = None,
    *,
    prim_batch: int = PRIM_BATCH,
    decode_batch: int = 1,
) -> Prediction:
    """Segment one slice with a grid of points, the mask selected per class.

    Args:
        decoder: trained decoder for K classes.
        taps: three maps (1, C, g, g), shallow to deep.
        neck: (1, P, g, g).
        prompts: N encoded points.
        rule: thresholds of the selection; default: the published ones.
        prim_batch: points scored at once.
        decode_batch: masks decoded at once; above 1 some may be decoded in vain, which a GPU forgives.
    """
    rule = rule or SelectionRule()
    stats = GridStats(contexts=1, prim_points=len(prompts.sparse))
    shared = decoder.share(decoder.contexts(taps))
    iou, embeddings = score_points(decoder, neck, prompts, rule.iou_threshold, prim_batch)

    def decode(points: Sequence[int]) -> Tensor:
        stats.masks_decoded += len(points)
        return decoder.mask(torch.stack([embeddings[point] for point in points]), shared).float()

    size = (4 * neck.shape[-2], 4 * neck.shape[-1])
    logits, points = select_lazily(iou[:, : decoder.num_classes], decode, size, rule, decode_batch)
    best = [iou[point, k] if point >= 0 else iou[:, k].max() for k, point in enumerate(points)]
    return Prediction(logits.to(neck.device), torch.stack(best), points, stats)


def score_points(
    decoder: DeSAMDecoder, neck: Tensor, prompts: EncodedPrompts, iou_threshold: float, batch: int = PRIM_BATCH
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run PRIM over all points of one slice.

    Returns:
        IoU predictions (N, C) in float32, and the prompt-aware maps (P, g, g) of the points that pass the threshold
        in at least one class; the others are never needed again.
    """
    scores, embeddings = [], {}
    for start in range(0, len(prompts.sparse), batch):
        mask_embedding, iou = decoder.prim(neck, prompts.sparse[start : start + batch], prompts.dense, prompts.dense_pe)
        scores.append(iou.float())
        passes = (iou[:, : decoder.num_classes].float() > iou_threshold).any(dim=1).tolist()
        embeddings.update({start + i: mask_embedding[i] for i, kept in enumerate(passes) if kept})
    return torch.cat(scores), embeddings


def finished(decoded: Tensor, k: int, rule: SelectionRule) -> tuple[Tensor, bool]:
    """Return class k's logits (H, W) after clean-up and frame, and whether the clean-up counts as a change.

    Args:
        decoded: (K, H, W), all classes of one decode.
        k: the class.
        rule: area and frame.
    """
    masks = (decoded > 0).cpu().numpy()
    mask, changed = masks[k], False
    if rule.min_region_area > 0:
        occupied = np.logical_or.reduce(np.delete(masks, k, axis=0)) if len(masks) > 1 else None
        mask, changed = clean(mask, rule.area_in(mask.shape), occupied)
    return with_sign(decoded[k], suppress_border(mask, rule.frame_in(mask.shape))), changed


def select_lazily(
    iou: Tensor,
    decode: Callable[[Sequence[int]], Tensor],
    size: tuple[int, int],
    rule: SelectionRule,
    decode_batch: int = 1,
) -> tuple[Tensor, tuple[int, ...]]:
    """Select per class like ``select_masks``, decoding only what the answer depends on.

    Args:
        iou: (N, K) predicted IoU.
        decode: gives the logits (M, K, H, W) of M points; one decode serves all classes.
        size: (H, W) of the masks.
        rule: thresholds of the selection.
        decode_batch: masks decoded at once.

    Returns:
        Logits (K, H, W) whose sign is the final mask, and the selected point per class, -1 for none.
    """
    scores, cache = iou.detach().float().cpu(), _Decodes(decode)
    winners = [_winner(k, scores[:, k], cache, rule, decode_batch) for k in range(scores.shape[1])]
    maps = [
        torch.full(size, CLOSED) if point < 0 else finished(cache.known[point], k, rule)[0].cpu()
        for k, point in enumerate(winners)
    ]
    return torch.stack(maps), tuple(winners)


class _Decodes:
    """Masks decoded so far, shared by the classes."""

    def __init__(self, decode: Callable[[Sequence[int]], Tensor]):
        self.decode = decode
        self.known: dict[int, Tensor] = {}

    def get(self, point: int, ahead: Sequence[int]) -> Tensor:
        """Return the logits (K, H, W) of ``point``; decode it with those of ``ahead`` that are not known."""
        if point not in self.known:
            points = [point, *(p for p in ahead if p not in self.known)]
            self.known.update(zip(points, self.decode(points), strict=True))
        return self.known[point]


def _winner(k: int, scores: Tensor, cache: _Decodes, rule: SelectionRule, decode_batch: int) -> int:
    order = torch.argsort(scores, descending=True, stable=True)
    passing = [point for point in order.tolist() if scores[point] > rule.iou_threshold]
    boxes: list[tuple[int, int, int, int]] = []
    survivors: list[int] = []
    for position, point in enumerate(passing):
        decoded = cache.get(point, passing[position + 1 : position + decode_batch])
        boxes.append(mask_box((decoded[k] > 0).cpu().numpy()))
        # torchvision decides, as in the reference: boxes kept so far in front of the new one, in descending score
        falling = torch.arange(len(boxes), 0, -1, dtype=torch.float32)
        if len(boxes) - 1 not in non_maximum_suppression(np.array(boxes), falling, rule.nms_threshold):
            boxes.pop()
            continue
        survivors.append(point)
        if not finished(decoded, k, rule)[1]:
            return point
    return survivors[0] if survivors else -1
