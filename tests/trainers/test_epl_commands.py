"""nnU-Net's own commands with EPL, each in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SEMI, World
from test_desam_commands import command, labels, same
from test_desam_reads import Opened, linux

from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

pytestmark = pytest.mark.slow


@linux
def test_train_predict_export_and_import_with_commands_alone(real_size_world: World):
    world = real_size_world.use(SEMI, own=True)
    world.settings(epochs=2)
    images, number = world.raw / "imagesTs", world.number
    with Opened(images, world.raw / "labelsTs") as opened:
        command("nnUNetv2_train", number, "2d", 0, "-tr", "EPLTrainer", "-device", "cpu")
        assert opened.paths() == set()  # target cases
    world.no_settings()
    tail = ("-c", "2d", "-tr", "EPLTrainer", "-device", "cpu", "-npp", 0, "-nps", 0)
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "first", "-f", 0, *tail)
    first = labels(world.root / "first")
    assert [x.shape for x in first.values()] == [(4, 36, 40), (5, 36, 40)]

    command("dgplugins", "second-fold", world.model("EPLTrainer"))
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "both", "-f", 0, 100, *tail)
    assert all(np.isin(x, (0, 1)).all() for x in labels(world.root / "both").values())
    doubt = command(
        "dgplugins", "evaluate", number, world.root / "first", "--no-labels",
        "--model", world.model("EPLTrainer"), "--device", "cpu",
    )  # fmt: skip
    assert "case_6" in doubt
    assert "case_7" in doubt

    zipped = world.root / "model.zip"
    command("nnUNetv2_export_model_to_zip", "-d", number, "-o", zipped, "-c", "2d", "-f", 0, "-tr", "EPLTrainer")
    world.elsewhere("received")
    command("nnUNetv2_install_pretrained_model_from_zip", zipped)
    command("nnUNetv2_predict", "-d", number, "-i", images, "-o", world.root / "received_out", "-f", 0, *tail)
    assert same(first, labels(world.root / "received_out"))


def test_smaller_plans_train_a_narrower_network_on_smaller_patches(real_size_world: World):
    world = real_size_world.use(SEMI, own=True)
    said = command(
        "dgplugins", "configure", world.number, "--batch-size", 3, "--patch-size", "32 32", "--width-divisor", 8,
        "-tr", "EPLTrainer", "--set", "epochs=1 iterations_per_epoch=1", "-o", "Smaller",
    )  # fmt: skip
    assert "Smaller.json" in said
    command("nnUNetv2_train", world.number, "2d", 0, "-tr", "EPLTrainer", "-p", "Smaller", "-device", "cpu")
    model = world.results / world.name / "EPLTrainer__Smaller__2d"
    weights = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    planned = read_json(world.preprocessed / "nnUNetPlans.json")["configurations"]["2d"]
    first = next(value for name, value in weights.items() if name.endswith("conv.weight"))
    assert len(first) == planned["architecture"]["arch_kwargs"]["features_per_stage"][0] // 8
    assert read_json(model / "plans.json")["configurations"]["2d"]["patch_size"] == [32, 32]
