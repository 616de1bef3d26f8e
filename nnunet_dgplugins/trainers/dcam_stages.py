"""Between D-CAM's stages: stage 1's result found and checked, and the pseudo masks it makes, kept on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import (
    content_hash,
    human_bytes,
    replacing,
    require_disk,
)
from nnunet_dgplugins.methods.dcam.maps import LAYERS
from nnunet_dgplugins.methods.dcam.masks import pseudo_masks
from nnunet_dgplugins.settings import DCAMClassifierSettings
from nnunet_dgplugins.trainers.earlier_stage import Finished, Stage
from nnunet_dgplugins.trainers.patches import Patches, background_is_class

if TYPE_CHECKING:
    from nnunet_dgplugins.trainers.dcam import DCAMTrainer

STAGE_ONE = Stage("DCAMClassifierTrainer", "stage 1", "classifier.")
FOLDER = "dgplugins_pseudo_masks"
CLASSIFIER = "classifier"  # key in the plans beside stage 2's model: stage 1's settings
BUILT_FROM = ("width_divisor", "pcnorm")  # what of them the network inside is rebuilt from
_SAYS_EVERY = 30.0  # seconds


def stage_stamp(table: CaseTable, cases: Sequence[str], dataset_json: Mapping[str, Any]) -> str:
    """Return a hash of what a classifier learns from: the cases, their tags, the classes, the converted input."""
    tags = {name: table.cases[name].tags for name in sorted(cases)}
    return content_hash([tags, dataset_json["labels"], table.protocol.get("input")])


def find_classifier(trainer: DCAMTrainer) -> Finished:
    """Return stage 1's result of the trainer's dataset, plans, configuration and fold.

    Raises:
        UserError: it is missing, unfinished, or made from other tags; with the command to run.
    """
    found = STAGE_ONE.find(trainer)
    cases, _ = trainer.fold_split()
    if found.stamp != stage_stamp(trainer.table, cases, trainer.dataset_json):
        raise UserError(
            f"{type(trainer).__name__}: {found.path} was trained on other patches, tags or classes than the "
            f"dataset has now. Remove {found.path.parent} and run: {found.command}"
        )
    return found


def draws_white(chosen: DCAMClassifierSettings, dataset_json: Mapping[str, Any]) -> bool:
    """Return whether white pixels are background in pseudo masks: as the settings say, else as the dataset does."""
    if chosen.white_background is not None:
        return chosen.white_background
    return bool(dataset_json.get(settings.KEY, {}).get("protocol", {}).get("white_background", False))


def background_level(chosen: DCAMClassifierSettings, dataset_json: Mapping[str, Any]) -> float | None:
    """Return the threshold below which pixels are background where that is a class of the dataset, else None."""
    return chosen.background_threshold if background_is_class(dataset_json) else None


def mask_rules(trainer: DCAMTrainer) -> tuple[bool, float | None]:
    """Return whether white is background in the masks of the trainer's stage 1, and the level of background or None."""
    chosen = trainer.stage_one.settings
    return draws_white(chosen, trainer.dataset_json), background_level(chosen, trainer.dataset_json)


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
    def of(cls, trainer: DCAMTrainer) -> PseudoMasks:
        """Return the masks of the trainer's stage 1 and tags, made or not."""
        found, table = trainer.stage_one, trainer.table
        identifier = trainer.configuration_manager.data_identifier
        every = [name for name, case in table.cases.items() if case.tags is not None]
        key = content_hash([
            found.digest, *mask_rules(trainer), stage_stamp(table, every, trainer.dataset_json),
        ])  # fmt: skip
        return cls(Path(trainer.preprocessed_dataset_folder_base) / FOLDER / f"{identifier}_{key[:12]}")

    def make(self, trainer: DCAMTrainer, cases: Sequence[str]) -> None:
        """Make those of some cases that are missing; killed and run again, it goes on and ends with the same masks."""
        patches = Patches(trainer, sorted({case for case in cases if trainer.table.cases[case].tags is not None}))
        count, (white, level) = len(patches.cases), mask_rules(trainer)
        trainer.print_to_log_file(
            f"Pseudo masks by stage 1's rules: white_background={white}, background_threshold={level}. Other ones are "
            f"set for stage 1 and taken over by: {trainer.stage_one.command} --val"
        )
        missing = {index for index, case in enumerate(patches.cases) if not self.path(case).is_file()}
        if not missing:
            trainer.print_to_log_file(f"Pseudo masks: {count} patches, all in {self.folder}.")
            return
        for half_written in self.folder.glob(".tmp-*"):  # by a process that was killed
            half_written.unlink(missing_ok=True)
        size = 3 * sum(int(np.prod(patches.size(index))) for index in missing)
        trainer.print_to_log_file(
            f"Making {len(missing)} of {count} pseudo masks in {self.folder}, at most {human_bytes(size)}."
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        require_disk(self.folder, size, "the pseudo masks")
        # the batches are those of a run that was never killed: how rounding falls may depend on the company
        batches = _equal_sizes(patches, trainer.stage_one.settings.mask_batch_size)
        self._make(trainer, patches, [batch for batch in batches if missing & {*batch}])

    def _make(self, trainer: DCAMTrainer, patches: Patches, batches: list[list[int]]) -> None:
        import tqdm

        network, (white, level) = trainer.network.classifier.eval(), mask_rules(trainer)
        begun = said = time.monotonic()
        for done, batch in enumerate(tqdm.tqdm(batches, disable=None, desc="pseudo masks"), 1):
            names = [patches.cases[index] for index in batch]
            images = torch.stack([patches.image(index) for index in batch])
            tags = torch.from_numpy(np.stack([trainer.tags_of(name) for name in names]))
            found = pseudo_masks(network, images, tags, white=white, background=level, batch_size=len(batch))
            together = torch.stack([found[layer] for layer in LAYERS], 1).numpy()
            for name, three in zip(names, together, strict=True):
                with replacing(self.path(name)) as temporary, open(temporary, "wb") as file:
                    np.savez_compressed(file, masks=three)
            if time.monotonic() - said > _SAYS_EVERY:
                said = time.monotonic()
                left = (said - begun) / done * (len(batches) - done)
                trainer.print_to_log_file(f"Pseudo masks: {done / len(batches):.0%}, about {left:.0f} s left.")


def _equal_sizes(patches: Patches, most: int) -> list[list[int]]:
    """Return groups of up to ``most`` patches of one size each."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index in range(len(patches.cases)):
        groups.setdefault(patches.size(index), []).append(index)
    return [own[start : start + most] for own in groups.values() for start in range(0, len(own), most)]
