"""The tag classifier: ResNet-38d (Wu et al., arXiv 1611.10080) as multi-layer pseudo-supervision trains it, and PCNorm.

Pre-activation residual blocks without a normalised stem, output stride 8, input RGB in [0, 1] without mean and standard
deviation. Parameter names are the released ones. 105,070,912 parameters and 4096 per class, PCNorm's left aside.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from nnunet_dgplugins.methods.dcam import pcnorm as pcnorms
from nnunet_dgplugins.methods.dcam.attention import dropped_attention

STRIDE = 8
_EARLY = ("conv1a", "b2", "b2_1", "b2_2")


class Taps(NamedTuple):
    """Feature maps at the three depths that class maps are made of, at 1/8 of the image's size.

    ``b4_5`` (N, 512, h, w) and ``b5_2`` (N, 1024, h, w) are block outputs before any ReLU; ``bn7`` (N, 4096, h, w) is
    behind normalisation and ReLU. Where PCNorm is active, ``b4_5`` lies behind it, as what the next block sees: PCNorm
    by instance takes no notice of a channel's mean, so the mean gradient before it, Grad-CAM's weight, is always 0.
    """

    b4_5: Tensor
    b5_2: Tensor
    bn7: Tensor


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside the input, or beside a 1x1 convolution where channels or stride change.

    Args:
        in_channels: of the input.
        mid_channels: between the convolutions.
        out_channels: of the output.
        stride: of the first convolution.
        first_dilation: of the first convolution; None: ``dilation``.
        dilation: of the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        stride: int = 1,
        first_dilation: int | None = None,
        dilation: int = 1,
    ):
        super().__init__()
        first = first_dilation or dilation
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(
            in_channels, mid_channels, 3, stride, padding=first, dilation=first, bias=False
        )  # fmt: skip
        self.bn_branch2b1 = nn.BatchNorm2d(mid_channels)
        self.conv_branch2b1 = nn.Conv2d(
            mid_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False
        )  # fmt: skip
        self.stride = stride
        self.conv_branch1: nn.Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, Cin, H, W) to (N, Cout, H / stride, W / stride)."""
        active = self.bn_branch2a(x).relu()
        beside = x
        if self.conv_branch1 is not None:
            # the stride is taken here: on the CPU a strided 1x1 convolution writes beyond its memory (torch 2.15) in
            # the channels-last layout of fewer than 16 channels, which thin towers have
            beside = self.conv_branch1(active[:, :, :: self.stride, :: self.stride])
        out = self.conv_branch2b1(self.bn_branch2b1(self.conv_branch2a(active)).relu())
        return beside + out


class Bottleneck(nn.Module):
    """1x1, dilated 3x3 and 1x1 convolution with dropped channels, beside a 1x1 convolution.

    Args:
        in_channels: of the input.
        out_channels: of the output; a quarter and a half of them in between.
        dilation: of the 3x3 convolution.
        dropout: probability of dropping a channel, twice.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int, dropout: float):
        super().__init__()
        quarter, half = out_channels // 4, out_channels // 2
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.conv_branch2b1 = nn.Conv2d(quarter, half, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.conv_branch2b2 = nn.Conv2d(half, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, Cin, H, W) to (N, Cout, H, W)."""
        active = self.bn_branch2a(x).relu()
        out = self.dropout(self.bn_branch2b1(self.conv_branch2a(active)).relu())
        out = self.dropout(self.bn_branch2b2(self.conv_branch2b1(out)).relu())
        return self.conv_branch1(active) + self.conv_branch2b2(out)


