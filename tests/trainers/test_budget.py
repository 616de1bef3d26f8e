"""Any trainer trains with a seed and a budget, and goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import World

from nnunet_dgplugins.budget import Budget, BudgetRun, ShareSchedule, _alone, command, train_or_continue
from nnunet_dgplugins.errors import UserError

STOCK = ["nnUNetTrainer", "nnUNetTrainerDA5"]
ALL = [*STOCK, "DeSAMTrainer"]


def run(world: World, trainer: str, *budget: str, seed: int = 0) -> Any:
    """Run the command in this process."""
    words = [str(world.number), "2d", "0", "-tr", trainer, "-device", "cpu", *budget, "--seed", str(seed)]
    done = CliRunner().invoke(command, [*words, "--epoch-steps", "2", "--validation-steps", "1"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def weights(world: World, trainer: str, name: str = "checkpoint_final.pth") -> dict[str, torch.Tensor]:
    file = world.model(trainer) / "fold_0" / name
    found: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["network_weights"]
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folders(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    single_process(monkeypatch)
    return world


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "DeSAMTrainer"])
def test_a_trainer_trains_for_a_short_time_and_leaves_a_model(folders: World, trainer: str):
    built = folders.construct(trainer)
    steps = BudgetRun(built, Budget(minutes=1 / 60), epoch_steps=2, validation_steps=7).train()
    folder = folders.model(trainer) / "fold_0"
    content = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert steps >= 2
    assert content["current_epoch"] == built.current_epoch == len(content["logging"]["train_losses"])
    assert not (folder / "checkpoint_latest.pth").exists()
    assert len(folders.predict(folders.model(trainer))) == 2


def test_the_learning_rate_falls_with_what_is_left():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    left = [1.0]
    schedule = ShareSchedule(optimizer, 1e-2, lambda: left[0])
    rates = []
    for left[0] in (1.0, 0.5, 0.0):
        schedule.step(0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2 * 0.5**0.9, 0])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ALL)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(folders: World, trainer: str):
    found = []
    for place, seed in (("a", 3), ("b", 3), ("c", 4)):
        folders.elsewhere(place)
        assert run(folders, trainer, "--iterations", "3", seed=seed).exit_code == 0
        found.append(weights(folders, trainer))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "DeSAMTrainer"])
def test_iterations_are_counted_exactly(folders: World, trainer: str):
    built = folders.construct(trainer)
    calls = []
    step = built.train_step
    built.train_step = lambda batch: calls.append(1) or step(batch)
    assert BudgetRun(built, Budget(iterations=5), epoch_steps=2, validation_steps=1).train() == 5
    assert len(calls) == 5


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ALL)
def test_a_training_killed_after_an_epoch_ends_with_the_weights_of_an_uninterrupted_one(
    real_size_world: World, trainer: str, monkeypatch: pytest.MonkeyPatch
):
    folders = real_size_world  # the killed process does not know the tests' tiny models
    single_process(monkeypatch)
    budget = ("--epochs", "3")
    assert run(folders, trainer, *budget).exit_code == 0
    whole = weights(folders, trainer)
    folders.elsewhere("killed")
    words = [sys.executable, "-m", "nnunet_dgplugins.budget", str(folders.number), "2d", "0", "-tr", trainer]
    words += ["-device", "cpu", *budget, "--epoch-steps", "2", "--validation-steps", "1"]
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    fold = folders.model(trainer) / "fold_0"
    for _ in range(1200):
        if (fold / "checkpoint_latest.pth").is_file() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = torch.load(fold / "checkpoint_latest.pth", weights_only=False)["current_epoch"]
    assert 1 <= kept < 3
    assert run(folders, trainer, *budget).exit_code == 0
    assert same(weights(folders, trainer), whole)


def test_a_finished_training_is_only_validated_where_that_is_missing(folders: World):
    assert run(folders, "nnUNetTrainer", "--iterations", "1").exit_code == 0
    before = weights(folders, "nnUNetTrainer")
    summary = folders.model("nnUNetTrainer") / "fold_0" / "validation" / "summary.json"
    summary.unlink()
    built = folders.construct("nnUNetTrainer")
    built.train_step = lambda batch: pytest.fail("trained again")
    for _ in range(2):
        assert train_or_continue(built, Budget(iterations=1), 0, 2) == 0
    assert summary.is_file()
    assert same(weights(folders, "nnUNetTrainer"), before)


def test_another_budget_or_seed_in_the_same_folder_is_refused(folders: World):
    run(folders, "nnUNetTrainer", "--iterations", "1")
    with pytest.raises(UserError, match="iterations=1, now 2; seed=0, now 1"):
        run(folders, "nnUNetTrainer", "--iterations", "2", seed=1)


def test_the_seed_is_a_setting_of_our_trainers_and_stays_beside_the_model(folders: World):
    assert run(folders, "DeSAMTrainer", "--epochs", "1", seed=7).exit_code == 0
    plans = json.loads((folders.model("DeSAMTrainer") / "plans.json").read_text())
    settings = plans["configurations"]["2d"]["dgplugins"]["DeSAMTrainer"]
    assert (settings["seed"], settings["epochs"]) == (7, 1)


def test_a_fold_is_trained_by_one_process_at_a_time(tmp_path: Path):
    pytest.importorskip("fcntl")
    code = "import sys, time; from pathlib import Path; from nnunet_dgplugins.budget import _alone\n"
    code += "with _alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="Another process trains"), _alone(tmp_path):
        pytest.fail("held twice")
    holder.kill()
    holder.wait()
    with _alone(tmp_path):
        assert (tmp_path / "budget.lock").is_file()


@pytest.mark.parametrize("given", [{}, {"minutes": 1, "epochs": 1}, {"minutes": 0}, {"iterations": -3}])
def test_a_budget_is_one_number_above_zero(given: dict[str, Any]):
    with pytest.raises(UserError, match="exactly one"):
        Budget(**given)
