"""What a method brings so that ``dgplugins pseudo-labels`` can write its masks: a drawer, and what one may choose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.folds import tagged
from nnunet_dgplugins.data.raw_dataset import RawDataset
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.panels import Row
from nnunet_dgplugins.files import PREPROCESSED, nnunet_folder
from nnunet_dgplugins.trainers.deployed import Rebuilt

LABELS = "labelsTr"
Masks = dict[str, npt.NDArray[np.uint8]]
"""Folder of the new dataset to a case's mask (Z, Y, X) in its files' geometry."""


@dataclass(frozen=True)
class Choices:
    """How maps become masks; None: as the model and the method say. A method refuses what it has no use for.

    Args:
        threshold: foreground is where a map is above. D-CAM: background is where all maps are below, in datasets with
            a class of background.
        fusion: (equivariant CAMs) ``mean``, ``max`` or the number of a modality.
        gate: (equivariant CAMs) ``tag``: slices with tag 0 are empty; in slices with tag 1 a network that calls the
            slice negative does not count, unless all do: then every map counts. ``predicted``: each network's own
            prediction empties its map, as published for images without tags. ``none``: every map counts.
        kind: (equivariant CAMs) ``cam``, ``grad_cam`` (the same up to rounding in these networks) or
            ``grad_cam_plus_plus``.
        white: (D-CAM) leave white pixels out.
    """

    threshold: float | None = None
    fusion: str | int | None = None
    gate: str | None = None
    kind: str | None = None
    white: bool | None = None


_OPTIONS = {"threshold": "--threshold", "fusion": "--fusion", "gate": "--gate", "kind": "--map", "white": "--white"}


class Drawer(ABC):
    """Draws the masks of one trained model on preprocessed cases.

    Args:
        model: rebuilt, with its weights, in evaluation mode, on its device.
        choices: what the user asked for.
        table: case table of the model's dataset.

    Raises:
        UserError: a choice that the method has no use for, or the preprocessed cases are gone.
    """

    #: names of :class:`Choices` that the method knows
    takes: ClassVar[frozenset[str]]
    #: folders of further masks
    beside: ClassVar[tuple[str, ...]] = ()
    #: what the tags are of, one each
    unit: ClassVar[str]
    #: what to do when nothing is drawn
    advice: str = ""

    def __init__(self, model: Rebuilt, choices: Choices, table: CaseTable):
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        given = [item.name for item in fields(choices) if getattr(choices, item.name) is not None]
        if strange := [_OPTIONS[name] for name in given if name not in self.takes]:
            known = ", ".join(sorted(_OPTIONS[name] for name in self.takes))
            raise UserError(f"Pseudo labels of {model.trainer} have no {', '.join(strange)}; they have {known}.")
        self.model, self.table = model, table
        folder = nnunet_folder(PREPROCESSED) / model.plans.dataset_name / model.configuration.data_identifier
        if not folder.is_dir():
            raise UserError(f"{folder}: the preprocessed training cases are not there; run nnUNetv2_preprocess.")
        self.dataset = infer_dataset_class(str(folder))(str(folder))
        self.reader = model.plans.image_reader_writer_class()

    @property
    @abstractmethod
    def choices(self) -> dict[str, Any]:
        """How maps become masks, nothing left open; part of the dataset's stamp and case table."""

    def cases(self, raw: RawDataset, folds: Any) -> list[str]:
        """Return the cases that get masks; ``folds`` are those that the model was trained with, or None."""
        return tagged(sorted(raw.training), self.table)

    def folds(self, folds: Any, cases: Sequence[str]) -> Any:
        """Return the folds of the new dataset: the model's, of cases that have masks."""
        known = set(cases)
        return folds and [
            {**fold, **{part: [case for case in fold[part] if case in known] for part in ("train", "val")}}
            for fold in folds
        ]

    def groups(self, cases: Sequence[str]) -> list[list[str]]:
        """Return the cases that are drawn together; the same groups in every run, so that bytes do not depend on it."""
        return [[case] for case in cases]

    @abstractmethod
    def draw(self, cases: Sequence[str]) -> list[tuple[Masks, dict[str, Any]]]:
        """Return each case's masks, of ``labelsTr`` and of :attr:`beside`, and nnU-Net's properties of it."""

    @abstractmethod
    def panel(self, case: str, raw: RawDataset, folder: Path) -> Row:
        """Return a case's row of the page; its masks lie in ``folder`` already."""

    @property
    def channel_names(self) -> Mapping[str, str] | None:
        """Channel names of the new dataset; None: those of the old one."""
        return None
