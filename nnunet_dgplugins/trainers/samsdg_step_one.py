"""Between SAM-SDG's steps: the coarse network found, and checked to be complete and made from the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.trainers.earlier_stage import Finished, Stage

STEP_ONE = Stage("SAMSDGCoarseTrainer", "step 1", "network.")
COARSE = "coarse"  # key in the plans beside step 2's model: step 1's settings
BUILT_FROM = ("network", "image_size")  # what of them the network inside is rebuilt from
_SEEN_ALIKE = ("channels", "field_of_view", "equalise")  # both networks see the same image


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


def find_step_one(trainer: Any) -> Finished:
    """Return step 1's result of the trainer's dataset, plans, configuration and fold.

    Raises:
        UserError: it is missing or unfinished, with the command to run; or it sees images in another way.
    """
    found = STEP_ONE.find(trainer)
    different = [
        f"{key}: step 1 has {theirs!r}, asked for {ours!r}"
        for key in _SEEN_ALIKE
        if (theirs := getattr(found.settings, key)) != (ours := getattr(trainer.settings, key))
    ]
    if different:
        raise UserError(
            f"{type(trainer).__name__}: both steps see the same images, and these settings differ: "
            f"{'; '.join(different)}. Give both trainers the same, in one plans file (dgplugins configure)."
        )
    return found


def check_same_data(step_one: Finished, stamp: str, who: str) -> None:
    """Refuse a step 1 that was trained on other data.

    Raises:
        UserError: with the command to run.
    """
    if step_one.stamp != stamp:
        raise UserError(
            f"{who}: {step_one.path} was trained on other cases, images or labels than this fold has now. "
            f"Remove {step_one.path.parent} and run: {step_one.command}"
        )
