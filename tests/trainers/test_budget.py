"""Any trainer trains for a time instead of a number of epochs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import World

from nnunet_dgplugins import budget


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "DeSAMTrainer"])
def test_a_trainer_trains_for_a_short_time_and_leaves_a_model(world: World, trainer: str):
    built = world.construct(trainer)
    steps = budget.train_for(built, 1.0, iterations=2, validation_iterations=7)
    folder = world.model(trainer) / "fold_0"
    content = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert steps >= 2
    assert content["current_epoch"] == built.current_epoch == len(content["logging"]["train_losses"])
    assert not (folder / "checkpoint_latest.pth").exists()
    assert len(world.predict(world.model(trainer))) == 2


def test_the_learning_rate_falls_with_time(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = budget.TimeSchedule(optimizer, 1e-2, 60)
    rates = []
    for now[0] in (100.0, 130.0, 160.0, 200.0):
        schedule.step(0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2 * 0.5**0.9, 0, 0])
