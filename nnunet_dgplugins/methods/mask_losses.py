"""Losses of binary masks that both SAM methods use: Dice with squared denominator (MONAI's), cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DICE_EPS = 1e-5


def dice_loss(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Soft Dice with squared denominator, per image and class, then averaged.

    ``1 - (2 sum(p g) + eps) / (sum(p^2) + sum(g^2) + eps)`` with p = sigmoid(logits); an empty target with an empty
    prediction costs nothing.

    Args:
        logits: (B, K, H, W).
        target: (B, K, H, W), 0 or 1.
        valid: (B, 1, H, W), 0 where the truth is unknown; None: known everywhere.
    """
    probability, truth = logits.sigmoid(), target.to(logits.dtype)
    if valid is not None:
        probability, truth = probability * valid, truth * valid
    overlap = (probability * truth).sum((2, 3))
    size = probability.square().sum((2, 3)) + truth.square().sum((2, 3))
    return (1 - (2 * overlap + DICE_EPS) / (size + DICE_EPS)).mean()


def bce_loss(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy averaged over known pixels and classes; 0 where nothing is known. Shapes as in dice_loss."""
    per_pixel = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    if valid is None:
        return per_pixel.mean()
    weight = valid.to(logits.dtype).expand_as(per_pixel)
    return (per_pixel * weight).sum() / weight.sum().clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision tensors in float32, in which sums over a slice do not overflow; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
