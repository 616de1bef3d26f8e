"""Any trainer trains with a seed and a budget, and goes on after a kill as if there had been none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import World

from nnunet_dgplugins import budget as module
from nnunet_dgplugins.budget import Budget, BudgetRun, ShareSchedule, command, seeded_settings, train_or_continue
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

STOCK = ["nnUNetTrainer", "nnUNetTrainerDA5"]
ALL = [*STOCK, "DeSAMTrainer", "EPLTrainer"]
LOGGED = ("mean_fg_dice", "ema_fg_dice", "train_losses", "val_losses", "lrs")
HERE = Path(__file__).parent


class Stopped(Exception):
    """Stands for a kill."""


def construct(world: World, trainer: str, budget: Budget, seed: int) -> Any:
    with seeded_settings(trainer, seed, budget):
        return world.construct(trainer)


def train(world: World, trainer: str, budget: Budget, seed: int = 0) -> Any:
    """Train without the final validation; returns the trainer."""
    built = construct(world, trainer, budget, seed)
    BudgetRun(built, budget, seed, epoch_steps=2, validation_steps=1).train()
    return built


def go_on(
    world: World, trainer: str, budget: Budget, seed: int = 0, before_step: Callable[[Any], None] | None = None
) -> int:
    """Start or go on as the command does; nnU-Net's validation writes nothing but its summary."""
    built = construct(world, trainer, budget, seed)
    summary = fold(world, trainer) / "validation" / "summary.json"

    def validate(save_probabilities: bool) -> None:
        summary.parent.mkdir(exist_ok=True)
        summary.write_text("{}")

    built.perform_actual_validation = validate
    if before_step:
        step = built.train_step

        def counted(batch: Any) -> Any:
            before_step(built)
            return step(batch)

        built.train_step = counted
    return train_or_continue(built, budget, seed, epoch_steps=2, validation_steps=1)


def stop_in_epoch(epoch: int) -> Callable[[Any], None]:
    def before_step(built: Any) -> None:
        if built.current_epoch == epoch:
            raise Stopped

    return before_step


def fold(world: World, trainer: str = "nnUNetTrainer") -> Path:
    return world.model(trainer) / "fold_0"


def checkpoint(world: World, trainer: str = "nnUNetTrainer", name: str = "final") -> dict[str, Any]:
    return read_checkpoint(fold(world, trainer) / f"checkpoint_{name}.pth")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("network_weights", "optimizer_state", "current_epoch", "_best_ema"):
        assert same(one[part], other[part]), part
    for name in LOGGED:
        assert same(list(one["logging"][name]), list(other["logging"][name])), name


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "DeSAMTrainer"])
def test_a_trainer_trains_for_a_short_time_and_leaves_a_model(world: World, trainer: str):
    built = train(world, trainer, Budget(minutes=0.01))
    content = checkpoint(world, trainer)
    assert content["current_epoch"] == built.current_epoch == len(content["logging"]["train_losses"])
    assert not (fold(world, trainer) / "checkpoint_latest.pth").exists()
    assert len(world.predict(world.model(trainer))) == 2


@pytest.mark.parametrize(("trainer", "epochs"), [("nnUNetTrainer", 3), ("DeSAMTrainer", 3)])
def test_iterations_are_counted_exactly_and_the_last_epoch_is_shorter(world: World, trainer: str, epochs: int):
    built = construct(world, trainer, Budget(iterations=5), 0)
    step, rates = built.train_step, []
    built.train_step = lambda batch: rates.append(built.optimizer.param_groups[0]["lr"]) or step(batch)
    assert BudgetRun(built, Budget(iterations=5), epoch_steps=2, validation_steps=1).train() == 5
    assert built.current_epoch == epochs
    assert rates == pytest.approx([built.initial_lr * (1 - done / 5) ** 0.9 for done in range(5)])


def test_epochs_follow_nnunets_own_schedule(world: World):
    built = train(world, "nnUNetTrainer", Budget(epochs=2))
    assert built.logger.get_checkpoint()["lrs"] == pytest.approx([1e-2, 1e-2 * 0.5**0.9])


def test_the_learning_rate_falls_with_what_is_left():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    left = [1.0]
    schedule = ShareSchedule(optimizer, 1e-2, lambda: left[0])
    rates = []
    for left[0] in (1.0, 0.5, 0.0):
        schedule.step(0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2 * 0.5**0.9, 0])


