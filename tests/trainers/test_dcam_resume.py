"""A training of either stage of D-CAM that was killed ends as one that was not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import World
from resuming import assert_same_training, checkpoint, interrupt, resume
from stages import after_its_stage, elsewhere, same, weights

both = pytest.mark.parametrize("trainer", ["DCAMClassifierTrainer", "DCAMTrainer"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads in every process of a comparison."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@both
@pytest.mark.parametrize("moment", ["mid-epoch", "saving"])
def test_a_killed_training_ends_with_the_same_bits_as_an_uninterrupted_one(
    patches: World, trainer: str, moment: str
):  # fmt: skip
    after_its_stage(patches, trainer).settings(epochs=4)
    patches.train(trainer)
    uninterrupted = checkpoint(patches, trainer)
    elsewhere(patches, trainer, "killed")
    interrupt(patches, trainer, moment)
    assert checkpoint(patches, trainer, "latest")["current_epoch"] == 2
    resume(patches, trainer)
    assert_same_training(uninterrupted, checkpoint(patches, trainer))


@both
def test_another_seed_gives_other_weights(patches: World, trainer: str):
    after_its_stage(patches, trainer).train(trainer)
    first = weights(patches, trainer)
    elsewhere(patches, trainer, "other").settings(seed=1)
    patches.train(trainer)
    assert not same(first, weights(patches, trainer))
