"""Prompts: the whole box, the grid of points, and points drawn for training (Gao et al., MICCAI 2024, sections 2.2, 3).

Every point carries SAM's label "positive", also off the organ: whether it was a good prompt is for the IoU head to
find out. Drawing random numbers and applying them to a target are separate, so a draw can be tested and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_dgplugins.methods.sam_parts import disabled_autocast

GRID_SIZE = 9


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as the decoder reads them.

    Args:
        sparse: (N, 2, P).
        dense: (1, P, g, g), the same for every prompt as there is never a mask prompt.
        dense_pe: (1, P, g, g), positions of the image tokens.
    """

    sparse: Tensor
    dense: Tensor
    dense_pe: Tensor

    def to(self, *args: Any, **kwargs: Any) -> EncodedPrompts:
        """Return a copy on another device or in another dtype."""
        return EncodedPrompts(*(x.to(*args, **kwargs) for x in (self.sparse, self.dense, self.dense_pe)))


@dataclass(frozen=True)
class PointDraw:
    """Random numbers for one point per slice, free of any target.

    Args:
        class_index: (B,) class the point is drawn for.
        on_organ: (B,) whether it should lie on that class.
        position: (B,) in [0, 1), which of the candidate pixels.
    """

    class_index: np.ndarray
    on_organ: np.ndarray
    position: np.ndarray


@dataclass(frozen=True)
class Points:
    """One point per slice.

    Args:
        xy: (B, 1, 2) float32, (x, y) in canvas pixels.
        on_class: (B, K) float32, 1 where the point lies on the class: the IoU head's target t.
        speaks: (B, K) float32, 1 for the class the point was drawn for (see ``losses.iou_loss``); all 0 where nothing
            of the slice is known.
    """

    xy: Tensor
    on_class: Tensor
    speaks: Tensor


def whole_box(canvas: int) -> np.ndarray:
    """Return the box (x0, y0, x1, y1) around the whole canvas of side ``canvas``."""
    return np.array([0, 0, canvas, canvas], dtype=np.float32)


def grid_points(n: int, image_hw: tuple[int, int], canvas: int) -> np.ndarray:
    """Return the centres of an n x n grid in canvas pixels, (n * n, 2) float64 as (x, y), x running fastest.

    Args:
        n: points per side, 9 in the paper.
        image_hw: height and width of the image; its longest side fills the canvas (SAM's rule).
        canvas: side of the canvas, 1024 for SAM's own models.
    """
    height, width = image_hw
    scale = canvas / max(height, width)
    side = (np.arange(n) + 0.5) / n
    unit = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    # SAM rounds the resized sides to whole pixels
    return unit * np.array([int(width * scale + 0.5), int(height * scale + 0.5)], dtype=np.float64)


def draw_points(count: int, num_classes: int, generator: np.random.Generator, background_points: int = 1) -> PointDraw:
    """Draw for ``count`` slices: a class uniformly, on it once for every ``background_points`` off it, a place."""
    return PointDraw(
        class_index=generator.integers(num_classes, size=count),
        on_organ=generator.integers(background_points + 1, size=count) == background_points,
        position=generator.random(count),
    )


def place_points(
    draw: PointDraw, target: np.ndarray | Tensor, canvas: int, valid: np.ndarray | Tensor | None = None
) -> Points:
    """Turn a draw into points, deterministically.

    A slice without a pixel of the wanted kind takes the other kind: without the organ, a background point with t = 0.

    Args:
        draw: numbers for B slices.
        target: (B, K, H, W), not 0 where the class is.
        canvas: side of the canvas; coordinates are pixel indices times canvas / size, as in the released code.
        valid: (B, 1, H, W), 0 where the truth is unknown; no point is put there unless nothing is known.
    """
    truth = np.asarray(target) != 0
    known = np.ones_like(truth[:, :1]) if valid is None else np.asarray(valid) != 0
    batch, classes, height, width = truth.shape
    xy = np.zeros((batch, 1, 2), dtype=np.float32)
    on_class = np.zeros((batch, classes), dtype=np.float32)
    speaks = np.zeros((batch, classes), dtype=np.float32)
    for i in range(batch):
        wanted = int(draw.class_index[i])
        organ, allowed = truth[i, wanted].ravel(), known[i, 0].ravel()
        first, second = (organ, ~organ) if draw.on_organ[i] else (~organ, organ)
        candidates = np.flatnonzero(first & allowed)
        if not len(candidates):
            candidates = np.flatnonzero(second & allowed)
        if len(candidates):
            speaks[i, wanted] = 1
        else:
            candidates = np.arange(height * width)
        row, column = divmod(int(candidates[int(draw.position[i] * len(candidates))]), width)
        xy[i, 0] = column * canvas / width, row * canvas / height
        on_class[i] = truth[i, :, row, column]
    return Points(torch.from_numpy(xy), torch.from_numpy(on_class), torch.from_numpy(speaks))


def sample_points(
    target: np.ndarray | Tensor,
    generator: np.random.Generator,
    canvas: int,
    valid: np.ndarray | Tensor | None = None,
    background_points: int = 1,
) -> Points:
    """Draw one training point per slice: class, on or off it (1:1 as published), a pixel of that kind at random."""
    draw = draw_points(target.shape[0], target.shape[1], generator, background_points)
    return place_points(draw, target, canvas, valid)


def fixed_points(
    target: np.ndarray | Tensor, seeds: Sequence[int], canvas: int, valid: np.ndarray | Tensor | None = None
) -> Points:
    """Return validation points that never change: each slice's draw comes from its own seed, whatever the batch.

    The released code draws fresh points for every validation, so its choice of checkpoint is noisy.
    """
    draws = [draw_points(1, target.shape[1], np.random.default_rng(seed)) for seed in seeds]
    joined = PointDraw(
        np.concatenate([d.class_index for d in draws]),
        np.concatenate([d.on_organ for d in draws]),
        np.concatenate([d.position for d in draws]),
    )
    return place_points(joined, target, canvas, valid)


@torch.no_grad()
def encode_points(prompt_encoder: nn.Module, xy: Tensor | np.ndarray) -> EncodedPrompts:
    """Encode one positive point per prompt, ``xy`` (N, 1, 2) or (N, 2) in canvas pixels."""
    device = next(prompt_encoder.parameters()).device
    coordinates = torch.as_tensor(xy, dtype=torch.float32, device=device).reshape(-1, 1, 2)
    labels = torch.ones(coordinates.shape[:2], dtype=torch.int, device=device)
    with disabled_autocast(device):
        sparse = prompt_encoder(points=(coordinates, labels), boxes=None, masks=None)[0]
    return _with_dense(prompt_encoder, sparse)


@torch.no_grad()
def encode_box(prompt_encoder: nn.Module, count: int = 1) -> EncodedPrompts:
    """Encode the whole-image box, ``count`` times (expanded, not copied)."""
    device = next(prompt_encoder.parameters()).device
    height, width = prompt_encoder.input_image_size  # type: ignore[misc]
    box = torch.tensor([[0, 0, width, height]], dtype=torch.float32, device=device)
    with disabled_autocast(device):
        sparse = prompt_encoder(points=None, boxes=box, masks=None)[0]
    return _with_dense(prompt_encoder, sparse.expand(count, -1, -1))


def _with_dense(prompt_encoder: nn.Module, sparse: Tensor) -> EncodedPrompts:
    with disabled_autocast(sparse.device):
        dense_pe = prompt_encoder.get_dense_pe()  # type: ignore[operator]
    empty = prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)  # type: ignore[union-attr, operator]
    return EncodedPrompts(sparse, empty.expand_as(dense_pe), dense_pe)
