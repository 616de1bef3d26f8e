"""What the loop of a budget changes in a stock trainer, without touching its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnunet_dgplugins.files import replacing


class ShareSchedule:
    """Polynomial decay over the share of the budget that is left; ``step`` is called before every training step.

    An epoch may be a large part of a short budget, so that a rate set once per epoch would hardly fall.

    Args:
        optimizer: the trainer's optimiser; a group that has an ``initial_lr`` of its own decays from there.
        initial_lr: learning rate at the start, of the others.
        left: returns the share that is left, 0 to 1.
        exponent: nnU-Net's 0.9; 0 keeps the rate.
    """

    def __init__(self, optimizer: Any, initial_lr: float, left: Callable[[], float], exponent: float = 0.9):
        self.optimizer, self.initial_lr, self.left, self.exponent = optimizer, initial_lr, left, exponent

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of this moment."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", self.initial_lr) * self.left() ** self.exponent


def save_in_one_step(trainer: Any) -> None:
    """Let a checkpoint stay until the next one is whole."""
    write = trainer.save_checkpoint

    def save(filename: str) -> None:
        with replacing(filename) as temporary:
            write(str(temporary))

    trainer.save_checkpoint = save


def blur_in_one_way(trainer: Any) -> None:
    """Keep the augmentation from choosing its way to blur by a clock."""
    from nnunet_dgplugins.data.augmentation import without_timing

    make = trainer.get_training_transforms
    trainer.get_training_transforms = lambda *arguments, **options: without_timing(make(*arguments, **options))
