"""Losses of EPL (Yao et al., AAAI 2022), from the released code; everything but integer maps is float32 or better.

Per network: p = softmax of the student's logits on an image, q = the same on its Fourier version. Their disagreement
V = KL(q || p) per pixel gives the confidence C = exp(-V), which weights what the *other* network learns from this
network's pseudo-labels; V itself is minimised besides, which keeps the networks from raising it to escape.

Paper and released code disagree. ``pixel`` (default) weights the cross-entropy pixel by pixel, as figure and abstract
say. ``batch``: the released code averages cross-entropy and confidence over the batch before it multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CPS_WEIGHT = 3.0
CONFIDENCES = ("pixel", "batch")
DICE_EPS = 0.1
SLICE_DICE_EPS = 1e-4


def pseudo_labels(plain: Tensor, styled: Tensor) -> Tensor:
    """Return the class of the mean of both logits, hard and everywhere: no threshold, no ignored region.

    Args:
        plain: teacher logits on the image (B, K, ...).
        styled: the same on its Fourier version.

    Returns:
        (B, ...) int64.
    """
    return (_at_least_float32(plain) + _at_least_float32(styled)).argmax(dim=1)


def disagreement(plain: Tensor, styled: Tensor) -> Tensor:
    """Return KL(q || p) per pixel, natural logarithm, summed over classes; 0 means agreement.

    Args:
        plain: logits on the image (B, K, ...), p = softmax.
        styled: logits on its Fourier version, q = softmax.

    Returns:
        (B, ...). Gradients reach both inputs.
    """
    return _divergence(_log_softmax(plain), _log_softmax(styled))


def cross_pseudo_supervision(
    plain: Sequence[Tensor],
    styled: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    cps_weight: float = CPS_WEIGHT,
    confidence: str = "pixel",
    detach_confidence: bool = False,
) -> dict[str, Tensor]:
    """Return the unlabelled loss of both networks; ``cps_weight`` is applied here.

    ``total = cps_weight * (w(C2, ce(z1, Y2)) + w(C1, ce(z2, Y1)) + mean(V1) + mean(V2))`` with w(C, ce) = mean(C * ce)
    per pixel or mean(C) * mean(ce) per batch. The network whose labels are learnt also says how far to trust them.

    Args:
        plain: student logits on the CutMix image, of network 1 and 2, each (B, K, ...).
        styled: the same on the CutMix of the Fourier versions.
        labels: pseudo-labels that network 1 and 2 made, each (B, ...) int64.
        cps_weight: weight of the whole; published 3.
        confidence: ``pixel`` or ``batch``.
        detach_confidence: cut the gradient through C; published: not cut. V is minimised either way.

    Returns:
        ``total``, and unweighted parts: ``supervision_1/2`` (confidence-weighted cross-entropy of that network),
        ``disagreement_1/2`` (mean V); detached, for the log: ``ce_1/2`` (plain mean) and ``confidence_1/2`` (mean C).

    Example:
        >>> terms = cross_pseudo_supervision(passes.plain, passes.styled, passes.labels)
        >>> terms["total"].backward()
    """
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence is one of {CONFIDENCES}, got {confidence!r}.")
    log_p = [_log_softmax(logits) for logits in plain]
    variance = [_divergence(p, _log_softmax(logits)) for p, logits in zip(log_p, styled, strict=True)]
    trust = [torch.exp(-(v.detach() if detach_confidence else v)) for v in variance]
    terms: dict[str, Tensor] = {}
    for network, other in ((0, 1), (1, 0)):
        ce = F.nll_loss(log_p[network], labels[other], reduction="none")
        weighted = (trust[other] * ce).mean() if confidence == "pixel" else trust[other].mean() * ce.mean()
        terms[f"supervision_{network + 1}"] = weighted
        terms[f"disagreement_{network + 1}"] = variance[network].mean()
        terms[f"ce_{network + 1}"] = ce.detach().mean()
        terms[f"confidence_{network + 1}"] = trust[network].detach().mean()
    parts = [terms[f"{name}_{number}"] for name in ("supervision", "disagreement") for number in (1, 2)]
    return {**terms, "total": cps_weight * torch.stack(parts).sum()}


def cps_weight_at(epoch: int, start_epoch: int = 0, weight: float = CPS_WEIGHT) -> float:
    """Return the weight of the unlabelled loss: 0 before ``start_epoch``, then all of it, without a ramp.

    Args:
        epoch: counted from 0.
        start_epoch: published 0 for M&Ms, 4 for SCGM.
        weight: published 3.
    """
    return weight if epoch >= start_epoch else 0.0


def dice_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Return one Dice loss per class, ``1 - (2 sum(p t) + 0.1) / (sum(p) + sum(t) + 0.1)``, p = softmax.

    Sums run over the whole batch, so a class absent from one image costs nothing as long as none is predicted there.

    Args:
        logits: (B, K, ...).
        target: class numbers (B, ...), where a number outside 0..K-1 (an ignore label) leaves the pixel out;
            or one-hot (B, K, ...).

    Returns:
        (K,).
    """
    probability = _at_least_float32(logits).softmax(dim=1)
    if target.ndim == logits.ndim:
        truth = target.to(probability.dtype)
    else:
        classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
        truth = (target.unsqueeze(1) == classes).to(probability.dtype)
        known = (target >= 0) & (target < logits.shape[1])
        probability = probability * known.unsqueeze(1)
    axes = (0, *range(2, logits.ndim))
    overlap = (probability * truth).sum(axes)
    size = probability.sum(axes) + truth.sum(axes)
    return 1 - (2 * overlap + DICE_EPS) / (size + DICE_EPS)


def supervised_dice(logits: Tensor, target: Tensor, channel: int | None = None) -> Tensor:
    """Return the published supervised loss of one network: batch Dice without cross-entropy.

    Args:
        logits: (B, K, ...).
        target: as in :func:`dice_losses`.
        channel: None: the SUM over all classes, background included, 0 to K (M&Ms); a number: that class alone,
            0 to 1 (SCGM: grey matter, channel 0 of the released models).
    """
    losses = dice_losses(logits, target)
    return losses.sum() if channel is None else losses[channel]


def mean_probability(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean of both networks' softmax (B, K, ...), the published prediction."""
    return (_at_least_float32(first).softmax(dim=1) + _at_least_float32(second).softmax(dim=1)) / 2


def slice_dice(prediction: Tensor, target: Tensor, channels: Sequence[int], joint: bool = True) -> Tensor:
    """Return the published evaluation Dice of every slice, ``(2 overlap + 1e-4) / (sizes + 1e-4)``.

    The released inference takes ``mean_probability > 0.5`` (no argmax: a pixel may get no class), flattens the
    foreground channels of a slice into one vector (``joint``), and averages over a patient's slices.

    Args:
        prediction: (B, K, H, W), 0 or 1.
        target: (B, K, H, W), 0 or 1.
        channels: the foreground channels; LV, MYO, RV = 0, 1, 2 in the released M&Ms models.
        joint: one number per slice; else one per slice and channel.

    Returns:
        (B,), or (B, len(channels)); 1 where both are empty.
    """
    axes = (1, 2, 3) if joint else (2, 3)
    found, truth = (x[:, list(channels)].double() for x in (prediction, target))
    overlap, size = (found * truth).sum(axes), found.sum(axes) + truth.sum(axes)
    return (2 * overlap + SLICE_DICE_EPS) / (size + SLICE_DICE_EPS)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)


def _log_softmax(logits: Tensor) -> Tensor:
    return _at_least_float32(logits).log_softmax(dim=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
