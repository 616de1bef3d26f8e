"""Trainers whose network needs whole slices: the patch is made large enough for slices of unseen sites."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_dgplugins.data.loaders import image_shape
from nnunet_dgplugins.trainers.base import DGTrainer

#: no scanner's slice is wider than this, mm
LARGEST_FIELD_OF_VIEW = 500.0


def deployed_patch(largest: Iterable[int], spacing: Iterable[float]) -> list[int]:
    """Return the patch that holds whole slices of sites not seen in training.

    Unseen sites are resampled to the source's spacing and often grow by it: twice the largest source slice at least,
    more where a body-sized field of view asks for it at this spacing, four times at most. Padding costs little: the
    network removes it before anything else.

    Args:
        largest: rows and columns of the largest source slice, pixels.
        spacing: mm per pixel of rows and columns.
    """
    return [
        min(4 * size, max(2 * size, ceil(LARGEST_FIELD_OF_VIEW / step)))
        for size, step in zip(largest, spacing, strict=True)
    ]


def largest_slice(folder: Path) -> tuple[int, int]:
    """Return rows and columns of the largest slice of a preprocessed dataset; its training site alone is in there."""
    dataset = infer_dataset_class(str(folder))(str(folder))
    shapes = [image_shape(dataset, name)[2:] for name in dataset.identifiers]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


class WholeSliceTrainer(DGTrainer):
    """Base of 2d trainers that see a slice as a whole."""

    @classmethod
    def refusals(cls, configuration: dict[str, Any], dataset_json: dict[str, Any]) -> list[str]:
        """Refuse 3d configurations and cascades."""
        sentences = []
        if len(configuration["patch_size"]) != 2:
            sentences.append(f"{cls.__name__} works slice by slice and has no 3d form: use configuration 2d.")
        if configuration.get("previous_stage"):
            sentences.append(f"{cls.__name__} does not work in a cascade.")
        return sentences

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, compared by name
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self._set_in_plans(
            "patch_size", deployed_patch(self.largest_slice, map(float, self.configuration_manager.spacing))
        )

    @cached_property
    def largest_slice(self) -> tuple[int, int]:
        """Rows and columns of the largest preprocessed training slice."""
        return largest_slice(Path(self.preprocessed_dataset_folder))

    def plot_network_architecture(self) -> None:
        """Draw nothing: the plotting library cannot follow a promptable network."""
