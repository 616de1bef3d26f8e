"""Pseudo labels of D-CAM's stage 1: three masks per patch, in an ordinary dataset."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import World
from PIL import Image
from tiny_dataset import plan

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json, write_json
from nnunet_dgplugins.trainers.dcam_labels import PatchDrawer
from nnunet_dgplugins.trainers.label_drawer import Choices
from nnunet_dgplugins.trainers.pseudo_labels import make_pseudo_labels

NUMBER, TAGS, BACKGROUND, RELEASE = 955, 956, 957, 958
TRAINER = "DCAMClassifierTrainer"
ROWS, COLUMNS = 40, 48
LAYERS = ("labelsTr", "pseudo_b5_2", "pseudo_b4_5")


def download(root: Path) -> Path:
    """Eight patches of hospital A, two of them validation, three of B: part 0 is red, 1 is blue, white in a corner."""
    random = np.random.RandomState(0)
    lines = []
    for number in range(11):
        mask = np.zeros((ROWS, COLUMNS), np.uint8)
        mask[:, COLUMNS // 2 :] = 1 if number % 3 else 0
        tags = [int((mask == 0).any()), int((mask == 1).any())] if number != 5 else [0, 0]
        image = np.where(mask[..., None] == 0, [180, 60, 90], [60, 70, 170]) + random.randint(
            -20, 20, (ROWS, COLUMNS, 1)
        )
        image[:10, :12] = 250
        name, site = f"p{number}.png", "A" if number < 8 else "B"
        for folder, array in (("", image.astype(np.uint8)), ("masks", mask + 1)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / folder / name)
        part = "val" if number in (6, 7) else "test" if number == 10 else "train"
        lines.append([name, site, f"patient{number}", part, *tags])
    with open(root / "tags.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "site", "patient", "part", "red", "blue"], *lines])
    (root / "plain.csv").write_text("class,value\nred,1\nblue,2\n")
    (root / "with_background.csv").write_text("class,value\nbackground,1\nred,2\nblue,3\n")
    return root


def invoke(*words: Any) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return str(done.output)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three folders of nnU-Net with the patches: as published, with background as a class, and for release."""
    root = tmp_path_factory.mktemp("patches")
    tree = download(root / "download")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("raw", "preprocessed", "results"):
            (root / f"nnUNet_{kind}").mkdir()
            patch.setenv(f"nnUNet_{kind}", str(root / f"nnUNet_{kind}"))
        for number, table, protocol in (
            (TAGS, "plain", "strict"), (BACKGROUND, "with_background", "strict"), (RELEASE, "plain", "release"),
        ):  # fmt: skip
            invoke("convert", "patch-folder", tree, "--masks", tree / "masks", "--classes-file", tree / f"{table}.csv",
                   "--source", "A", "--protocol", protocol, "--id", number, "--jobs", 1)  # fmt: skip
            plan(number)
    return root


@pytest.fixture
def patches(world: World, converted: Path) -> World:
    """A world on those datasets."""
    for kind in ("raw", "preprocessed"):
        world.monkeypatch.setenv(f"nnUNet_{kind}", str(converted / f"nnUNet_{kind}"))
    return world


def trained(world: World, converted: Path, number: int = TAGS) -> Path:
    """Train a thin stage 1 for a step, and return its model folder."""
    quick = {"epochs": 1, "iterations_per_epoch": 1, "batch_size": 4, "width_divisor": 32, "mask_batch_size": 2}
    write_json(world.root / "settings.json", {TRAINER: quick})
    (raw,) = (converted / "nnUNet_raw").glob(f"Dataset{number}_*")
    world.number, world.name, world.raw = number, raw.name, raw
    world.preprocessed = converted / "nnUNet_preprocessed" / raw.name
    world.train(TRAINER)
    world.no_settings()
    return world.model(TRAINER)


