"""Stages of a method that build on each other, in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import World

from nnunet_dgplugins.registry import TRAINERS
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint


def after_its_stage(world: World, trainer: str, fold: int | str = 0, **options: Any) -> World:
    """Train what the trainer builds on, if anything."""
    if before := TRAINERS[trainer].after:
        world.train(before, fold, **options)
    return world


def elsewhere(world: World, trainer: str, name: str) -> World:
    """Go on with another results folder, where only what the trainer builds on is trained."""
    return world.elsewhere(name, keeping=TRAINERS[trainer].after)


def weights(world: World, trainer: str) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(world.model(trainer) / "fold_0" / "checkpoint_final.pth")["network_weights"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def turn_tags(world: World, name: str = "case_0") -> None:
    """Let a patch of the test's own dataset show what it did not, and nothing else."""

    def turned(content: dict[str, Any]) -> None:
        case = content["dgplugins"]["cases"][name]
        case["tags"] = [[1 - tag for tag in case["tags"][0]]]

    world.edit_json("dataset.json", turned)


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()
