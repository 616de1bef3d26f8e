"""Step 1 of SAM-SDG for tests of step 2: trained once per session and kind of data, then copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import World

COARSE, SAM = "SAMSDGCoarseTrainer", "SAMSDGTrainer"
TRAINERS = (COARSE, SAM)
#: enough to find something
LEARNS = {"iterations_per_epoch": 12, "initial_lr": 5e-3}
_KEPT: dict[tuple[Any, ...], Path] = {}


def step_one(world: World, fold: int | str = 0, plans: str = "nnUNetPlans", **values: Any) -> Path:
    """Give the world a finished step 1, whatever its own settings are; returns the model folder.

    A step 1 with other settings than the usual ones, or of data the test has changed, is trained anew.
    """
    model = world.model(COARSE, plans=plans)
    if (model / f"fold_{fold}" / "checkpoint_final.pth").is_file():
        return model
    key = (world.recipe, fold, plans)
    usual = not values and world.root not in world.raw.parents
    if usual and key in _KEPT:
        shutil.copytree(_KEPT[key], model, dirs_exist_ok=True)
        return model
    file = world.root / "settings.json"
    before = file.read_text()
    world.settings(**{**LEARNS, **values})
    world.train(COARSE, fold, plans=plans)
    file.write_text(before)
    if usual:
        kept = world.root.parent / f"step_one_{len(_KEPT)}"
        pattern = shutil.ignore_patterns("*latest*", "*best*", "*.txt")
        shutil.copytree(model, kept / "model", ignore=pattern)
        _KEPT[key] = kept / "model"
    return model


def before(world: World, trainer: str, fold: int | str = 0, plans: str = "nnUNetPlans") -> None:
    """Give the world what the trainer builds on."""
    if trainer == SAM:
        step_one(world, fold, plans)


def checkpoint(world: World, trainer: str, name: str = "final", fold: int | str = 0) -> dict[str, Any]:
    return torch.load(world.model(trainer) / f"fold_{fold}" / f"checkpoint_{name}.pth", weights_only=False)
