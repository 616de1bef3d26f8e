"""What the equivariant trainer learns from, and what it never opens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TAGGED, World
from stages import same, weights
from tiny_dataset import ENDING, Recipe

from nnunet_dgplugins.budget import Budget, BudgetRun
from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.loaders import read_properties
from nnunet_dgplugins.data.tags import slice_tags
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.methods.equivariant.segmenter import CAMSegmenter
from nnunet_dgplugins.methods.equivariant.transforms import FAMILIES
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint
from nnunet_dgplugins.trainers.deployed import rebuild
from nnunet_dgplugins.trainers.equivariant import _Slices
from nnunet_dgplugins.trainers.measure_equivariance import _untrained, differences

TRAINER = "EquivariantCAMTrainer"


def test_batches_hold_whole_slices_of_training_cases_with_the_tables_tags(tagged: World):
    trainer = tagged.construct(TRAINER)
    trainer.on_train_start()
    table = CaseTable.from_dataset_json(read_json(tagged.preprocessed / "dataset.json"))
    assert table is not None
    train, _ = trainer.do_split()
    expected = [tag for name in train for tag in table.cases[name].tags or []]
    assert trainer.num_iterations_per_epoch == 2
    batch = next(trainer.dataloader_train)
    assert batch["images"].shape == (4, 2, 40, 40)
    assert set(batch["keys"]) <= set(train)
    slices = _Slices(trainer, train)
    every = slices.load(np.arange(len(slices)), 0)
    assert every["tags"].tolist() == expected
    assert 0 < sum(expected) < len(expected)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, train)
    shown = [data[:, z] for data in (dataset.load_case(name)[0][:] for name in train) for z in range(data.shape[1])]
    for image, frame in zip(shown, every["images"], strict=True):
        assert np.array_equal(frame[:, 2:38].numpy(), image)  # 36 rows in the middle of 40
    trainer.on_train_end()


def test_slices_that_the_crop_takes_away_take_their_tags_with_them(tagged: World):
    tagged.use(TAGGED, own=True)
    trainer = tagged.construct(TRAINER)
    trainer.initialize()
    properties = read_properties(trainer.dataset_class(trainer.preprocessed_dataset_folder, ["case_1"]), "case_1")
    bounds = properties["bbox_used_for_cropping"]
    cropped = {**properties, "bbox_used_for_cropping": [[2, bounds[0][1]], *bounds[1:]]}
    whole = slice_tags(trainer.case_table, "case_1", properties, [0, 1, 2]).tolist()
    assert slice_tags(trainer.case_table, "case_1", cropped, [0, 1, 2]).tolist() == whole[2:]


def test_tags_go_through_nnunets_crop():
    table = CaseTable.from_dataset_json({"dgplugins": {"format": 1, "cases": {"a": {"tags": [0, 1, 1, 0, 1]}}}})
    assert table is not None
    properties = {"shape_before_cropping": (5, 8, 8), "bbox_used_for_cropping": [[1, 4], [0, 8], [2, 8]]}
    assert slice_tags(table, "a", properties, [0, 1, 2]).tolist() == [1, 1, 0]
    with pytest.raises(UserError, match="along axis 2"):
        slice_tags(table, "a", properties, [2, 0, 1])
    with pytest.raises(UserError, match="5 tags in the case table, 6 slices"):
        slice_tags(table, "a", {**properties, "shape_before_cropping": (6, 8, 8)}, [0, 1, 2])
    with pytest.raises(UserError, match="one tag per slice"):
        slice_tags(table, "b", properties, [0, 1, 2])


def test_the_dice_per_volume_is_that_of_the_prediction_and_never_of_tags(tagged: World):
    tagged.settings(epochs=2, iterations_per_epoch=8)
    tagged.command(TRAINER)
    folder = tagged.model(TRAINER) / "fold_0" / "validation_cam"
    result = json.loads((folder / "cam_dice.json").read_text())
    assert list(result["cases"]) == ["case_0"]
    assert {"0.2", "0.5", "0.8"} <= set(result["cases"]["case_0"])
    import SimpleITK as sitk

    drawn, truth = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(path))) == 1
        for path in (folder / f"case_0{ENDING}", tagged.raw / "labelsVal" / f"case_0{ENDING}")
    )
    total = drawn.sum() + truth.sum()
    assert result["cases"]["case_0"]["0.5"] == pytest.approx(2 * (drawn & truth).sum() / total, abs=1e-9)
    summary = json.loads((folder.parent / "validation" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] == result["mean"]["0.5"]


def test_the_threshold_may_be_chosen_by_the_validation_volumes_and_stays_with_the_model(tagged: World):
    tagged.use(TAGGED, own=True)
    asked = {"epochs": 2, "iterations_per_epoch": 8, "gate": "none", "fusion": "max"}
    tagged.settings(**asked, threshold=0.2)
    tagged.command(TRAINER)
    model = tagged.model(TRAINER)
    fold = model / "fold_0"
    drawn = fold / "validation_cam" / f"case_0{ENDING}"
    expected = tagged.predict(model)
    assert any(mask.any() for mask in expected)
    shutil.copyfile(drawn, tagged.raw / "labelsVal" / drawn.name)  # the truth is the map above 0.2
    tagged.settings(**asked)
    tagged.command(TRAINER, only_run_validation=True)
    at_half = json.loads((fold / "validation_cam" / "cam_dice.json").read_text())
    assert at_half["threshold"] == 0.5
    assert at_half["mean"]["0.5"] < at_half["mean"]["0.2"] == pytest.approx(1, abs=0.01)  # a tie lies on either side
    tagged.settings(**asked, choose_threshold=True)
    tagged.command(TRAINER, only_run_validation=True)
    chosen = json.loads((fold / "validation_cam" / "cam_dice.json").read_text())
    assert (chosen["threshold"], chosen["mean"]["0.2"]) == (0.2, 1)
    assert chosen["mean"]["0.5"] == pytest.approx(at_half["mean"]["0.5"])
    assert json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"] == 1
    tagged.no_settings()  # prediction knows it from the model alone
    assert all(np.array_equal(a, b) for a, b in zip(tagged.predict(model), expected, strict=True))


def test_a_volume_whose_mask_is_empty_is_listed_and_counts_in_no_mean(tagged: World):
    import SimpleITK as sitk

    tagged.use(TAGGED, own=True)
    first, second = (tagged.raw / "labelsVal" / f"case_{number}{ENDING}" for number in (0, 4))
    image = sitk.ReadImage(str(second))
    sitk.WriteImage(image * 0, str(second))
    tagged.write_splits([{"train": ["case_1", "case_2", "case_3"], "val": ["case_0", "case_4"]}])
    tagged.settings(threshold=1.0, choose_threshold=True)  # nothing is above 1: the empty volume would have Dice 1
    tagged.command(TRAINER)
    fold = tagged.model(TRAINER) / "fold_0"
    result = json.loads((fold / "validation_cam" / "cam_dice.json").read_text())
    assert list(result["cases"]) == ["case_0"]
    assert result["empty"] == ["case_4"]
    assert result["mean"] == result["cases"]["case_0"]
    (log,) = fold.glob("training_log_*.txt")
    assert "Masks of case_4 are empty" in log.read_text()
    sitk.WriteImage(sitk.ReadImage(str(first)) * 0, str(first))
    tagged.command(TRAINER, only_run_validation=True)
    assert not (fold / "validation_cam" / "cam_dice.json").exists()
    assert json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"] is None


def test_validation_goes_without_dice_where_no_mask_is_known(tagged: World):
    tagged.use(TAGGED, own=True)
    (tagged.raw / "labelsVal" / f"case_0{ENDING}").unlink()
    tagged.command(TRAINER)
    folder = tagged.model(TRAINER) / "fold_0" / "validation_cam"
    assert (folder / f"case_0{ENDING}").is_file()
    assert not (folder / "cam_dice.json").exists()
    (log,) = folder.parent.glob("training_log_*.txt")
    assert "no masks of them are known" in log.read_text()


def test_tag_accuracy_stands_where_nnunet_keeps_its_pseudo_dice_and_chooses_the_best_checkpoint(tagged: World):
    tagged.settings(epochs=3)
    trainer = tagged.construct(TRAINER)
    scripted = iter((0.25, 1.0, 0.0))
    trainer.validation_step = lambda batch, share=None: {"loss": np.zeros(2), "right": np.zeros(2), "slices": 4}
    ended = trainer.on_validation_epoch_end

    def with_accuracy(outputs: list[dict[str, Any]]) -> None:
        ended([{"loss": np.zeros(2), "right": np.full(2, 4 * next(scripted)), "slices": 4}])

    trainer.on_validation_epoch_end = with_accuracy
    trainer.run_training()
    best = torch.load(tagged.model(TRAINER) / "fold_0" / "checkpoint_best.pth", weights_only=False)
    assert best["current_epoch"] == 2  # epochs done: the second had the best moving average
    accuracies = [trainer.logger.get_value("mean_fg_dice", step) for step in range(3)]
    assert all(0 <= value <= 1 for value in accuracies)
    per_modality = trainer.logger.get_value("dice_per_class_or_region", 0)
    assert len(per_modality) == 2
    assert float(np.mean(per_modality)) == pytest.approx(accuracies[0])


@pytest.mark.parametrize("choice", [{"forwards": "grouped"}, {"one_graph_at_a_time": True}, {"channels_last": False}])
def test_choices_of_speed_and_memory_change_results_by_rounding_only(tagged: World, choice: dict[str, Any]):
    def step() -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        trainer = tagged.train(TRAINER)
        gradients = [state["exp_avg"] for state in trainer.optimizer.state.values()]  # a tenth of the only gradient
        return {key: value for key, value in weights(tagged, TRAINER).items() if "running" in key}, gradients

    # one thread and PyTorch's own kernels: a ReLU whose input is 0 up to rounding lets a gradient jump
    with torch.backends.mkldnn.flags(enabled=False):
        tagged.settings(iterations_per_epoch=1)
        statistics, gradients = step()
        tagged.settings(iterations_per_epoch=1, **choice)
        tagged.elsewhere("again")
        others, again = step()
    for key, value in others.items():
        torch.testing.assert_close(value, statistics[key], rtol=1e-3, atol=1e-5)
    assert len(gradients) == len(again) > 0
    for one, other in zip(gradients, again, strict=True):
        largest = float(one.abs().max())
        torch.testing.assert_close(other, one, rtol=0, atol=max(1e-6, 2e-2 * largest))


def test_a_dataset_with_masks_is_refused_until_tags_are_to_be_derived_and_then_they_are_once(world: World):
    world.use(Recipe("Masks", channels=("noNorm", "noNorm")), own=True)
    with pytest.raises(UserError, match="derive_tags=true"):
        world.construct(TRAINER)
    assert not list(world.results.iterdir())
    world.settings(derive_tags=True)
    world.train(TRAINER)
    for folder in (world.raw, world.preprocessed):
        cases = read_json(folder / "dataset.json")["dgplugins"]["cases"]
        assert {len(case["tags"]) for case in cases.values()} == {4, 5, 6}
        assert all(case["tags"][-1] == 0 and sum(case["tags"]) == len(case["tags"]) - 1 for case in cases.values())
    before = weights(world, TRAINER)
    for path in (world.preprocessed / "gt_segmentations").glob(f"*{ENDING}"):
        path.write_bytes(b"no image")
    world.settings()  # the table has them now
    world.elsewhere("again").train(TRAINER)
    assert same(before, weights(world, TRAINER))


def test_cases_without_masks_get_no_tags_and_unknown_slices_are_an_error(world: World):
    recipe = Recipe("SemiTwo", channels=("noNorm", "noNorm"), cases=6, unlabelled=3)
    world.use(recipe, own=True).settings(derive_tags=True)
    world.construct(TRAINER)
    cases = read_json(world.preprocessed / "dataset.json")["dgplugins"]["cases"]
    assert {name for name, case in cases.items() if "tags" in case} == {"case_0", "case_1", "case_2"}
    world.use(Recipe("IgnoreTwo", channels=("noNorm", "noNorm"), ignore=True), own=True).settings(derive_tags=True)
    with pytest.raises(UserError, match="its tag is unknown"):
        world.construct(TRAINER)


def test_z_scored_channels_are_warned_of(tagged: World):
    tagged.use(replace(TAGGED, name="ZScored", channels=("T1", "T2")))
    assert "ZScoreNormalization" in Path(tagged.construct(TRAINER).log_file).read_text()


def test_the_learning_rate_stays_under_a_budget_of_steps(tagged: World):
    (world := tagged).settings(epochs=50)
    run = BudgetRun(world.construct(TRAINER), Budget(iterations=6))
    run.train()
    rates = run.trainer.logger.get_value("lrs", None)
    assert len(rates) > 1
    assert {float(rate) for rate in rates} == {1e-3}


def test_a_modality_by_number_is_set_like_any_setting_and_a_wrong_one_is_refused(tagged: World):
    tagged.use(TAGGED, own=True).no_settings()
    words = ["configure", str(tagged.number), "-tr", TRAINER, "--set", "fusion=1", "-o", "Second"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert tagged.construct(TRAINER, plans="Second").settings.fusion == 1
    for wrong in (2, "median"):
        tagged.settings(fusion=wrong)
        with pytest.raises(UserError, match="neither mean nor max nor a modality"):
            tagged.elsewhere(f"wrong{wrong}").construct(TRAINER)
        assert not list(tagged.results.iterdir())


def test_how_maps_become_masks_may_change_after_training(tagged: World):
    tagged.settings(epochs=2, iterations_per_epoch=8)
    tagged.train(TRAINER)
    before = tagged.predict(tagged.model(TRAINER))
    tagged.settings(epochs=2, iterations_per_epoch=8, threshold=0.05, gate="none", fusion="max")
    tagged.command(TRAINER, only_run_validation=True)
    tagged.no_settings()
    after = tagged.predict(tagged.model(TRAINER))
    assert sum(int(x.sum()) for x in after) > sum(int(x.sum()) for x in before)


def test_one_modality_several_classes_and_slices_of_one_kind_are_refused(tagged: World):
    tagged.use(replace(TAGGED, name="OneModality", channels=("noNorm",)))
    with pytest.raises(UserError, match="needs two channels or more"):
        tagged.construct(TRAINER)
    tagged.use(replace(TAGGED, name="TaggedClasses", classes=2))
    with pytest.raises(UserError, match="knows one class"):
        tagged.construct(TRAINER)
    tagged.use(TAGGED, own=True)

    def positive(content: dict[str, Any]) -> None:
        for case in content["dgplugins"]["cases"].values():
            case["tags"] = [1] * len(case.get("tags", []))

    tagged.edit_json("dataset.json", positive)
    with pytest.raises(UserError, match="all positive"):
        tagged.train(TRAINER)


@pytest.mark.parametrize("trainer", ["DeSAMTrainer", "EPLTrainer"])
def test_trainers_of_masks_refuse_a_dataset_of_tags(tagged: World, trainer: str):
    with pytest.raises(UserError, match=f"{trainer} learns from masks and this dataset has tags"):
        tagged.construct(trainer)
    assert not list(tagged.results.iterdir())


def test_a_case_without_tags_in_a_fold_is_named(tagged: World):
    tagged.use(TAGGED, own=True)
    tagged.edit_json("dataset.json", lambda content: content["dgplugins"]["cases"]["case_2"].pop("tags"))
    with pytest.raises(BadInput, match="'case_2' has no tags"):
        tagged.train(TRAINER)


def test_padding_and_larger_slices_change_no_map(tagged: World):
    trainer = tagged.train(TRAINER)
    network = trainer.network.eval()
    images = torch.rand(1, 2, 30, 36) + 0.1
    with pytest.warns(UserWarning, match="fills the whole patch"):
        plain = network(images)
    with torch.no_grad():
        padded = network(torch.nn.functional.pad(images, (5, 9, 12, 3)))
        assert network(torch.rand(1, 2, 61, 47)).shape == (1, 2, 61, 47)
        empty = network(torch.zeros(1, 2, 16, 16))
    torch.testing.assert_close(padded[..., 12:42, 5:41], plain.detach(), rtol=0, atol=0)
    assert (empty[:, 1] == -20 * 0.5).all()  # a black slice is negative without asking the networks
    assert torch.isfinite(plain).all()


def test_equivariance_is_measured_before_and_after_training_on_the_same_slices(tagged: World):
    tagged.settings(initial_lr=0.0, weight_decay=0.0)
    tagged.train(TRAINER)
    words = ["evaluate", str(tagged.number), "--equivariance", "--model", str(tagged.model(TRAINER)), "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["slices"] == 3  # case_0 has four slices, the last without organ
    for family in FAMILIES:
        before, after = found[family]["before"], found[family]["after"]
        assert before["difference"] > 0
        assert after["relative"] > after["difference"]  # maps are below 1
    trainer = tagged.construct(TRAINER)
    trainer.initialize()
    fresh = _untrained(rebuild(tagged.model(TRAINER), read_checkpoint(_final(tagged))))
    names = [name for name, _ in trainer.network.named_parameters()]
    assert names
    for name in names:
        assert torch.equal(fresh.get_parameter(name), trainer.network.get_parameter(name)), name
    shown = CliRunner().invoke(cli, words[:-1])
    assert "before training" in shown.stdout
    assert "rotation" in shown.stdout


def test_networks_that_look_at_single_pixels_move_perfectly_with_flips_and_turns():
    torch.manual_seed(0)
    network = CAMSegmenter(2, 16, (32, 32)).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
            centre = layer.weight.data[:, :, 1, 1].clone()
            layer.weight.data.zero_()
            layer.weight.data[:, :, 1, 1] = centre
    for one in network.members():
        one.classifier.weight.data[1] = 1  # features are positive, so every map is
    found = differences(network, torch.rand(5, 2, 32, 32))
    for family in ("flipping", "rotation"):
        assert found[family]["difference"] == pytest.approx(0, abs=1e-4)
    assert found["translation"]["difference"] > 1e-3
    for layer in network.members():
        layer.classifier.weight.data.fill_(-1)
    assert differences(network, torch.rand(2, 2, 32, 32))["rotation"]["relative"] is None


def test_equivariance_wants_a_model_and_no_predictions(tagged: World, tmp_path: Path):
    model = ["--equivariance", "--model", str(tmp_path)]
    for words in (["--equivariance"], [str(tmp_path), *model], [], [*model, "--no-labels"], model):
        assert CliRunner().invoke(cli, ["evaluate", str(tagged.number), *words]).exit_code == 2


def _final(world: World) -> Path:
    return world.model(TRAINER) / "fold_0" / "checkpoint_final.pth"
