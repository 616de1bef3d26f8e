"""TensorBoard and MLflow beside nnU-Net's own logger: ``DGPLUGINS_LOGGERS=tensorboard,mlflow``.

nnU-Net's logger hands values on to a list of loggers: its own W&B, and by :func:`attach` these, imported if asked for.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nnunet_dgplugins.errors import UserError, nearest

VARIABLE = "DGPLUGINS_LOGGERS"
TRACKING_URI = "MLFLOW_TRACKING_URI"
#: how often progress.png is drawn at most. One drawing takes about a second, as long as an epoch of a small network
DRAW_SECONDS = 30.0
#: what to install; each logger is named like the package that it imports
INSTALL = {"tensorboard": "pip install tensorboard", "mlflow": "pip install mlflow-skinny"}


def named() -> list[str]:
    """Return the names in ``DGPLUGINS_LOGGERS``, unchecked, each once."""
    names = (name.strip().lower() for name in os.environ.get(VARIABLE, "").split(","))
    return list(dict.fromkeys(name for name in names if name))


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; a mere folder of its name does not count."""
    return (spec := find_spec(package)) is not None and spec.origin is not None


def asked() -> list[str]:
    """Return the loggers that ``DGPLUGINS_LOGGERS`` names, all of them ready.

    Raises:
        UserError: one does not exist, is not installed or does not know where to log.
    """
    names = named()
    for name in names:
        if name not in INSTALL:
            raise UserError(f"{VARIABLE}: no logger {name!r}{nearest(name, INSTALL)}")
        if not is_installed(name):
            raise UserError(f"{VARIABLE} asks for {name}, which is not installed: {INSTALL[name]}")
    if "mlflow" in names and not os.environ.get(TRACKING_URI):
        raise UserError(f"{VARIABLE} asks for mlflow, which must know where: export {TRACKING_URI}=http://server:5000")
    return names


def attach(trainer: Any, hyperparameters: dict[str, Any]) -> None:
    """Give a trainer that is about to train the loggers asked for; its hyper-parameters are written once, to W&B too.

    From here on ``progress.png`` is drawn now and then (:class:`RarePlot`), and by :func:`draw_progress` at the end.

    Args:
        trainer: any nnU-Net trainer, initialised; its current epoch is where the curves go on.
        hyperparameters: by name, not nested.
    """
    trainer.logger.plot_progress_png = RarePlot(trainer.logger.plot_progress_png)
    if trainer.current_epoch == 0:
        trainer.logger.update_config({"settings": hyperparameters})
    for name in asked():
        logger: Any = {"tensorboard": TensorBoardLogger, "mlflow": MLflowLogger}[name](trainer)
        if logger.new:
            logger.update_config(hyperparameters)
        trainer.logger.loggers.append(logger)


def draw_progress(trainer: Any) -> None:
    """Draw the epochs that ``progress.png`` lacks; to be called before the final checkpoint says that all is done."""
    if trainer.local_rank == 0:
        trainer.logger.plot_progress_png.draw_skipped()


def finish(trainer: Any) -> None:
    """Say that the training has come to its end; the final validation's values may still follow."""
    for logger in trainer.logger.loggers:
        if isinstance(logger, MLflowLogger):
            logger.finish()


class RarePlot:
    """Draws ``progress.png`` at once, then at most every :data:`DRAW_SECONDS`.

    Args:
        draw: nnU-Net's drawing, which takes the fold's folder.
    """

    def __init__(self, draw: Callable[[str], None]):
        self._draw, self._drawn, self._skipped = draw, -math.inf, ""

    def __call__(self, folder: str) -> None:
        """Draw, unless that was done a short while ago."""
        self._skipped = folder
        if time.monotonic() - self._drawn >= DRAW_SECONDS:
            self.draw_skipped()

    def draw_skipped(self) -> None:
        """Draw the epochs that the picture lacks, if any."""
        if self._skipped:
            self._draw(self._skipped)
            self._drawn, self._skipped = time.monotonic(), ""


