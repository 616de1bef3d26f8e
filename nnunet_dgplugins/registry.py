"""The one list of trainers that exist. Importable without torch: the lookup bridge and ``dgplugins list`` read it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainerInfo:
    """One trainer as typed after ``-tr``.

    Args:
        name: class name, public API.
        module: dotted module that defines it.
        settings: name of its settings class in :mod:`nnunet_dgplugins.settings`.
        method: name of the published method.
        stage: what this trainer is within the method.
        paper: where the method was published.
        supervision: what it may read.
        output: what comes out.
        after: trainer of the stage before, trained on the same dataset first; "" for a first stage.
        tags: whether it learns from tags in the case table instead of masks.
        planned: whether it trains the network, patches and batches that nnU-Net planned, as stock trainers do.
    """

    name: str
    module: str
    settings: str
    method: str
    stage: str
    paper: str
    supervision: str
    output: str
    after: str = ""
    tags: bool = False
    planned: bool = False


_DCAM = (
    "D-CAM, MICCAI 2025 (github.com/JingjunYi/D-CAM), on Han et al., Multi-layer pseudo-supervision, Medical Image "
    "Analysis 2022 (arXiv 2110.08048)"
)
_DESAM = "Gao et al., DeSAM: Decoupled Segment Anything Model, MICCAI 2024 (arXiv 2306.00499)"
_SAMSDG = "Leveraging SAM for single-source domain generalization in medical image segmentation (arXiv 2401.02076)"

#: the trainer whose network can be shown several slices together, by ``dgplugins predict``
GROUPS_SLICES = "SAMSDGTrainer"

TRAINERS: dict[str, TrainerInfo] = {
    info.name: info
    for info in (
        TrainerInfo(
            name="DeSAMTrainer",
            module="nnunet_dgplugins.trainers.desam",
            settings="DeSAMSettings",
            method="DeSAM",
            stage="whole-box prompt",
            paper=_DESAM,
            supervision="masks of one source site",
            output="segmentation",
        ),
        TrainerInfo(
            name="DeSAMGridTrainer",
            module="nnunet_dgplugins.trainers.desam",
            settings="DeSAMSettings",
            method="DeSAM",
            stage="grid of points",
            paper=_DESAM,
            supervision="masks of one source site",
            output="segmentation",
        ),
        TrainerInfo(
            name="EPLTrainer",
            module="nnunet_dgplugins.trainers.epl",
            settings="EPLSettings",
            method="EPL",
            stage="two networks that teach each other, 2d and 3d",
            paper="Yao et al., Enhancing Pseudo Label Quality for Semi-Supervised Domain-Generalized Medical Image "
            "Segmentation, AAAI 2022 (arXiv 2201.08657)",
            supervision="masks of few cases, images of many",
            output="segmentation",
            planned=True,
        ),
        TrainerInfo(
            name="EquivariantCAMTrainer",
            module="nnunet_dgplugins.trainers.equivariant",
            settings="EquivariantSettings",
            method="Equivariant",
            stage="one classifier per modality and its CAMs, 2d",
            paper="Patel and Dolz, Weakly supervised segmentation with cross-modality equivariant constraints, Medical "
            "Image Analysis 77, 2022 (arXiv 2104.02488)",
            supervision="slice tags only",
            output="CAM segmentation",
            tags=True,
        ),
        TrainerInfo(
            name="DCAMClassifierTrainer",
            module="nnunet_dgplugins.trainers.dcam",
            settings="DCAMClassifierSettings",
            method="D-CAM",
            stage="1: which tissues a patch shows, and its class maps",
            paper=_DCAM,
            supervision="image tags only",
            output="CAM segmentation",
            tags=True,
        ),
        TrainerInfo(
            name="DCAMTrainer",
            module="nnunet_dgplugins.trainers.dcam",
            settings="DCAMSettings",
            method="D-CAM",
            stage="2: segmenter from three pseudo masks, gated by stage 1",
            paper=_DCAM,
            supervision="image tags only",
            output="segmentation",
            after="DCAMClassifierTrainer",
            tags=True,
        ),
        TrainerInfo(
            name="SAMSDGCoarseTrainer",
            module="nnunet_dgplugins.trainers.samsdg",
            settings="SAMSDGCoarseSettings",
            method="SAM-SDG",
            stage="1: coarse network",
            paper=_SAMSDG,
            supervision="masks of one source site",
            output="coarse segmentation",
        ),
        TrainerInfo(
            name="SAMSDGTrainer",
            module="nnunet_dgplugins.trainers.samsdg",
            settings="SAMSDGSettings",
            method="SAM-SDG",
            stage="2 and 3: SAM prompted by step 1's boxes, four slices per canvas",
            paper=_SAMSDG,
            supervision="masks of one source site",
            output="segmentation",
            after="SAMSDGCoarseTrainer",
        ),
    )
}


def load_trainer(name: str) -> type:
    """Import and return the trainer class called ``name``.

    Raises:
        KeyError: no such trainer.
    """
    return getattr(importlib.import_module(TRAINERS[name].module), name)