@pytest.fixture(autouse=True)
def gone_afterwards(converted: Path) -> Any:
    """Leave no pseudo labels to the next test."""
    import shutil

    yield
    for path in (*(converted / "nnUNet_raw").glob("*_pseudo"), *(converted / "nnUNet_preprocessed").glob("*_pseudo")):
        shutil.rmtree(path)


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_writes_three_masks_per_patch_and_leaves_patches_without_tags_out(patches: World, converted: Path):
    model = trained(patches, converted)
    output = invoke("pseudo-labels", model, "--out", NUMBER, "--white", "--device", "cpu")
    folder = converted / "nnUNet_raw" / f"Dataset{NUMBER}_{patches.raw.name[11:]}_pseudo"
    assert "1 tagged training cases are left out" in output
    before, content = read_json(patches.raw / "dataset.json"), read_json(folder / "dataset.json")
    table = before["dgplugins"]["cases"]
    ignore = before["labels"]["ignore"]
    drawn = {name: masks(folder / name) for name in LAYERS}
    assert len(drawn["labelsTr"]) == content["numTraining"] == 7
    for name, mask in drawn["labelsTr"].items():
        allowed = {1 + place for place, tag in enumerate(table[name]["tags"][0]) if tag}
        for layer in LAYERS:
            own = drawn[layer][name]
            assert own.shape == (ROWS, COLUMNS)
            assert own.dtype == np.uint8
            assert (own[:10, :12] == ignore).all()
            assert set(np.unique(own)) <= allowed | {ignore}
        assert set(np.unique(mask)) - {ignore}
    listed = read_json(patches.preprocessed / "splits_final.json")[0]
    (fold,) = read_json(folder / "splits_final.json")
    assert sorted(fold["train"] + fold["val"]) == sorted(drawn["labelsTr"])
    assert set(fold["val"]) <= set(listed["val"])
    origin = content["dgplugins"]["protocol"]["pseudo_labels"]
    assert origin["white"] is True
    assert origin["background"] is None
    assert origin["model"].endswith(f"{TRAINER}__nnUNetPlans__2d/fold_0/checkpoint_final.pth")
    assert all("tags" not in case for name, case in content["dgplugins"]["cases"].items() if name in drawn["labelsTr"])
    assert content["channel_names"] == before["channel_names"]
    assert masks(folder / "labelsVal").keys() == masks(patches.raw / "labelsVal").keys()
    assert masks(folder / "labelsTs").keys() == masks(patches.raw / "labelsTs").keys()
    assert (folder / "pseudo_labels.png").read_bytes().startswith(b"\x89PNG")


def test_where_background_is_a_class_what_no_map_reaches_is_background(patches: World, converted: Path):
    model = trained(patches, converted, BACKGROUND)
    folder = make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.9))
    drawn = masks(folder / "labelsTr")
    assert len(drawn) == 8  # an image without tags is all background
    cases = read_json(patches.raw / "dataset.json")["dgplugins"]["cases"]
    (empty,) = (name for name in drawn if not any(cases[name]["tags"][0]))
    assert not drawn[empty].any()
    assert all((mask == 0).any() and mask.max() < 3 for mask in drawn.values())
    lower = masks(make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.2), overwrite=True) / "labelsTr")
    assert sum((mask == 0).sum() for mask in lower.values()) < sum((mask == 0).sum() for mask in drawn.values())


def test_under_release_the_patches_of_the_target_train(patches: World, converted: Path):
    folder = make_pseudo_labels(trained(patches, converted, RELEASE), NUMBER)
    cases = read_json(folder / "dataset.json")["dgplugins"]["cases"]
    (fold,) = read_json(folder / "splits_final.json")
    assert {cases[name]["site"] for name in fold["train"]} == {"B"}
    assert {cases[name]["site"] for name in fold["val"]} == {"A"}
    assert sorted(masks(folder / "labelsTr")) == sorted(fold["train"] + fold["val"])


def test_options_that_the_method_has_no_use_for_are_refused_by_name(patches: World, converted: Path):
    model = trained(patches, converted)
    with pytest.raises(UserError, match="have no --fusion, --gate, --map; they have --threshold, --white"):
        make_pseudo_labels(model, NUMBER, choices=Choices(fusion="mean", gate="tag", kind="cam"))
    with pytest.raises(UserError, match="background is no class of this dataset"):
        make_pseudo_labels(model, NUMBER, choices=Choices(threshold=0.5))


def test_killed_and_run_again_the_three_masks_have_the_same_bytes(
    patches: World, converted: Path, monkeypatch: pytest.MonkeyPatch
):
    model = trained(patches, converted)
    whole = make_pseudo_labels(model, NUMBER)
    expected = everything(whole)
    whole.rename(patches.root / "kept")
    draw, drawn = PatchDrawer.draw, []

    def stopping(self: Any, cases: list[str]) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(cases)
        return draw(self, cases)

    with monkeypatch.context() as patch:
        patch.setattr(PatchDrawer, "draw", stopping)
        with pytest.raises(KeyboardInterrupt):
            make_pseudo_labels(model, NUMBER)
    (half,) = whole.parent.glob(f".dgplugins-Dataset{NUMBER}*")
    (half / "labelsTr" / f"{drawn[0][1]}.png").unlink()  # a group that was cut off is drawn as a whole again
    assert everything(make_pseudo_labels(model, NUMBER)) == expected


@pytest.mark.slow
def test_stock_nnunet_plans_trains_and_predicts_on_the_pseudo_labels(
    patches: World, converted: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make_pseudo_labels(trained(patches, converted), NUMBER)
    plan(NUMBER)
    patches.number, patches.name = NUMBER, folder.name
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    built = patches.construct("nnUNetTrainer")
    built.num_epochs = built.num_iterations_per_epoch = built.num_val_iterations_per_epoch = 1
    built.run_training()
    files = [[str(path)] for path in sorted((folder / "imagesTs").glob("*.png"))]
    predicted = patches.predict(patches.model("nnUNetTrainer"), files)
    assert [mask.shape for mask in predicted] == [(1, ROWS, COLUMNS)] * len(files)
    assert all(set(np.unique(mask)) <= {0, 1, 2} for mask in predicted)
