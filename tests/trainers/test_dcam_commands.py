"""nnU-Net's own commands with D-CAM's two stages, each in a process of its own; and real stained tissue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import PATCHES, World
from PIL import Image
from stages import after_its_stage
from test_desam_commands import command, same
from test_desam_reads import Opened, linux
from tiny_dataset import plan

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.files import read_json

pytestmark = pytest.mark.slow
FIRST, SECOND = TRAINERS = ("DCAMClassifierTrainer", "DCAMTrainer")
SCRIPTS = Path(__file__).parents[2] / "scripts"


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


@linux
@pytest.mark.parametrize("trainer", TRAINERS)
def test_train_predict_export_and_import_with_commands_alone(real_size_world: World, trainer: str):
    world = after_its_stage(real_size_world.use(PATCHES, own=True), trainer)
    images, number = world.raw / "imagesTs", world.number
    with Opened(images, world.raw / "labelsTs", world.raw / "labelsTr") as opened:
        command("nnUNetv2_train", number, "2d", 0, "-tr", trainer, "-device", "cpu")
        assert opened.paths() == set()
    world.no_settings()
    tail = ("-c", "2d", "-tr", trainer, "-device", "cpu", "-npp", 0, "-nps", 0)
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "first", "-f", 0, *tail)
    first = labels(world.root / "first")
    assert [x.shape for x in first.values()] == [(64, 64)] * 2
    assert all(np.isin(x, (1, 2, 3)).all() for x in first.values())

    zipped = world.root / "model.zip"
    command("nnUNetv2_export_model_to_zip", "-d", number, "-o", zipped, "-c", "2d", "-f", 0, "-tr", trainer)
    world.elsewhere("received")
    command("nnUNetv2_install_pretrained_model_from_zip", zipped)
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "received_out", "-f", 0, *tail)
    assert same(first, labels(world.root / "received_out"))


def test_real_stained_tissue_is_cut_converted_and_trained_on(
    world: World, sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "histology_patches.py"), str(sample_data / "histology"), str(tmp_path / "cut"),
         "--size", "64"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / f"nnUNet_{kind}"))
        (tmp_path / f"nnUNet_{kind}").mkdir()
    cut = tmp_path / "cut"
    words = ["convert", "patch-folder", cut, "--masks", cut / "masks", "--classes-file", cut / "classes.csv",
             "--source", "violet_tissue", "--id", 960, "--jobs", 1]  # fmt: skip
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    (raw,) = (tmp_path / "nnUNet_raw").iterdir()
    plan(960)
    world.number, world.name, world.raw, world.ending = 960, raw.name, raw, ".png"
    world.settings(epochs=4, iterations_per_epoch=4, batch_size=8, initial_lr=0.01)
    world.command(FIRST)
    scores = read_json(world.model(FIRST) / "fold_0" / "validation_cam" / "iou.json")
    assert list(scores["IoU"]) == ["background", "nuclei"]
    assert 0 < scores["mIoU"] < 1
    unseen = world.predict(world.model(FIRST), files=world.images()[:4])
    assert all(x.shape == (1, 64, 64) and np.isin(x, (0, 1)).all() for x in unseen)
