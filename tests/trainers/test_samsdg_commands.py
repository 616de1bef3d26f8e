"""SAM-SDG by nnU-Net's own commands and ours, each in a process of its own, with vit_tiny as it is shipped."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from conftest import World
from samsdg_worlds import COARSE, SAM
from test_desam_commands import command, labels, same
from test_desam_reads import Opened
from tiny_dataset import Recipe

from nnunet_dgplugins.files import read_json

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("trainer", [COARSE, SAM])
def test_train_predict_bundle_export_and_import_with_commands_alone(real_size_world: World, trainer: str):
    world = real_size_world.use(Recipe(), own=True)
    world.settings(epochs=2, batch_size=4, iterations_per_epoch=10, initial_lr=1e-3)
    images, number = world.raw / "imagesTs", world.number
    if trainer == SAM:
        text = command("nnUNetv2_train", number, "2d", 0, "-tr", SAM, "-device", "cpu", ok=False)
        assert f"Run: nnUNetv2_train {number} 2d 0 -tr {COARSE}" in text
        command("nnUNetv2_train", number, "2d", 0, "-tr", COARSE, "-device", "cpu")
    with Opened(images, world.raw / "labelsTs") as opened:
        command("nnUNetv2_train", number, "2d", 0, "-tr", trainer, "-device", "cpu")
        assert opened.paths() == set()
    fold = world.model(trainer) / "fold_0"
    assert (fold / "progress.png").is_file()
    assert 0 <= read_json(fold / "validation" / "summary.json")["foreground_mean"]["Dice"] <= 1

    world.no_settings()  # the model knows them
    tail = ("-c", "2d", "-f", 0, "-tr", trainer, "-device", "cpu")
    where = ("-d", number, "-i", images)
    command("nnUNetv2_predict", *where, "-o", world.root / "first", *tail, "-npp", 0, "-nps", 0)
    first = labels(world.root / "first")
    assert [x.shape for x in first.values()] == [(6, 36, 40), (4, 36, 40)]
    if trainer == SAM:
        command("dgplugins", "predict", *where, "-o", world.root / "four", *tail)
        four = labels(world.root / "four")
        assert four.keys() == first.keys()
        assert all(np.mean(four[name] == first[name]) > 0.8 for name in first)
        command("dgplugins", "bundle", world.model(trainer))
    zipped = world.root / "model.zip"
    command("nnUNetv2_export_model_to_zip", "-d", number, "-o", zipped, "-c", "2d", "-f", 0, "-tr", trainer)
    shutil.rmtree(world.results)
    world.elsewhere("received")
    command("nnUNetv2_install_pretrained_model_from_zip", zipped)
    command("nnUNetv2_predict", *where, "-o", world.root / "again", *tail, "-npp", 1, "-nps", 1)
    assert same(first, labels(world.root / "again"))
