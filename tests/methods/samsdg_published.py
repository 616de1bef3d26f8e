"""SAM-SDG's released order of work where ours differs, for comparison only: its search and its exchanged offsets."""

from __future__ import annotations

from collections import deque

import torch


def search(mask: torch.Tensor) -> torch.Tensor:
    """Box (4,) around the largest components of a mask (H, W), found pixel by pixel in a tensor, as released.

    An empty mask gives the box of the whole mask: the released code then keeps every pixel of size 0.
    """
    sizes = mask.long()
    visited = torch.zeros_like(sizes)
    height, width = sizes.shape
    largest = 0
    for row in range(height):
        for column in range(width):
            if not (sizes[row][column] == 1 and visited[row][column] == 0):
                continue
            component, waiting = [], deque([(row, column)])
            visited[row][column] = 1
            while waiting:
                y, x = waiting.popleft()
                component.append((y, x))
                for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                    below, beside = y + down, x + right
                    inside = 0 <= below < height and 0 <= beside < width
                    if inside and sizes[below][beside] == 1 and visited[below][beside] == 0:
                        waiting.append((below, beside))
                        visited[below][beside] = 1
            largest = max(largest, len(component))
            if len(component) == largest:
                for y, x in component:
                    sizes[y][x] = largest
    rows, columns = torch.where(sizes == largest)
    return torch.stack([columns.min(), rows.min(), columns.max(), rows.max()])


def swapped_on_canvas(boxes: torch.Tensor, tile: int) -> torch.Tensor:
    """Move boxes (4N, 4) onto their canvas with the row's offset in x and the column's in y, as released."""
    moved = boxes.clone()
    for index in range(len(boxes)):
        row, column = divmod(index % 4, 2)
        moved[index, 0::2] += tile * row
        moved[index, 1::2] += tile * column
    return moved
