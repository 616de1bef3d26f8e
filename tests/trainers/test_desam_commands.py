"""nnU-Net's own commands, each in a process of its own, with vit_tiny as it is shipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import World
from test_desam_reads import Opened
from tiny_dataset import Recipe

from nnunet_dgplugins.files import read_json

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def command(name: str, *arguments: object, ok: bool = True, **variables: str) -> str:
    """Run an installed command; returns what it printed."""
    done = subprocess.run(
        [str(BIN / name), *map(str, arguments)],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("trainer", ["DeSAMTrainer", "DeSAMGridTrainer"])
def test_train_predict_bundle_export_and_import_with_commands_alone(real_size_world: World, trainer: str):
    world = real_size_world.use(Recipe(), own=True)
    world.settings(epochs=2, batch_size=4)
    images, number = world.raw / "imagesTs", world.number
    with Opened(images, world.raw / "labelsTs") as opened:
        command("nnUNetv2_train", number, "2d", 0, "-tr", trainer, "-device", "cpu")
        assert opened.paths() == set()
    fold = world.model(trainer) / "fold_0"
    assert (fold / "progress.png").is_file()
    assert 0 <= read_json(fold / "validation" / "summary.json")["foreground_mean"]["Dice"] <= 1

    world.no_settings()  # the model knows them
    tail = ("-c", "2d", "-f", 0, "-tr", trainer, "-device", "cpu", "-npp", 0, "-nps", 0)
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "first", *tail)
    first = labels(world.root / "first")
    assert [x.shape for x in first.values()] == [(6, 36, 40), (4, 36, 40)]

    copied = world.root / "elsewhere" / "model"
    shutil.copytree(world.model(trainer), copied)
    nowhere = {f"nnUNet_{kind}": str(world.root / "nowhere") for kind in ("raw", "preprocessed", "results")}
    command(
        "nnUNetv2_predict_from_modelfolder", "-i", images, "-o", world.root / "copied", "-m", copied, "-f", 0,
        "-device", "cpu", "-npp", 1, "-nps", 1, **nowhere,
    )  # fmt: skip
    assert same(first, labels(world.root / "copied"))

    command("dgplugins", "bundle", world.model(trainer))
    zipped = world.root / "model.zip"
    command("nnUNetv2_export_model_to_zip", "-d", number, "-o", zipped, "-c", "2d", "-f", 0, "-tr", trainer)
    world.elsewhere("received")
    command("nnUNetv2_install_pretrained_model_from_zip", zipped)
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "received_out", *tail)
    assert same(first, labels(world.root / "received_out"))


def test_a_refusal_is_one_sentence_at_the_end_of_the_command(real_size_world: World):
    text = command(
        "nnUNetv2_train", real_size_world.number, "3d_fullres", 0, "-tr", "DeSAMTrainer", "-device", "cpu", ok=False
    )
    assert (
        text.strip()
        .splitlines()[-1]
        .endswith("DeSAMTrainer works slice by slice and has no 3d form: use configuration 2d.")
    )
    assert not list(real_size_world.results.iterdir())


def test_training_for_a_time_by_command_leaves_a_validated_model(real_size_world: World):
    done = subprocess.run(
        [sys.executable, "-m", "nnunet_dgplugins.budget", str(real_size_world.number), "2d", "0",
         "--minutes", "0.03", "--epoch-steps", "3", "-device", "cpu"],
        env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    fold = real_size_world.model("nnUNetTrainer") / "fold_0"
    assert (fold / "checkpoint_final.pth").is_file()
    assert (fold / "validation" / "summary.json").is_file()
