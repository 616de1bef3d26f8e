"""Trainers whose network needs whole slices: the patch is made large enough for slices of unseen sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_dgplugins.content import Field
from nnunet_dgplugins.data.loaders import image_shape
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam.slices import SliceSet, read_slices
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


def mask_heads(manager: Any) -> list[tuple[int, ...]]:
    """Return the label values of each mask channel of a label manager: one for a class, several for a region."""
    regions = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    return [tuple(int(value) for value in np.atleast_1d(region)) for region in regions]


def are_colours(dataset_json: Mapping[str, Any]) -> bool:
    """Return whether the first three channels are red, green and blue by name."""
    names = [str(name).lower() for name in dataset_json["channel_names"].values()]
    return names[:3] in (["r", "g", "b"], ["rgb_to_0_1"] * 3, ["red", "green", "blue"])


def are_neighbours(dataset_json: Mapping[str, Any]) -> bool:
    """Return whether the channels are a slice between its neighbours by name: X_below, X, X_above."""
    names = [str(name) for name in dataset_json["channel_names"].values()]
    return len(names) == 3 and names == [f"{names[1]}_below", names[1], f"{names[1]}_above"]


class WholeSliceTrainer(DGTrainer):
    """Base of 2d trainers that see a slice as a whole."""

    settings: Any  # with train_slices and field_of_view

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

    @property
    def field(self) -> Field | None:
        """Rows and columns that the network's image shows at least; None: a slice fills it."""
        return self.largest_slice if self.settings.field_of_view == "source" else None

    @property
    def heads(self) -> list[tuple[int, ...]]:
        """Label values of each mask channel: one for a class, several for a region."""
        return mask_heads(self.label_manager)

    def read_slices(self, dataset: Any, cases: Sequence[str], size: int, **options: Any) -> SliceSet:
        """Read slices with labels on a grid of ``size``; options of :func:`nnunet_dgplugins.sam.slices.read_slices`.

        Raises:
            UserError: there is none.
        """
        organ = sorted({value for head in self.heads for value in head})
        found = read_slices(dataset, cases, size, foreground=organ, field=self.field, **options)
        if not len(found):
            raise UserError(
                f"{type(self).__name__}: no slice to train or validate on in {', '.join(cases)} "
                f"(train_slices={self.settings.train_slices})."
            )
        return found

    def hard_counts(
        self, deployed: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None
    ) -> dict[str, np.ndarray]:
        """Count what nnU-Net's pseudo Dice is made of.

        Args:
            deployed: logits (B, K, h, w); a class wins where it is the highest above 0, a region where it is above 0.
            target: (B, K, h, w), 0 or 1.
            valid: (B, 1, h, w), 0 where the truth is unknown; None: known everywhere.
        """
        if self.label_manager.has_regions:
            predicted = deployed > 0
        else:
            winner = torch.cat([torch.zeros_like(deployed[:, :1]), deployed], 1).argmax(1, keepdim=True)
            predicted = winner == torch.arange(1, deployed.shape[1] + 1, device=winner.device)[None, :, None, None]
        truth, known = target > 0, torch.ones_like(target[:, :1], dtype=torch.bool) if valid is None else valid > 0
        counts = {
            "tp_hard": predicted & truth & known,
            "fp_hard": predicted & ~truth & known,
            "fn_hard": ~predicted & truth & known,
        }
        return {name: value.sum((0, 2, 3)).cpu().numpy() for name, value in counts.items()}

    def plot_network_architecture(self) -> None:
        """Draw nothing: the plotting library cannot follow a promptable network."""
