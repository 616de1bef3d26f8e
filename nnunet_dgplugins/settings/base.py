"""How one setting is declared, and what every trainer can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(
    default: Any,
    help: str,
    reference: str = "",
    choices: tuple[Any, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare one setting: its default, what it means, where it comes from and what is allowed."""
    rules = {"choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata={"help": help, "reference": reference, **rules})


@dataclass(frozen=True)
class TrainingSettings:
    """What every trainer can be told."""

    epochs: int = setting(1000, "Training epochs.", "nnU-Net", minimum=1)
    iterations_per_epoch: int | None = setting(
        None,
        "Training steps per epoch; null: as the method says (one pass over the data, or nnU-Net's 250).",
        minimum=1,
    )
    batch_size: int | None = setting(None, "Samples per step; null: from the plans.", minimum=1)
    initial_lr: float = setting(1e-2, "Learning rate at epoch 0, polynomial decay with exponent 0.9.", minimum=0)
    seed: int = setting(
        0, "Drives initialisation, sampling, prompts and augmentation; same seed, same weights on one CPU.", minimum=0
    )
    amp: bool = setting(True, "Mixed precision of training steps on CUDA; nnU-Net's own prediction always has it.")
    cpu_bfloat16: bool = setting(False, "bfloat16 autocast on CPU: 1.7-2x faster where the processor has it.")
    keep_freed_memory: bool = setting(
        True, "On glibc, keep freed memory in the process instead of giving it back at every step (CPU speed)."
    )
