"""Intensities in EPL (Yao et al., AAAI 2022): the Fourier version of an image of any scale, and the released scaling.

The released code mixes images in [0, 1], where the mean is never negative. nnU-Net's are normalised to mean 0, where
the zero frequency of one image may point the other way than its partner's. So each image is brought near [0, 1] by its
0.5 and 99.5 percentiles, mixed, and brought back by its own scale: low frequencies move, the input's scale stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_dgplugins.methods.spectral import full_mix, window_swap

MODES = ("window_swap", "full_mix")
PERCENTILES = (0.5, 99.5)
SCALINGS = ("none", "percentiles", "maximum")


@torch.no_grad()
def fourier_version(
    images: Tensor,
    partners: Tensor,
    mode: str = "window_swap",
    *,
    strength: float | Tensor = 1.0,
    fraction: float = 0.01,
    minimum: int = 0,
) -> Tensor:
    """Return the images in their partners' style, on the images' own intensity scale.

    Args:
        images: (B, C, H, W) or (B, C, D, H, W), any scale.
        partners: same shape.
        mode: ``window_swap`` (published default) or ``full_mix`` (the released alternative, strength ~ U(0, 0.3)).
        strength: share of the partner's amplitudes, one number or one per sample (B,).
        fraction: see :func:`~nnunet_dgplugins.methods.spectral.window_swap`.
        minimum: likewise.

    Returns:
        float32 (float64 for float64 input), not clipped; finite for constant images too.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {MODES}, got {mode!r}.")
    low, span = _scale(images)
    partner_low, partner_span = _scale(partners)
    own, other = (images - low) / span, (partners - partner_low) / partner_span
    if mode == "window_swap":
        mixed = window_swap(own, other, fraction, strength, minimum)
    else:
        mixed = full_mix(own, other, strength)
    return mixed * span + low


def unit_range(images: Tensor, scaling: str) -> Tensor:
    """Return each sample and channel as the released networks expect it.

    Args:
        images: (B, C, H, W), not normalised.
        scaling: ``percentiles`` (M&Ms): cut at the 0.5 and 99.5 percentiles, then from 0 to 1; ``maximum`` (SCGM):
            divided by the maximum; ``none``: unchanged.

    Returns:
        Same shape; finite for constant images too.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is one of {SCALINGS}, got {scaling!r}.")
    if scaling == "none":
        return images
    if scaling == "maximum":
        highest = images.amax((2, 3), keepdim=True)
        return images / torch.where(highest > 0, highest, 1.0)
    low, span = _scale(images)
    return ((images - low) / span).clamp(0, 1)


def _scale(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return low percentile and span per sample and channel, shaped to broadcast; the span of a constant is 1."""
    values = images.flatten(2)
    values = values if values.dtype == torch.float64 else values.float()
    low, high = (
        values.kthvalue(1 + round((values.shape[-1] - 1) * percentile / 100), dim=-1).values
        for percentile in PERCENTILES
    )
    span = torch.where(high > low, high - low, 1.0)
    shape = (*low.shape, *[1] * (images.ndim - 2))
    return low.view(shape), span.view(shape)
