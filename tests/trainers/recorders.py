"""Stand-ins for W&B and MLflow that keep what they are told; TensorBoard's event files; what all three must hold."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

CURVES = ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs")
#: curves of a method's own
BESIDE = {
    "EPLTrainer": {"supervised_losses", "mean_confidence"},
    "EquivariantCAMTrainer": {"ce", "er", "kd", "cmer"},
    "DCAMClassifierTrainer": {"tags_exact_match"},
}
Curves = dict[str, dict[int, float]]


class Wandb:
    """The module wandb: one row of values per step; the last row of a killed process is lost."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []

    def init(self, project: str, dir: str, id: str | None, mode: str, resume: str) -> Any:
        if id is None:
            assert resume in ("never", "allow")
            run = SimpleNamespace(rows={}, config={}, summary={}, step=0, log=None)
            self.runs.append(run)
            id = str(len(self.runs) - 1)
        else:
            assert resume == "allow"
            run = self.runs[int(id)]
            run.rows.pop(max(run.rows), None)
            run.step = len(run.rows)

        def log(values: dict[str, float], step: int) -> None:
            row = run.rows.setdefault(step, {})
            assert step == max(run.rows)
            assert not row.keys() & values.keys()
            row.update(values)

        run.log = log
        folder = Path(dir) / "wandb" / "latest-run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"run-{id}.wandb").touch()
        return run

    def curves(self) -> Curves:
        (run,) = self.runs
        keys = {key for row in run.rows.values() for key in row}
        return {key: {step: row[key] for step, row in run.rows.items() if key in row} for key in keys}


class NoAnswer(Exception):
    """MLflow's exception."""


class Mlflow(ModuleType):
    """The module mlflow, and its client at once."""

    exceptions = SimpleNamespace(MlflowException=NoAnswer)

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None, origin="made")
        self.runs: dict[str, SimpleNamespace] = {}
        self.answers = True

    def MlflowClient(self) -> Mlflow:
        return self

    def set_experiment(self, name: str) -> Any:
        self._answer()
        return SimpleNamespace(experiment_id=f"number of {name}")

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        name = f"run{len(self.runs)}"
        self.runs[name] = SimpleNamespace(
            info=SimpleNamespace(run_id=name, experiment_id=experiment_id, run_name=run_name),
            params={}, metrics=[], status="RUNNING",
        )  # fmt: skip
        return self.runs[name]

    def get_run(self, run_id: str) -> Any:
        self._answer()
        if run_id not in self.runs:
            raise NoAnswer(f"Run {run_id} not found")
        return self.runs[run_id]

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        assert key not in self.runs[run_id].params
        self.runs[run_id].params[key] = value

    def log_metric(self, run_id: str, key: str, value: float, step: int) -> None:
        self._answer()
        self.runs[run_id].metrics.append(SimpleNamespace(key=key, value=value, step=step))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        self._answer()
        return [entry for entry in self.runs[run_id].metrics if entry.key == key]

    def set_terminated(self, run_id: str) -> None:
        self.runs[run_id].status = "FINISHED"

    def curves(self) -> Curves:
        (run,) = self.runs.values()
        return by_key(run.metrics)

    def _answer(self) -> None:
        if not self.answers:
            raise NoAnswer("no answer")


def by_key(entries: list[Any]) -> Curves:
    """Order entries that have key, step and value; no step of a key may come twice."""
    found: Curves = {}
    for entry in entries:
        steps = found.setdefault(entry.key, {})
        assert entry.step not in steps, (entry.key, entry.step)
        steps[entry.step] = entry.value
    return found


def events(fold: Path) -> Curves:
    """Read TensorBoard's event files as its own page does."""
    found = _read(fold)
    scalars = [(key, entry) for key in found.Tags()["scalars"] for entry in found.Scalars(key)]
    return by_key([SimpleNamespace(key=key, step=entry.step, value=entry.value) for key, entry in scalars])


def hyperparameters(fold: Path) -> dict[str, Any]:
    """Read the hyper-parameters of the event files."""
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    content = _read(fold).SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    values = parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}


def _read(fold: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(fold / "tensorboard")).Reload()


def switch_on(monkeypatch: pytest.MonkeyPatch) -> tuple[Wandb, Mlflow]:
    """Switch all three loggers on; TensorBoard is the real one."""
    from nnunetv2.training.logging import nnunet_logger

    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install .[tensorboard]")
    wandb, mlflow = Wandb(), Mlflow()
    monkeypatch.setattr(nnunet_logger, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setenv("DGPLUGINS_LOGGERS", "tensorboard,mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://made:5000")
    return wandb, mlflow


def kill_while_saving(trainer: Any, name: str) -> None:
    """Let a trainer stop where it would write a checkpoint, its epoch already logged."""
    save = trainer.save_checkpoint

    def stopping(filename: str) -> None:
        if Path(filename).name == f"checkpoint_{name}.pth":
            raise KeyboardInterrupt
        save(filename)

    trainer.save_checkpoint = stopping


def kill_in_epoch(trainer: Any, epoch: int) -> None:
    """Let a trainer stop where it would do a step of an epoch."""
    step = trainer.train_step

    def stopping(batch: Any) -> Any:
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt
        return step(batch)

    trainer.train_step = stopping


def expected_curves(logging: dict[str, list[Any]]) -> Curves:
    """What every logger must hold, from the log in a checkpoint."""
    found = {key: dict(enumerate(map(float, logging[key]))) for key in CURVES}
    for step, values in enumerate(logging["dice_per_class_or_region"]):
        for number, value in enumerate(values, 1):
            found.setdefault(f"dice_per_class_or_region/class_{number}", {})[step] = float(value)
    return found


def assert_all_hold(wandb: Wandb, mlflow: Mlflow, fold: Path, logging: dict[str, list[Any]], beside: set[str]) -> None:
    """Look for each epoch's value of each key once, and for no other key."""
    expected = expected_curves(logging)
    steps = expected["lrs"].keys()
    times = {"epoch_start_timestamps", "epoch_end_timestamps"}
    for found, own in (
        (wandb.curves(), times),
        (mlflow.curves(), {"epoch_seconds"}),
        (events(fold), {"epoch_seconds"}),
    ):
        assert found.keys() == expected.keys() | beside | own
        assert all(found[key].keys() == steps for key in found)
        for key, values in expected.items():
            assert found[key] == pytest.approx(values, rel=1e-5, nan_ok=True), key
