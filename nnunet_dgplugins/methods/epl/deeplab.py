"""DeepLabV3+ on ResNet-50 v1c as EPL trains it (Yao et al., AAAI 2022), under the released parameter names.

Chen et al., ECCV 2018, with the changes of the cross-pseudo-supervision code that EPL builds on: a stem of three 3x3
convolutions (v1c), the last stage dilated by 2, 4, 8 instead of strided (output stride 16), one normalisation behind
the joined ASPP branches, and the global branch added rather than concatenated. The released second output, a pooled
feature that no loss reads and that fails below 18x18 features, is left out. 40,470,436 parameters with one input
channel and four classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dgplugins.methods.dilated_resnet import dilated_resnet, first_and_last_stage
from nnunet_dgplugins.methods.epl.styles import unit_range

if TYPE_CHECKING:
    from torchvision.models import ResNet

ASPP_DILATIONS = (6, 12, 18)
WIDTH = 256  # of the head
LOW_LEVEL_WIDTH = 48
DROPOUT = 0.1
STEM_WIDTH = 64


class DeepLabV3Plus(nn.Module):
    """Segmentation network for slices of any size.

    In training mode a forward needs at least two images: the global branch normalises one value per image and channel.

    Args:
        in_channels: input channels; published: 1.
        num_classes: output channels K.
        input_scaling: what is done to each image first, see :func:`~.styles.unit_range`; ``none`` for images that are
            normalised already.

    Example:
        >>> DeepLabV3Plus(in_channels=1, num_classes=4)(torch.zeros(2, 1, 288, 288)).shape  # training mode
        torch.Size([2, 4, 288, 288])
    """

    def __init__(self, in_channels: int, num_classes: int, input_scaling: str = "none"):
        super().__init__()
        self.input_scaling = input_scaling
        self.backbone = resnet50_v1c(in_channels)
        self.head = Head(low_level_channels=256, high_level_channels=2048)
        self.classifier = nn.Conv2d(WIDTH, num_classes, 1)
        for module in (*self.head.modules(), self.classifier):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K, H, W)."""
        logits = self.classifier(self.head(*first_and_last_stage(self.backbone, unit_range(x, self.input_scaling))))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=True)


def resnet50_v1c(in_channels: int) -> ResNet:
    """Return torchvision's ResNet-50 with the v1c stem and the dilated last stage, without pooling and classifier.

    Names are those of the published ImageNet file ``resnet50_v1c.pth``.
    """
    width = STEM_WIDTH
    net = dilated_resnet([3, 4, 6, 3])
    net.conv1 = nn.Sequential(
        nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
    )
    net.bn1 = nn.BatchNorm2d(2 * width)
    first = net.layer1[0]
    first.conv1 = nn.Conv2d(2 * width, first.conv1.out_channels, 1, bias=False)
    first.downsample[0] = nn.Conv2d(2 * width, first.downsample[0].out_channels, 1, bias=False)
    return net


class ASPP(nn.Module):
    """Dilated convolutions side by side, and the image's mean added to them.

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        hidden_channels: channels of each branch.
        dilations: of the three 3x3 branches; a 1x1 branch comes first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = WIDTH,
        hidden_channels: int = WIDTH,
        dilations: Sequence[int] = ASPP_DILATIONS,
    ):
        super().__init__()
        self.map_convs = nn.ModuleList(
            [nn.Conv2d(in_channels, hidden_channels, 1, bias=False)]
            + [nn.Conv2d(in_channels, hidden_channels, 3, dilation=d, padding=d, bias=False) for d in dilations]
        )
        joined = hidden_channels * len(self.map_convs)
        self.map_bn = nn.BatchNorm2d(joined)
        self.red_conv = nn.Conv2d(joined, out_channels, 1, bias=False)
        self.global_pooling_conv = nn.Conv2d(in_channels, hidden_channels, 1, bias=False)
        self.global_pooling_bn = nn.BatchNorm2d(hidden_channels)
        self.pool_red_conv = nn.Conv2d(hidden_channels, out_channels, 1, bias=False)
        self.red_bn = nn.BatchNorm2d(out_channels)
        self.leak_relu = nn.LeakyReLU(0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Cin, H, W) to (B, Cout, H, W)."""
        local = torch.cat([conv(x) for conv in self.map_convs], dim=1)
        local = self.red_conv(self.leak_relu(self.map_bn(local)))
        whole = self.global_pooling_conv(x.mean((2, 3), keepdim=True))
        whole = self.pool_red_conv(self.leak_relu(self.global_pooling_bn(whole)))
        return self.leak_relu(self.red_bn(local + whole))


class Head(nn.Module):
    """ASPP on the deep map, joined with the shallow one.

    Args:
        low_level_channels: channels of the shallow map.
        high_level_channels: channels of the deep map.
    """

    def __init__(self, low_level_channels: int, high_level_channels: int):
        super().__init__()
        self.aspp = ASPP(high_level_channels)
        self.reduce = nn.Sequential(
            nn.Conv2d(low_level_channels, LOW_LEVEL_WIDTH, 1, bias=False), nn.BatchNorm2d(LOW_LEVEL_WIDTH), nn.ReLU()
        )
        self.last_conv = nn.Sequential(
            nn.Conv2d(WIDTH + LOW_LEVEL_WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Dropout2d(DROPOUT),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Map the shallow (B, Cl, H/4, W/4) and the deep map (B, Ch, H/16, W/16) to (B, 256, H/4, W/4)."""
        high = F.interpolate(self.aspp(high), size=low.shape[2:], mode="bilinear", align_corners=True)
        return self.last_conv(torch.cat([high, self.reduce(low)], dim=1))
