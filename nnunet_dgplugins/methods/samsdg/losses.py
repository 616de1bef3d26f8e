"""Losses of both steps of SAM-SDG (arXiv 2401.02076) and the hard Dice its released code reports.

The paper names no loss. The released code calls MONAI's ``DiceCELoss`` on one channel: up to MONAI 1.2 its
cross-entropy is a softmax over that single channel and exactly zero, from 1.3 on it is binary. Step 1 hands it
probabilities and adds a binary cross-entropy of its own; with MONAI 1.3 another one then takes the probabilities for
logits (a double sigmoid).
"""

from __future__ import annotations

from torch import Tensor

from nnunet_dgplugins.methods.mask_losses import at_least_float32, bce_loss, dice_loss
from nnunet_dgplugins.methods.samsdg.canvas import TILES

SMOOTH = 1.0


def canvas_loss(
    logits: Tensor, target: Tensor, *, ce_weight: float = 1.0, valid: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the named terms of step 3's loss and their ``total``: Dice pooled over each canvas, and cross-entropy.

    Args:
        logits: (4N, K, h, w), four tiles per canvas.
        target: (4N, K, h, w), 0 or 1.
        ce_weight: of the cross-entropy; 1 as with MONAI 1.3 and later, 0 as before.
        valid: (4N, 1, h, w), 0 where the truth is unknown; None: known everywhere.

    Example:
        >>> terms = canvas_loss(decoder(embeddings, boxes), target)  # doctest: +SKIP
        >>> terms["total"].backward()  # doctest: +SKIP
    """
    return _terms(pooled(at_least_float32(logits)), pooled(target), ce_weight, None if valid is None else pooled(valid))


def coarse_loss(
    logits: Tensor, target: Tensor, *, double_sigmoid: bool = False, valid: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the named terms of step 1's loss and their ``total``: Dice per slice, and cross-entropy.

    Args:
        logits: (B, K, H, W).
        target: (B, K, H, W), 0 or 1.
        double_sigmoid: add the cross-entropy that takes probabilities for logits, as with MONAI 1.3 and later.
        valid: (B, 1, H, W), 0 where the truth is unknown; None: known everywhere.
    """
    logits = at_least_float32(logits)
    terms = _terms(logits, target, 1.0, valid)
    if double_sigmoid:
        terms["double_sigmoid"] = bce_loss(logits.sigmoid(), target, valid)
        terms["total"] = terms["total"] + terms["double_sigmoid"]
    return terms


def pooled(tiles: Tensor) -> Tensor:
    """Put the four tiles of a canvas below each other, (4N, K, h, w) to (N, K, 4h, w): sums then run over all four."""
    return tiles.unflatten(0, (-1, TILES)).movedim(1, 2).flatten(2, 3)


def pooled_dice(mask: Tensor, target: Tensor) -> Tensor:
    """Return the released code's score ``(2|P∩T| + 1) / (|P| + |T| + 1)``, pooled over everything that is given.

    Args:
        mask: predicted, bool or 0 and 1, any shape.
        target: true, same shape.
    """
    guess, truth = mask.float().flatten(), target.float().flatten()
    return (2 * (guess * truth).sum() + SMOOTH) / (guess.sum() + truth.sum() + SMOOTH)


def _terms(logits: Tensor, target: Tensor, ce_weight: float, valid: Tensor | None) -> dict[str, Tensor]:
    valid = None if valid is None else valid.to(logits.dtype)
    terms = {"dice": dice_loss(logits, target, valid), "bce": bce_loss(logits, target, valid)}
    return {**terms, "total": terms["dice"] + ce_weight * terms["bce"]}
