"""DeepLabV3+ on ResNet-101 (Chen et al., ECCV 2018), stage 2's published network, under the released parameter names.

Output stride 16, input RGB in [0, 1]. With four classes 59,339,940 parameters. EPL's DeepLabV3+ has another stem,
another ASPP and other names; the two share the dilated ResNet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dgplugins.methods.dilated_resnet import dilated_resnet, first_and_last_stage

BLOCKS = (3, 4, 23, 3)
ASPP_DILATIONS = (6, 12, 18)
LOW_CHANNELS, HIGH_CHANNELS = 256, 2048
WIDTH = 256  # of the head
LOW_LEVEL_WIDTH = 48


class DeepLab(nn.Module):
    """Segmentation network for patches of any size; no background channel.

    In training mode a forward needs at least two images: the pooled branch normalises one value per image and channel.

    Args:
        num_classes: output channels C.
        in_channels: input channels; published: 3.

    Example:
        >>> DeepLab(num_classes=4)(torch.zeros(2, 3, 224, 224)).shape  # training mode
        torch.Size([2, 4, 224, 224])
    """

    def __init__(self, num_classes: int, in_channels: int = 3):
        super().__init__()
        self.backbone = dilated_resnet(BLOCKS)
        if in_channels != 3:
            self.backbone.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.aspp = ASPP()
        self.decoder = Decoder(num_classes)
        for module in (*self.aspp.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, C, H, W)."""
        low, high = first_and_last_stage(self.backbone, x)
        return _resized(self.decoder(self.aspp(high), low), x)


class Branch(nn.Module):
    """One dilated convolution of the ASPP.

    Args:
        dilation: of a 3x3 convolution; None: 1x1.
    """

    def __init__(self, dilation: int | None = None):
        super().__init__()
        self.atrous_conv = (
            nn.Conv2d(HIGH_CHANNELS, WIDTH, 1, bias=False)
            if dilation is None
            else nn.Conv2d(HIGH_CHANNELS, WIDTH, 3, padding=dilation, dilation=dilation, bias=False)
        )
        self.bn = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 2048, H, W) to (B, 256, H, W)."""
        out: Tensor = self.bn(self.atrous_conv(x))
        return out.relu()


class ASPP(nn.Module):
    """Dilated convolutions and the pooled image side by side, joined by a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.aspp1 = Branch()
        self.aspp2, self.aspp3, self.aspp4 = (Branch(dilation) for dilation in ASPP_DILATIONS)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(HIGH_CHANNELS, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )
        self.conv1 = nn.Conv2d(5 * WIDTH, WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 2048, H, W) to (B, 256, H, W)."""
        pooled = self.global_avg_pool(x).expand(-1, -1, *x.shape[2:])
        joined = torch.cat([self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x), pooled], 1)
        out: Tensor = self.dropout(self.bn1(self.conv1(joined)).relu())
        return out


class Decoder(nn.Module):
    """Joins the deep map with the shallow one.

    Args:
        num_classes: output channels C.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(LOW_CHANNELS, LOW_LEVEL_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(LOW_LEVEL_WIDTH)
        self.last_conv = nn.Sequential(
            nn.Conv2d(WIDTH + LOW_LEVEL_WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(WIDTH, num_classes, 1),
        )

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """Map the deep (B, 256, H/16, W/16) and the shallow map (B, 256, H/4, W/4) to logits (B, C, H/4, W/4)."""
        low = self.bn1(self.conv1(low)).relu()
        out: Tensor = self.last_conv(torch.cat([_resized(high, low), low], 1))
        return out


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)