def test_minutes_count_steps_and_online_validation_alone_and_go_on_counting_after_a_stop(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as upstream

    now, steps = [1_000_000.0], [0]
    monkeypatch.setattr(upstream, "time", lambda: now[0])
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    write = torch.save

    def slow_save(*arguments: Any) -> None:
        now[0] += 1000
        write(*arguments)

    monkeypatch.setattr(torch, "save", slow_save)

    def ten_seconds(built: Any) -> None:
        if steps[0] == 3:
            steps[0] += 1
            raise Stopped
        steps[0] += 1
        now[0] += 10

    budget = Budget(minutes=1)
    with pytest.raises(Stopped):
        go_on(world, "nnUNetTrainer", budget, before_step=ten_seconds)
    now[0] += 5000
    # two steps of the first epoch are saved: 40 seconds are left, the third step is done again
    assert go_on(world, "nnUNetTrainer", budget, before_step=ten_seconds) == 4


@pytest.mark.parametrize("given", [{}, {"minutes": 1, "epochs": 1}, {"minutes": 0}, {"iterations": -3}])
def test_a_budget_is_one_number_above_zero(given: dict[str, Any]):
    with pytest.raises(UserError, match="exactly one"):
        Budget(**given)


@pytest.mark.parametrize(("given", "typed"), [({"iterations": 1234567}, "1234567"), ({"minutes": 0.75}, "0.75")])
def test_a_budget_is_typed_as_it_is_read(given: dict[str, Any], typed: str):
    assert Budget(**given).words() == [f"--{next(iter(given))}", typed]


@pytest.mark.parametrize("words", [[], ["--minutes", "1", "--epochs", "2"], ["--epochs", "0"]])
def test_the_command_wants_exactly_one_budget(words: list[str]):
    assert CliRunner().invoke(command, ["1", "2d", "0", *words]).exit_code == 2


# ---------------------------------------------------------------- seeds and resume


@pytest.mark.parametrize("trainer", ALL)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(world: World, trainer: str):
    found = []
    for place, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(world.elsewhere(place), trainer, Budget(iterations=3), seed)
        found.append(checkpoint(world, trainer))
        torch.rand(7)  # what ran before does not matter
    assert_same_training(found[0], found[1])
    assert not same(found[0]["network_weights"], found[2]["network_weights"])


def test_no_transform_of_a_stock_trainer_chooses_by_a_clock(world: World):
    built = construct(world, "nnUNetTrainer", Budget(epochs=1), 0)
    BudgetRun(built, Budget(epochs=1)).initialize()
    blurs = [
        part.transform
        for part in built.get_dataloaders()[0].data_loader.transforms.transforms
        if hasattr(getattr(part, "transform", None), "benchmark")
    ]
    assert [blur.benchmark for blur in blurs] == [False]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ALL)
@pytest.mark.parametrize("budget", [Budget(epochs=3), Budget(iterations=5)], ids=["epochs", "iterations"])
def test_a_stopped_training_ends_as_an_uninterrupted_one(world: World, trainer: str, budget: Budget):
    assert go_on(world, trainer, budget) == (6 if budget.epochs else 5)
    whole, best = checkpoint(world, trainer), checkpoint(world, trainer, "best")
    world.elsewhere("stopped")
    for epoch in (1, 2):
        with pytest.raises(Stopped):
            go_on(world, trainer, budget, before_step=stop_in_epoch(epoch))
        assert checkpoint(world, trainer, "latest")["current_epoch"] == epoch
    go_on(world, trainer, budget)
    assert_same_training(whole, checkpoint(world, trainer))
    assert_same_training(best, checkpoint(world, trainer, "best"))


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import small_models
from nnunet_dgplugins import ext
from nnunet_dgplugins.budget import command
from nnunet_dgplugins.sam.models import MODELS
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from pathlib import Path
ext.register()
MODELS.update(small_models.installed(Path(sys.argv[2])))
cls = recursive_find_trainer_class_by_name(sys.argv[3])
step = cls.train_step
def killing(self, batch):
    if self.current_epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
