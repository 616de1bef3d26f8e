"""Step 1 of SAM-SDG: its network, start weights, augmentations and losses, and batch statistics that do not move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from samsdg_worlds import COARSE, checkpoint
from tiny_dataset import Recipe
from torch import nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.samsdg.losses import coarse_loss
from nnunet_dgplugins.trainers import samsdg_coarse


class Small(nn.Module):
    """Stands for DeepLabV3: batch statistics, dropout, and a backbone under its name."""

    def __init__(self, num_classes: int = 1):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.conv1 = nn.Conv2d(3, 8, 3, padding=1)  # type: ignore[assignment]
        self.rest = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, num_classes, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.rest(self.backbone.conv1(images))
        return found


@pytest.fixture
def small(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The world with a small network in place of DeepLabV3."""
    monkeypatch.setattr(samsdg_coarse, "CoarseNetwork", Small)
    world.settings(network="deeplabv3")
    return world


@pytest.mark.slow
def test_the_coarse_network_learns_the_organ_of_its_source(world: World):
    world.settings(iterations_per_epoch=30, initial_lr=3e-3, batch_size=8)
    built = world.train(COARSE)
    assert built.logger.get_value("mean_fg_dice", 0) > 0.6


def test_batch_statistics_move_in_training_alone(small: World):
    built = small.construct(COARSE)
    built.initialize()
    statistics = built.network.network.rest[0]
    moved: list[tuple[str, int]] = []
    for name, own in (("train_step", built.train_step), ("validation_step", built.validation_step)):

        def watched(batch: Any, step: Callable[..., Any] = own, name: str = name) -> Any:
            before = int(statistics.num_batches_tracked)
            found = step(batch)
            moved.append((name, int(statistics.num_batches_tracked) - before))
            return found

        setattr(built, name, watched)
    built.run_training()
    assert set(moved) == {("train_step", 1), ("validation_step", 0)}
    predictor = small.predictor(small.model(COARSE))
    predictor.predict_from_files_sequential(small.images(), None)
    own = checkpoint(small, COARSE)["network_weights"]
    after = predictor.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in own.items())


def test_start_weights_are_counted_named_in_the_log_and_never_needed_again(small: World):
    path = small.root / "resnet50.pth"
    torch.manual_seed(3)
    weight = torch.randn(8, 3, 3, 3)
    torch.save({"conv1.weight": weight, "conv1.bias": torch.zeros(9), "fc.weight": torch.zeros(2)}, path)
    small.settings(network="deeplabv3", start_weights=str(path), initial_lr=0.0)
    built = small.train(COARSE)
    assert torch.equal(built.network.network.backbone.conv1.weight, weight)
    said = Path(built.log_file).read_text()
    assert "1 tensors loaded; 1 of another shape, skipped (backbone.conv1.bias (9,) instead of (8,))" in said
    assert "fc.weight" in said
    path.unlink()
    small.command(COARSE, only_run_validation=True)
    assert len(small.predict(small.model(COARSE))) == 2


def test_start_weights_that_are_not_there_or_not_for_this_network_are_refused(small: World):
    small.settings(network="deeplabv3", start_weights="/nowhere/resnet50.pth")
    with pytest.raises(UserError, match=r"start_weights: no file /nowhere/resnet50\.pth"):
        small.train(COARSE)
    small.settings(network="planned", start_weights="/nowhere/resnet50.pth")
    with pytest.raises(UserError, match="start_weights are for network=deeplabv3"):
        small.construct(COARSE)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"network": "deeplabv3", "image_size": 80}, "no multiple of 32"), ({"image_size": 68}, "no multiple of 8")],
)
def test_image_sizes_that_the_network_cannot_halve_are_refused(world: World, values: dict[str, Any], words: str):
    world.settings(**values)
    with pytest.raises(UserError, match=words):
        world.construct(COARSE)


@pytest.mark.slow
def test_deeplab_trains_a_step_on_slices(world: World):
    """The real one, 40 million parameters; its checkpoints would take longer than the rest."""
    world.settings(network="deeplabv3", batch_size=2)
    built = world.construct(COARSE)
    built.on_train_start()
    built.on_train_epoch_start()
    weight = built.network.network.backbone.conv1.weight.detach().clone()
    assert np.isfinite(built.train_step(next(built.dataloader_train))["loss"])
    assert not torch.equal(weight, built.network.network.backbone.conv1.weight)
    assert built.network.network.classifier[0].project[3].p == 0.1