class EpochLogger(ABC):
    """Gathers what nnU-Net's logger hands on and writes it when the epoch is whole: one value per epoch and key.

    That is before the epoch's checkpoint, so that no kill leaves a gap. Timestamps become ``epoch_seconds``.
    """

    new: bool  # whether nothing of this training has been logged yet

    def __init__(self, trainer: Any):
        self.epochs_done: int = trainer.current_epoch
        self._values: dict[str, float] = {}

    def log(self, key: str, value: float, step: int) -> None:
        """Take a value of epoch ``step``; of two values of one key the later counts."""
        if key == "epoch_start_timestamps":
            self._values, self._began = {}, float(value)
        elif key == "epoch_end_timestamps":
            self.epochs_done = step + 1
            self.write({**self._values, "epoch_seconds": value - self._began}, step)
        else:
            self._values[key] = float(value)

    def log_summary(self, key: str, value: float) -> None:
        """Write a value that a training has once, such as the final validation's, behind its last epoch."""
        self.write({key: float(value)}, self.epochs_done)

    @abstractmethod
    def write(self, values: dict[str, float], step: int) -> None:
        """Write values of one step."""


class TensorBoardLogger(EpochLogger):
    """Event files in ``<fold>/tensorboard``; a training that goes on takes back epochs it does again."""

    def __init__(self, trainer: Any):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(trainer)
        folder = Path(trainer.output_folder) / "tensorboard"
        if not trainer.current_epoch:  # what lies there belongs to a training that is overwritten
            shutil.rmtree(folder, ignore_errors=True)
        self.new = not folder.exists()
        self._writer: Any = SummaryWriter(str(folder), purge_step=None if self.new else trainer.current_epoch)
        trainer.print_to_log_file(f"Curves: tensorboard --logdir {folder}")

    def update_config(self, config: dict[str, Any]) -> None:
        """Write hyper-parameters."""
        from torch.utils.tensorboard.summary import hparams  # add_hparams would open a run of its own

        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in config.items()}
        for summary in hparams(plain, {"ema_fg_dice": 0, "val_losses": 0})[:2]:
            self._writer.file_writer.add_summary(summary)

    def write(self, values: dict[str, float], step: int) -> None:
        """Write values of one step, to the disk at once."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()


class MLflowLogger(EpochLogger):
    """A run per fold at MLflow's own ``MLFLOW_TRACKING_URI``; ``<fold>/mlflow_run.txt`` keeps its id.

    The experiment is ``MLFLOW_EXPERIMENT_NAME``, or the dataset's name. What MLflow has already is not sent again. It
    must answer at the start; where it does not later, the training goes on, and values are sent with the next epoch's.
    """

    def __init__(self, trainer: Any):
        import mlflow

        super().__init__(trainer)
        self._say, self._error = trainer.print_to_log_file, mlflow.exceptions.MlflowException
        self._pending: list[tuple[str, float, int]] = []
        self._last_steps: dict[str, int] = {}
        fold = Path(trainer.output_folder)
        file = fold / "mlflow_run.txt"
        self.new = not (trainer.current_epoch and file.is_file())
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or trainer.plans_manager.dataset_name
        try:
            self._client = mlflow.MlflowClient()
            if self.new:
                number = mlflow.set_experiment(experiment).experiment_id
                run = self._client.create_run(number, run_name=f"{fold.parent.name} {fold.name}")
                file.write_text(run.info.run_id)
            else:
                run = self._client.get_run(file.read_text().strip())
        except self._error as error:
            raise UserError(f"MLflow: {error}. Set {TRACKING_URI}, or remove {file} to begin a new run.") from error
        self._run = run.info.run_id
        trainer.print_to_log_file(f"Curves: MLflow run {self._run}")

    def update_config(self, config: dict[str, Any]) -> None:
        """Write hyper-parameters."""
        with self._going_on():
            for key, value in config.items():
                self._client.log_param(self._run, key, value)

    def write(self, values: dict[str, float], step: int) -> None:
        """Send values of one step, behind those that wait."""
        self._pending += ((key, value, step) for key, value in values.items())
        with self._going_on():
            while self._pending:
                self._send(*self._pending[0])
                del self._pending[0]

    def finish(self) -> None:
        """Mark the run as finished."""
        with self._going_on():
            self._client.set_terminated(self._run)

    def _send(self, key: str, value: float, step: int) -> None:
        if key not in self._last_steps:
            known = [] if self.new else self._client.get_metric_history(self._run, key)
            self._last_steps[key] = max((entry.step for entry in known), default=-1)
        if step > self._last_steps[key]:
            self._client.log_metric(self._run, key, value, step=step)
            self._last_steps[key] = step

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            self._say(f"MLflow: {error}; the training goes on, {len(self._pending)} values wait.")
