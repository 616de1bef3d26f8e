"""Pseudo labels of D-CAM's stage 1: one mask of tissues from each of three depths (Han et al., MedIA 2022)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.folds import tagged, tagged_elsewhere
from nnunet_dgplugins.data.loaders import image_shape, read_image, read_properties
from nnunet_dgplugins.data.raw_dataset import RawDataset
from nnunet_dgplugins.data.tags import image_tags
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.panels import PatchPanel
from nnunet_dgplugins.files import VALIDATION_MASKS
from nnunet_dgplugins.methods.dcam.masks import pseudo_masks
from nnunet_dgplugins.methods.dcam.segmenter import CAMClassifier
from nnunet_dgplugins.settings import DCAMClassifierSettings
from nnunet_dgplugins.trainers.dcam_stages import background_level, draws_white
from nnunet_dgplugins.trainers.deployed import Rebuilt
from nnunet_dgplugins.trainers.label_drawer import LABELS, Choices, Drawer, Masks
from nnunet_dgplugins.trainers.patches import class_labels

#: depth -> folder of its masks; stock trainers learn from those of the last depth
FOLDERS = {"bn7": LABELS, "b5_2": "pseudo_b5_2", "b4_5": "pseudo_b4_5"}


class PatchDrawer(Drawer):
    """See :class:`~nnunet_dgplugins.trainers.label_drawer.Drawer`.

    Classes are those of the patch's tags. White background and pixels of which nothing is known are ignored; where
    background is a class of the dataset, what no map reaches is background, 0. Patches that show none of the classes
    are left out, as in stage 2, unless background is a class: then they are all background. Under the protocol
    ``release`` the target's tagged patches train.
    """

    takes = frozenset({"threshold", "white"})
    beside = tuple(FOLDERS.values())[1:]
    unit = "patches"
    advice = "Either no tag names a class, or background took it all: see --threshold and --no-white."

    def __init__(self, model: Rebuilt, choices: Choices, table: CaseTable):
        super().__init__(model, choices, table)
        assert isinstance(model.network, CAMClassifier)
        self._network = model.network.classifier
        block = model.configuration.configuration[settings.KEY][model.trainer]
        chosen = settings.build(DCAMClassifierSettings, block, f"{model.trainer}, plans beside the model")
        assert isinstance(chosen, DCAMClassifierSettings)
        self._together = chosen.mask_batch_size
        self._white = draws_white(chosen, model.dataset_json) if choices.white is None else choices.white
        self._background = background_level(chosen, model.dataset_json)
        if choices.threshold is not None:
            if self._background is None:
                raise UserError("--threshold says what is background, and background is no class of this dataset.")
            self._background = choices.threshold
        self._labels = class_labels(model.dataset_json)
        if "ignore" not in model.dataset_json["labels"]:
            raise UserError(
                "Pseudo labels leave pixels out, and this dataset has no label `ignore`: add it, the largest value."
            )
        self._ignore = int(model.dataset_json["labels"]["ignore"])

    @property
    def choices(self) -> dict[str, Any]:
        """White rule, and the level of background; None where that is no class."""
        return {"white": self._white, "background": self._background}

    @property
    def _release(self) -> bool:
        return self.table.protocol.get("protocol") == "release"

    def _tags(self, case: str) -> npt.NDArray[np.int64]:
        return image_tags(self.table, case, len(self._labels))

    def cases(self, raw: RawDataset, folds: Any) -> list[str]:
        """Return the patches that get masks."""
        names = sorted(raw.training)
        found = tagged(names, self.table)
        if self._release:
            validate = {case for fold in folds or () for case in fold["val"]}
            found = sorted({*tagged_elsewhere(names, self.table), *(case for case in found if case in validate)})
        return [case for case in found if self._background is not None or self._tags(case).any()]

    def folds(self, folds: Any, cases: Sequence[str]) -> Any:
        """Return the model's folds; under ``release`` their training patches are the target's."""
        if folds and self._release:
            folds = [{**fold, "train": tagged_elsewhere(cases, self.table)} for fold in folds]
        return super().folds(folds, cases)

    def groups(self, cases: Sequence[str]) -> list[list[str]]:
        """Return groups of patches of one size each."""
        sizes = {case: tuple(image_shape(self.dataset, case)) for case in cases}
        found: list[list[str]] = []
        for _, own in groupby(sorted(cases, key=lambda case: (sizes[case], case)), key=sizes.__getitem__):
            names = list(own)
            found += [names[start : start + self._together] for start in range(0, len(names), self._together)]
        return found

    def draw(self, cases: Sequence[str]) -> list[tuple[Masks, dict[str, Any]]]:
        """Return each patch's three masks and its properties."""
        images = torch.stack([torch.from_numpy(read_image(self.dataset, case)[:, 0]) for case in cases])
        tags = torch.from_numpy(np.stack([self._tags(case) for case in cases]))
        found = pseudo_masks(
            self._network, images, tags, white=self._white, background=self._background, batch_size=len(cases)
        )
        result = []
        for index, case in enumerate(cases):
            properties = read_properties(self.dataset, case)
            masks = {
                folder: self._in_file_geometry(found[layer][index].numpy(), properties)
                for layer, folder in FOLDERS.items()
            }
            result.append((masks, properties))
        return result

    def _in_file_geometry(self, mask: npt.NDArray[np.uint8], properties: dict[str, Any]) -> npt.NDArray[np.uint8]:
        """Return label values (1, H, W) on the file's grid of a mask (h, w) of places among the classes."""
        values = np.full(256, self._ignore, np.uint8)
        values[: len(self._labels)] = self._labels
        if self._background is not None:
            values[len(self._labels)] = 0
        whole = np.full(properties["shape_before_cropping"], self._ignore, np.uint8)
        whole[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])] = values[mask][None]
        return np.ascontiguousarray(whole.transpose(self.model.plans.transpose_backward))

    def panel(self, case: str, raw: RawDataset, folder: Path) -> PatchPanel:
        """Return a patch with its three masks and, where it is known, the truth."""
        images, _ = self.reader.read_images([os.fspath(path) for path in raw.training[case].images])
        name = f"{case}{raw.file_ending}"
        paths = {layer: folder / own / name for layer, own in FOLDERS.items()}
        paths["truth"] = raw.folder / VALIDATION_MASKS / name
        masks = {
            title: np.asarray(self.reader.read_seg(os.fspath(path))[0][0, 0], np.int64)
            for title, path in paths.items()
            if path.is_file()
        }
        names = {value: name for name, value in self.model.dataset_json["labels"].items()}
        return PatchPanel(case, images[:, 0].transpose(1, 2, 0), masks, names)
