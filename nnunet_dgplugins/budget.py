"""Train any trainer, stock ones included, with a seed and a budget; run it again and it goes on.

``python -m nnunet_dgplugins.budget 501 2d 0 -tr nnUNetTrainer --minutes 3 --seed 0 -device cpu``

The trainer class, its hooks and its result folder are untouched: only the loop is ours. The newest state is saved after
every epoch, in one step. Run again, the same command goes on from the newest readable checkpoint, does not train a
finished fold again, and completes a validation that was interrupted.

One seed drives initialisation, sampling and augmentation; it is set anew from (seed, epoch) at every epoch. With
``--epochs`` or ``--iterations``, nnU-Net's single-process loader (``nnUNet_n_proc_DA=0``), one kind of CPU and the same
number of threads, the same seed gives the same weights to the last bit, also after a kill. Not covered: loaders with
worker processes (they take their seeds from the system), CUDA, ``--minutes`` (the steps that fit differ), and cascades
(nnU-Net's augmentation of the earlier stage's masks keeps an order of channels from epoch to epoch).
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json, write_json
from nnunet_dgplugins.locks import held
from nnunet_dgplugins.trainers import loggers
from nnunet_dgplugins.trainers.costs import note_costs
from nnunet_dgplugins.trainers.stock import ShareSchedule, blur_in_one_way, save_in_one_step

_LATEST, _BEST, _FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"
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

    def split(self, share: float) -> tuple[Budget, Budget]:
        """Return a share of it and the rest; of steps and epochs one at least each.

        Raises:
            UserError: there is one step or epoch alone.
        """
        if self.minutes:
            return Budget(minutes=self.minutes * share), Budget(minutes=self.minutes * (1 - share))
        whole = self.epochs or self.iterations or 0
        if whole < 2:
            raise UserError(f"A budget of {' '.join(self.words())} cannot be shared by two stages.")
        first = min(max(round(whole * share), 1), whole - 1)
        pair = (first, whole - first)
        earlier, rest = (Budget(epochs=part) if self.epochs else Budget(iterations=part) for part in pair)
        return earlier, rest

    def words(self) -> list[str]:
        """Return the option and its value, as typed."""
        return next(
            [f"--{f.name}", f"{value:.12g}"] for f in fields(self) if (value := getattr(self, f.name)) is not None
        )


class BudgetRun:
    """One training of a constructed, not yet initialised trainer.

    Args:
        trainer: nnU-Net trainer.
        budget: how long.
        seed: of everything random; trainers of this package also have it as their setting.
        epoch_steps: steps per epoch. Trainers of this package whose epochs are passes over the data keep their own.
        validation_steps: online validation steps per epoch, likewise.
    """

    def __init__(self, trainer: Any, budget: Budget, seed: int = 0, epoch_steps: int = 25, validation_steps: int = 4):
        from nnunet_dgplugins.trainers.base import DGTrainer

        self.trainer, self.budget, self.seed = trainer, budget, seed
        self.own = isinstance(trainer, DGTrainer)
        trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epoch_steps, validation_steps
        trainer.num_epochs = budget.epochs or _ENDLESS
        self._steps_in_epoch = 0
        if not self.own:
            trainer.save_every = _ENDLESS  # nnU-Net saves before the best value is updated, we do it behind that
            save_in_one_step(trainer)
            blur_in_one_way(trainer)

    def initialize(self) -> None:
        """Build the network from the seed."""
        from nnunet_dgplugins.trainers.base import seed_everything

        seed_everything(self.seed, 0)
        if not self.trainer.was_initialized:
            self.trainer.initialize()

    def seconds(self) -> float:
        """Return the time of training and online validation, earlier sessions included.

        The log of epochs is part of every checkpoint: what a killed epoch has used is forgotten with its steps.
        """
        log = self.trainer.logger.get_checkpoint()
        starts, ends = log["epoch_start_timestamps"], log["epoch_end_timestamps"]
        now = [time.time()] if len(starts) > len(ends) else []
        return sum(max(0.0, end - start) for start, end in zip(starts, [*ends, *now], strict=True))

    def left(self) -> float:
        """Return the share of the budget that is left, 0 to 1."""
        trainer, budget = self.trainer, self.budget
        if budget.minutes:
            return max(0.0, 1 - self.seconds() / (60 * budget.minutes))
        if budget.iterations:
            done = trainer.current_epoch * trainer.num_iterations_per_epoch + self._steps_in_epoch
            return max(0.0, 1 - done / budget.iterations)
        return max(0.0, 1 - trainer.current_epoch / trainer.num_epochs)

    def train(self) -> int:
        """Train until the budget is spent, and write the final checkpoint; returns the steps of this session.

        A budget of minutes is overrun by at most one step and the last online validation.
        """
        trainer, steps = self.trainer, 0
        self.initialize()
        trainer.on_train_start()
        if not self.own:
            names = ("initial_lr", "weight_decay", "batch_size", "num_iterations_per_epoch")
            chosen = {name: getattr(trainer, name) for name in names}
            loggers.attach(trainer, {**asdict(self.budget), "seed": self.seed, **chosen})
        if not self.budget.epochs:
            exponent = getattr(trainer, "lr_exponent", 0.9)
            trainer.lr_scheduler = ShareSchedule(trainer.optimizer, trainer.initial_lr, self.left, exponent)
        while self.left() > 0:
            steps += self._epoch()
        trainer.num_epochs = trainer.current_epoch
        loggers.draw_progress(trainer)
        trainer.on_train_end()
        if not self.own:
            loggers.finish(trainer)
        return steps

    def _epoch(self) -> int:
        import torch

        from nnunet_dgplugins.trainers.base import seed_everything

        trainer = self.trainer
        trainer.on_epoch_start()
        if not self.own:  # ours reseed themselves
            seed_everything(self.seed, trainer.current_epoch + 1)
        trainer.on_train_epoch_start()
        outputs = []
        for _ in range(self._steps_of_epoch()):
            if not self.budget.epochs:
                trainer.lr_scheduler.step()
            outputs.append(trainer.train_step(next(trainer.dataloader_train)))
            self._steps_in_epoch += 1
            if self.budget.minutes and not self.left():
                break
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
        self._steps_in_epoch = 0
        self._say_and_save()
        return len(outputs)

    def _steps_of_epoch(self) -> int:
        per_epoch = int(self.trainer.num_iterations_per_epoch)
        if not self.budget.iterations:
            return per_epoch
        return min(per_epoch, self.budget.iterations - self.trainer.current_epoch * per_epoch)

    def _guess_epochs(self) -> None:
        """Give the trainer the number of epochs that this speed leads to; ours say the time left by it."""
        if not self.budget.epochs:
            done, left = self.trainer.current_epoch + 1, self.left()
            self.trainer.num_epochs = max(done + 1, math.ceil(done / (1 - left))) if left else done

    def _say_and_save(self) -> None:
        """Do for other trainers what ours do in their ``on_epoch_end``."""
        trainer, left = self.trainer, self.left()
        if self.own:
            return
        seconds = self.seconds() * left / (1 - left)
        share = f"Epoch {trainer.current_epoch} done, {100 * (1 - left):.0f} % of the budget"
        trainer.print_to_log_file(f"{share}, about {timedelta(seconds=round(seconds))} (h:mm:ss) left.")
        if left:  # the final checkpoint follows otherwise
            # save_checkpoint counts from the running epoch, which nnU-Net has just advanced
            trainer.current_epoch -= 1
            trainer.save_checkpoint(str(Path(trainer.output_folder) / _LATEST))
            trainer.current_epoch += 1


def train_or_continue(
    trainer: Any, budget: Budget, seed: int = 0, epoch_steps: int = 25, validation_steps: int = 4
) -> int:
    """Train from the start, from the newest checkpoint, or only validate; the training is validated at the end.

    Returns:
        Optimiser steps of this session.

    Raises:
        UserError: the fold was started with another budget or seed or by another command, another process trains it
            now, or none of its checkpoints can be read.
    """
    folder = Path(trainer.output_folder)
    with held(folder / "budget.lock", f"trains {folder}"):
        for half_written in folder.glob(".tmp-*"):  # by a process that was killed while saving
            half_written.unlink(missing_ok=True)
        run = BudgetRun(trainer, budget, seed, epoch_steps, validation_steps)
        steps_asked = (
            {}
            if run.own and trainer.sets_steps()
            else {"epoch_steps": epoch_steps, "validation_steps": validation_steps}
        )
        _claim(folder, {**asdict(budget), "seed": seed, **steps_asked})
        found, steps = _newest_checkpoint(folder), 0
        if found and found.name == _FINAL and _is_validated(folder):
            trainer.print_to_log_file(f"{found} is there, and so is its validation: nothing to do.")
            return 0
        if found:
            run.initialize()
            trainer.load_checkpoint(str(found))
            trainer.print_to_log_file(f"Goes on from {found.name}, {trainer.current_epoch} epochs done.")
        if not found or found.name != _FINAL:
            steps = run.train()
        elif run.own:  # a kill may have come right after the final checkpoint
            trainer.after_training()
        trainer.print_to_log_file(f"{type(trainer).__name__}: {steps} steps, {run.seconds() / 60:.2f} minutes.")
        trainer.perform_actual_validation(False)
        note_costs(trainer, run.seconds() / 60)
    return steps


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the readable checkpoint with most epochs, None where there is no checkpoint at all.

    Raises:
        UserError: there are some, and none can be read.
    """
    from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

    epochs: dict[Path, int] = {}
    complaints = []
    for path in (folder / name for name in (_FINAL, _LATEST, _BEST)):
        if not path.is_file():
            continue
        try:
            epochs[path] = read_checkpoint(path)["current_epoch"]
        except UserError as error:
            complaints.append(str(error))
            continue
        if path.name == _FINAL:
            break
    if complaints and not epochs:
        raise UserError(" ".join([*complaints, f"Remove {folder} to train it anew."]))
    for complaint in complaints:
        click.echo(complaint)
    return max(epochs, key=lambda path: epochs[path], default=None)


