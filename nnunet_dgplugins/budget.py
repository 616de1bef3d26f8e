"""Train any trainer, stock ones included, for a given time instead of a number of epochs.

``python -m nnunet_dgplugins.budget 501 2d 0 -tr nnUNetTrainer --minutes 3 -device cpu``

The trainer class, its hooks and its result folder are untouched: only the loop is ours. The learning rate follows
nnU-Net's polynomial decay with elapsed time in the place of epochs. Used where methods are compared at equal time.
"""

from __future__ import annotations

import time
from typing import Any

import click


class TimeSchedule:
    """Polynomial decay over a time budget; ``step`` is called once per epoch, as nnU-Net does.

    Args:
        optimizer: the trainer's optimiser.
        initial_lr: learning rate at the start.
        seconds: the budget.
        exponent: nnU-Net's 0.9.
    """

    def __init__(self, optimizer: Any, initial_lr: float, seconds: float, exponent: float = 0.9):
        self.optimizer, self.initial_lr, self.seconds, self.exponent = optimizer, initial_lr, seconds, exponent
        self.started = time.monotonic()

    def left(self) -> float:
        """Return the part of the budget that is left, 0 to 1."""
        return max(0.0, 1 - (time.monotonic() - self.started) / self.seconds)

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of this moment."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * self.left() ** self.exponent


def train_for(trainer: Any, seconds: float, iterations: int, validation_iterations: int) -> int:
    """Run ``trainer`` for ``seconds``, counted from the first step; returns the number of steps.

    Args:
        trainer: a constructed nnU-Net trainer.
        seconds: time for training steps and online validation together.
        iterations: steps per epoch.
        validation_iterations: online validation steps per epoch. Trainers of this package, whose epochs are passes
            over the data, keep their own numbers of both.
    """
    import torch

    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = iterations, validation_iterations
    trainer.save_every = 1_000_000  # the end state is what counts
    trainer.on_train_start()
    iterations, validation_iterations = trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch
    trainer.lr_scheduler = TimeSchedule(trainer.optimizer, trainer.initial_lr, seconds)
    steps = 0
    while trainer.lr_scheduler.left() > 0:
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        outputs = []
        for _ in range(iterations):
            outputs.append(trainer.train_step(next(trainer.dataloader_train)))
            steps += 1
            if not trainer.lr_scheduler.left():
                break
        trainer.on_train_epoch_end(outputs)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end(
                [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(validation_iterations)]
            )
        trainer.on_epoch_end()
    trainer.num_epochs = trainer.current_epoch
    trainer.on_train_end()
    return steps


@click.command()
@click.argument("dataset")
@click.argument("configuration")
@click.argument("fold")
@click.option("-tr", "trainer", default="nnUNetTrainer", show_default=True, help="Trainer name, stock or ours.")
@click.option("-p", "plans", default="nnUNetPlans", show_default=True, help="Plans name.")
@click.option("--minutes", type=float, required=True, help="Training time.")
@click.option("--iterations", type=int, default=25, show_default=True, help="Steps per epoch.")
@click.option(
    "--validation-iterations", type=int, default=4, show_default=True, help="Online validation steps per epoch."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of initialisation and sampling.")
@click.option("-device", "device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu", "mps"]))
def command(
    dataset: str, configuration: str, fold: str, trainer: str, plans: str, minutes: float, iterations: int,
    validation_iterations: int, seed: int, device: str,
) -> None:  # fmt: skip
    """Train for a time budget, then validate, as nnUNetv2_train would."""
    import multiprocessing

    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    from nnunet_dgplugins.system import keep_freed_memory
    from nnunet_dgplugins.trainers.base import seed_everything

    if device == "cpu":
        torch.set_num_threads(multiprocessing.cpu_count())
        keep_freed_memory()
    built = get_trainer_from_args(
        dataset,
        configuration,
        fold if fold == "all" else int(fold),
        trainer,
        plans,
        device=torch.device(device),
    )
    seed_everything(seed)
    steps = train_for(built, minutes * 60, iterations, validation_iterations)
    built.print_to_log_file(f"{trainer}: {steps} steps in {minutes:.2f} minutes.")
    built.perform_actual_validation(False)


if __name__ == "__main__":
    command()