cls.train_step = killing
command(sys.argv[4:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ALL)
def test_a_killed_command_run_again_ends_with_the_same_weights_and_its_validation(world: World, trainer: str):
    budget = Budget(epochs=2)
    go_on(world, trainer, budget, seed=5)
    whole = checkpoint(world, trainer)
    world.elsewhere("killed")
    words = [str(world.number), "2d", "0", "-tr", trainer, "-device", "cpu", "--seed", "5", *budget.words()]
    words += ["--epoch-steps", "2", "--validation-steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(HERE), str(world.root / "package"), trainer, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-2000:]
    assert checkpoint(world, trainer, "latest")["current_epoch"] == 1
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert_same_training(whole, checkpoint(world, trainer))
    summary = json.loads((fold(world, trainer) / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1


# ---------------------------------------------------------------- what lies in the fold


def never(built: Any) -> None:
    pytest.fail("trained again")


def test_a_finished_training_is_only_validated_where_that_is_missing_or_half_done(world: World):
    budget = Budget(iterations=1)
    assert go_on(world, "nnUNetTrainer", budget) == 1
    before = (fold(world) / "checkpoint_final.pth").read_bytes()
    summary = fold(world) / "validation" / "summary.json"
    assert go_on(world, "nnUNetTrainer", budget, before_step=never) == 0
    for break_it in (summary.unlink, lambda: summary.write_text('{"mean": ')):
        break_it()
        assert go_on(world, "nnUNetTrainer", budget, before_step=never) == 0
        assert summary.read_text() == "{}"
    assert (fold(world) / "checkpoint_final.pth").read_bytes() == before


def test_a_broken_checkpoint_gives_way_to_the_newest_readable_one(world: World, capsys: pytest.CaptureFixture[str]):
    budget = Budget(epochs=2)
    with pytest.raises(Stopped):
        go_on(world, "nnUNetTrainer", budget, before_step=stop_in_epoch(1))
    latest = fold(world) / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:1000])
    assert go_on(world, "nnUNetTrainer", budget) == 2
    said = capsys.readouterr().out
    assert "checkpoint_latest.pth: not a readable" in said
    assert "Goes on from checkpoint_best.pth, 1 epochs done." in said


def test_a_fold_without_any_readable_checkpoint_is_refused(world: World):
    budget = Budget(epochs=2)
    with pytest.raises(Stopped):
        go_on(world, "nnUNetTrainer", budget, before_step=stop_in_epoch(1))
    for file in fold(world).glob("checkpoint_*.pth"):
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match="to train it anew"):
        go_on(world, "nnUNetTrainer", budget, before_step=never)


def test_another_budget_or_seed_in_the_same_folder_is_refused_with_both_values(world: World):
    go_on(world, "nnUNetTrainer", Budget(iterations=1))
    with pytest.raises(UserError, match="iterations=1, now 2; seed=0, now 1"):
        go_on(world, "nnUNetTrainer", Budget(iterations=2), seed=1, before_step=never)


def test_checkpoints_of_another_command_are_never_continued(world: World):
    fold(world).mkdir(parents=True)
    (fold(world) / "checkpoint_latest.pth").write_bytes(b"of nnUNetv2_train")
    with pytest.raises(UserError, match="another command"):
        go_on(world, "nnUNetTrainer", Budget(epochs=1), before_step=never)
    assert not (fold(world) / "budget.json").exists()


def test_the_seed_is_a_setting_of_our_trainers_and_stays_beside_the_model(world: World):
    train(world, "DeSAMTrainer", Budget(epochs=1), seed=7)
    plans = json.loads((world.model("DeSAMTrainer") / "plans.json").read_text())
    settings = plans["configurations"]["2d"]["dgplugins"]["DeSAMTrainer"]
    assert (settings["seed"], settings["epochs"]) == (7, 1)


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "DeSAMTrainer"])
def test_every_epoch_says_how_much_is_left(world: World, trainer: str, capsys: pytest.CaptureFixture[str]):
    train(world, trainer, Budget(iterations=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if " left." in line]
    assert len(lines) == 2
    expected = ("50 % of the budget", "100 % of the budget") if trainer in STOCK else ("Epoch 1/2", "Epoch 2/2")
    assert all(text in line for text, line in zip(expected, lines, strict=True))


def test_two_stages_share_a_budget_without_loss():
    assert Budget(epochs=5).split(0.5) == (Budget(epochs=2), Budget(epochs=3))
    assert Budget(iterations=3).split(0.1) == (Budget(iterations=1), Budget(iterations=2))
    assert Budget(minutes=3.0).split(0.25) == (Budget(minutes=0.75), Budget(minutes=2.25))
    with pytest.raises(UserError, match="cannot be shared"):
        Budget(epochs=1).split(0.5)
