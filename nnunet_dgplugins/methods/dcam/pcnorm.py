"""PCNorm: a feature map keeps the phase of its spectrum (content) and takes the amplitude (style) of a normalised map.

D-CAM puts this layer behind three stages of its classifier; the operator is that of "Decompose, Adjust, Compose" (Lee
et al., CVPR 2023, arXiv 2303.02328). As released, the statistics stay at mean 0 and variance 1 and are frozen, so that
the layer returns x / sqrt(1 + 1e-5): it does nothing. What the idea needs is active statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dgplugins.methods.cam import precise

ACTIVE_MODES = ("instance", "batch")
#: ``off`` is the network without D-CAM's addition; ``official`` is D-CAM as released, which computes the same
MODES = (*ACTIVE_MODES, "official", "off")
_SMALLEST = 1e-5
_EPS = 1e-5


class PCNorm(nn.Module):
    """The layer with active statistics, in float32 at least, also under autocast.

    Under its released names (``weight``, ``bias``, ``running_mean``, ``running_var``) mode ``batch`` is the released
    operator for whatever statistics it is given.

    Args:
        channels: K.
        mode: ``instance``: mean and variance of each image and channel, in training and at test. Reconstructed: neither
            paper text nor released code does so, but it depends on no batch and no running averages, and it is active
            when class maps are made. ``batch``: batch statistics in training, running ones at test, as the operator's
            own paper has it (reconstructed too).
        momentum: of the running statistics.

    Example:
        >>> PCNorm(8)(torch.rand(2, 8, 14, 14)).shape
        torch.Size([2, 8, 14, 14])
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, mode: str = "instance", momentum: float = 0.1):
        super().__init__()
        if mode not in ACTIVE_MODES:
            raise ValueError(f"mode is one of {ACTIVE_MODES}, got {mode!r}.")
        self.mode, self.momentum = mode, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        if mode == "batch":
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, K, H, W) to the same shape and type."""
        with torch.autocast(x.device.type, enabled=False):
            values = precise(x)
            out = compose(phase(values), amplitude(self._normalised(values)), (x.shape[-2], x.shape[-1]))
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(x.dtype)

    def _normalised(self, x: Tensor) -> Tensor:
        if self.mode == "instance":
            # a tile may show a few pixels only, which is a single place here: it equals its own mean
            return F.instance_norm(x, eps=_EPS) if x.shape[-2] * x.shape[-1] > 1 else torch.zeros_like(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, None, None, self.training, self.momentum, _EPS
        )  # fmt: skip


def layer(channels: int, mode: str) -> nn.Module:
    """Return the layer of a mode; the inert modes compute nothing at all."""
    if mode not in MODES:
        raise ValueError(f"pcnorm is one of {MODES}, got {mode!r}.")
    return PCNorm(channels, mode) if mode in ACTIVE_MODES else nn.Identity()


def phase(x: Tensor) -> Tensor:
    """Return the phases (..., H, W // 2 + 1) of real maps (..., H, W): the half of the spectrum that says it all."""
    spectrum = torch.fft.rfft2(x)
    return torch.atan2(spectrum.imag, _off_zero(spectrum.real))


def amplitude(x: Tensor) -> Tensor:
    """Return the amplitudes (..., H, W // 2 + 1) of real maps (..., H, W), at least sqrt(1e-5)."""
    spectrum = torch.fft.rfft2(x)
    return _off_zero(spectrum.real.square() + spectrum.imag.square()).sqrt()


def compose(phases: Tensor, amplitudes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return real maps (..., H, W) of that size with these phases and amplitudes."""
    return torch.fft.irfft2(torch.polar(amplitudes, phases), s=size)


def _off_zero(values: Tensor) -> Tensor:
    """Return values, those within 1e-5 of zero being +1e-5, also negative ones, and without a gradient, as released."""
    return torch.where(values.abs() < _SMALLEST, _SMALLEST, values)
