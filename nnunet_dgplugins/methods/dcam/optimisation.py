"""Learning rates, parameter groups and momentum of both stages, as the released code sets them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from nnunet_dgplugins.methods.dcam.deeplab import DeepLab
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38

HEAD_FACTOR = 10.0
POWER = 0.9
WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9
#: stage 1 as released, where the weight decay is passed in the momentum's place
PUBLISHED_MOMENTUM = 5e-4


def poly(step: int, max_steps: int, power: float = POWER) -> float:
    """Return the factor of the learning rate in a step counted from 0: ``(1 - step / max_steps) ** power``."""
    return max(0.0, 1 - step / max_steps) ** power


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set each group's rate to its ``initial_lr`` times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def classifier_groups(network: ResNet38, lr: float, weight_decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """Return stage 1's groups: what is not frozen at ``lr``, the classifier's last layer at ten times that.

    The released groups of biases are empty, because no convolution has one. Released code leaves every normalisation
    out, which it has frozen; what :meth:`ResNet38.freeze` leaves trainable is trained here, and so is PCNorm.
    """
    head = list(network.fc8.parameters())
    own = {id(parameter) for parameter in head}
    return _groups([p for p in network.parameters() if id(p) not in own], head, lr, weight_decay)


def deeplab_groups(network: DeepLab, lr: float, weight_decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """Return stage 2's groups: the backbone at ``lr``, ASPP and decoder at ten times that; normalisations included."""
    head = [*network.aspp.parameters(), *network.decoder.parameters()]
    return _groups(list(network.backbone.parameters()), head, lr, weight_decay)


def _groups(
    body: list[nn.Parameter], head: list[nn.Parameter], lr: float, weight_decay: float
) -> list[dict[str, Any]]:  # fmt: skip
    return [
        {
            "params": [parameter for parameter in parameters if parameter.requires_grad],
            "lr": rate,
            "initial_lr": rate,
            "weight_decay": weight_decay,
        }
        for parameters, rate in ((body, lr), (head, HEAD_FACTOR * lr))
    ]
