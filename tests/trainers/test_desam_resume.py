"""A training that was killed ends as one that was not; the same seed gives the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import small_models
import torch
from conftest import World
from resuming import assert_same_training, checkpoint, interrupt, resume

from nnunet_dgplugins.errors import UserError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads in every process of a comparison."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stop_after(world: World, epochs: int) -> None:
    """Train in this process for some of the epochs."""
    built = world.construct()
    ended = built.on_epoch_end

    def end() -> None:
        ended()
        if built.current_epoch == epochs:
            raise KeyboardInterrupt

    built.on_epoch_end = end
    with pytest.raises(KeyboardInterrupt):
        built.run_training()


@pytest.mark.parametrize(
    ("trainer", "moment"),
    [("DeSAMTrainer", "mid-epoch"), ("DeSAMGridTrainer", "mid-epoch"), ("DeSAMTrainer", "saving")],
)
def test_a_killed_training_ends_with_the_same_bits_as_an_uninterrupted_one(world: World, trainer: str, moment: str):
    world.settings(epochs=4)
    world.train(trainer)
    uninterrupted = checkpoint(world, trainer)
    assert len(set(uninterrupted["logging"]["train_losses"])) == 4
    world.elsewhere("killed")
    interrupt(world, trainer, moment)
    assert checkpoint(world, trainer, "latest")["current_epoch"] == 2
    resume(world, trainer)
    assert_same_training(uninterrupted, checkpoint(world, trainer))
    assert not list((world.model(trainer) / "fold_0").glob(".tmp-*"))


def test_a_truncated_latest_checkpoint_gives_way_to_the_newest_readable_one_and_it_is_said(world: World):
    world.settings(epochs=3)
    world.train()
    uninterrupted = checkpoint(world)
    world.elsewhere("stopped")
    stop_after(world, 2)
    latest = world.model() / "fold_0" / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[: latest.stat().st_size // 2])
    built = resume(world)
    said = Path(built.log_file).read_text()
    assert "Cannot read checkpoint_latest.pth" in said
    assert "continuing from checkpoint_best.pth instead" in said
    assert_same_training(uninterrupted, checkpoint(world))


def test_a_training_goes_on_with_its_own_encoder_when_the_package_ships_another(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    world.settings(epochs=3)
    world.train()
    uninterrupted = checkpoint(world)
    world.elsewhere("stopped")
    stop_after(world, 2)
    small_models.install_newer(world.root / "newer", monkeypatch)
    resume(world)
    assert_same_training(uninterrupted, checkpoint(world))
    world.elsewhere("fresh").train()
    name = "image_encoder.weights_hash"
    assert not torch.equal(uninterrupted["network_weights"][name], checkpoint(world)["network_weights"][name])


def test_a_training_begun_anew_is_continued_and_not_the_finished_one_before(world: World):
    world.train()
    fold = world.model() / "fold_0"
    content = (fold / "checkpoint_final.pth").read_bytes()
    world.construct().on_train_start()  # and killed in its first epoch
    assert not list(fold.glob("checkpoint_*.pth"))
    assert (fold / "earlier_checkpoint_final.pth").read_bytes() == content
    resume(world)
    assert (fold / "checkpoint_final.pth").is_file()
    assert (fold / "earlier_checkpoint_final.pth").read_bytes() == content


def test_without_any_readable_checkpoint_the_error_names_them(world: World):
    world.settings(epochs=2)
    stop_after(world, 1)
    for path in (world.model() / "fold_0").glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no readable checkpoint.*checkpoint_latest\.pth.*checkpoint_best\.pth"):
        resume(world)


def test_a_finished_training_that_is_continued_stays_as_it_is(world: World):
    world.train()
    before = checkpoint(world)
    resume(world)
    assert_same_training(before, checkpoint(world))


@pytest.mark.parametrize("trainer", ["DeSAMTrainer", "DeSAMGridTrainer"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(world: World, trainer: str):
    world.train(trainer)
    first = checkpoint(world, trainer)
    world.elsewhere("again").train(trainer)
    assert_same_training(first, checkpoint(world, trainer))
    world.elsewhere("other").settings(seed=1)
    world.train(trainer)
    name = "head.mask_decoder.pimm.seg_outputs.1.weight"
    assert not torch.equal(first["network_weights"][name], checkpoint(world, trainer)["network_weights"][name])
