"""Between D-CAM's stages: stage 1's result found and checked, and the pseudo masks it makes, kept on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import (
    RESULTS,
    content_hash,
    file_sha256,
    human_bytes,
    nnunet_folder,
    read_json,
    replacing,
    require_disk,
)
from nnunet_dgplugins.methods.dcam.maps import LAYERS
from nnunet_dgplugins.methods.dcam.masks import pseudo_masks
from nnunet_dgplugins.settings import DCAMClassifierSettings
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from nnunet_dgplugins.trainers.dcam import DCAMTrainer

STAGE_ONE = "DCAMClassifierTrainer"
FOLDER = "dgplugins_pseudo_masks"
_PREFIX = "classifier."  # of its tensors in stage 1's checkpoint
_SAYS_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Classifier:
    """Stage 1's finished result.

    Args:
        settings: it was trained with.
        weights: of the tower.
        digest: SHA-256 of the checkpoint.
    """

    settings: DCAMClassifierSettings
    weights: dict[str, torch.Tensor]
    digest: str


def stage_stamp(table: CaseTable, cases: Sequence[str], dataset_json: Mapping[str, Any]) -> str:
    """Return a hash of what a classifier learns from: the cases, their tags, the classes, the converted input."""
    tags = {name: table.cases[name].tags for name in sorted(cases)}
    return content_hash([tags, dataset_json["labels"], table.protocol.get("input")])


def find_classifier(trainer: DCAMTrainer) -> Classifier:
    """Return stage 1's result of the trainer's dataset, plans, configuration and fold.

    Raises:
        UserError: it is missing, unfinished, or made from other tags; with the command to run.
    """
    plans, configuration = trainer.plans_manager.plans_name, trainer.configuration_name
    name, fold = trainer.plans_manager.dataset_name, trainer.fold
    model = nnunet_folder(RESULTS) / name / f"{STAGE_ONE}__{plans}__{configuration}"
    path = model / f"fold_{fold}" / "checkpoint_final.pth"
    words = f"nnUNetv2_train {int(name[7:10])} {configuration} {fold} -tr {STAGE_ONE}"
    words += "" if plans == "nnUNetPlans" else f" -p {plans}"
    if not path.is_file():
        begun = any(path.parent.glob("checkpoint_*.pth"))
        raise UserError(
            f"{type(trainer).__name__}: stage 1 {'is not finished' if begun else 'is missing'}, no {path}. Run: {words}"
            + (" --c" if begun else "")
        )
    content = read_checkpoint(path)
    cases, _ = trainer.fold_split()
    if content.get(settings.KEY, {}).get("stamp") != stage_stamp(trainer.table, cases, trainer.dataset_json):
        raise UserError(
            f"{type(trainer).__name__}: {path} was trained on other patches, tags or classes than the dataset has now. "
            f"Remove {path.parent} and run: {words}"
        )
    block = settings.configuration_block(read_json(model / "plans.json"), configuration, STAGE_ONE)
    weights = {
        key[len(_PREFIX) :]: value for key, value in content["network_weights"].items() if key.startswith(_PREFIX)
    }
    return Classifier(settings.build(DCAMClassifierSettings, block, str(model)), weights, file_sha256(path))


def draws_white(chosen: DCAMClassifierSettings, dataset_json: Mapping[str, Any]) -> bool:
    """Return whether white pixels are background in pseudo masks: as the settings say, else as the dataset does."""
    if chosen.white_background is not None:
        return chosen.white_background
    return bool(dataset_json.get(settings.KEY, {}).get("protocol", {}).get("white_background", False))


def background_level(chosen: DCAMClassifierSettings, dataset_json: Mapping[str, Any]) -> float | None:
    """Return the threshold below which pixels are background where that is a class of the dataset, else None."""
    own = dataset_json.get(settings.KEY, {}).get("protocol", {}).get("background", False)
    return chosen.background_threshold if own else None


class PseudoMasks:
    """Three masks of each patch on its preprocessed grid, one compressed file per case, beside the preprocessed data.

    The folder's name holds a hash of the classifier and of everything else the masks depend on.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, case: str) -> Path:
        """Return a case's file."""
        return self.folder / f"{case}.npz"

    def read(self, case: str) -> npt.NDArray[np.uint8]:
        """Return (3, H, W) in the order of :data:`LAYERS`; 0 to C - 1 classes, C white or background, 255 unknown."""
        with np.load(self.path(case), allow_pickle=False) as content:
            return np.asarray(content["masks"])

    @classmethod
    def made(cls, trainer: DCAMTrainer, cases: Sequence[str]) -> PseudoMasks:
        """Return the masks of some cases, made where they are missing; killed and run again, it goes on."""
        from nnunet_dgplugins.trainers.patches import Patches

        found, table = trainer.stage_one, trainer.table
        white = draws_white(found.settings, trainer.dataset_json)
        level = background_level(found.settings, trainer.dataset_json)
        identifier = trainer.configuration_manager.data_identifier
        key = content_hash([
            found.digest, white, level, identifier, stage_stamp(table, cases, trainer.dataset_json),
        ])[:12]  # fmt: skip
        masks = cls(Path(trainer.preprocessed_dataset_folder_base) / FOLDER / f"{identifier}_{key}")
        tagged = sorted({case for case in cases if table.cases[case].tags is not None})
        missing = [case for case in tagged if not masks.path(case).is_file()]
        if not missing:
            trainer.print_to_log_file(f"Pseudo masks: {len(tagged)} patches, all in {masks.folder}.")
            return masks
        for half_written in masks.folder.glob(".tmp-*"):  # by a process that was killed
            half_written.unlink(missing_ok=True)
        patches = Patches(trainer, missing)
        pixels = sum(int(np.prod(patches.size(index))) for index in range(len(missing)))
        trainer.print_to_log_file(
            f"Making {len(missing)} of {len(tagged)} pseudo masks in {masks.folder}, at most {human_bytes(3 * pixels)}."
        )
        masks.folder.mkdir(parents=True, exist_ok=True)
        require_disk(masks.folder, 3 * pixels, "the pseudo masks")
        masks._make(trainer, patches, white, level)
        return masks

    def _make(self, trainer: DCAMTrainer, patches: Any, white: bool, level: float | None) -> None:
        import tqdm

        chosen, network = trainer.stage_one.settings, trainer.network.classifier.eval()
        begun = said = time.monotonic()
        groups = list(_equal_sizes(patches, chosen.mask_batch_size))
        done = 0
        for group in tqdm.tqdm(groups, disable=None, desc="pseudo masks"):
            names = [patches.cases[index] for index in group]
            images = torch.stack([patches.image(index) for index in group])
            tags = torch.from_numpy(np.stack([trainer.tags_of(name) for name in names]))
            found = pseudo_masks(
                network, images, tags, white=white, background=level, batch_size=chosen.mask_batch_size
            )
            together = torch.stack([found[layer] for layer in LAYERS], 1).numpy()
            for name, three in zip(names, together, strict=True):
                with replacing(self.path(name)) as temporary, open(temporary, "wb") as file:
                    np.savez_compressed(file, masks=three)
            done += len(group)
            if time.monotonic() - said > _SAYS_EVERY:
                said = time.monotonic()
                left = (said - begun) / done * (len(patches.cases) - done)
                trainer.print_to_log_file(f"Pseudo masks: {done} of {len(patches.cases)}, about {left:.0f} s left.")


def _equal_sizes(patches: Any, most: int) -> list[list[int]]:
    """Return groups of up to ``most`` patches of one size each."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index in range(len(patches.cases)):
        groups.setdefault(patches.size(index), []).append(index)
    return [own[start : start + most] for own in groups.values() for start in range(0, len(own), most)]
