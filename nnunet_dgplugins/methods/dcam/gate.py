"""The gate at inference (Han et al., MedIA 2022): tissues that the tag classifier thinks absent are closed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GATE_THRESHOLD = 0.1
#: logit of a closed class in a deployed network: nnU-Net's predictor sums tiles in half precision, without infinities
DEPLOYED_CLOSED = -50.0


def open_classes(probabilities: Tensor, threshold: float = GATE_THRESHOLD, background: bool = False) -> Tensor:
    """Return which classes are open (N, C): those above the threshold, or all of them where none is.

    Args:
        probabilities: of the tag classifier (N, C).
        threshold: published: 0.1.
        background: whether background is a class of its own; then all may be closed.
    """
    opened = probabilities > threshold
    return opened if background else opened | ~opened.any(1, keepdim=True)


def close(logits: Tensor, opened: Tensor, closed: float = -math.inf) -> Tensor:
    """Return logits (N, C, ...) with ``closed`` in the classes that are not open (N, C)."""
    return torch.where(_over_places(opened, logits), logits, closed)


def published_gate(logits: Tensor, probabilities: Tensor, threshold: float = GATE_THRESHOLD) -> Tensor:
    """Return logits (N, C, ...) times the gate, as released: a closed class wins wherever all open logits are negative.

    Args:
        logits: (N, C, ...).
        probabilities: of the tag classifier (N, C).
        threshold: published: 0.1.
    """
    return logits * _over_places(probabilities > threshold, logits)


def _over_places(flags: Tensor, logits: Tensor) -> Tensor:
    return flags.to(logits.device).view(*flags.shape, *[1] * (logits.ndim - 2))
