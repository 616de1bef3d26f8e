"""Settings travel with the model, along one road, and two folds of one model never differ in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import QUICK, QUICK_GRID, World
from tiny_dataset import Recipe

from nnunet_dgplugins.cli.configure import command as configure
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.files import read_json


def resolved(world: World, trainer: str = "DeSAMTrainer", plans: str = "nnUNetPlans") -> dict:
    return read_json(world.model(trainer, plans=plans) / "plans.json")["configurations"]["2d"]["dgplugins"][trainer]


def test_resolved_settings_lie_in_the_plans_beside_the_model(world: World):
    world.settings(grid_size=3)
    world.train("DeSAMGridTrainer")
    found = resolved(world, "DeSAMGridTrainer")
    assert {**found, **QUICK_GRID, "grid_size": 3} == found
    assert found["channels"] == [0]
    assert found["loss"] == "paper"
    assert read_json(world.model("DeSAMGridTrainer") / "plans.json")["dgplugins"]["version"]
    assert "dgplugins" not in read_json(world.preprocessed / "nnUNetPlans.json")["configurations"]["2d"]


def test_prediction_without_the_trial_file_builds_the_same_network(world: World):
    world.settings(grid_size=3, min_region_area=0, iou_threshold=0.25)
    world.train("DeSAMGridTrainer")
    with_file = world.predict(world.model("DeSAMGridTrainer"))
    world.no_settings()
    predictor = world.predictor(world.model("DeSAMGridTrainer"))
    assert (predictor.network.head.grid_size, predictor.network.head.rule.iou_threshold) == (3, 0.25)
    without = world.predict(world.model("DeSAMGridTrainer"))
    assert all((a == b).all() for a, b in zip(with_file, without, strict=True))


def test_a_fold_with_other_settings_is_refused_with_both_values(world: World):
    world.train(fold=0)
    world.settings(epochs=2, loss="code")
    with pytest.raises(UserError) as caught:
        world.construct(fold=1)
    text = str(caught.value)
    assert "epochs: the model has 1, asked for 2" in text
    assert "loss: the model has 'paper', asked for 'code'" in text
    assert not (world.model() / "fold_1").exists()
    assert resolved(world)["epochs"] == 1


def test_continuing_with_other_settings_is_refused(world: World):
    world.train()
    world.settings(initial_lr=1e-3)
    with pytest.raises(UserError, match=r"initial_lr: the model has 0\.0001, asked for 0\.001"):
        world.construct(continues=True)


def test_settings_that_change_no_result_may_differ_between_folds(world: World):
    world.train(fold=0)
    world.settings(keep_freed_memory=False)
    world.train(fold=1)
    assert (world.model() / "fold_1" / "checkpoint_final.pth").is_file()


def test_auto_means_the_model_at_hand_and_is_written_by_its_name(world: World):
    world.settings(sam="auto")
    world.train()
    assert resolved(world)["sam"] == "vit_tiny"


def test_auto_takes_a_weight_file_that_is_there(world: World, sam_file: Path):
    world.settings(sam="auto")
    assert world.construct().settings.sam == "vit_b"


def test_auto_keeps_what_the_model_was_trained_with(world: World, sam_file: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as without:
        without.delenv("DGPLUGINS_SAM_DIR")
        world.settings(sam="auto")
        world.train(fold=0)
    assert world.construct(fold=1).settings.sam == "vit_tiny"


def test_configured_plans_are_used_with_their_name(world: World):
    world.use(Recipe(), own=True).no_settings()
    values = [f"{key}={value}" for key, value in {**QUICK, "loss": "code"}.items()]
    done = CliRunner().invoke(configure, [str(world.number), "-tr", "DeSAMTrainer", "-o", "nnUNetPlansQuick", *values])
    assert done.exit_code == 0, done.output
    world.train(plans="nnUNetPlansQuick")
    assert resolved(world, plans="nnUNetPlansQuick")["loss"] == "code"
    assert (world.model(plans="nnUNetPlansQuick") / "fold_0" / "checkpoint_final.pth").is_file()
    assert world.construct("DeSAMGridTrainer", plans="nnUNetPlansQuick").settings.loss == "paper"


def test_plans_for_a_stock_trainer_take_another_batch_size_and_nothing_else(world: World):
    world.use(Recipe(), own=True)
    before = read_json(world.preprocessed / "nnUNetPlans.json")
    done = CliRunner().invoke(configure, [str(world.number), "--batch-size", "7", "-o", "SmallBatch"])
    assert done.exit_code == 0, done.output
    after = read_json(world.preprocessed / "SmallBatch.json")
    assert after["configurations"]["2d"].pop("batch_size") == 7
    assert before["configurations"]["2d"].pop("batch_size") != 7
    assert after == {**before, "plans_name": "SmallBatch"}


def test_a_configuration_that_inherits_keeps_its_parents_settings(world: World):
    world.use(Recipe(), own=True).no_settings()

    def change(plans: dict) -> None:
        plans["configurations"]["2d"]["dgplugins"] = {"DeSAMTrainer": QUICK}
        plans["configurations"]["2d_code"] = {
            "inherits_from": "2d",
            "dgplugins": {"DeSAMTrainer": {"loss": "code"}},
        }

    world.edit_json("nnUNetPlans.json", change)
    built = world.train(configuration="2d_code")
    assert (built.settings.loss, built.settings.epochs, built.settings.sam) == ("code", 1, "vit_tiny")
    model = world.model(configuration="2d_code")
    network = world.predictor(model).network
    assert network.model.name == "vit_tiny"
    assert len(world.predict(model)) == 2


def test_an_unknown_setting_is_refused_before_anything_is_written(world: World):
    world.settings(epoch=3)
    with pytest.raises(BadInput, match="unknown setting 'epoch'; did you mean 'epochs'"):
        world.construct()
    assert not list(world.results.iterdir())


def test_the_whole_patch_is_written_beside_the_model_and_not_into_the_users_plans(world: World):
    world.train()
    assert read_json(world.model() / "plans.json")["configurations"]["2d"]["patch_size"] == [144, 160]
    assert read_json(world.preprocessed / "nnUNetPlans.json")["configurations"]["2d"]["patch_size"] != [144, 160]


def test_the_checkpoint_knows_the_settings_too(world: World):
    world.train()
    content = torch.load(world.model() / "fold_0" / "checkpoint_final.pth", weights_only=False)
    plans = content["init_args"]["plans"]
    assert plans["configurations"]["2d"]["dgplugins"]["DeSAMTrainer"]["sam"] == "vit_tiny"
