"""Batches of whole slices: features read from the store, or slices augmented anew for an encoder in the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nnunet_dgplugins.content import Field, content_box
from nnunet_dgplugins.sam.preprocess import resize_target
from nnunet_dgplugins.sam.slices import Augment, SliceSet, read_view
from nnunet_dgplugins.sam.store import EmbeddingStore


class StoredBatches:
    """Calls give ``{features, labels, keys}`` of some slices, the features unpacked on ``device``."""

    def __init__(self, slices: SliceSet, store: EmbeddingStore, device: torch.device):
        self.slices, self.store, self.device = slices, store, device

    def __call__(self, chosen: np.ndarray, epoch: int) -> dict[str, Any]:
        """Read the slices with these indices; the epoch does not matter."""
        keys = [self.slices.keys[index] for index in chosen]
        features = self.store.read_batch(keys, device=self.device)
        return {"features": features, "labels": self.slices.labels[chosen], "keys": keys}


class AugmentedBatches:
    """Calls give ``{images, labels, keys}`` of some slices, another view of each in every epoch."""

    def __init__(self, slices: SliceSet, dataset: Any, augment: Augment, mask_size: int, field: Field | None):
        self.slices, self.dataset, self.augment, self.mask_size, self.field = slices, dataset, augment, mask_size, field

    def __call__(self, chosen: np.ndarray, epoch: int) -> dict[str, Any]:
        """Augment the slices with these indices as this epoch does."""
        # view 0 is the plain slice
        keys = [self.slices.keys[index]._replace(view=epoch + 1) for index in chosen]
        pairs = [read_view(self.dataset, key, self.augment) for key in keys]
        labels = [resize_target(label, content_box(image), self.mask_size, self.field)[0] for image, label in pairs]
        return {"images": [image for image, _ in pairs], "labels": torch.stack(labels), "keys": keys}
