"""nnU-Net's own commands with the equivariant CAMs, each in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TAGGED, World
from test_desam_commands import command, labels, same
from test_desam_reads import Opened, linux

pytestmark = pytest.mark.slow
TRAINER = "EquivariantCAMTrainer"


@linux
def test_train_predict_export_and_import_with_commands_alone(real_size_world: World):
    world = real_size_world.use(TAGGED, own=True)
    world.settings(epochs=2)
    images, number = world.raw / "imagesTs", world.number
    with Opened(images, world.raw / "labelsTs", world.raw / "labelsTr") as opened:
        command("nnUNetv2_train", number, "2d", 0, "-tr", TRAINER, "-device", "cpu")
        assert opened.paths() == set()  # target cases, and label files, which hold tags for the planner
    world.no_settings()
    tail = ("-c", "2d", "-tr", TRAINER, "-device", "cpu", "-npp", 0, "-nps", 0)
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "first", "-f", 0, *tail)
    first = labels(world.root / "first")
    assert [x.shape for x in first.values()] == [(6, 36, 40), (4, 36, 40)]
    assert all(np.isin(x, (0, 1)).all() for x in first.values())

    zipped = world.root / "model.zip"
    command("nnUNetv2_export_model_to_zip", "-d", number, "-o", zipped, "-c", "2d", "-f", 0, "-tr", TRAINER)
    world.elsewhere("received")
    command("nnUNetv2_install_pretrained_model_from_zip", zipped)
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "received_out", "-f", 0, *tail)
    assert same(first, labels(world.root / "received_out"))
