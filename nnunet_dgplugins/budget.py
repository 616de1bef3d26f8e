"""Train any trainer, stock ones included, with a seed and a budget; run it again and it goes on.

``python -m nnunet_dgplugins.budget 501 2d 0 -tr nnUNetTrainer --minutes 3 --seed 0 -device cpu``

The trainer class, its hooks and its result folder are untouched: only the loop is ours. The newest state is saved after
every epoch, in one step; a finished training is not repeated, an interrupted validation is.

One seed drives initialisation, sampling and augmentation. The same seed gives the same weights on one kind of CPU with
the same number of threads and nnU-Net's single-process loader (``nnUNet_n_proc_DA=0``), also after a kill where the
budget counts epochs or iterations. With worker processes, on CUDA, or with a budget of minutes, runs differ.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json, replacing, write_json

_LATEST, _FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
_ENDLESS = 1_000_000  # epochs, until the time is known


@dataclass(frozen=True)
class Budget:
    """How long a training lasts: exactly one of the three.

    Args:
        minutes: time of training steps and online validation together, over all sessions.
        epochs: nnU-Net's epochs; passes over the data in trainers of this package.
        iterations: optimiser steps; the last epoch ends early.
    """

    minutes: float | None = None
    epochs: int | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in asdict(self).values() if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise UserError("A budget is exactly one of minutes, epochs and iterations, above 0.")

    def words(self) -> list[str]:
        """Return the option and its value, as typed."""
        return next([f"--{f.name}", f"{value:g}"] for f in fields(self) if (value := getattr(self, f.name)) is not None)


class ShareSchedule:
    """Polynomial decay over the share of the budget that is left; ``step`` is called once per epoch, as nnU-Net does.

    Args:
        optimizer: the trainer's optimiser.
        initial_lr: learning rate at the start.
        left: returns the share that is left, 0 to 1.
        exponent: nnU-Net's 0.9.
    """

    def __init__(self, optimizer: Any, initial_lr: float, left: Any, exponent: float = 0.9):
        self.optimizer, self.initial_lr, self.left, self.exponent = optimizer, initial_lr, left, exponent

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of this moment."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * self.left() ** self.exponent


class BudgetRun:
    """One training of a constructed, not yet initialised trainer.

    Args:
        trainer: nnU-Net trainer; a checkpoint may be loaded already.
        budget: how long.
        seed: of everything random; trainers of this package also have it as their setting.
        epoch_steps: steps per epoch. Trainers of this package, whose epochs are passes over the data, keep their own.
        validation_steps: online validation steps per epoch, likewise.
    """

    def __init__(self, trainer: Any, budget: Budget, seed: int = 0, epoch_steps: int = 25, validation_steps: int = 4):
        from nnunet_dgplugins.trainers.base import DGTrainer

        self.trainer, self.budget, self.seed = trainer, budget, seed
        self.own = isinstance(trainer, DGTrainer)
        trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epoch_steps, validation_steps
        trainer.num_epochs = budget.epochs or _ENDLESS
        if not self.own:
            trainer.save_every = 1
            self._save_in_one_step()
        self.before = 0.0
        self.started = math.inf

    def _save_in_one_step(self) -> None:
        write = self.trainer.save_checkpoint

        def save(filename: str) -> None:
            with replacing(filename) as temporary:
                write(str(temporary))

        self.trainer.save_checkpoint = save

    def seconds(self) -> float:
        """Return the time spent in epochs, those of earlier sessions included."""
        return self.before + max(0.0, time.monotonic() - self.started)

    def left(self) -> float:
        """Return the share of the budget that is left, 0 to 1."""
        trainer, budget = self.trainer, self.budget
        if budget.minutes:
            return max(0.0, 1 - self.seconds() / (60 * budget.minutes))
        if budget.iterations:
            return max(0.0, 1 - trainer.current_epoch * trainer.num_iterations_per_epoch / budget.iterations)
        return max(0.0, 1 - trainer.current_epoch / trainer.num_epochs)

    def train(self) -> int:
        """Train until the budget is spent, and write the final checkpoint; returns the steps of this session."""
        import torch

        from nnunet_dgplugins.trainers.base import seed_everything

        trainer, steps = self.trainer, 0
        seed_everything(self.seed, 0)
        trainer.on_train_start()
        self.before = _spent(trainer)
        if not self.budget.epochs:
            trainer.lr_scheduler = ShareSchedule(trainer.optimizer, trainer.initial_lr, self.left)
        self.started = time.monotonic()
        while self.left() > 0:
            trainer.on_epoch_start()
            if not self.own:  # ours reseed themselves
                seed_everything(self.seed, trainer.current_epoch + 1)
            trainer.on_train_epoch_start()
            outputs = []
            for _ in range(self._steps_of_epoch()):
                outputs.append(trainer.train_step(next(trainer.dataloader_train)))
                if self.budget.minutes and not self.left():
                    break
            steps += len(outputs)
            trainer.on_train_epoch_end(outputs)
            with torch.no_grad():
                trainer.on_validation_epoch_start()
                trainer.on_validation_epoch_end(
                    [
                        trainer.validation_step(next(trainer.dataloader_val))
                        for _ in range(trainer.num_val_iterations_per_epoch)
                    ]
                )
            self._guess_epochs()
            trainer.on_epoch_end()
            self._say()
        trainer.num_epochs = trainer.current_epoch
        trainer.on_train_end()
        return steps

    def _steps_of_epoch(self) -> int:
        per_epoch = int(self.trainer.num_iterations_per_epoch)
        if not self.budget.iterations:
            return per_epoch
        return min(per_epoch, self.budget.iterations - self.trainer.current_epoch * per_epoch)

    def _guess_epochs(self) -> None:
        """Give the trainer a number of epochs to say the time left by, before the epoch it ends is counted."""
        trainer = self.trainer
        if not self.budget.epochs:
            spent = 1 - self.left()
            trainer.num_epochs = max(
                trainer.current_epoch + 2, math.ceil((trainer.current_epoch + 1) / max(spent, 1e-6))
            )

    def _say(self) -> None:
        if self.own:
            return  # says so itself
        left = self.left()
        seconds = self.seconds() * left / max(1 - left, 1e-6)
        done = f"Epoch {self.trainer.current_epoch} done, {100 * (1 - left):.0f} % of the budget"
        self.trainer.print_to_log_file(f"{done}, about {seconds:.0f} s left.")


def _spent(trainer: Any) -> float:
    """Return the seconds of the epochs that a loaded checkpoint has behind it."""
    if trainer.current_epoch == 0:
        return 0.0
    log = trainer.logger.get_checkpoint()
    pairs = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
    return float(sum(end - start for start, end in pairs))


def train_or_continue(
    trainer: Any, budget: Budget, seed: int = 0, epoch_steps: int = 25, validation_steps: int = 4
) -> int:
    """Train from the start, from the newest checkpoint, or only validate; the training is validated at the end.

    Returns:
        Optimiser steps of this session.

    Raises:
        UserError: the fold was started with another budget or seed, or another process trains it now.
    """
    folder = Path(trainer.output_folder)
    with _alone(folder):
        _claim(folder / "budget.json", {**budget.__dict__, "seed": seed, "epoch_steps": epoch_steps})
        run = BudgetRun(trainer, budget, seed, epoch_steps, validation_steps)
        if (folder / _FINAL).is_file():
            if (folder / "validation" / "summary.json").is_file():
                trainer.print_to_log_file(f"{folder / _FINAL} is there, and so is its validation: nothing to do.")
                return 0
            trainer.load_checkpoint(str(folder / _FINAL))
            steps = 0
        else:
            if (folder / _LATEST).is_file():
                from nnunet_dgplugins.trainers.base import seed_everything

                seed_everything(seed, 0)
                trainer.load_checkpoint(str(folder / _LATEST))
            steps = run.train()
        trainer.print_to_log_file(f"{type(trainer).__name__}: {steps} steps, {run.seconds() / 60:.2f} minutes.")
        trainer.perform_actual_validation(False)
    return steps


def _claim(file: Path, options: dict[str, Any]) -> None:
    kept = read_json(file) if file.is_file() else options
    changed = [f"{key}={kept.get(key)}, now {value}" for key, value in options.items() if kept.get(key) != value]
    if changed:
        raise UserError(f"{file.parent} was started with {'; '.join(changed)}. Remove the folder, or use another one.")
    write_json(file, options)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a fold while it is trained; the lock ends with the process, however it ends.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks; two trainings of one fold are then the user's matter
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "budget.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another process trains {folder} now.") from error
        yield


@contextmanager
def seeded_settings(trainer: str, seed: int, budget: Budget) -> Iterator[None]:
    """Let seed and epochs reach a trainer of this package through its own settings; others have none."""
    from nnunet_dgplugins import settings
    from nnunet_dgplugins.registry import TRAINERS

    if trainer not in TRAINERS:
        yield
        return
    content = settings.trial_settings()
    own = {**content.get(trainer, {}), "seed": seed, **({"epochs": budget.epochs} if budget.epochs else {})}
    before = os.environ.get(settings.VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        file.write_text(json.dumps({**content, trainer: own}))
        os.environ[settings.VARIABLE] = str(file)
        try:
            yield
        finally:
            if before is None:
                del os.environ[settings.VARIABLE]
            else:
                os.environ[settings.VARIABLE] = before


@click.command()
@click.argument("dataset")
@click.argument("configuration")
@click.argument("fold")
@click.option("-tr", "trainer", default="nnUNetTrainer", show_default=True, help="Trainer name, stock or ours.")
@click.option("-p", "plans", default="nnUNetPlans", show_default=True, help="Plans name.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Training time.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs; ours count passes over the data.")
@click.option("--iterations", type=click.IntRange(1), help="Optimiser steps.")
@click.option("--epoch-steps", type=click.IntRange(1), default=25, show_default=True, help="Steps per epoch.")
@click.option(
    "--validation-steps",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Online validation steps per epoch.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything random.")
@click.option("-device", "device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu", "mps"]))
def command(
    dataset: str, configuration: str, fold: str, trainer: str, plans: str, minutes: float | None, epochs: int | None,
    iterations: int | None, epoch_steps: int, validation_steps: int, seed: int, device: str,
) -> None:  # fmt: skip
    """Train for a budget (one of --minutes, --epochs, --iterations), then validate, as nnUNetv2_train would.

    Run the same command again to go on after a stop.
    """
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    from nnunet_dgplugins.system import keep_freed_memory

    try:
        budget = Budget(minutes, epochs, iterations)
    except UserError as error:
        raise click.UsageError(str(error)) from error
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        keep_freed_memory()
    number = fold if fold == "all" else int(fold)
    with seeded_settings(trainer, seed, budget):
        built = get_trainer_from_args(
            dataset, configuration, number, trainer, plans, device=torch.device(device)
        )  # fmt: skip
        train_or_continue(built, budget, seed, epoch_steps, validation_steps)


if __name__ == "__main__":
    command()
