"""Class activation maps: standardised input, maps between 0 and 1, CAM, Grad-CAM and Grad-CAM++.

Zhou et al., CVPR 2016 (CAM); Selvaraju et al., ICCV 2017 (Grad-CAM); Chattopadhyay et al., WACV 2018 (Grad-CAM++), with
the normalisation of Patel and Dolz, Medical Image Analysis 2022. Normalisations run in float32 at least, also under
autocast: their small constants vanish in half precision and would leave 0/0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STD_FLOOR = 1e-12
_RANGE_FLOOR = 1e-8


def standardise(images: Tensor) -> Tensor:
    """Return each sample and channel with mean 0 and (unbiased) standard deviation 1, background included.

    Args:
        images: (..., H, W).

    Returns:
        Same shape, float32 (float64 where given); a constant image becomes 0.
    """
    images = precise(images)
    deviation = images - images.mean((-2, -1), keepdim=True)
    scaled = deviation / (images.std((-2, -1), keepdim=True) + _STD_FLOOR)
    # rounding leaves a constant image a deviation that the division would blow up
    constant = images.amax((-2, -1), keepdim=True) == images.amin((-2, -1), keepdim=True)
    return torch.where(constant, 0.0, scaled)


def normalise(maps: Tensor) -> Tensor:
    """Return the positive part of each map, from 0 to (nearly) 1; gradients flow through minimum and maximum too.

    Args:
        maps: (..., H, W), of any sign.

    Returns:
        Same shape, float32 (float64 where given); a map that is constant or nowhere positive becomes 0.
    """
    positive = precise(maps).relu()
    lowest, highest = positive.amin((-2, -1), keepdim=True), positive.amax((-2, -1), keepdim=True)
    return (positive - lowest - _RANGE_FLOOR).relu() / (highest - lowest + _RANGE_FLOOR)


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return Grad-CAM (N, H, W) before normalisation: channels weighted by the mean of their gradients.

    Args:
        activations: (N, C, H, W) of the hooked layer.
        gradients: of the class's logit, same shape, or (N, C, 1, 1) where they are the same at every place.
    """
    weights = gradients.mean((-2, -1), keepdim=True)
    return (weights * activations).sum(1).relu()


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor, scores: Tensor) -> Tensor:
    """Return Grad-CAM++ (N, H, W) before normalisation.

    Args:
        activations: (N, C, H, W) of the hooked layer.
        gradients: as in :func:`grad_cam`.
        scores: the class's logits (N,).
    """
    places = activations.shape[-2] * activations.shape[-1]
    square = gradients.square()
    spread = 2 * square + (activations * gradients**3).sum((-2, -1), keepdim=True)
    alpha = square / torch.where(spread == 0, 1.0, spread)
    per_place = alpha * (scores.exp().view(-1, 1, 1, 1) * gradients).relu()
    repeats = places // (per_place.shape[-2] * per_place.shape[-1])
    weights = per_place.sum((-2, -1), keepdim=True) * repeats
    return (weights * activations).sum(1).relu()


def to_bytes(maps: Tensor) -> Tensor:
    """Return maps in [0, 1] as 8-bit levels, ``floor(255 * map)``, the grey images that were published."""
    return (maps * 255).to(torch.uint8)


def precise(values: Tensor) -> Tensor:
    """Return values in float32, or float64 where given."""
    return values if values.dtype == torch.float64 else values.float()
