"""Losses and the learning-rate schedule of DeSAM (Gao et al., MICCAI 2024, section 2.4).

The mask is trained towards the whole organ for points on and off the organ alike: that is the decoupling. Nothing is
detached, so mask and IoU terms both reach PRIM.

Paper and released code disagree. ``paper`` (default): Dice + BCE + 10 MSE(u, t), whole box Dice + BCE. ``code``: the
released script's cross-entropy is a softmax over one channel and hence exactly zero, and its IoU term is 1 L1(u, t).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_dgplugins.methods.mask_losses import at_least_float32, bce_loss, dice_loss

PAPER_IOU_WEIGHT = 10.0
CODE_IOU_WEIGHT = 1.0
VARIANTS = ("paper", "code")


def iou_loss(predicted: Tensor, target: Tensor, kind: str = "mse", speaks: Tensor | None = None) -> Tensor:
    """Distance between predicted IoU and the flag "the prompt lies on the organ" (not a real IoU).

    With K classes a point is drawn for one class, on it or off it with equal chance, and speaks about that class's
    column alone (``speaks``): every column then sees the paper's one-to-one mix of good and bad points, which is what
    makes 0.5 its threshold. Letting the point speak about all columns would show each of them far more bad points
    than good ones. With K = 1 this is the paper's term.

    Args:
        predicted: (B, C) raw predictions, C >= K; columns from K on are not trained.
        target: (B, K), 0 or 1.
        kind: ``mse`` or ``l1``.
        speaks: (B, K), 1 where the prompt says something about the class; None: everywhere.

    Returns:
        Mean over the entries that speak, 0 when none does.
    """
    if kind not in ("mse", "l1"):
        raise ValueError(f"kind is 'mse' or 'l1', got {kind!r}.")
    difference = predicted[:, : target.shape[1]] - target.to(predicted.dtype)
    error = difference.square() if kind == "mse" else difference.abs()
    if speaks is None:
        return error.mean()
    weight = speaks.to(error.dtype)
    return (error * weight).sum() / weight.sum().clamp(min=1)


def desam_loss(
    logits: Tensor,
    target: Tensor,
    *,
    variant: str = "paper",
    iou: Tensor | None = None,
    iou_target: Tensor | None = None,
    speaks: Tensor | None = None,
    valid: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the named terms of the training loss and their ``total``.

    Half-precision inputs are raised to float32 first: sums over a slice overflow float16.

    Args:
        logits: (B, K, H, W).
        target: (B, K, H, W), 0 or 1.
        variant: ``paper`` or ``code``.
        iou: (B, C) predicted IoU with grid points; None for the whole box, which has no IoU term.
        iou_target: (B, K), 1 where the point lies on the class; needed with ``iou``.
        speaks: (B, K), see :func:`iou_loss`.
        valid: (B, 1, H, W), 0 where the truth is unknown.

    Example:
        >>> terms = desam_loss(logits, target, iou=iou, iou_target=points.on_class, speaks=points.speaks)
        >>> terms["total"].backward()
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is one of {VARIANTS}, got {variant!r}.")
    if (iou is None) != (iou_target is None):
        raise ValueError("iou and iou_target belong together.")
    logits = at_least_float32(logits)
    valid = None if valid is None else valid.to(logits.dtype)
    terms = {"dice": dice_loss(logits, target, valid)}
    if variant == "paper":
        terms["bce"] = bce_loss(logits, target, valid)
    total = torch.stack(list(terms.values())).sum()
    if iou is not None and iou_target is not None:
        kind, weight = ("mse", PAPER_IOU_WEIGHT) if variant == "paper" else ("l1", CODE_IOU_WEIGHT)
        terms["iou"] = iou_loss(at_least_float32(iou), iou_target, kind, speaks)
        total = total + weight * terms["iou"]
    return {**terms, "total": total}


def poly_lr(initial: float, epoch: int, epochs: int, exponent: float = 0.9) -> float:
    """Return ``initial * (1 - epoch / epochs) ** exponent``, epoch from 0."""
    return initial * (1 - epoch / epochs) ** exponent