def step_of(world: World, **values: Any) -> tuple[Any, list[torch.Tensor], dict[str, Any], float]:
    """Make one training step; returns the trainer, what the network saw, the batch, and the loss."""
    world.settings(iterations_per_epoch=1, initial_lr=0.0, **values)
    built = world.construct(COARSE)
    built.initialize()
    shown, batches = [], []
    built.network.network.register_forward_pre_hook(
        lambda module, inputs: shown.append(inputs[0].detach().clone()) if torch.is_grad_enabled() else None
    )
    step = built.train_step
    built.train_step = lambda batch: batches.append(batch) or step(batch)
    built.run_training()
    return built, shown, batches[0], float(built.logger.get_value("train_losses", 0))


def test_without_augmentation_the_network_sees_the_slices_as_they_are(world: World):
    _, shown, batch, _ = step_of(world)
    assert len(shown) == 1
    assert torch.equal(shown[0], batch["images"])


def test_location_scale_shows_other_intensities_at_the_same_places(world: World):
    _, shown, batch, _ = step_of(world, augmentation="location_scale")
    assert len(shown) == 1
    assert shown[0].shape == batch["images"].shape
    assert not any(torch.equal(new, old) for new, old in zip(shown[0], batch["images"], strict=True))
    assert shown[0].min() >= 0
    assert shown[0].max() <= 1


def test_saliency_shows_the_global_version_and_then_its_mixture_with_the_local_one(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    fused: list[torch.Tensor] = []
    plain = samsdg_coarse.fuse
    monkeypatch.setattr(samsdg_coarse, "fuse", lambda *parts: fused.append(parts) or plain(*parts))
    built, shown, batch, _ = step_of(world, augmentation="saliency")
    ((whole, by_class, where),) = fused
    assert torch.equal(shown[0], whole.detach())
    torch.testing.assert_close(shown[1], whole.detach() * where + by_class * (1 - where))
    assert where.amin((2, 3)).max() < 1e-6
    assert where.amax((2, 3)).min() == 1
    # one step with the sum of both gradients
    network = built.network.network
    network.zero_grad()
    target, _ = built.target_of(batch["labels"])
    for images in list(shown):  # which goes on growing
        coarse_loss(network(images), target)["total"].backward()
    held = [p for p in network.parameters() if p in built.optimizer.state]
    for parameter in held[:5]:
        torch.testing.assert_close(
            built.optimizer.state[parameter]["exp_avg"], 0.1 * parameter.grad, rtol=1e-3, atol=1e-7
        )


def test_the_loss_is_the_one_asked_for(world: World):
    built, shown, batch, plain = step_of(world)
    _, _, _, double = step_of(world.elsewhere("double"), loss="double_sigmoid")
    target, _ = built.target_of(batch["labels"])
    with torch.no_grad():
        terms = coarse_loss(built.network.network(shown[0]), target, double_sigmoid=True)
    assert plain == pytest.approx(float(terms["dice"] + terms["bce"]), rel=1e-4)
    assert double == pytest.approx(float(terms["total"]), rel=1e-4)


def test_foreground_slices_alone_are_trained_on_when_asked_for(world: World):
    world.settings(iterations_per_epoch=None, train_slices="foreground")
    built = world.construct(COARSE)
    seen: set[tuple[str, int]] = set()
    step = built.train_step
    built.train_step = lambda batch: seen.update((key.case, key.z) for key in batch["keys"]) or step(batch)
    built.run_training()
    dataset = built.dataset_class(built.preprocessed_dataset_folder)
    organ = {
        (case, int(z))
        for case in built.do_split()[0]
        for z in np.flatnonzero((np.asarray(dataset.load_case(case)[1][0]) > 0).any((1, 2)))
    }
    assert seen == organ


def test_neighbouring_slices_are_shown_as_colours(world: World):
    world.use(Recipe("Colours", channels=("R", "G", "B")), own=True)
    names = {"0": "T2_below", "1": "T2", "2": "T2_above"}
    world.edit_json("dataset.json", lambda content: content.update(channel_names=names))
    built, shown, _, _ = step_of(world)
    assert built.settings.channels == (0, 1, 2)
    assert not torch.equal(shown[0][:, 0], shown[0][:, 1])
    assert len(world.predict(world.model(COARSE))) == 2
    world.settings(channels=[3])
    with pytest.raises(UserError, match=r"channels=\[3\] cannot be shown"):
        world.elsewhere("third").construct(COARSE)
