"""A training of SAM-SDG that was killed ends as one that was not; the same seed gives the same weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import World
from resuming import assert_same_training, interrupt, resume
from samsdg_worlds import COARSE, SAM, TRAINERS, before, checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads in every process of a comparison."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "moment", "options"),
    [
        (COARSE, "mid-epoch", {"augmentation": "location_scale"}),
        (SAM, "mid-epoch", {}),
        (SAM, "saving", {"groupings": 2}),
    ],
)
def test_a_killed_training_ends_with_the_same_bits_as_an_uninterrupted_one(
    world: World, trainer: str, moment: str, options: dict[str, object]
):
    before(world, trainer)
    world.settings(epochs=4, **options)
    world.train(trainer)
    uninterrupted = checkpoint(world, trainer)
    assert len(set(uninterrupted["logging"]["train_losses"])) == 4
    before(world.elsewhere("killed"), trainer)
    world.settings(epochs=4, **options)
    interrupt(world, trainer, moment)
    assert checkpoint(world, trainer, "latest")["current_epoch"] == 2
    resume(world, trainer)
    assert_same_training(uninterrupted, checkpoint(world, trainer))
    assert not list((world.model(trainer) / "fold_0").glob(".tmp-*"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(world: World, trainer: str):
    before(world, trainer)
    world.train(trainer)
    first = checkpoint(world, trainer)
    before(world.elsewhere("again"), trainer)
    world.train(trainer)
    assert_same_training(first, checkpoint(world, trainer))
    before(world.elsewhere("other"), trainer)
    world.settings(seed=1)
    world.train(trainer)
    other = checkpoint(world, trainer)["network_weights"]
    assert any(not torch.equal(value, other[key]) for key, value in first["network_weights"].items())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_finished_training_that_is_continued_stays_as_it_is(world: World, trainer: str):
    before(world, trainer)
    world.train(trainer)
    first = checkpoint(world, trainer)
    resume(world, trainer)
    assert_same_training(first, checkpoint(world, trainer))
