"""Progressive dropout attention (Han et al., MedIA 2022, arXiv 2110.08048): hides what the classifier is surest of.

Used in training only, so that the maps grow over whole tissues instead of their most telling spots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_EPOCH = 3
DECAY = 0.98
FLOOR = 0.65
PUBLISHED_DIVISOR = 4


def dropped_attention(features: Tensor, weight: Tensor, gamma: float, divisor: int | None = None) -> Tensor:
    """Return features times the mean of all classes' maps, each map 0 where it exceeds gamma times its own maximum.

    All classes take part, tagged or not; gradients reach the features and the classifier through the attention too.

    Args:
        features: (N, K, h, w).
        weight: of the classifier (C, K, 1, 1).
        gamma: 1 drops nothing.
        divisor: of the sum over classes; None: C. The released code divides by 4 whatever C is.

    Returns:
        (N, K, h, w).
    """
    maps = F.conv2d(features, weight).relu()
    highest = maps.amax((2, 3), keepdim=True)
    kept = torch.where(maps > gamma * highest, 0.0, maps)
    return features * (kept.sum(1, keepdim=True) / (divisor or len(weight)))


def gamma_at(epoch: int, start: float = 1.0, decay: float = DECAY, floor: float = FLOOR) -> float:
    """Return gamma in an epoch: multiplied by ``decay`` after every epoch while it is above ``floor``.

    Args:
        epoch: counted from 0; the first ones count although attention is not used in them.
        start: gamma in epoch 0.
        decay: factor per epoch.
        floor: where it stops; published: 0.65, which 20 epochs do not reach.
    """
    gamma = start
    for _ in range(epoch):
        if gamma > floor:
            gamma *= decay
    return gamma


def attention_used(epoch: int, first_epoch: int = FIRST_EPOCH) -> bool:
    """Return whether an epoch, counted from 0, uses the attention; published: from epoch 3 on."""
    return epoch >= first_epoch
