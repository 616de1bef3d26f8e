"""Losses of both stages (Han et al., MedIA 2022), from the released code; everything is float32 or better."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_dgplugins.methods.cam import precise
from nnunet_dgplugins.methods.dcam.masks import IGNORE

#: weights of the three masks of a patch; the deepest layer is the most trusted one
LAYER_WEIGHTS = {"bn7": 0.6, "b5_2": 0.2, "b4_5": 0.2}
FOCAL_POWER = 2
FOCAL_WEIGHT = 0.5


def tag_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Return the multi-label soft margin loss: binary cross-entropy, mean over classes, then over the batch.

    Args:
        logits: (N, C).
        tags: (N, C), 0 and 1.
    """
    return F.multilabel_soft_margin_loss(precise(logits), tags.to(logits.device, precise(logits).dtype))


def tag_agreement(logits: Tensor, tags: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Compare the predicted set of classes with the tagged one.

    Args:
        logits: (N, C).
        tags: (N, C), bool or 0 and 1.
        threshold: classes of a higher probability are predicted.

    Returns:
        Whether the sets are equal (N,) bool, and their Jaccard index (N,), 1 where both are empty.
    """
    predicted, tags = logits.sigmoid() > threshold, tags.to(logits.device).bool()
    common, union = (predicted & tags).sum(1), (predicted | tags).sum(1)
    return (predicted == tags).all(1), torch.where(union > 0, common / union.clamp(min=1), 1.0)


def layered_loss(
    logits: Tensor,
    masks: Mapping[str, Tensor],
    *,
    weights: Mapping[str, float] = LAYER_WEIGHTS,
    dummy_logit: bool = False,
    count_white: bool = False,
    divide_by_batch: bool = False,
    focal: bool = False,
    easy_examples: bool = False,
) -> dict[str, Tensor]:
    """Return the loss against the pseudo masks of the classifier's three depths.

    By default a weighted sum of cross-entropies over tissue pixels. The published loss sets ``dummy_logit``,
    ``count_white`` and ``divide_by_batch``: it appends a channel that is 100 on white pixels and 0 elsewhere, which
    leaves white pixels without loss or gradient but in the mean, and pulls all other logits up in absolute terms.

    Args:
        logits: (N, C, H, W), no background channel.
        masks: (N, H, W) by layer; 0 to C - 1, C for white background, :data:`IGNORE` for unknown.
        weights: by layer, published: 0.6, 0.2, 0.2.
        dummy_logit: a constant logit 0 in the softmax.
        count_white: white pixels count in the mean, with loss 0.
        divide_by_batch: divide by N once more, which makes the step 1 / N of the nominal learning rate.
        focal: the released option: ``0.5 (1 - exp(-ce))^2 ce`` of the mean cross-entropy, not of each pixel's.
        easy_examples: see :func:`easy_example_weights`; in neither paper nor code.

    Returns:
        ``total``, and each layer's loss before weighting. 0 where no pixel is known.
    """
    scores = precise(logits)
    if dummy_logit:
        scores = torch.cat([scores, torch.zeros_like(scores[:, :1])], 1)
    terms: dict[str, Tensor] = {}
    for layer in weights:
        target = masks[layer].to(logits.device).long()
        known = target < logits.shape[1]
        losses = F.cross_entropy(scores, target.masked_fill(~known, IGNORE), reduction="none", ignore_index=IGNORE)
        if easy_examples:
            losses = losses * easy_example_weights(losses, target.masked_fill(~known, IGNORE))
        counted = target != IGNORE if count_white else known
        loss = losses.sum() / counted.sum().clamp(min=1)
        if focal:
            loss = FOCAL_WEIGHT * (1 - torch.exp(-loss)) ** FOCAL_POWER * loss
        terms[layer] = loss / len(logits) if divide_by_batch else loss
    total = torch.stack([weight * terms[layer] for layer, weight in weights.items()]).sum()
    return {**terms, "total": total}


def easy_example_weights(losses: Tensor, labels: Tensor) -> Tensor:
    """Return online easy-example mining's weights of pixels (Li et al., MICCAI 2022, arXiv 2206.06665).

    Within an image a softmax of the negative losses, scaled to mean 1; 1 in images with a single label.

    Args:
        losses: (N, H, W), 0 on ignored pixels, which take part.
        labels: (N, H, W), :data:`IGNORE` where unknown.

    Returns:
        (N, H, W), without a gradient.
    """
    weights = (-losses.detach()).flatten(1).softmax(1)
    weights = (weights / weights.mean(1, keepdim=True)).view_as(losses)
    known = labels != IGNORE
    lowest = labels.masked_fill(~known, IGNORE).flatten(1).amin(1)
    highest = labels.masked_fill(~known, -1).flatten(1).amax(1)
    return torch.where((lowest < highest)[:, None, None], weights, 1.0)