class ResNet38(nn.Module):
    """Which tissues a patch shows, as C independent logits.

    Args:
        num_classes: C.
        width_divisor: all channels are divided by it, a divisor of 64; 1 is the published tower, for small machines try
            8 or 16.
        pcnorm: see :data:`~.pcnorm.MODES`; ``official`` and ``off`` compute nothing there.
        in_channels: of the image.
        attention_divisor: see :func:`~.attention.dropped_attention`.

    Example:
        >>> ResNet38(num_classes=4, width_divisor=16)(torch.rand(2, 3, 224, 224)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width_divisor: int = 1,
        pcnorm: str = "instance",
        in_channels: int = 3,
        attention_divisor: int | None = None,
    ):
        super().__init__()
        if width_divisor < 1 or 64 % width_divisor:
            raise ValueError(f"width_divisor is a divisor of 64, got {width_divisor}.")
        c64, c128, c256, c512, c1024, c2048, c4096 = (64 * 2**i // width_divisor for i in range(7))
        self.attention_divisor = attention_divisor
        self.conv1a = nn.Conv2d(in_channels, c64, 3, padding=1, bias=False)
        self.b2 = ResBlock(c64, c128, c128, stride=2)
        self.b2_1 = ResBlock(c128, c128, c128)
        self.b2_2 = ResBlock(c128, c128, c128)
        self.bn2 = pcnorms.layer(c128, pcnorm)
        self.b3 = ResBlock(c128, c256, c256, stride=2)
        self.b3_1 = ResBlock(c256, c256, c256)
        self.b3_2 = ResBlock(c256, c256, c256)
        self.bn3 = pcnorms.layer(c256, pcnorm)
        self.b4 = ResBlock(c256, c512, c512, stride=2)
        self.b4_1 = ResBlock(c512, c512, c512)
        self.b4_2 = ResBlock(c512, c512, c512)
        self.b4_3 = ResBlock(c512, c512, c512)
        self.b4_4 = ResBlock(c512, c512, c512)
        self.b4_5 = ResBlock(c512, c512, c512)
        self.bn4 = pcnorms.layer(c512, pcnorm)
        self.b5 = ResBlock(c512, c512, c1024, first_dilation=1, dilation=2)
        self.b5_1 = ResBlock(c1024, c512, c1024, dilation=2)
        self.b5_2 = ResBlock(c1024, c512, c1024, dilation=2)
        self.b6 = Bottleneck(c1024, c2048, dilation=4, dropout=0.3)
        self.b7 = Bottleneck(c2048, c4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(c4096)
        self.dropout7 = nn.Dropout2d(0.5)
        self.fc8 = nn.Conv2d(c4096, num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        self._frozen_norms: tuple[str, ...] = ()

    def shallow(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to the first tap, ``b4_5``."""
        x = self.conv1a(images)
        for block in (self.b2, self.b2_1, self.b2_2, self.bn2, self.b3, self.b3_1, self.b3_2, self.bn3,
                      self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5, self.bn4):  # fmt: skip
            x = block(x)
        return x

    def middle(self, b4_5: Tensor) -> Tensor:
        """Map the first tap to the second, ``b5_2``."""
        return self.b5_2(self.b5_1(self.b5(b4_5)))

    def deep(self, b5_2: Tensor) -> Tensor:
        """Map the second tap to the third, ``bn7``."""
        return self.bn7(self.b7(self.b6(b5_2))).relu()

    def taps(self, images: Tensor) -> Taps:
        """Map images (N, 3, H, W) to the features at the three depths."""
        b4_5 = self.shallow(images)
        b5_2 = self.middle(b4_5)
        return Taps(b4_5, b5_2, self.deep(b5_2))

    def logits(self, bn7: Tensor, gamma: float | None = None) -> Tensor:
        """Map the third tap to logits (N, C).

        Args:
            bn7: (N, 4096, h, w).
            gamma: of the progressive dropout attention, in training; None: without attention.
        """
        if gamma is not None:
            bn7 = dropped_attention(bn7, self.fc8.weight, gamma, self.attention_divisor)
        # dropping a channel before its mean is taken or after is the same
        return self.fc8(self.dropout7(bn7.mean((2, 3), keepdim=True))).flatten(1)

    def forward(self, images: Tensor, gamma: float | None = None) -> Tensor:
        """Map images (N, 3, H, W) in [0, 1] to logits (N, C)."""
        return self.logits(self.taps(images).bn7, gamma)

    def freeze(self, adapt_norms: bool | None = None) -> None:
        """Hold still what the published training holds still; only for a network whose start weights are loaded.

        These are conv1a and the blocks b2*, and the weights and statistics of every batch normalisation (PCNorm is
        none). Without start weights nothing may be frozen: random features and statistics would stay.

        Args:
            adapt_norms: let the batch normalisations behind b2* learn. None: where PCNorm is active, whose output is
                nothing like what their statistics were estimated on; published: never.
        """
        adapt = any(isinstance(m, pcnorms.PCNorm) for m in self.modules()) if adapt_norms is None else adapt_norms
        norms = [name for name, module in self.named_modules() if isinstance(module, nn.BatchNorm2d)]
        self._frozen_norms = tuple(name for name in norms if not adapt or name.split(".")[0] in _EARLY)
        for name in (*_EARLY, *self._frozen_norms):
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ResNet38:
        """Set the mode; frozen normalisations stay in evaluation."""
        super().train(mode)
        for name in self._frozen_norms:
            self.get_submodule(name).eval()
        return self
