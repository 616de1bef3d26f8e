"""A training of EPL that was killed ends as one that was not, with both networks and both groups of the optimiser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import World
from resuming import assert_same, assert_same_training, checkpoint, interrupt, resume

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint, write_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads in every process of a comparison."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["mid-epoch", "saving"])
def test_a_killed_training_ends_with_the_same_bits_as_an_uninterrupted_one(semi: World, moment: str):
    semi.settings(epochs=4)
    semi.train("EPLTrainer")
    uninterrupted = checkpoint(semi, "EPLTrainer")
    assert len(uninterrupted["optimizer_state"]["param_groups"]) == 2
    semi.elsewhere("killed")
    interrupt(semi, "EPLTrainer", moment)
    assert checkpoint(semi, "EPLTrainer", "latest")["current_epoch"] == 2
    resume(semi, "EPLTrainer")
    resumed = checkpoint(semi, "EPLTrainer")
    assert_same_training(uninterrupted, resumed)
    assert_same(uninterrupted["dgplugins"], resumed["dgplugins"])


def test_another_seed_gives_other_networks(semi: World):
    semi.train("EPLTrainer")
    first = checkpoint(semi, "EPLTrainer")
    semi.elsewhere("other").settings(seed=1)
    semi.train("EPLTrainer")
    other = checkpoint(semi, "EPLTrainer")
    name = next(iter(first["network_weights"]))
    assert not torch.equal(first["network_weights"][name], other["network_weights"][name])
    second = first["dgplugins"]["second_network"][name], other["dgplugins"]["second_network"][name]
    assert not torch.equal(*second)


def test_a_checkpoint_given_as_its_content_brings_both_networks(semi: World):
    semi.train("EPLTrainer")
    content = checkpoint(semi, "EPLTrainer")
    semi.elsewhere("other").settings(seed=1)
    built = semi.construct("EPLTrainer")
    built.load_checkpoint(content)
    assert_same(content["network_weights"], built.network.state_dict())
    assert_same(content["dgplugins"]["second_network"], built.second_network.state_dict())


def test_a_checkpoint_without_the_second_network_cannot_go_on(semi: World):
    semi.train("EPLTrainer")
    path = semi.model("EPLTrainer") / "fold_0" / "checkpoint_final.pth"
    content = read_checkpoint(path)
    del content["dgplugins"]
    write_checkpoint(path, content)
    with pytest.raises(UserError, match="holds no second network"):
        resume(semi, "EPLTrainer")
