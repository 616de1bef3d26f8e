"""What a training took and how it went, kept in its fold for ``dgplugins report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_dgplugins.files import read_json, write_json
from nnunet_dgplugins.system import peak_memory

TRAINING = "dgplugins_training.json"  # in a fold
CURVES = ("train_losses", "val_losses", "ema_fg_dice")  # of nnU-Net's logger, a value per epoch


def note_costs(trainer: Any, minutes: float) -> None:
    """Write time, memory and curves of a finished training; memory is the highest of all its sessions.

    Args:
        trainer: any nnU-Net trainer.
        minutes: of training steps and online validation.
    """
    import torch

    path = Path(trainer.output_folder) / TRAINING
    before = read_json(path) if path.is_file() else {}
    log = trainer.logger.get_checkpoint()
    memory = {"peak_memory_bytes": peak_memory(), "peak_gpu_memory_bytes": None}
    if trainer.device.type == "cuda":
        memory["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
    highest = {name: max(value or 0, before.get(name) or 0) or None for name, value in memory.items()}
    curves = {key: [float(value) for value in log[key]] for key in CURVES if log.get(key)}
    write_json(path, {"minutes": minutes, **highest, "curves": curves})
