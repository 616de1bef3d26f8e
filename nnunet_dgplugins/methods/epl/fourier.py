"""Fourier versions of z-scored images: mixed on the scale of the released code, given back on their own."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_dgplugins.methods.spectral import full_mix, window_swap

PERCENTILES = (0.005, 0.995)  # the released code's scaling of a slice to [0, 1]
FULL_MIX_STRENGTH = 0.3  # published: U(0, 0.3)
_QUANTILE_LIMIT = 2**24  # torch.quantile refuses more values


@torch.no_grad()
def fourier_versions(
    images: Tensor,
    partners: Tensor,
    mode: str = "window_swap",
    fraction: float = 0.01,
    strength: float | None = None,
    minimum: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return each image in the look of its partner, at its own scale and pixel by pixel aligned with it.

    The released code mixes images in [0, 1], where no image has a negative mean; nnU-Net's are z-scored. Image and
    partner are brought there by their own percentiles, channel by channel, and the image's scaling is undone.

    Args:
        images: (B, C, H, W) or (B, C, D, H, W), any scale; volumes are mixed slice by slice.
        partners: same shape; another permutation of the source images.
        mode: ``window_swap`` (published AS) or ``full_mix`` (published AM).
        fraction: see :func:`~nnunet_dgplugins.methods.spectral.window_swap`.
        strength: share of the partner's amplitude; ``full_mix`` draws from 0 to it per image. None: 1 and 0.3.
        minimum: see :func:`~nnunet_dgplugins.methods.spectral.window_swap`.
        generator: CPU generator of the draws; None: torch's global one.

    Returns:
        float32, on the images' device.
    """
    images, partners = images.float(), partners.float()
    low, width = _range(images)
    partner_low, partner_width = _range(partners)
    own, other = (images - low) / width, (partners - partner_low) / partner_width
    if mode == "window_swap":
        mixed = window_swap(own, other, fraction, 1.0 if strength is None else strength, minimum)
    elif mode == "full_mix":
        limit = FULL_MIX_STRENGTH if strength is None else strength
        mixed = full_mix(own, other, (torch.rand(len(images), generator=generator) * limit).to(images.device))
    else:
        raise ValueError(f"mode is window_swap or full_mix, got {mode!r}.")
    return mixed * width + low


def _range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower percentile and the distance to the upper one, per image and channel, ready to broadcast.

    A constant image has no range; it keeps its scale.
    """
    values = images.flatten(2)
    values = values[..., :: -(-values.shape[-1] // _QUANTILE_LIMIT)]
    points = torch.tensor(PERCENTILES, dtype=values.dtype, device=values.device)
    low, high = torch.stack([torch.quantile(image, points, dim=1) for image in values], dim=1)
    width = high - low
    width = torch.where(width > 0, width, torch.ones_like(width))
    shape = (*images.shape[:2], *[1] * (images.ndim - 2))
    return low.view(shape), width.view(shape)
