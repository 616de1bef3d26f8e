"""Fourier amplitude mixing: the look of one image from another's amplitudes, its content from its own phases.

Yang and Soatto, FDA, CVPR 2020 (swap of a low-frequency window); Xu et al., A Fourier-based Framework for Domain
Generalization, CVPR 2021 (mix of the whole spectrum). Numerically what the released code of EPL (Yao et al., AAAI 2022)
does, without its complex FFTs, shifts, angles and polar forms:

- The images are real, so half of the spectrum says everything.
- A bin keeps its phase when it is scaled by new amplitude / old amplitude; no angle is needed.
- The swap changes the (2b+1)^2 bins around zero frequency only. On the CPU they are read by two thin matrix products
  and their change is added back by two more; elsewhere the FFT is quick and knows no reduced-precision matrix product.

All of it runs in float32 (float64 where given), also under autocast, on the images' device, for the whole batch at
once and without gradients. Volumes (B, C, D, H, W) are treated slice by slice over the last two axes. Results are not
clipped.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_EMPTY = 1e-20  # a bin below has no phase; it gets phase 0, as NumPy's angle of zero


@torch.no_grad()
def window_swap(
    images: Tensor, partners: Tensor, fraction: float = 0.01, strength: float | Tensor = 1.0, minimum: int = 0
) -> Tensor:
    """Give each image its partner's low-frequency amplitudes, ``(1 - strength) * own + strength * partner's``.

    Args:
        images: (B, C, H, W) or (B, C, D, H, W).
        partners: same shape; each image is mixed with the partner at its own index.
        fraction: half-width b of the window as a share of the shorter side, see :func:`half_width`; the window is the
            square of 2b+1 bins around zero frequency.
        strength: share of the partner's amplitude, one number or one per sample (B,). 1 swaps, 0 changes nothing.
        minimum: least half-width. 0 is the published rule, under which small images exchange their mean only.

    Returns:
        The mixed images, float32 (float64 for float64 input).
    """
    _check(images, partners)
    height, width = images.shape[-2:]
    half = half_width(height, width, fraction, minimum)
    half_rows, half_columns = min(half, height // 2), min(half, width // 2)
    if images.device.type == "cpu":
        return _swap_by_products(images, partners, strength, half_rows, half_columns)
    window = _window((height, width), half_rows, half_columns, images.device)
    return _mix_by_fft(images, partners, strength, window)


def half_width(height: int, width: int, fraction: float, minimum: int = 0) -> int:
    """Return b, ``floor(min(height, width) * fraction)`` but at least ``minimum``; published fraction: 0.01.

    Args:
        height: of the image.
        width: of the image.
        fraction: 0 to 0.5.
        minimum: for small images, whose b would be 0.
    """
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"fraction is a share of the side between 0 and 0.5, got {fraction}.")
    return max(math.floor(min(height, width) * fraction), minimum)


@torch.no_grad()
def full_mix(images: Tensor, partners: Tensor, strength: float | Tensor, ratio: float = 1.0) -> Tensor:
    """Mix the amplitudes of the whole spectrum, or of a centred window of it.

    Args:
        images: (B, C, H, W) or (B, C, D, H, W).
        partners: same shape.
        strength: share of the partner's amplitude, one number or one per sample (B,); published: U(0, 0.3).
        ratio: share of the spectrum's area that the window takes, sides ``int(side * sqrt(ratio))``; published: 1.

    Returns:
        The mixed images, float32 (float64 for float64 input).
    """
    _check(images, partners)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is a share of the spectrum's area between 0 and 1, got {ratio}.")
    window = None
    if ratio < 1:
        rows, columns = (_centred(side, math.sqrt(ratio), images.device) for side in images.shape[-2:])
        window = rows[:, None] & columns
    return _mix_by_fft(images, partners, strength, window)


def _mix_by_fft(images: Tensor, partners: Tensor, strength: float | Tensor, window: Tensor | None) -> Tensor:
    """Mix the amplitudes where ``window`` (H, W), in the FFT's own order, is true; None: everywhere."""
    with torch.autocast(images.device.type, enabled=False):
        images, partners = _as_real(images), _as_real(partners)
        size = images.shape[-2:]
        share = _per_sample(strength, images)
        if window is not None:
            # the published code takes the real part in the end, which averages the window with its mirror image
            mirrored = window.flip(0, 1).roll((1, 1), (0, 1))
            weight = (window.to(images.dtype) + mirrored.to(images.dtype)) / 2
            share = share * weight[:, : size[1] // 2 + 1]
        spectrum = _with_amplitude(torch.fft.rfft2(images), torch.fft.rfft2(partners).abs(), share)
        return torch.fft.irfft2(spectrum, s=size)


def _swap_by_products(
    images: Tensor, partners: Tensor, strength: float | Tensor, half_rows: int, half_columns: int
) -> Tensor:
    """Read the window's bins by matrix products and add their change back, images on the CPU."""
    with torch.autocast("cpu", enabled=False):
        images, partners = _as_real(images), _as_real(partners)
        height, width = images.shape[-2:]
        row_waves, column_waves, multiplicity = _waves(height, width, half_rows, half_columns, images.dtype)

        def window_of(x: Tensor) -> Tensor:  # (..., H, W) -> (..., 2b+1, b+1) complex
            along = (x.reshape(-1, width) @ column_waves).view(*x.shape[:-1], -1, 2)
            return row_waves @ torch.view_as_complex(along)

        own = window_of(images)
        mixed = _with_amplitude(own, window_of(partners).abs(), _per_sample(strength, images))
        change = torch.view_as_real(row_waves.mH @ ((mixed - own) * multiplicity))
        back = torch.addmm(images.reshape(-1, width), change.reshape(-1, column_waves.shape[1]), column_waves.T)
        return back.view(images.shape)


def _with_amplitude(spectrum: Tensor, amplitude: Tensor, share: Tensor) -> Tensor:
    """Return ``spectrum`` with its own phases and ``(1 - share) * own amplitude + share * amplitude``."""
    own = spectrum.abs()
    spectrum = spectrum.masked_fill(own < _EMPTY, _EMPTY)
    own = own.clamp_(min=_EMPTY)
    scale = torch.lerp(own, amplitude, share.expand_as(own)).div_(own)
    return torch.view_as_complex(torch.view_as_real(spectrum).mul_(scale[..., None]))


@lru_cache(maxsize=32)
def _waves(
    height: int, width: int, half_rows: int, half_columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the waves of the window's bins.

    Returns:
        Row waves ``exp(-2 pi i u h / H)`` (2b+1, H) complex; column waves for v = 0..b, cosine and minus sine in turn,
        (W, 2(b+1)) real; and for each v how often it counts in the image (its mirror -v is not listed) / (H W).
    """
    # the bin at half of an even side is its own mirror and listed once
    rows = torch.arange(-half_rows, min(half_rows, (height - 1) // 2) + 1, dtype=torch.float64)
    columns = torch.arange(0, half_columns + 1, dtype=torch.float64)
    row_angles = rows[:, None] * torch.arange(height) * (-2 * math.pi / height)
    column_angles = torch.arange(width)[:, None] * columns * (-2 * math.pi / width)
    row_waves = torch.polar(torch.ones_like(row_angles), row_angles)
    column_waves = torch.stack([column_angles.cos(), column_angles.sin()], dim=-1).flatten(1)
    multiplicity = (2.0 - ((columns == 0) | (2 * columns == width)).double()) / (height * width)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return row_waves.to(complex_dtype), column_waves.to(dtype), multiplicity.to(dtype)


def _window(size: tuple[int, int], half_rows: int, half_columns: int, device: torch.device) -> Tensor:
    """Return which bins (H, W), in the FFT's order, lie in the window."""
    rows, columns = (_offsets(side, device).abs() for side in size)
    return (rows <= half_rows)[:, None] & (columns <= half_columns)


def _offsets(side: int, device: torch.device) -> Tensor:
    """Return the signed frequency of every bin in the FFT's order: 0, 1, ..., -2, -1."""
    return torch.fft.fftfreq(side, 1 / side, device=device).round()


def _centred(side: int, share: float, device: torch.device) -> Tensor:
    """Return which bins of one axis lie in the published centred window, in the FFT's order."""
    length = int(side * share)
    start = side // 2 - length // 2
    position = _offsets(side, device) + side // 2  # after the published shift
    return (position >= start) & (position < start + length)


def _per_sample(strength: float | Tensor, images: Tensor) -> Tensor:
    value = torch.as_tensor(strength, dtype=images.dtype, device=images.device)
    if value.ndim > 1 or (value.ndim == 1 and len(value) != len(images)):
        raise ValueError(f"strength is one number or one per sample ({len(images)}), got shape {tuple(value.shape)}.")
    return value.reshape(-1, *[1] * (images.ndim - 1))


def _as_real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(images: Tensor, partners: Tensor) -> None:
    if images.ndim not in (4, 5) or images.shape != partners.shape:
        raise ValueError(
            "images and partners are both (B, C, H, W) or both (B, C, D, H, W), "
            f"got {tuple(images.shape)} and {tuple(partners.shape)}."
        )
