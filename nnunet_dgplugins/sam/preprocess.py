"""From a slice of nnU-Net's data to SAM's canvas and back; one rule for training, embedding and prediction.

nnU-Net's predictor pads a slice with exact zeros up to its patch size. Everything here looks only at the box of
non-zero pixels, so padding never changes a bit of the result. SAM itself was given 0..255 RGB images; the published
DeSAM preprocessing (percentiles, stretch to the square canvas, SAM's normalisation) is applied per slice.

What the canvas shows is the content, or, where a ``field`` (rows, columns) is given, the middle of a larger field in
black: an organ then has the same size on the canvas whatever field of view a scanner chose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from nnunet_dgplugins.content import Box, Field, content_box, crop, margins
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam.models import SamModel

PREPROCESSING_VERSION = 1
PERCENTILES = (0.005, 0.995)
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def check_channels(channels: Sequence[int], available: int, where: str) -> None:
    """Refuse a channel choice that the data cannot serve.

    Raises:
        UserError: neither one nor three channels, or a channel that is not there.
    """
    if len(channels) not in (1, 3) or any(not 0 <= channel < available for channel in channels):
        raise UserError(
            f"{where}: channels={list(channels)} cannot be shown to SAM. Choose one channel (grey) or three "
            f"(red, green, blue) out of 0..{available - 1}."
        )


def to_canvas(x: torch.Tensor, model: SamModel, channels: Sequence[int], field: Field | None = None) -> torch.Tensor:
    """Prepare one slice for SAM's encoder.

    Args:
        x: slice (C, H, W) as nnU-Net preprocessed it, with or without zero padding.
        model: gives the canvas size S.
        channels: one channel (replicated to RGB) or three.
        field: rows and columns that the canvas shows at least, in pixels of x; smaller content stands in its middle,
            around it is 0. None: the content fills the canvas, as published.

    Returns:
        (3, S, S) float32. Each channel is clipped to its own 0.5 and 99.5 percentile inside the content box, scaled to
        0..255 (a constant channel becomes 0), stretched to the square without keeping the aspect ratio, normalised.
    """
    box = content_box(x)
    if box is None:
        part = x.new_zeros((len(channels), 1, 1), dtype=torch.float32)  # so that the size of an empty slice is no input
    else:
        part = crop(x[list(channels)].float(), box)
    low, high = _percentiles(part.flatten(1))
    spread = (high - low)[:, None, None]
    part = torch.minimum(torch.maximum(part, low[:, None, None]), high[:, None, None]) - low[:, None, None]
    part = torch.where(spread > 0, part / torch.where(spread > 0, spread, 1.0), 0.0) * 255
    if box is not None:
        part = F.pad(part, margins(part.shape[-2], part.shape[-1], field))
    size = (model.image_size, model.image_size)
    canvas = F.interpolate(part[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    mean = canvas.new_tensor(PIXEL_MEAN)[:, None, None]
    std = canvas.new_tensor(PIXEL_STD)[:, None, None]
    return (canvas.expand(3, -1, -1) - mean) / std


def _percentiles(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Percentiles of each row of (C, N), linear between neighbours; ``torch.quantile`` refuses large slices."""
    ordered = values.sort(dim=1).values
    found = []
    for share in PERCENTILES:
        place = share * (values.shape[1] - 1)
        below = int(place)
        above = min(below + 1, values.shape[1] - 1)
        found.append(torch.lerp(ordered[:, below], ordered[:, above], place - below))
    return found[0], found[1]


def resize_target(target: torch.Tensor, box: Box | None, size: int, field: Field | None = None) -> torch.Tensor:
    """Bring a target slice onto the mask that the decoder writes, by nearest pixel centres.

    Args:
        target: (C, H, W), whole numbers of any type; values are kept, negative ones too.
        box: what :func:`content_box` said of the image slice.
        size: side of the mask in pixels.
        field: as for :func:`to_canvas`; around the content is background.

    Returns:
        (C, size, size) of the same type.
    """
    part = crop(target, box)
    part = F.pad(part, margins(part.shape[-2], part.shape[-1], field)) if box is not None else part
    rows, columns = (((torch.arange(size) + 0.5) * (side / size)).long().to(target.device) for side in part.shape[-2:])
    return part[..., rows[:, None], columns[None, :]]
