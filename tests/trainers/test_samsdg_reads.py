"""What both steps of SAM-SDG open: nothing of target sites, and no voxel of other folds' cases counts."""

from __future__ import annotations

import pytest
from conftest import World
from samsdg_worlds import COARSE, SAM, checkpoint
from test_desam_reads import Opened, linux
from tiny_dataset import Recipe


@linux
def test_training_and_validation_open_nothing_of_the_target_cases(world: World):
    world.use(Recipe(), own=True)
    target = [world.raw / "imagesTs", world.raw / "labelsTs"]
    with Opened(*target, world.preprocessed / "nnUNetPlans_2d") as opened:
        for trainer in (COARSE, SAM):
            world.command(trainer)
            paths = opened.paths()
            assert {path for path in paths if "Ts" in path} == set()
            assert any("case_0.b2nd" in path for path in paths)  # a library written in C is seen
        world.predict(world.model(SAM))
        assert any("imagesTs" in path for path in opened.paths())  # and so would the target have been


@pytest.mark.parametrize("trainer", [COARSE, SAM])
def test_only_the_folds_own_cases_decide_the_weights(world: World, trainer: str):
    """Other cases of imagesTr may be looked at for their size, but not one of their voxels counts."""
    import shutil

    import torch

    world.use(Recipe(), own=True)
    world.write_splits([{"train": ["case_0", "case_1"], "val": ["case_2"]}])
    for name in dict.fromkeys((COARSE, trainer)):
        world.train(name)
    first = checkpoint(world, trainer)["network_weights"]
    folder = world.preprocessed / "nnUNetPlans_2d"
    for kind in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copy(folder / f"case_0{kind}", folder / f"case_4{kind}")
    world.elsewhere("changed")
    for name in dict.fromkeys((COARSE, trainer)):
        world.train(name)
    second = checkpoint(world, trainer)["network_weights"]
    assert {key for key, value in first.items() if not torch.equal(value, second[key])} == set()
