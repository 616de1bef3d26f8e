"""ResNets of bottleneck blocks with output stride 16, the backbone of DeepLabV3+ (Chen et al., ECCV 2018).

The last stage is dilated by 2, 4, 8 instead of strided. Names are those of torchvision's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torchvision.models import ResNet

LAST_STAGE_DILATIONS = (2, 4, 8)


def dilated_resnet(blocks: Sequence[int]) -> ResNet:
    """Return torchvision's ResNet without pooling and classifier, its last stage dilated.

    Args:
        blocks: per stage; the last one has three.
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    net = ResNet(Bottleneck, list(blocks))
    del net.avgpool, net.fc
    net.layer4[0].downsample[0].stride = (1, 1)
    for block, dilation in zip(net.layer4, LAST_STAGE_DILATIONS, strict=True):
        block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
    return net


def first_and_last_stage(net: ResNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps behind the first stage (B, 256, H/4, W/4) and the last (B, 2048, H/16, W/16)."""
    low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
    return low, net.layer4(net.layer3(net.layer2(low)))
