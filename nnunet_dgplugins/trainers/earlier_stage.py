"""The finished result of a method's earlier stage, found as nnU-Net's cascade finds its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import RESULTS, nnunet_folder, read_json
from nnunet_dgplugins.registry import TRAINERS
from nnunet_dgplugins.sam.weights import hash_state
from nnunet_dgplugins.trainers.base import settings_beside_model
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

STAMP = "stamp"  # key in a checkpoint's block of ours: hash of what the stage learnt from
_FINAL = "checkpoint_final.pth"


@dataclass(frozen=True)
class Finished:
    """A finished fold of an earlier stage.

    Args:
        path: of its checkpoint.
        settings: it was trained with.
        weights: of the part that the later stage takes over.
        digest: SHA-256 of these weights.
        stamp: hash of what it was trained on; empty where it kept none.
        command: that trains it anew.
    """

    path: Path
    settings: Any
    weights: dict[str, torch.Tensor]
    digest: str
    stamp: str
    command: str


@dataclass(frozen=True)
class Stage:
    """An earlier stage, as the later one asks for it.

    Args:
        trainer: of the earlier stage.
        name: in messages, ``stage 1``.
        prefix: of the wanted tensors in its checkpoint.
    """

    trainer: str
    name: str
    prefix: str

    def checkpoint(self, who: str, plans: Mapping[str, Any], configuration: str, fold: int | str) -> Path:
        """Return the final checkpoint of a fold.

        Args:
            who: the trainer that asks.
            plans: content of the plans.
            configuration: of the plans.
            fold: number, or ``all``.

        Raises:
            UserError: it is missing or unfinished; with the command to run.
        """
        model = f"{self.trainer}__{plans['plans_name']}__{configuration}"
        path = nnunet_folder(RESULTS) / plans["dataset_name"] / model / f"fold_{fold}" / _FINAL
        if not path.is_file():
            begun = any(path.parent.glob("checkpoint_*.pth"))
            raise UserError(
                f"{who}: {self.name} {'is not finished' if begun else 'is missing'}, no {path}. "
                f"Run: {self._command(plans, configuration, fold)}{' --c' if begun else ''}"
            )
        return path

    def find(self, trainer: Any) -> Finished:
        """Return the result for a later trainer's dataset, plans, configuration and fold.

        Raises:
            UserError: as :meth:`checkpoint`.
        """
        plans, configuration = trainer.plans_manager.plans, trainer.configuration_name
        path = self.checkpoint(type(trainer).__name__, plans, configuration, trainer.fold)
        content, model = read_checkpoint(path), path.parent.parent
        block = settings.configuration_block(read_json(model / "plans.json"), configuration, self.trainer)
        every, length = content["network_weights"], len(self.prefix)
        weights = {key[length:]: value for key, value in every.items() if key.startswith(self.prefix)}
        return Finished(
            path=path,
            settings=settings.build(settings.settings_class(TRAINERS[self.trainer].settings), block, str(model)),
            weights=weights,
            digest=hash_state(weights),
            stamp=str(content.get(settings.KEY, {}).get(STAMP, "")),
            command=self._command(plans, configuration, trainer.fold),
        )

    def _command(self, plans: Mapping[str, Any], configuration: str, fold: int | str) -> str:
        words = f"nnUNetv2_train {int(plans['dataset_name'][7:10])} {configuration} {fold} -tr {self.trainer}"
        return words if plans["plans_name"] == "nnUNetPlans" else f"{words} -p {plans['plans_name']}"


class Stamped:
    """A trainer whose checkpoints carry a hash of what it learns from: for a later stage, and for going on."""

    output_folder: str
    #: set by :meth:`claim`
    stamp: str
    _stamp_loaded: str | None = None

    def claim(self, stamp: str) -> None:
        """Keep the stamp of what this training learns from.

        Raises:
            UserError: it is continued, and began with other data.
        """
        if self._stamp_loaded not in (None, stamp):
            raise UserError(
                f"{type(self).__name__}: what this training learns from (cases, images, labels or tags, an earlier "
                f"stage) has changed since it began. Remove {self.output_folder} and start it anew, without --c."
            )
        self.stamp = stamp

    def extra_state(self) -> dict[str, Any]:
        """Keep what the network was trained on, so that a later stage and a continued training can tell."""
        return {STAMP: self.stamp}

    def load_extra_state(self, extra: dict[str, Any] | None) -> None:
        """Take over what a continued training was begun with."""
        self._stamp_loaded = (extra or {}).get(STAMP)


def refuse_other_build(trainer: Any, stage: str, key: str, first: Mapping[str, Any], built_from: Sequence[str]) -> None:
    """Refuse an earlier stage of another build than that of the folds already trained, which share one plans file.

    Args:
        trainer: of the later stage.
        stage: the earlier one in messages, ``stage 1``.
        key: of the earlier stage's settings in the plans beside the later one's model.
        first: the earlier stage's settings now.
        built_from: names of those that the network inside is rebuilt from.

    Raises:
        UserError: one of these differs.
    """
    folder = Path(trainer.output_folder_base)
    kept = settings_beside_model(folder, trainer.configuration_name, key) or {}
    changed = [
        f"{name}: {kept[name]!r}, now {first[name]!r}"
        for name in built_from
        if name in kept and kept[name] != first[name]
    ]
    if changed:
        raise UserError(
            f"{type(trainer).__name__}: {folder} was trained with another {stage} ({'; '.join(changed)}). Move the "
            f"folder, or use another plans name (dgplugins configure ... -o NAME) for {stage} and what follows it."
        )
