"""A training in a process of its own that kills itself: ``python interrupted.py DATASET TRAINER MOMENT``.

MOMENT is ``mid-epoch`` (in the second step of the third epoch) or ``saving`` (half of the third epoch's newest
checkpoint is written). The kill is SIGKILL: nothing is cleaned up.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any


def main(dataset: str, trainer: str, moment: str) -> None:
    import torch

    torch.set_num_threads(1)
    import small_models
    from nnunetv2.run.run_training import run_training

    from nnunet_dgplugins import ext
    from nnunet_dgplugins.files import RESULTS, nnunet_folder
    from nnunet_dgplugins.registry import load_trainer
    from nnunet_dgplugins.sam.models import MODELS

    ext.register()
    MODELS.update(small_models.installed(nnunet_folder(RESULTS).parent / "package"))
    if moment == "mid-epoch":
        _kill_in_step(load_trainer(trainer))
    else:
        _kill_while_saving(torch)
    run_training(dataset, "2d", 0, trainer, device=torch.device("cpu"))


def _kill_in_step(cls: Any) -> None:
    step, count = cls.train_step, [0]

    def counted(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        count[0] += self.current_epoch == 2
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        found: dict[str, Any] = step(self, batch)
        return found

    cls.train_step = counted


def _kill_while_saving(torch: Any) -> None:
    save = torch.save

    def half(content: Any, path: str, **options: Any) -> None:
        save(content, path, **options)
        if "latest" in str(path) and content["current_epoch"] == 3:
            file = Path(path)
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


if __name__ == "__main__":
    main(*sys.argv[1:])
