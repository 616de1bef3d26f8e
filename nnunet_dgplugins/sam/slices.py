"""Whole slices of preprocessed cases: which exist, what is on them, and their targets on a small grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunet_dgplugins.content import Field, content_box
from nnunet_dgplugins.sam.preprocess import resize_target
from nnunet_dgplugins.sam.store import Key


@dataclass(frozen=True)
class SliceSet:
    """Slices and their label maps on the mask grid.

    Args:
        keys: case, z along the first spatial axis, view (0: the plain slice), in case and z order.
        labels: (N, m, m) int16, nearest label of each mask pixel inside the slice's content; -1 outside the crop.
    """

    keys: list[Key]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)


#: (data (C, H, W) float32, label (1, H, W) int16, key) -> the same two, augmented
Augment = Callable[[torch.Tensor, torch.Tensor, Key], tuple[torch.Tensor, torch.Tensor]]


def read_slices(
    dataset: Any,
    cases: Iterable[str],
    mask_size: int,
    *,
    foreground: Sequence[int] = (),
    only_foreground: bool = False,
    drop_last: bool = False,
    views: int = 0,
    augment: Augment | None = None,
    field: Field | None = None,
) -> SliceSet:
    """Read the slices of some cases from nnU-Net's preprocessed dataset.

    Args:
        dataset: nnU-Net dataset with ``load_case(name)``.
        cases: case identifiers.
        mask_size: side of the mask grid, pixels.
        foreground: label values that count as organ for the next two options.
        only_foreground: leave out slices without organ (DeSAM, released preprocessing).
        drop_last: leave out the last slice with organ of each case (released preprocessing, a slip there).
        views: augmented views per slice beside the plain one.
        augment: makes view k of a slice; needed when ``views`` is not 0.
        field: what the canvas shows at least, see :func:`nnunet_dgplugins.sam.preprocess.to_canvas`.

    Returns:
        All slices that show anything; a slice that is zero everywhere has nothing to learn from and is left out.
    """
    keys, labels = [], []
    for case in cases:
        data, seg, _, _ = dataset.load_case(case)
        data, seg = np.asarray(data[:], np.float32), np.asarray(seg[:1], np.int16)
        organ = [z for z in range(seg.shape[1]) if np.isin(seg[0, z], foreground).any()]
        wanted = organ if only_foreground else list(range(seg.shape[1]))
        if drop_last and organ:
            wanted = [z for z in wanted if z != organ[-1]]
        for z in wanted:
            for view in range(views + 1):
                key = Key(case, z, view)
                image, label = torch.from_numpy(data[:, z]), torch.from_numpy(seg[:, z])
                if view and augment is not None:
                    image, label = augment(image, label, key)
                box = content_box(image)
                if box is None:
                    continue
                keys.append(key)
                labels.append(resize_target(label, box, mask_size, field)[0].to(torch.int16))
    stacked = torch.stack(labels) if labels else torch.empty((0, mask_size, mask_size), dtype=torch.int16)
    return SliceSet(keys, stacked)


def read_view(dataset: Any, key: Key, augment: Augment) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one slice (C, H, W) and its label map (1, H, W), augmented as its key's view says."""
    data, seg, _, _ = dataset.load_case(key.case)
    image = torch.from_numpy(np.asarray(data[:, key.z], np.float32))
    return augment(image, torch.from_numpy(np.asarray(seg[:1, key.z], np.int16)), key)


def masks(
    labels: torch.Tensor, heads: Sequence[Sequence[int]], ignore: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn label maps into one binary mask per head.

    Args:
        labels: (B, h, w) label values; negative values count as background.
        heads: label values of each output channel: one for a class, several for a region.
        ignore: label value that says "not annotated".

    Returns:
        Masks (B, K, h, w) float32, and where they are valid (B, 1, h, w) float32, None without an ignore label.
    """
    channels = []
    for head in heads:
        channels.append(torch.isin(labels, torch.as_tensor(list(head), device=labels.device, dtype=labels.dtype)))
    stacked = torch.stack(channels, 1).float()
    valid = None if ignore is None else (labels != ignore).float()[:, None]
    return stacked, valid
