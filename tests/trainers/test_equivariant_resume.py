"""A training of the equivariant CAMs that was killed ends as one that was not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import World
from resuming import assert_same_training, checkpoint, interrupt, resume

TRAINER = "EquivariantCAMTrainer"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads in every process of a comparison."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["mid-epoch", "saving"])
def test_a_killed_training_ends_with_the_same_bits_as_an_uninterrupted_one(tagged: World, moment: str):
    tagged.settings(epochs=4)
    tagged.train(TRAINER)
    uninterrupted = checkpoint(tagged, TRAINER)
    tagged.elsewhere("killed")
    interrupt(tagged, TRAINER, moment)
    assert checkpoint(tagged, TRAINER, "latest")["current_epoch"] == 2
    resume(tagged, TRAINER)
    assert_same_training(uninterrupted, checkpoint(tagged, TRAINER))


def test_another_seed_gives_other_networks(tagged: World):
    tagged.train(TRAINER)
    first = checkpoint(tagged, TRAINER)["network_weights"]
    tagged.elsewhere("other").settings(seed=1)
    tagged.train(TRAINER)
    other = checkpoint(tagged, TRAINER)["network_weights"]
    name = next(key for key in first if key.endswith("classifier.weight"))
    assert not torch.equal(first[name], other[name])
