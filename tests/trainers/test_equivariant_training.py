"""What the equivariant trainer learns from, and what it never opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TAGGED, World
from tiny_dataset import ENDING, Recipe

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.tags import slice_tags
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.methods.equivariant.transforms import FAMILIES
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint
from nnunet_dgplugins.trainers.deployed import rebuild
from nnunet_dgplugins.trainers.equivariance import _untrained

TRAINER = "EquivariantCAMTrainer"


def weights(world: World) -> dict[str, torch.Tensor]:
    content = torch.load(world.model(TRAINER) / "fold_0" / "checkpoint_final.pth", weights_only=False)
    return dict(content["network_weights"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_batches_hold_whole_slices_of_training_cases_with_the_tables_tags(tagged: World):
    trainer = tagged.construct(TRAINER)
    trainer.on_train_start()
    table = CaseTable.from_dataset_json(read_json(tagged.preprocessed / "dataset.json"))
    assert table is not None
    train, _ = trainer.do_split()
    expected = [tag for name in train for tag in table.cases[name].tags or []]
    slices = trainer.dataloader_train
    assert trainer.num_iterations_per_epoch == 2
    batch = next(slices)
    assert batch["images"].shape == (4, 2, 40, 40)
    assert set(batch["keys"]) <= set(train)
    assert 0 < sum(expected) < len(expected)
    trainer.on_train_end()


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


def test_label_files_can_hold_anything_and_not_one_bit_of_the_weights_changes(tagged: World):
    tagged.use(TAGGED, own=True).train(TRAINER)
    before = weights(tagged)
    for folder in (tagged.raw / "labelsTr", tagged.preprocessed / "gt_segmentations"):
        for path in folder.glob(f"*{ENDING}"):
            path.write_bytes(b"no image")
    scrambled = list(tagged.preprocessed.glob("nnUNetPlans_2d/*_seg.b2nd"))
    assert len(scrambled) == TAGGED.cases
    for path in scrambled:
        array = blosc2.open(str(path), mode="a")
        array[:] = 1 - np.asarray(array[:])
    tagged.elsewhere("again").train(TRAINER)
    assert same(before, weights(tagged))


def test_other_tags_give_other_weights(tagged: World):
    tagged.use(TAGGED, own=True).train(TRAINER)
    before = weights(tagged)

    def turned(content: dict[str, Any]) -> None:
        for case in content["dgplugins"]["cases"].values():
            if "tags" in case:
                case["tags"] = [1 - tag for tag in case["tags"]]

    tagged.edit_json("dataset.json", turned)
    tagged.elsewhere("again").train(TRAINER)
    assert not same(before, weights(tagged))


def test_no_mask_of_a_training_case_is_opened(tagged: World, monkeypatch: pytest.MonkeyPatch):
    import SimpleITK as sitk

    opened: list[str] = []
    read = sitk.ReadImage

    def noting(path: Any, *arguments: Any) -> Any:
        opened.append(str(path))
        return read(path, *arguments)

    monkeypatch.setattr(sitk, "ReadImage", noting)
    tagged.command(TRAINER)
    labels = [Path(path) for path in opened if "labels" in path or "gt_segmentations" in path]
    assert {path.parent.name for path in labels} == {"labelsVal"}
    assert {path.name for path in labels} == {f"case_0{ENDING}"}  # fold 0 validates on it


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


def test_validation_goes_without_dice_where_no_mask_is_known(tagged: World):
    tagged.use(TAGGED, own=True)
    (tagged.raw / "labelsVal" / f"case_0{ENDING}").unlink()
    tagged.command(TRAINER)
    folder = tagged.model(TRAINER) / "fold_0" / "validation_cam"
    assert (folder / f"case_0{ENDING}").is_file()
    assert not (folder / "cam_dice.json").exists()
    (log,) = folder.parent.glob("training_log_*.txt")
    assert "no masks of them are known" in log.read_text()


def test_the_best_checkpoint_is_that_of_the_best_tag_accuracy(tagged: World):
    tagged.settings(epochs=3)
    trainer = tagged.train(TRAINER)
    accuracies = [trainer.logger.get_value("mean_fg_dice", step) for step in range(3)]
    assert all(0 <= value <= 1 for value in accuracies)
    per_modality = trainer.logger.get_value("dice_per_class_or_region", 0)
    assert len(per_modality) == 2
    assert float(np.mean(per_modality)) == pytest.approx(accuracies[0])


@pytest.mark.parametrize("choice", [{"forwards": "grouped"}, {"one_graph_at_a_time": True}, {"channels_last": False}])
def test_choices_of_speed_and_memory_change_results_by_rounding_only(tagged: World, choice: dict[str, Any]):
    tagged.settings(iterations_per_epoch=1)
    tagged.train(TRAINER)
    before = weights(tagged)
    tagged.settings(iterations_per_epoch=1, **choice)
    tagged.elsewhere("again").train(TRAINER)
    for key, value in weights(tagged).items():
        if "running" in key:
            torch.testing.assert_close(value, before[key], rtol=1e-3, atol=1e-5)


def test_a_dataset_with_masks_is_refused_until_tags_are_to_be_derived_and_then_they_are_once(world: World):
    world.use(Recipe("Masks", channels=("noNorm", "noNorm")), own=True)
    with pytest.raises(UserError, match="derive_tags=true"):
        world.construct(TRAINER)
    world.settings(derive_tags=True)
    world.train(TRAINER)
    for folder in (world.raw, world.preprocessed):
        cases = read_json(folder / "dataset.json")["dgplugins"]["cases"]
        assert {len(case["tags"]) for case in cases.values()} == {4, 5, 6}
        assert all(case["tags"][-1] == 0 and sum(case["tags"]) == len(case["tags"]) - 1 for case in cases.values())
    before = weights(world)
    for path in (world.preprocessed / "gt_segmentations").glob(f"*{ENDING}"):
        path.write_bytes(b"no image")
    world.elsewhere("again").train(TRAINER)
    assert same(before, weights(world))


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


def test_a_case_without_tags_in_a_fold_is_named(tagged: World):
    tagged.use(TAGGED, own=True)
    tagged.edit_json("dataset.json", lambda content: content["dgplugins"]["cases"]["case_2"].pop("tags"))
    with pytest.raises(BadInput, match="'case_2' has no tags"):
        tagged.train(TRAINER)


def test_padding_and_larger_slices_change_no_map(tagged: World):
    trainer = tagged.train(TRAINER)
    network = trainer.network.eval()
    images = torch.rand(1, 2, 30, 36) + 0.1
    with torch.no_grad():
        plain = network(images)
        padded = network(torch.nn.functional.pad(images, (5, 9, 12, 3)))
        assert network(torch.rand(1, 2, 61, 47)).shape == (1, 2, 61, 47)
        empty = network(torch.zeros(1, 2, 16, 16))
    torch.testing.assert_close(padded[..., 12:42, 5:41], plain, rtol=0, atol=0)
    assert float(empty[:, 1].max()) < 0
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


def test_equivariance_wants_a_model_and_no_predictions(tagged: World, tmp_path: Path):
    for words in (["--equivariance"], [str(tmp_path), "--equivariance", "--model", str(tmp_path)], []):
        assert CliRunner().invoke(cli, ["evaluate", str(tagged.number), *words]).exit_code == 2


def _final(world: World) -> Path:
    return world.model(TRAINER) / "fold_0" / "checkpoint_final.pth"
