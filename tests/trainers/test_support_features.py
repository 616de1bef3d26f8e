"""Features of nnU-Net that look the same for every trainer; the others are in each method's own file."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import recorders
import torch
from conftest import PATCHES, SEMI, TAGGED, World
from resuming import assert_same, checkpoint, resume
from stages import after_its_stage, elsewhere
from tiny_dataset import Recipe

from nnunet_dgplugins.errors import UnsupportedFeature
from nnunet_dgplugins.registry import TRAINERS
from nnunet_dgplugins.settings import to_dict

RECIPES = {"DeSAM": Recipe(), "EPL": SEMI, "Equivariant": TAGGED, "D-CAM": PATCHES, "SAM-SDG": Recipe()}
pytestmark = pytest.mark.parametrize("trainer", list(TRAINERS))


@pytest.fixture
def ready(world: World, trainer: str) -> World:
    """The world on a dataset that the trainer reads, with what it builds on trained."""
    return after_its_stage(world.use(RECIPES[TRAINERS[trainer].method]), trainer)


def refused(world: World, trainer: str, configuration: str = "2d") -> str:
    """The sentence of a refusal, which leaves nothing behind."""
    with pytest.raises(UnsupportedFeature) as caught:
        world.construct(trainer, configuration=configuration)
    assert not list(world.results.iterdir())
    text = str(caught.value)
    assert text.startswith(trainer)
    assert text.endswith(".")
    assert ". " not in text
    return text


def test_a_cascade_is_refused(world: World, trainer: str):
    world.use(RECIPES[TRAINERS[trainer].method], own=True)
    stages = {
        "2d_first": {"inherits_from": "2d", "next_stage": "2d_second"},
        "2d_second": {"inherits_from": "2d", "previous_stage": "2d_first"},
    }
    world.edit_json("nnUNetPlans.json", lambda plans: plans["configurations"].update(stages))
    assert "cascade" in refused(world, trainer, "2d_second")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_several_gpus_are_refused(world: World, trainer: str):
    world.use(RECIPES[TRAINERS[trainer].method])
    torch.distributed.init_process_group("gloo", init_method=f"file://{world.root}/meeting", rank=0, world_size=1)
    try:
        assert "one GPU" in refused(world, trainer)
    finally:
        torch.distributed.destroy_process_group()


def test_continuing_finishes_the_missing_epochs(ready: World, trainer: str):
    ready.settings(epochs=2)
    built = ready.construct(trainer)
    start = built.on_epoch_start

    def stopping(*arguments: Any) -> None:
        if built.current_epoch == 1:
            raise KeyboardInterrupt
        start(*arguments)

    built.on_epoch_start = stopping
    with pytest.raises(KeyboardInterrupt):
        built.run_training()
    ready.command(trainer, continue_training=True)
    assert checkpoint(ready, trainer)["current_epoch"] == 2
    assert len(checkpoint(ready, trainer)["logging"]["train_losses"]) == 2


def test_every_logger_has_one_value_per_epoch_and_key_also_after_a_stop(
    ready: World, trainer: str, monkeypatch: pytest.MonkeyPatch
):
    wandb, mlflow = recorders.switch_on(monkeypatch)
    ready.settings(epochs=2)
    built = ready.construct(trainer)
    recorders.kill_while_saving(built, "final")
    with pytest.raises(KeyboardInterrupt):
        built.run_training()
    chosen = to_dict(resume(ready, trainer).settings)
    fold = ready.model(trainer) / "fold_0"
    logging = checkpoint(ready, trainer)["logging"]
    recorders.assert_all_hold(wandb, mlflow, fold, logging, recorders.BESIDE.get(trainer, set()))
    assert wandb.runs[0].config["settings"] == mlflow.runs["run0"].params == chosen
    told = recorders.hyperparameters(fold)
    assert told.keys() == chosen.keys()
    assert (told["epochs"], told["initial_lr"]) == (2, chosen["initial_lr"])
    assert mlflow.runs["run0"].status == "FINISHED"


def test_no_checkpoint_is_written_when_checkpointing_is_disabled(ready: World, trainer: str):
    ready.settings(export_second=True)
    ready.command(trainer, disable_checkpointing=True)
    assert not list(ready.model(trainer).rglob("*.pth"))
    assert (ready.model(trainer) / "fold_0" / "validation" / "summary.json").is_file()


def test_compilation_is_accepted_and_changes_nothing(ready: World, trainer: str, monkeypatch: pytest.MonkeyPatch):
    ready.train(trainer)
    plain = checkpoint(ready, trainer)
    monkeypatch.setenv("nnUNet_compile", "t")
    assert not elsewhere(ready, trainer, "compiled").train(trainer)._do_i_compile()
    assert_same(plain["network_weights"], checkpoint(ready, trainer)["network_weights"])


def test_a_zip_carries_everything_to_an_empty_results_folder(ready: World, trainer: str):
    from nnunetv2.model_sharing.model_export import export_pretrained_model
    from nnunetv2.model_sharing.model_import import install_model_from_zip_file

    ready.command(trainer)
    (ready.model(trainer) / "fold_0" / "progress.png").touch()  # nnU-Net's plot is off in fast tests
    before = ready.predict(ready.model(trainer))
    export_pretrained_model(
        ready.name, str(ready.root / "model.zip"), ("2d",), trainer, folds=(0,), export_crossval_predictions=False
    )
    shutil.rmtree(ready.results)
    ready.elsewhere("received").no_settings()
    install_model_from_zip_file(str(ready.root / "model.zip"))
    after = ready.predict(ready.model(trainer))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
