"""Pseudo labels: an ordinary dataset of the masks that a model of tags draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from click.testing import CliRunner
from conftest import TAGGED, World
from tiny_dataset import ENDING, plan

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.trainers.equivariant_labels import EquivariantDrawer
from nnunet_dgplugins.trainers.label_drawer import Choices
from nnunet_dgplugins.trainers.pseudo_labels import make_pseudo_labels

TRAINER = "EquivariantCAMTrainer"
NUMBER = 955


@pytest.fixture
def model(tagged: World) -> Path:
    """A model on a dataset of the test's own; its networks call every slice positive."""
    tagged.use(TAGGED, own=True)
    tagged.settings(epochs=2, iterations_per_epoch=6)
    tagged.train(TRAINER)
    tagged.no_settings()
    return tagged.model(TRAINER)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob(f"*{ENDING}"))}


def tags(world: World) -> dict[str, list[int]]:
    cases = read_json(world.raw / "dataset.json")["dgplugins"]["cases"]
    return {name + ENDING: case["tags"] for name, case in cases.items() if "tags" in case}


def everything(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_the_command_writes_a_dataset_with_geometry_splits_and_provenance(model: Path, tagged: World):
    done = CliRunner().invoke(cli, ["pseudo-labels", str(model), "--out", str(NUMBER), "--threshold", "0.3"])
    assert done.exit_code == 0, done.output
    folder = tagged.raw.with_name(f"Dataset{NUMBER}_{TAGGED.name}_pseudo")
    assert str(folder) in done.output
    for name, mask in arrays(folder / "labelsTr").items():
        own, image = (
            sitk.ReadImage(str(path))
            for path in (folder / "labelsTr" / name, folder / "imagesTr" / name.replace(ENDING, f"_0000{ENDING}"))
        )
        assert own.GetSize() == image.GetSize()
        assert own.GetSpacing() == pytest.approx(image.GetSpacing())
        assert own.GetOrigin() == pytest.approx(image.GetOrigin())
        for z, tag in enumerate(tags(tagged)[name]):
            assert bool(mask[z].any()) <= bool(tag)
    assert read_json(folder / "splits_final.json") == read_json(tagged.preprocessed / "splits_final.json")
    content = read_json(folder / "dataset.json")
    assert content["numTraining"] == TAGGED.cases
    origin = content["dgplugins"]["protocol"]["pseudo_labels"]
    assert (origin["threshold"], origin["fusion"], origin["gate"]) == (0.3, "mean", "tag")
    assert all(case["labelled"] and "tags" not in case for case in content["dgplugins"]["cases"].values())
    assert (folder / "pseudo_labels.png").read_bytes().startswith(b"\x89PNG")
    assert arrays(folder / "labelsVal").keys() == arrays(tagged.raw / "labelsVal").keys()


def test_stock_nnunet_plans_trains_and_predicts_on_it(model: Path, tagged: World, monkeypatch: pytest.MonkeyPatch):
    make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.2))
    plan(NUMBER)
    tagged.number, tagged.name = NUMBER, f"Dataset{NUMBER}_{TAGGED.name}_pseudo"
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    built = tagged.construct("nnUNetTrainer")
    built.num_epochs = built.num_iterations_per_epoch = built.num_val_iterations_per_epoch = 1
    built.run_training()
    predicted = tagged.predict(tagged.model("nnUNetTrainer"))
    assert [x.shape for x in predicted] == [(6, 36, 40), (4, 36, 40)]


def test_killed_and_run_again_the_same_bytes_come_out(model: Path, tagged: World, monkeypatch: pytest.MonkeyPatch):
    whole = make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.3), linked=False)
    expected = everything(whole)
    assert make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.3), linked=False) == whole
    whole.rename(tagged.root / "kept")
    draw, drawn = EquivariantDrawer.draw, []

    def stopping(self: Any, cases: list[str]) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.extend(cases)
        return draw(self, cases)

    with monkeypatch.context() as patch:
        patch.setattr(EquivariantDrawer, "draw", stopping)
        with pytest.raises(KeyboardInterrupt):
            make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.3), linked=False)
    assert not whole.exists()
    assert everything(make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.3), linked=False)) == expected


def weigh_absent(model: Path, more: dict[int, float]) -> None:
    """Weigh absent so much more than present in networks by number; the map of present is what it was."""
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    for number, weight in more.items():
        classifier = content["network_weights"][f"networks.{number}.classifier.weight"]
        classifier[0] = classifier[1] + weight
    torch.save(content, path)


