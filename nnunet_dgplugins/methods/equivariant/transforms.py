"""The spatial transforms under which a map must move with its image (Patel and Dolz, MedIA 2022, code: class All).

Parameters are drawn once, apart from applying them, and shared by every modality, image and map of a batch. Quarter
turns are exact; the released code's are shifted by one pixel and slightly blurred.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FAMILIES = ("flipping", "rotation", "translation", "scaling")
SHIFT = 0.3  # of a side, either way
SCALE = (0.8, 1.2)
SCALE_STEP = 8  # pixels


@dataclass(frozen=True)
class Transform:
    """What one batch undergoes; only the entries of its family are set.

    Args:
        family: one of ``FAMILIES``.
        flip_axis: -1 flips left and right, -2 up and down, whole batch alike.
        quarter_turns: counter-clockwise, 1 to 3 per sample (N,).
        shift: pixels to the right and down per sample (N, 2), not whole numbers.
        size: new height and width, whole batch alike.
    """

    family: str
    flip_axis: int | None = None
    quarter_turns: Tensor | None = None
    shift: Tensor | None = None
    size: tuple[int, int] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return images or maps (N, C, H, W), transformed; zeros enter where content leaves."""
        if self.flip_axis is not None:
            return images.flip(self.flip_axis)
        if self.quarter_turns is not None:
            return turn(images, self.quarter_turns)
        if self.shift is not None:
            return translate(images, self.shift)
        assert self.size is not None
        return F.interpolate(images, self.size, mode="bilinear", align_corners=True)


def sample(batch: int, height: int, width: int, generator: torch.Generator, family: str = "all") -> Transform:
    """Draw a transform: its family first, each as likely, then its parameters.

    Images that are not square are turned by 180 degrees only.

    Args:
        batch: N.
        height: of the images.
        width: of the images.
        generator: on the CPU.
        family: ``all``, or one of ``FAMILIES`` always.
    """
    if family not in ("all", *FAMILIES):
        raise ValueError(f"family is all or one of {FAMILIES}, got {family!r}.")
    chosen = FAMILIES[_integer(len(FAMILIES), generator)] if family == "all" else family
    if chosen == "flipping":
        return Transform(chosen, flip_axis=(-1, -2)[_integer(2, generator)])
    if chosen == "rotation":
        turns = torch.randint(1, 4, (batch,), generator=generator)
        return Transform(chosen, quarter_turns=turns if height == width else torch.full_like(turns, 2))
    if chosen == "translation":
        share = (torch.rand(batch, 2, generator=generator) * 2 - 1) * SHIFT
        return Transform(chosen, shift=share * torch.tensor([width, height]))
    sizes = scaled_sizes(height, width)
    return Transform(chosen, size=sizes[_integer(len(sizes), generator)])


def scaled_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return the sizes that scaling draws from: 0.8 to 1.2 of the height in steps of 8, 192 to 288 for 240.

    The width keeps its proportion as far as multiples of 8 allow.
    """
    low, high = (max(SCALE_STEP, SCALE_STEP * round(height * scale / SCALE_STEP)) for scale in SCALE)
    return [
        (side, max(SCALE_STEP, SCALE_STEP * round(width * side / height / SCALE_STEP)))
        for side in range(low, high + 1, SCALE_STEP)
    ]


def turn(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """Return each image (N, C, H, W) turned counter-clockwise by its quarter turns (N,)."""
    out = torch.empty_like(images)
    for count in quarter_turns.unique().tolist():
        chosen = (quarter_turns == count).to(images.device)
        out[chosen] = images[chosen].rot90(int(count), (-2, -1))
    return out


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Return each image (N, C, H, W) moved by its shift (N, 2), pixels right and down; bilinear, zeros enter."""
    height, width = images.shape[-2:]
    shift = shift.to(images.device, images.dtype)
    rows = torch.arange(height, device=images.device, dtype=images.dtype) - shift[:, 1:]
    columns = torch.arange(width, device=images.device, dtype=images.dtype) - shift[:, :1]
    # positions between the first and the last pixel centre are -1 to 1; a single row or column has no between
    rows, columns = rows * (2 / max(height - 1, 1)) - 1, columns * (2 / max(width - 1, 1)) - 1
    grid = torch.stack([
        columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)
    ], -1)  # fmt: skip
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))
