"""The coarse network: DeepLabV3 on ResNet-50 with output stride 8 (SAM-SDG, arXiv 2401.02076, section 3.2).

Chen et al., arXiv 1706.05587, in torchvision's form and under torchvision's names; the released code differs in the
dropout alone (0.1 instead of 0.5). 39,633,729 parameters with one class.
"""

from __future__ import annotations

import os
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.safe_loading import Loaded, fits_somewhere, load_matching, read_state_dict

DROPOUT = 0.1
_BACKBONE = "backbone."
# the released network has one level more around its head
_RELEASED_HEAD, _HEAD = "classifier.classifier.", "classifier."


class CoarseNetwork(nn.Module):
    """DeepLabV3-ResNet50 without auxiliary head; weights are random until :func:`load_start_weights`.

    In training mode a forward needs at least two images: the pooled branch normalises one value per image and channel.

    Args:
        num_classes: output channels K, one sigmoid each.

    Example:
        >>> CoarseNetwork(1).eval()(torch.zeros(1, 3, 64, 64)).shape  # doctest: +SKIP
        torch.Size([1, 1, 64, 64])
    """

    def __init__(self, num_classes: int = 1):
        from torchvision.models.segmentation import deeplabv3_resnet50

        super().__init__()
        # both None: torchvision would download either file
        network: Any = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=num_classes)
        self.backbone, self.classifier = network.backbone, network.classifier
        self.classifier[0].project[3].p = DROPOUT
        for module in self.classifier.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, K, H, W)."""
        logits = self.classifier(self.backbone(images)["out"])
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def load_start_weights(network: nn.Module, path: str | os.PathLike[str]) -> Loaded:
    """Load a file's weights where names and shapes fit, and say what became of each tensor.

    The file holds torchvision's ImageNet ResNet-50 (as the paper starts from; its ``fc.*`` is unknown to the network),
    a DeepLabV3 of torchvision, or the bare tensors of a released step-1 network. Nothing is ever downloaded.

    Raises:
        UserError: the file cannot be read safely, or nothing in it fits.
    """
    state = {name.replace(_RELEASED_HEAD, _HEAD): value for name, value in read_state_dict(path).items()}
    if not any(name.startswith(_BACKBONE) for name in state):
        state = {_BACKBONE + name: value for name, value in state.items()}
    if not fits_somewhere(network, state):
        example = ", ".join(name.removeprefix(_BACKBONE) for name in list(state)[:3]) or "no tensor"
        raise UserError(
            f"{path}: nothing fits the coarse network's ResNet-50; found for example {example}. Expected torchvision's "
            "ImageNet file (resnet50-*.pth) with names such as conv1.weight and layer1.0.conv1.weight."
        )
    return load_matching(network, state)
