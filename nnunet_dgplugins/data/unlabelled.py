"""Unlabelled cases of a fold, and loaders that draw from them without ever looking at a label."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.folds import without_masks
from nnunet_dgplugins.data.splits import SPLITS
from nnunet_dgplugins.files import read_json


def unlabelled_cases(
    base: Path, data_folder: Path, fold: int | str, table: CaseTable | None, validation: Collection[str]
) -> list[str]:
    """Return the fold's cases without masks, by the case table alone.

    Left out are cases of other sites than the source that the table or the fold names, of the site the fold holds out,
    and of patients the fold validates on.

    Args:
        base: preprocessed folder of the dataset, which holds ``splits_final.json``.
        data_folder: preprocessed data of one configuration.
        fold: fold number, or ``all``.
        table: case table; without one every case counts as labelled.
        validation: cases that the fold validates on without training on them.
    """
    if table is None:
        return []
    split = read_json(base / SPLITS)[int(fold)] if fold != "all" and (base / SPLITS).is_file() else {}
    source, held_out = split.get("source"), split.get("held_out")
    patients = {table.patient_of(name) for name in validation}
    present = sorted(path.name[: -len(".pkl")] for path in data_folder.glob("*.pkl"))
    return [
        name
        for name in without_masks(present, table)
        if source in (None, table.site_of(name))
        and (held_out is None or table.site_of(name) != held_out)
        and table.patient_of(name) not in patients
    ]


class WithoutLabels:
    """Shows a transform where the image was outside of its non-zero region (-1), and no label value.

    Args:
        transform: of batchgeneratorsv2, made for training.
    """

    def __init__(self, transform: Callable[..., dict[str, Any]]):
        self.transform = transform

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, Any]:
        """Transform the image."""
        return self.transform(image=image, segmentation=segmentation.clamp(max=0))


class UnlabelledLoader(nnUNetDataLoader):
    """nnU-Net's loader, drawing patches anywhere in an image: labels neither steer the draw nor come out.

    Args:
        dataset: nnU-Net dataset of the unlabelled cases.
        batch_size: patches per batch.
        patch_size: before augmentation.
        final_patch_size: what the network gets.
        label_manager: of the plans.
        transforms: nnU-Net's training transforms without deep supervision.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        patch_size: Any,
        final_patch_size: Any,
        label_manager: Any,
        transforms: Callable[..., dict[str, Any]],
    ):
        super().__init__(
            dataset,
            batch_size,
            patch_size,
            final_patch_size,
            label_manager,
            oversample_foreground_percent=0.0,
            transforms=WithoutLabels(transforms),
        )
        self.has_ignore = False  # else patches are centred on annotated voxels

    def generate_train_batch(self) -> dict[str, Any]:
        """Return ``data`` (B, C, ...) and ``keys``."""
        batch = super().generate_train_batch()
        return {"data": batch["data"], "keys": batch["keys"]}


class LabelledAndUnlabelled(Iterator[dict[str, Any]]):
    """One labelled batch and two unlabelled draws at a time.

    Yields nnU-Net's batch (``data``, ``target``, ``keys``) with ``unlabelled``, a pair of image batches, and
    ``unlabelled_keys``, the cases of both.

    Args:
        labelled: nnU-Net's loader of labelled cases.
        unlabelled: loader of unlabelled ones.
    """

    def __init__(self, labelled: Any, unlabelled: Any):
        self.labelled, self.unlabelled = labelled, unlabelled

    def __next__(self) -> dict[str, Any]:
        batch, first, second = next(self.labelled), next(self.unlabelled), next(self.unlabelled)
        return {
            **batch,
            "unlabelled": (first["data"], second["data"]),
            "unlabelled_keys": [*first["keys"], *second["keys"]],
        }

    def close(self) -> None:
        """End worker processes; nnU-Net ends those of its own loaders only."""
        for loader in (self.labelled, self.unlabelled):
            if isinstance(loader, NonDetMultiThreadedAugmenter):
                loader._finish()


def in_background(loader: nnUNetDataLoader, pin_memory: bool) -> Any:
    """Wrap a loader as nnU-Net does: worker processes, or none with ``nnUNet_n_proc_DA=0``."""
    processes = get_allowed_n_proc_DA()
    if processes == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        data_loader=loader,
        transform=None,
        num_processes=processes,
        num_cached=max(6, processes // 2),
        seeds=None,
        pin_memory=pin_memory,
        wait_time=0.002,
    )
