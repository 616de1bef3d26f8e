"""Trainings stopped and resumed, and their checkpoints compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import World

LOGGED = ("mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses", "lrs")
HERE = Path(__file__).parent


def checkpoint(world: World, trainer: str = "DeSAMTrainer", name: str = "final") -> dict[str, Any]:
    return torch.load(world.model(trainer) / "fold_0" / f"checkpoint_{name}.pth", weights_only=False)


def interrupt(world: World, trainer: str, moment: str) -> None:
    """Train in another process until it kills itself."""
    done = subprocess.run(
        [sys.executable, str(HERE / "interrupted.py"), str(world.number), trainer, moment],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-2000:]


def resume(world: World, trainer: str = "DeSAMTrainer") -> Any:
    from nnunetv2.run.run_training import maybe_load_checkpoint

    built = world.construct(trainer, continues=True)
    maybe_load_checkpoint(built, True, False)
    built.run_training()
    return built


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("network_weights", "optimizer_state", "current_epoch", "_best_ema"):
        assert_same(one[part], other[part], part)
    for name in LOGGED:
        assert_same(list(one["logging"][name]), list(other["logging"][name]), name)
