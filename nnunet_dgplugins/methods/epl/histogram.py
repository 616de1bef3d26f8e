"""Histogram matching of a step's images, optional in training (the released loaders do it, at test time too)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def match_histograms(batches: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Give all images of a step the intensities of one of them, channel by channel.

    Args:
        batches: (B, C, ...) each, source images only.
        generator: CPU generator that draws the image.
    """
    from skimage.exposure import match_histograms as match

    images = torch.cat(list(batches))
    reference = images[int(torch.randint(len(images), (1,), generator=generator))].cpu().numpy()
    matched = [
        torch.from_numpy(match(image.cpu().numpy(), reference, channel_axis=0).astype(np.float32)) for image in images
    ]
    moved = torch.stack(matched).to(images.device)
    return list(moved.split([len(batch) for batch in batches]))