def test_a_network_that_calls_a_positive_slice_negative_does_not_count_there(model: Path, tagged: World):
    weigh_absent(model, {0: 10, 1: -10})
    above = Choices(threshold=0.6)  # which the mean of a map and of nothing does not reach
    masks = arrays(make_pseudo_labels(model, NUMBER, choices=above) / "labelsTr")
    other = replace(above, fusion="1", gate="none")
    alone = arrays(make_pseudo_labels(model, NUMBER + 1, choices=other) / "labelsTr")
    for name, mask in masks.items():
        for z, tag in enumerate(tags(tagged)[name]):
            assert np.array_equal(mask[z], alone[name][z] * tag)
    assert any(mask.any() for mask in masks.values())


def test_a_positive_slice_that_no_network_believes_in_takes_the_ungated_map(model: Path, tagged: World):
    weigh_absent(model, {0: 10, 1: 10})
    by_tag = make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.2))
    masks = arrays(by_tag / "labelsTr")
    assert any(mask.any() for mask in masks.values())
    ungated = arrays(make_pseudo_labels(model, NUMBER + 1, choices=Choices(threshold=0.2, gate="none")) / "labelsTr")
    for name, mask in masks.items():
        for z, tag in enumerate(tags(tagged)[name]):
            assert np.array_equal(mask[z], ungated[name][z] * tag)
    with pytest.raises(UserError, match="No voxel of 5 cases"):
        make_pseudo_labels(model, NUMBER + 2, choices=Choices(threshold=0.2, gate="predicted"))
    assert not [path for path in tagged.raw.parent.iterdir() if str(NUMBER + 2) in path.name]


def test_other_choices_and_other_folds_make_the_dataset_anew_when_that_is_allowed(model: Path, tagged: World):
    first = make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.3))
    with pytest.raises(UserError, match="--overwrite"):
        make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.1, kind="grad_cam_plus_plus", fusion="1"))
    make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.1, fusion="1", gate="none"), overwrite=True)
    origin = read_json(first / "dataset.json")["dgplugins"]["protocol"]["pseudo_labels"]
    assert (origin["threshold"], origin["fusion"], origin["kind"]) == (0.1, 1, "cam")
    tagged.write_splits([{"train": ["case_0"], "val": ["case_1"]}])
    make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.1, fusion="1", gate="none"), overwrite=True)
    assert read_json(first / "splits_final.json") == [{"train": ["case_0"], "val": ["case_1"]}]


def test_positive_slices_that_got_nothing_are_counted(model: Path, tagged: World, monkeypatch: pytest.MonkeyPatch):
    def all_but_the_first(self: Any, data: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        drawn = tags.clone()
        drawn[tags.argmax()] = 0
        return drawn.float()[:, None, None].expand(data.shape[1:])

    said: list[str] = []
    monkeypatch.setattr(EquivariantDrawer, "_maps", all_but_the_first)
    make_pseudo_labels(model, NUMBER, say=said.append)
    positive = sum(sum(own) for own in tags(tagged).values())
    assert f"5 of {positive} slices tagged positive got no voxel. Lower --threshold (0.5 now); " in said[-1]
    monkeypatch.setattr(EquivariantDrawer, "_maps", lambda self, data, tags: torch.ones(data.shape[1:]))
    make_pseudo_labels(model, NUMBER + 1, say=said.append)
    assert said[-1].endswith("foreground voxels in 5 cases.")


def test_a_threshold_that_nothing_reaches_is_said_and_leaves_nothing(model: Path, tagged: World):
    with pytest.raises(UserError, match="Lower --threshold"):
        make_pseudo_labels(model, NUMBER, choices=Choices(threshold=1.0))
    assert not [path for path in tagged.raw.parent.iterdir() if str(NUMBER) in path.name]


def test_models_that_learn_from_masks_and_wrong_fusions_are_refused(model: Path, tagged: World):
    with pytest.raises(UserError, match="mean, max or the number"):
        make_pseudo_labels(model, NUMBER, choices=Choices(fusion="2"))
    with pytest.raises(UserError, match="gate is one of"):
        make_pseudo_labels(model, NUMBER, choices=Choices(gate="Tag"))
    tagged.use(TAGGED).settings()
    world = tagged.elsewhere("masks")
    from tiny_dataset import Recipe

    world.use(Recipe())
    world.settings()
    world.train("DeSAMTrainer")
    with pytest.raises(UserError, match="learns from masks"):
        make_pseudo_labels(world.model("DeSAMTrainer"), NUMBER)
