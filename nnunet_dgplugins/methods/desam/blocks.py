"""Building blocks of the prompt-decoupled mask module.

Gao et al., DeSAM, MICCAI 2024, section 2.3. Attribute names are those of the released code (``conv1.conv`` and so on),
because they are the keys of its checkpoints.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_SLOPE = 0.01
NORM_EPS = 1e-5
SE_REDUCTION = 16
Halves = tuple[Tensor, Tensor | None]


class Conv(nn.Module):
    """Bias-free convolution of stride 1 that keeps the size."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, Cin, H, W) to (B, Cout, H, W)."""
        return self.conv(x)

    def part(self, x: Tensor, start: int) -> Tensor:
        """Convolve only input channels ``start`` to ``start + x.shape[1]``: one summand of the whole convolution."""
        weight = self.conv.weight[:, start : start + x.shape[1]]
        return F.conv2d(x, weight, padding=self.conv.padding)


class Upsample(nn.Module):
    """Bias-free transposed convolution that doubles the size."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels_in, channels_out, kernel_size=2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (B, Cin, H, W) to (B, Cout, 2H, 2W)."""
        return self.conv(x)


class SqueezeExcitation(nn.Module):
    """Channel gate.

    Behind a normalisation without affine parameters its pooled input is zero up to rounding, so the gate is sigmoid(0)
    = 0.5 and never learns. That is how the method was published, and the factor is kept.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // SE_REDUCTION
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of (B, C, H, W)."""
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


class ResSE(nn.Module):
    """Residual block with squeeze-and-excitation: conv, norm, LeakyReLU, conv, norm, gate, sum, LeakyReLU.

    Args:
        channels_in: input channels; the later ones may be fed apart, see :meth:`forward_halves`.
        channels_out: output channels, a multiple of 16.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv1 = Conv(channels_in, channels_out, 3)
        self.conv2 = Conv(channels_out, channels_out, 3)
        self.conv3 = Conv(channels_in, channels_out, 1)  # exists in checkpoints even where the shortcut is the identity
        self.se = SqueezeExcitation(channels_out)
        self.identity = channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Cin, H, W) to (B, Cout, H, W)."""
        return self._finish(self.conv1(x), x if self.identity else _norm(self.conv3(x)))

    def second_half(self, x: Tensor) -> Halves:
        """Return what the later input channels contribute to both convolutions of the concatenated input.

        Convolutions are linear, so ``conv(cat[a, b]) = conv_a(a) + conv_b(b)``: where ``b`` is the same for many
        ``a``, its part is worked out once.
        """
        start = self.conv1.conv.in_channels - x.shape[1]
        return self.conv1.part(x, start), None if self.identity else self.conv3.part(x, start)

    def forward_halves(self, first: Tensor, second: Halves) -> Tensor:
        """Equal :meth:`forward` of ``cat[first, x]`` where ``second = second_half(x)`` (batch 1 or that of first)."""
        wide, shortcut = second
        if self.identity or shortcut is None:
            raise ValueError("A block with an identity shortcut cannot take its input in halves.")
        return self._finish(self.conv1.part(first, 0) + wide, _norm(self.conv3.part(first, 0) + shortcut))

    def _finish(self, wide: Tensor, shortcut: Tensor) -> Tensor:
        inner = F.leaky_relu(_norm(wide), LEAKY_SLOPE)
        return F.leaky_relu(self.se(_norm(self.conv2(inner))) + shortcut, LEAKY_SLOPE)


def _norm(x: Tensor) -> Tensor:
    """Instance normalisation without parameters or running statistics.

    One group per channel is the same function; PyTorch runs it 3-10 times faster on a CPU, while autocast on CUDA would
    raise it to float32.
    """
    if x.device.type == "cpu":
        return F.group_norm(x, x.shape[1], eps=NORM_EPS)
    return F.instance_norm(x, eps=NORM_EPS)


def expanded_to_batch(x: Tensor, like: Tensor) -> Tensor:
    """Expand a batch of one to the batch of ``like`` without copying."""
    if x.shape[0] == like.shape[0]:
        return x
    return x.expand(like.shape[0], *x.shape[1:])
