"""Class maps of the tag classifier: CAM, and Grad-CAM at three depths of all classes from one forward pass.

Han et al., MedIA 2022. The gradient of a class's logit at a tap, averaged over places, weights the tap's channels; no
ReLU. At ``bn7`` the gradient is the classifier's weight over the number of places, so no backward pass is needed. The
two earlier taps share one backward pass per class that ends at the first of them; images of a batch do not meet in
evaluation mode, so one pass serves them all. Everything runs through the network's own forward, PCNorm included (the
released code walks the modules in the order of their registration and leaves it out).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38

LAYERS = ("b4_5", "b5_2", "bn7")


class ClassMaps(NamedTuple):
    """What the classifier says of images.

    ``logits`` (N, C); ``layers``: Grad-CAM (N, C, h, w), signed, at the features' resolution, by the names of
    :data:`LAYERS`.
    """

    logits: Tensor
    layers: dict[str, Tensor]


@torch.no_grad()
def grad_cams(network: ResNet38, images: Tensor) -> ClassMaps:
    """Return Grad-CAM of all classes at the three depths: one forward pass, one partial backward pass per class.

    Args:
        network: in evaluation mode.
        images: (N, 3, H, W) in [0, 1]; all of them at once, so N bounds the memory.

    Raises:
        ValueError: the network is in training mode, where images of a batch are not independent.
    """
    _require_evaluation(network)
    b4_5 = network.shallow(images)  # nothing below the first tap is tracked
    with torch.enable_grad():
        b4_5.requires_grad_()
        b5_2 = network.middle(b4_5)
        bn7 = network.deep(b5_2)
        logits = network.logits(bn7)
        weights: dict[str, list[Tensor]] = {"b4_5": [], "b5_2": []}
        for score in logits.unbind(1):
            gradients = torch.autograd.grad(score.sum(), (b4_5, b5_2), retain_graph=True)
            for layer, gradient in zip(weights, gradients, strict=True):
                weights[layer].append(gradient.mean((2, 3)))
    layers = {
        layer: torch.einsum("nck,nkhw->nchw", torch.stack(weights[layer], 1), tap.detach())
        for layer, tap in (("b4_5", b4_5), ("b5_2", b5_2))
    }
    places = bn7.shape[-2] * bn7.shape[-1]
    layers["bn7"] = F.conv2d(bn7.detach(), network.fc8.weight / places)
    return ClassMaps(logits.detach(), layers)


def published_grad_cam(network: ResNet38, image: Tensor, layer: str, target: int) -> Tensor:
    """Return one Grad-CAM (h, w) by the published order of work: a whole forward and backward for it alone.

    Reference for tests and benchmark; gradients of all weights are computed, as released, and dropped.

    Args:
        network: in evaluation mode.
        image: (1, 3, H, W).
        layer: one of :data:`LAYERS`.
        target: number of the class.
    """
    taps = network.taps(image.clone().requires_grad_())
    tap: Tensor = getattr(taps, layer)
    tap.retain_grad()
    network.logits(taps.bn7)[0, target].backward()
    assert tap.grad is not None
    weights = tap.grad.mean((2, 3), keepdim=True)
    network.zero_grad(set_to_none=True)
    return (weights * tap.detach()).sum(1)[0]


@torch.no_grad()
def cams(network: ResNet38, images: Tensor) -> ClassMaps:
    """Return logits and the plain CAM (N, C, h, w), not negative, as layer ``bn7``; a forward pass alone.

    Args:
        network: in evaluation mode.
        images: (N, 3, H, W) in [0, 1].

    Raises:
        ValueError: the network is in training mode.
    """
    _require_evaluation(network)
    bn7 = network.taps(images).bn7
    return ClassMaps(network.logits(bn7), {"bn7": F.conv2d(bn7, network.fc8.weight).relu()})


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (N, C, h, w) at the image's size, bilinear between pixel centres."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _require_evaluation(network: ResNet38) -> None:
    if network.training:
        raise ValueError("Class maps need the network in evaluation mode: call network.eval() first.")
