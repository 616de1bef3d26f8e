"""W&B, TensorBoard and MLflow: what is refused, budgets, values that a training has once, runs that begin anew."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recorders
import torch
from conftest import PATCHES, TAGGED, World
from resuming import checkpoint, resume

from nnunet_dgplugins.budget import Budget, construct, seeded_settings, train_or_continue
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.trainers import loggers


def refused(world: World) -> str:
    with pytest.raises(UserError) as caught:
        world.construct()
    assert not list(world.results.iterdir())
    return str(caught.value)


# ---------------------------------------------------------------- what is refused before anything is written


def test_an_unknown_logger_is_refused_with_the_nearest_name(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DGPLUGINS_LOGGERS", "tensorbord")
    assert refused(world) == "DGPLUGINS_LOGGERS: no logger 'tensorbord'; did you mean 'tensorboard'?"


@pytest.mark.parametrize(("name", "install"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny")])
def test_a_logger_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, install: str
):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    monkeypatch.setenv("DGPLUGINS_LOGGERS", name)
    sentence = f"DGPLUGINS_LOGGERS asks for {name}, which is not installed: pip install {install}"
    assert refused(world) == sentence
    with pytest.raises(UserError, match=sentence):
        construct(str(world.number), "2d", 0, "nnUNetTrainer", "nnUNetPlans", torch.device("cpu"))


def test_a_folder_that_is_called_like_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "foldname").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not loggers.is_installed("foldname")
    (tmp_path / "foldname" / "__init__.py").touch()
    assert loggers.is_installed("foldname")


def test_mlflow_without_an_address_is_refused(world: World, monkeypatch: pytest.MonkeyPatch):
    recorders.switch_on(monkeypatch)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "export MLFLOW_TRACKING_URI=" in refused(world)


def test_wandb_that_is_not_installed_is_refused_by_nnunet_itself(world: World, monkeypatch: pytest.MonkeyPatch):
    recorders.switch_on(monkeypatch)
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", None)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        world.construct()


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "DeSAMTrainer"])
def test_a_budget_logs_one_value_per_epoch_and_key_also_after_a_stop(
    world: World, monkeypatch: pytest.MonkeyPatch, trainer: str
):
    wandb, mlflow = recorders.switch_on(monkeypatch)
    budget, seed = Budget(epochs=2), 3

    def built() -> Any:
        with seeded_settings(trainer, seed, budget):
            found = construct(str(world.number), "2d", 0, trainer, "nnUNetPlans", torch.device("cpu"))
        found.perform_actual_validation = lambda save_probabilities: None
        return found

    first = built()
    recorders.kill_in_epoch(first, 1)
    with pytest.raises(KeyboardInterrupt):
        train_or_continue(first, budget, seed, epoch_steps=2, validation_steps=1)
    train_or_continue(built(), budget, seed, epoch_steps=2, validation_steps=1)
    fold = world.model(trainer) / "fold_0"
    recorders.assert_all_hold(wandb, mlflow, fold, checkpoint(world, trainer)["logging"], set())
    assert mlflow.runs["run0"].status == "FINISHED"
    assert mlflow.runs["run0"].params == wandb.runs[0].config["settings"]
    assert recorders.hyperparameters(fold)["seed"] == seed


# ---------------------------------------------------------------- progress.png


def test_the_picture_is_drawn_at_most_every_half_minute_and_lacks_no_epoch_at_the_end(monkeypatch: pytest.MonkeyPatch):
    clock, drawn = [100.0], []
    monkeypatch.setattr(loggers, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    plot = loggers.RarePlot(lambda folder: drawn.append((folder, clock[0])))
    plot.draw_skipped()  # nothing has been trained
    for clock[0] in (100.0, 110.0, 129.0, 131.0, 140.0):
        plot("fold_0")
    plot.draw_skipped()
    plot.draw_skipped()
    assert drawn == [("fold_0", 100.0), ("fold_0", 131.0), ("fold_0", 140.0)]


def test_a_training_of_short_epochs_draws_the_first_and_the_last(world: World, monkeypatch: pytest.MonkeyPatch):
    drawn: list[int] = []
    monkeypatch.setattr(
        "nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png",
        lambda logger, folder: drawn.append(len(logger.my_fantastic_logging["train_losses"])),
    )
    world.settings(epochs=3)
    built = world.construct("DeSAMTrainer")
    recorders.kill_while_saving(built, "final")  # nothing would draw behind it
    with pytest.raises(KeyboardInterrupt):
        built.run_training()
    assert drawn == [1, 3]


# ---------------------------------------------------------------- once per training


@pytest.mark.parametrize(
    ("trainer", "key"),
    [
        ("DeSAMTrainer", "final_val/foreground_dice"),
        ("EquivariantCAMTrainer", "final_val/foreground_dice"),
        ("DCAMClassifierTrainer", "final_val/mean_iou"),
    ],
)
def test_the_final_validation_is_logged_once_behind_the_last_epoch(
    world: World, monkeypatch: pytest.MonkeyPatch, trainer: str, key: str
):
    world.use({"EquivariantCAMTrainer": TAGGED, "DCAMClassifierTrainer": PATCHES}.get(trainer, world.recipe))
    wandb, mlflow = recorders.switch_on(monkeypatch)
    world.command(trainer)
    value = wandb.runs[0].summary[key]
    assert 0 <= value <= 1
    assert mlflow.curves()[key] == {1: value}
    assert recorders.events(world.model(trainer) / "fold_0")[key] == pytest.approx({1: value})


def test_a_training_begun_anew_in_the_same_fold_takes_nothing_over(world: World, monkeypatch: pytest.MonkeyPatch):
    _, mlflow = recorders.switch_on(monkeypatch)
    world.settings(epochs=2)
    world.train()
    world.elsewhere("anew", keeping="DeSAMTrainer")  # the earlier training's curves come along
    for path in world.model().glob("fold_0/checkpoint_*"):
        path.unlink()
    world.settings(epochs=1)
    world.train()
    fold = world.model() / "fold_0"
    assert all(values.keys() == {0} for values in recorders.events(fold).values())
    assert recorders.hyperparameters(fold)["epochs"] == 1
    assert [mlflow.runs[name].params["epochs"] for name in ("run0", "run1")] == [2, 1]
    assert (fold / "mlflow_run.txt").read_text() == "run1"


# ---------------------------------------------------------------- MLflow's answers


def test_a_training_goes_on_without_mlflow_and_sends_what_waited(world: World, monkeypatch: pytest.MonkeyPatch):
    _, mlflow = recorders.switch_on(monkeypatch)
    world.settings(epochs=2)
    built = world.construct()
    end = built.on_epoch_end

    def silent_in_the_first_epoch() -> None:
        mlflow.answers = built.current_epoch > 0
        end()

    built.on_epoch_end = silent_in_the_first_epoch
    built.run_training()
    assert all(values.keys() == {0, 1} for values in mlflow.curves().values())
    assert "the training goes on" in Path(built.log_file).read_text()


def test_an_mlflow_that_does_not_answer_at_the_start_is_said_with_its_variable(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    _, mlflow = recorders.switch_on(monkeypatch)
    mlflow.answers = False
    with pytest.raises(UserError, match=r"no answer.*MLFLOW_TRACKING_URI"):
        world.train()


def test_a_run_that_mlflow_does_not_know_is_never_continued_unasked(world: World, monkeypatch: pytest.MonkeyPatch):
    _, mlflow = recorders.switch_on(monkeypatch)
    world.settings(epochs=2)
    built = world.construct()
    recorders.kill_while_saving(built, "final")
    with pytest.raises(KeyboardInterrupt):
        built.run_training()
    mlflow.runs.clear()
    with pytest.raises(UserError, match=r"run0 not found.*remove .*mlflow_run.txt"):
        resume(world)
    (world.model() / "fold_0" / "mlflow_run.txt").unlink()
    resume(world)
    assert mlflow.curves()["lrs"].keys() == {1}


@pytest.mark.slow  # the import alone takes seconds
def test_the_real_mlflow_keeps_one_value_per_epoch_and_key(world: World, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow", reason="MLflow's client is large and no test dependency: pip install .[mlflow]")
    import mlflow

    monkeypatch.setenv("DGPLUGINS_LOGGERS", "mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (world.root / "mlruns").as_uri())
    world.settings(epochs=2)
    built = world.construct()
    recorders.kill_while_saving(built, "final")
    with pytest.raises(KeyboardInterrupt):
        built.run_training()
    resume(world)
    client = mlflow.MlflowClient()
    run = client.get_run((world.model() / "fold_0" / "mlflow_run.txt").read_text())
    assert client.get_experiment(run.info.experiment_id).name == world.name
    assert (run.info.status, run.data.params["epochs"]) == ("FINISHED", "2")
    found = recorders.by_key(
        [entry for key in run.data.metrics for entry in client.get_metric_history(run.info.run_id, key)]
    )
    expected = recorders.expected_curves(checkpoint(world)["logging"])
    assert found.keys() == expected.keys() | {"epoch_seconds"}
    assert all(found[key] == pytest.approx(values, nan_ok=True) for key, values in expected.items())
