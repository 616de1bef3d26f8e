"""nnU-Net's own augmentation of whole slices, drawn from a key: the same slice and view always look the same."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dgplugins.data.augmentation import without_timing
from nnunet_dgplugins.sam.store import Key

_VERSION = 2


class SliceViews:
    """Augmented views of slices: rotation, scaling, mirroring, noise, blur, brightness, contrast, resolution, gamma.

    Args:
        seed: another seed, other views.
        use_mask_for_norm: per channel, from the plans; masked images keep their zeros.
        max_rotation: radians; nnU-Net's 2d default is pi.
    """

    def __init__(self, seed: int, use_mask_for_norm: list[bool], max_rotation: float = np.pi):
        self.seed, self.use_mask_for_norm, self.max_rotation = seed, list(use_mask_for_norm), max_rotation
        # part of the embedding store's identity: a change of the augmentation computes the views anew
        self.name = f"nnunet-v{_VERSION}-seed{seed}-rotation{max_rotation:.3f}"
        self._transforms: dict[tuple[int, int], Any] = {}

    def __call__(self, image: torch.Tensor, key: Key) -> torch.Tensor:
        """Return view ``key.view`` of a slice (C, H, W)."""
        return self.both(image, torch.zeros_like(image[:1], dtype=torch.int16), key)[0]

    def both(self, image: torch.Tensor, label: torch.Tensor, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        """Return view ``key.view`` of a slice (C, H, W) float32 and of its label map (1, H, W) int16, moved alike."""
        size = (int(image.shape[1]), int(image.shape[2]))
        if size not in self._transforms:
            transforms = nnUNetTrainer.get_training_transforms(
                size,
                (-self.max_rotation, self.max_rotation),
                None,
                (0, 1),
                False,
                use_mask_for_norm=self.use_mask_for_norm,
            )
            self._transforms[size] = without_timing(transforms)
        with _seeded(self.seed, zlib.crc32(key.case.encode()), key.z, key.view):
            # the transforms work in place
            moved = self._transforms[size](image=image.clone().float(), segmentation=label.clone())
        return moved["image"], moved["segmentation"].to(torch.int16)


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seed every generator the transforms use, and give it back as it was."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    value = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
