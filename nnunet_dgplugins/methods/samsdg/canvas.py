"""Four slices on one canvas of SAM's, and back.

SAM-SDG (arXiv 2401.02076), section 3.4: tiles 0 to 3 fill the canvas row by row, without scaling, gap or border. A
prompt of a tile therefore moves by the tile's column in x and by its row in y. The released scripts add the row's
offset to x and the column's to y, which puts the boxes of two tiles into each other's corner; tests keep that form
alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SIDE = 2  # tiles per row and column
TILES = SIDE * SIDE


def merge(tiles: Tensor) -> Tensor:
    """Lay every four tiles (4N, ..., h, w) onto a canvas (N, ..., 2h, 2w)."""
    by_place = tiles.unflatten(0, (-1, SIDE, SIDE))  # (N, row, column, ..., h, w)
    return by_place.movedim((1, 2), (-4, -2)).flatten(-2).flatten(-3, -2)


def unmerge(canvases: Tensor) -> Tensor:
    """Cut canvases (N, ..., 2h, 2w) into their tiles (4N, ..., h, w): the inverse of :func:`merge`."""
    height, width = (side // SIDE for side in canvases.shape[-2:])
    by_place = canvases.unflatten(-1, (SIDE, width)).unflatten(-3, (SIDE, height))  # (N, ..., row, h, column, w)
    return by_place.movedim((-4, -2), (1, 2)).flatten(0, 2)


def offsets(tile: float) -> Tensor:
    """Return how far each tile lies from the canvas's corner: (4, 2) as (x, y), for tiles of side ``tile``."""
    return torch.tensor([(column, row) for row in range(SIDE) for column in range(SIDE)]) * tile


def on_canvas(boxes: Tensor, tile: float) -> Tensor:
    """Move boxes (4N, ..., 4) = (x_min, y_min, x_max, y_max) from their tiles onto the canvas; shapes stay."""
    by_place = boxes.unflatten(0, (-1, TILES))
    moved = offsets(tile).to(boxes).repeat(1, 2)  # (4, 4)
    return (by_place + moved.view(TILES, *[1] * (boxes.ndim - 2), 4)).flatten(0, 1)


def filled_up(items: Tensor) -> Tensor:
    """Repeat the last item of (B, ...) until four divide their number; the released code drops such a rest."""
    lacking = -len(items) % TILES
    return torch.cat([items, items[-1:].expand(lacking, *items.shape[1:])]) if lacking else items


def draw_canvases(slices: int, generator: np.random.Generator) -> np.ndarray:
    """Draw which slices share a canvas in one pass over all of them: (ceil(slices / 4), 4) of their numbers.

    Every slice occurs; the last canvas is filled up with slices of the first (the released code drops such a rest).
    """
    order = generator.permutation(slices)
    return np.resize(order, (-(-slices // TILES), TILES))
