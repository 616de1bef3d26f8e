"""From class maps to masks (Han et al., MedIA 2022): joint scaling, gate by tags, largest score, white background.

A mask holds 0 to C - 1 for the tissues, C for white background and :data:`IGNORE` where nothing is known.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnunet_dgplugins.methods.cam import precise
from nnunet_dgplugins.methods.dcam.maps import LAYERS, cams, enlarge, grad_cams
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38
from nnunet_dgplugins.methods.dcam.white import white_background

IGNORE = 255
EVALUATION_THRESHOLD = 0.25


def scale_jointly(maps: Tensor) -> Tensor:
    """Return maps from 0 to 1 over all classes, absent ones included, and all pixels of each image; 0 where constant.

    Args:
        maps: (N, C, H, W), of any sign.
    """
    maps = precise(maps)
    lowest = maps.amin((1, 2, 3), keepdim=True)
    span = maps.amax((1, 2, 3), keepdim=True) - lowest
    return (maps - lowest) / torch.where(span > 0, span, 1.0)


def tagged_mask(maps: Tensor, tags: Tensor, published_ties: bool = False, background: float | None = None) -> Tensor:
    """Return the tagged class of the largest score at each pixel; the lowest one of equals.

    Args:
        maps: (N, C, H, W) at the image's size, raw.
        tags: which classes the image shows (N, C), bool or 0 and 1.
        published_ties: untagged classes score 0 as released, so that a pixel whose tagged scores are all 0 falls to
            the lowest class of all, tagged or not. Otherwise untagged classes never win.
        background: where background is a class of its own, pixels whose scores all stay below it get C, and an image
            without tags is all background; None: it is none, as published.

    Returns:
        (N, H, W) uint8; :data:`IGNORE` everywhere in an image without tags, on which the released code stops.
    """
    tags = tags.to(maps.device).bool()
    scores = torch.where(tags[:, :, None, None], scale_jointly(maps), 0.0 if published_ties else -1.0)
    if background is not None:
        return torch.cat([scores, torch.full_like(scores[:, :1], background)], 1).argmax(1).to(torch.uint8)
    found = scores.argmax(1)
    return found.masked_fill(~tags.any(1)[:, None, None], IGNORE).to(torch.uint8)


def pseudo_masks(
    network: ResNet38,
    images: Tensor,
    tags: Tensor,
    *,
    white: bool = False,
    background: float | None = None,
    published_ties: bool = False,
    batch_size: int = 8,
) -> dict[str, Tensor]:
    """Return the pseudo masks of tagged images from the classifier's three depths.

    Args:
        network: in evaluation mode, on any device.
        images: (N, 3, H, W), 8-bit levels divided by 255.
        tags: (N, C), bool or 0 and 1.
        white: mark white background (LUAD-HistoSeg); elsewhere fat and the like is tissue.
        background: see :func:`tagged_mask`.
        published_ties: see :func:`tagged_mask`.
        batch_size: images at once; bounds the memory.

    Returns:
        (N, H, W) uint8 on the CPU for each of :data:`~.maps.LAYERS`. White pixels are the same in all three.
    """
    size = (images.shape[-2], images.shape[-1])
    device = network.fc8.weight.device
    parts: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}
    for some, some_tags in zip(images.split(batch_size), tags.split(batch_size), strict=True):
        found = grad_cams(network, some.to(device)).layers
        empty = white_pixels(some) if white else None
        for layer in LAYERS:
            mask = tagged_mask(enlarge(found[layer], size), some_tags, published_ties, background).cpu()
            if empty is not None:
                mask[empty & (mask != IGNORE)] = tags.shape[1]
            parts[layer].append(mask)
    return {layer: torch.cat(masks) for layer, masks in parts.items()}


def white_pixels(images: Tensor) -> Tensor:
    """Return which pixels of images (N, 3, H, W), 8-bit levels divided by 255, are white background (N, H, W)."""
    levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.from_numpy(np.stack([white_background(rgb) for rgb in levels]))


def cam_masks(
    network: ResNet38, images: Tensor, threshold: float = EVALUATION_THRESHOLD, published_ties: bool = False
) -> Tensor:
    """Return the classifier's own segmentation of images without tags, by which the release judges stage 1.

    :class:`~.segmenter.CAMClassifier` deploys the same as logits, and knows classes of background.

    Args:
        network: in evaluation mode.
        images: (N, 3, H, W) in [0, 1].
        threshold: classes of a higher probability take part; where there is none, the most probable one.
        published_ties: see :func:`tagged_mask`; the released code also answers class 0 where no class takes part.

    Returns:
        (N, H, W) uint8.
    """
    found = cams(network, images)
    return cam_mask(
        found.layers["bn7"], found.logits.sigmoid(), (images.shape[-2], images.shape[-1]), threshold, published_ties
    )


def cam_mask(
    maps: Tensor,
    probabilities: Tensor,
    size: tuple[int, int],
    threshold: float = EVALUATION_THRESHOLD,
    published_ties: bool = False,
) -> Tensor:
    """Return masks (N, H, W) uint8 of plain CAMs (N, C, h, w); see :func:`cam_masks`.

    Classes that take no part are emptied before the joint scaling.
    """
    present = present_classes(probabilities, threshold)
    return tagged_mask(enlarge(maps, size) * present[:, :, None, None], present, published_ties)


def present_classes(probabilities: Tensor, threshold: float = EVALUATION_THRESHOLD, background: bool = False) -> Tensor:
    """Return which classes take part (N, C): those above the threshold, the most probable one where there is none.

    Args:
        probabilities: of the tag classifier (N, C).
        threshold: of the evaluation of stage 1.
        background: whether background is a class of its own; then none may take part.
    """
    present = probabilities > threshold
    if background:
        return present
    likeliest = torch.zeros_like(present).scatter(1, probabilities.argmax(1, keepdim=True), True)
    return torch.where(present.any(1, keepdim=True), present, likeliest)
