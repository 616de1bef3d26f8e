"""Between SAM-SDG's steps: the coarse network found, and checked to be complete and made from the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import RESULTS, nnunet_folder, read_json
from nnunet_dgplugins.sam.weights import hash_state
from nnunet_dgplugins.settings import SAMSDGCoarseSettings
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

TRAINER = "SAMSDGCoarseTrainer"
STAMP = "stamp"  # key in a checkpoint's block of ours
_PREFIX = "network."  # of the coarse network's tensors in step 1's checkpoint
_SEEN_ALIKE = ("channels", "field_of_view", "equalise")  # both networks see the same image


@dataclass(frozen=True)
class StepOne:
    """Step 1's finished result.

    Args:
        path: of its checkpoint.
        settings: it was trained with.
        weights: of the coarse network.
        digest: SHA-256 of the weights.
        stamp: :func:`data_stamp` of what it was trained on.
        command: that trains it anew.
    """

    path: Path
    settings: SAMSDGCoarseSettings
    weights: dict[str, torch.Tensor]
    digest: str
    stamp: str
    command: str


def data_stamp(dataset: Any, cases: Sequence[str], dataset_json: Mapping[str, Any]) -> str:
    """Return a hash of what a fold trains on: preprocessed images, label maps, and what the labels mean."""
    meaning = [dataset_json["labels"], dataset_json["channel_names"]]
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for case in sorted(cases):
        data, seg, _, _ = dataset.load_case(case)
        for values in (np.ascontiguousarray(data[:], np.float32), np.ascontiguousarray(seg[:], np.int16)):
            digest.update(f"{case} {values.shape}".encode())
            digest.update(values.data)
    return digest.hexdigest()[:32]


def find_step_one(trainer: Any) -> StepOne:
    """Return step 1's result of the trainer's dataset, plans, configuration and fold.

    Raises:
        UserError: it is missing or unfinished, with the command to run; or it sees images in another way.
    """
    plans, configuration = trainer.plans_manager.plans_name, trainer.configuration_name
    name, fold = trainer.plans_manager.dataset_name, trainer.fold
    model = nnunet_folder(RESULTS) / name / f"{TRAINER}__{plans}__{configuration}"
    path = model / f"fold_{fold}" / "checkpoint_final.pth"
    command = f"nnUNetv2_train {int(name[7:10])} {configuration} {fold} -tr {TRAINER}"
    command += "" if plans == "nnUNetPlans" else f" -p {plans}"
    if not path.is_file():
        begun = any(path.parent.glob("checkpoint_*.pth"))
        raise UserError(
            f"{type(trainer).__name__}: step 1 {'is not finished' if begun else 'is missing'}, no {path}. "
            f"Run: {command}{' --c' if begun else ''}"
        )
    content = read_checkpoint(path)
    block = settings.configuration_block(read_json(model / "plans.json"), configuration, TRAINER)
    found = settings.build(SAMSDGCoarseSettings, block, str(model))
    different = [
        f"{key}: step 1 has {theirs!r}, asked for {ours!r}"
        for key in _SEEN_ALIKE
        if (theirs := getattr(found, key)) != (ours := getattr(trainer.settings, key))
    ]
    if different:
        raise UserError(
            f"{type(trainer).__name__}: both steps see the same images, and these settings differ: "
            f"{'; '.join(different)}. Give both trainers the same, in one plans file (dgplugins configure)."
        )
    weights = {
        key[len(_PREFIX) :]: value for key, value in content["network_weights"].items() if key.startswith(_PREFIX)
    }
    stamp = str(content.get(settings.KEY, {}).get(STAMP, ""))
    return StepOne(path, found, weights, hash_state(weights), stamp, command)


def check_same_data(step_one: StepOne, stamp: str, who: str) -> None:
    """Refuse a step 1 that was trained on other data.

    Raises:
        UserError: with the command to run.
    """
    if step_one.stamp != stamp:
        raise UserError(
            f"{who}: {step_one.path} was trained on other cases, images or labels than this fold has now. "
            f"Remove {step_one.path.parent} and run: {step_one.command}"
        )