def _is_validated(folder: Path) -> bool:
    """Whether nnU-Net's validation has come to its end, which is when it writes its summary."""
    try:
        read_json(folder / "validation" / "summary.json")
    except UserError:  # none, or half of one
        return False
    return True


def _claim(folder: Path, options: dict[str, Any]) -> None:
    file = folder / "budget.json"
    kept = read_json(file) if file.is_file() else options
    changed = [f"{key}={kept[key]}, now {value}" for key, value in options.items() if kept.get(key, value) != value]
    if changed:
        raise UserError(f"{folder} was started with {'; '.join(changed)}. Remove the folder, or use another one.")
    if not file.is_file() and any(folder.glob("checkpoint_*.pth")):
        raise UserError(f"{folder} holds checkpoints of another command. Remove the folder, or use another one.")
    write_json(file, options)


def construct(dataset: str, configuration: str, fold: int | str, trainer: str, plans: str, device: Any) -> Any:
    """Make a trainer as ``nnUNetv2_train`` does, with ``--c`` where the fold has a checkpoint.

    nnU-Net's W&B logger goes on with the fold's run then, and removes it otherwise.
    """
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    loggers.asked()
    number = int(dataset) if dataset.isdigit() else dataset
    folder = Path(get_output_folder(number, trainer, plans, configuration, fold))
    goes_on = any(folder.glob("checkpoint_*.pth"))
    return get_trainer_from_args(dataset, configuration, fold, trainer, plans, goes_on, device)


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

    from nnunet_dgplugins.system import keep_freed_memory

    try:
        budget = Budget(minutes, epochs, iterations)
    except UserError as error:
        raise click.UsageError(str(error)) from error
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        keep_freed_memory()
    elif device == "cuda":
        torch.backends.cudnn.benchmark = True  # as nnUNetv2_train does
        if minutes:  # compiling, anew after each stop, would be paid from the minutes of stock trainers alone
            os.environ.setdefault("nnUNet_compile", "f")
    if fold != "all" and not fold.isdigit():
        raise click.BadParameter("a number, or all", param_hint="FOLD")
    number = fold if fold == "all" else int(fold)
    with seeded_settings(trainer, seed, budget):
        built = construct(dataset, configuration, number, trainer, plans, torch.device(device))
        train_or_continue(built, budget, seed, epoch_steps, validation_steps)


if __name__ == "__main__":
    try:
        command()
    except UserError as error:
        sys.exit(str(error))
