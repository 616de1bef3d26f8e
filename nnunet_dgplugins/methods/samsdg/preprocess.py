"""From a slice to the image that both networks see.

SAM-SDG's released loader: all channels share one minimum and maximum, then 8 bits, histogram equalisation channel by
channel, [0, 1]. Each step works on the slice's content alone (no zero padding), so nothing around it changes a bit; a
constant slice, on which the released code divides by zero, becomes black. The released code enlarges before it
equalises, here it is the other way round: the histogram is then that of the pixels that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_dgplugins.content import Field, content_box, crop, margins

CHANNELS = 3


def to_8_bit(image: Tensor) -> Tensor:
    """Return an image (C, H, W) between its joint minimum and maximum as uint8 0..255; a constant one is 0."""
    low, high = image.min(), image.max()
    spread = torch.where(high > low, high - low, torch.ones_like(high))
    return torch.round((image - low) / spread * 255).to(torch.uint8)


def equalised(image: Tensor) -> Tensor:
    """Spread each channel's histogram of a uint8 image (C, H, W)."""
    from torchvision.transforms.functional import equalize

    found: Tensor = equalize(image)
    return found


def seen(x: Tensor, channels: Sequence[int], field: Field | None = None, equalise: bool = True) -> Tensor | None:
    """Return what is seen of one slice at its own resolution.

    Args:
        x: slice (C, H, W) as nnU-Net preprocessed it, with or without zero padding.
        channels: one channel (shown three times) or three, published: the slices z - 1, z, z + 1.
        field: rows and columns that are shown at least, black around smaller content; None: the content alone.
        equalise: spread the histogram, as published.

    Returns:
        (3, h, w) float32 in [0, 1]; None for a slice of zeros.
    """
    box = content_box(x)
    if box is None:
        return None
    image = to_8_bit(crop(x[list(channels)].float(), box))
    image = (equalised(image) if equalise else image).float() / 255
    return F.pad(image, margins(image.shape[-2], image.shape[-1], field)).expand(CHANNELS, -1, -1)


def resized(image: Tensor, size: int) -> Tensor:
    """Stretch an image (C, h, w) to (C, size, size), bilinear; anti-aliased where it shrinks, unlike the published."""
    return F.interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True)[0]
