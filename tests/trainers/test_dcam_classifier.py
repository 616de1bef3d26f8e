"""Stage 1 of D-CAM: the tag classifier and the segmentation of its maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATCHES, World
from PIL import Image
from resuming import resume
from stages import log_of, weights
from tiny_patches import patch

from nnunet_dgplugins.budget import Budget, BudgetRun
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.methods.dcam.pcnorm import PCNorm
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

TRAINER = "DCAMClassifierTrainer"
UNEQUAL = replace(PATCHES, name="Unequal", sizes=((48, 64), (64, 64), (80, 56)))


@pytest.fixture
def start_file(patches: World) -> Path:
    """Start weights for the narrow tower, with statistics unlike fresh ones, named in the settings."""
    torch.manual_seed(8)
    state = ResNet38(3, width_divisor=32, pcnorm="off").state_dict()
    state = {key: value + 0.25 if "running" in key else value for key, value in state.items()}
    torch.save(state, patches.root / "start.pth")
    patches.settings(start_weights=str(patches.root / "start.pth"))
    return patches.root / "start.pth"


def test_batches_hold_whole_patches_of_the_fold_with_the_tables_tags(patches: World):
    trainer = patches.use(UNEQUAL).construct(TRAINER)
    trainer.on_train_start()
    size = tuple(trainer.configuration_manager.patch_size)
    batch, validation = next(trainer.dataloader_train), next(trainer.dataloader_val)
    assert set(batch["keys"]) <= set(UNEQUAL.training)
    assert validation["keys"] == UNEQUAL.validation
    for one in (batch, validation):
        assert one["images"].shape[1:] == (3, *size)
        assert one["images"].max() <= 1
        shown = [patch(UNEQUAL, int(name[-1]))[2] for name in one["keys"]]
        assert one["tags"].tolist() == shown
    other = sum(UNEQUAL.sizes[number % 3] != size for number in range(6))
    assert f"{other} of 6 training patches are not {size[0]} x {size[1]} and are resized." in log_of(trainer)
    assert f"at another scale; convert with --resize {max(size)}" in log_of(trainer)
    trainer.on_train_end()


def test_patches_are_mirrored_along_both_axes(patches: World):
    trainer = patches.construct(TRAINER)
    trainer.on_train_start()
    truth = {name: torch.from_numpy(patch(PATCHES, int(name[-1]))[0] / 255).permute(2, 0, 1) for name in
             PATCHES.training}  # fmt: skip
    ways = set()
    for epoch in range(6):
        trainer.dataloader_train.start_epoch(epoch)
        for batch in (next(trainer.dataloader_train) for _ in range(2)):
            for name, image in zip(batch["keys"], batch["images"], strict=True):
                found = [axes for axes in ((), (1,), (2,), (1, 2)) if torch.allclose(
                    truth[name].float().flip(axes), image, atol=1e-3)]  # fmt: skip
                assert len(found) == 1
                ways.add(found[0])
    assert ways == {(), (1,), (2,), (1, 2)}
    trainer.on_train_end()


def test_without_start_weights_nothing_is_frozen_and_momentum_is_as_usual(patches: World):
    trainer = patches.construct(TRAINER)
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.run_training()
    said = "No start weights: nothing is frozen, normalisations train, momentum 0.9, no dropout attention."
    assert said in log_of(trainer)
    assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.9}
    after = weights(patches, TRAINER)
    assert [name for name, _ in trainer.network.named_parameters() if torch.equal(before[name], after[name])] == []
    assert not torch.equal(before["classifier.b2.bn_branch2a.running_mean"],
                           after["classifier.b2.bn_branch2a.running_mean"])  # fmt: skip


@pytest.mark.parametrize(("pcnorm", "adapts"), [("instance", True), ("off", False)])
def test_start_weights_freeze_the_early_blocks_and_normalisations_that_nothing_unsettles(
    patches: World, start_file: Path, pcnorm: str, adapts: bool
):
    patches.settings(start_weights=str(start_file), pcnorm=pcnorm)
    trainer = patches.train(TRAINER)
    given, after = torch.load(start_file, weights_only=True), weights(patches, TRAINER)

    def changed(part: str) -> bool:
        return any(
            not torch.equal(given[key], after[f"classifier.{key}"])
            for key in given
            if key.startswith(part) and "batches" not in key
        )

    assert not changed("conv1a")
    assert not changed("b2")
    assert changed("b3.conv")
    assert changed("fc8")
    assert changed("b3.bn") == changed("bn7") == adapts
    assert "tensors loaded" in log_of(trainer)
    assert "Frozen: conv1a, b2" in log_of(trainer)


def test_a_training_begins_with_its_start_weights_or_not_at_all_and_goes_on_without_the_file(
    patches: World, start_file: Path
):
    start_file.rename(patches.root / "kept.pth")
    with pytest.raises(UserError, match="start_weights: no file"):
        patches.train(TRAINER)
    (patches.root / "kept.pth").rename(start_file)
    patches.train(TRAINER)
    start_file.unlink()
    again = resume(patches, TRAINER)
    assert not again.network.classifier.conv1a.weight.requires_grad


@pytest.mark.parametrize("attention", [True, False])
def test_attention_begins_with_the_fourth_epoch(patches: World, attention: bool):
    patches.settings(epochs=5, iterations_per_epoch=1, attention=attention)
    trainer = patches.construct(TRAINER)
    trainer.initialize()
    tower, gammas = trainer.network.classifier, []
    forward = tower.forward

    def watched(images: torch.Tensor, gamma: float | None = None) -> torch.Tensor:
        if tower.training:
            gammas.append(gamma)
        return forward(images, gamma)

    tower.forward = watched
    trainer.run_training()
    used = [pytest.approx(0.98**3), pytest.approx(0.98**4)]
    assert gammas == [None, None, None, *(used if attention else [None, None])]


@pytest.mark.parametrize("budget", [None, Budget(epochs=2), Budget(iterations=6)])
def test_rates_fall_with_every_step_and_the_last_layers_is_ten_times_as_high(patches: World, budget: Budget | None):
    patches.settings(epochs=2, iterations_per_epoch=3)
    trainer = patches.construct(TRAINER)
    step, rates = trainer.train_step, []
    trainer.train_step = lambda batch: rates.append([g["lr"] for g in trainer.optimizer.param_groups]) or step(batch)
    if budget is None:
        trainer.run_training()
    else:
        BudgetRun(trainer, budget).train()
    head = {id(parameter) for parameter in trainer.network.classifier.fc8.parameters()}
    body, last = trainer.optimizer.param_groups
    assert {id(parameter) for parameter in last["params"]} == head
    assert not head & {id(parameter) for parameter in body["params"]}
    expected = [1e-3 * (1 - done / 6) ** 0.9 for done in range(6)]
    assert np.asarray(rates) == pytest.approx(np.stack([expected, 10 * np.asarray(expected)], 1))


def test_gradients_reach_everything_that_trains(patches: World):
    patches.settings(attention=True)
    trainer = patches.construct(TRAINER)
    trainer.on_train_start()
    trainer.current_epoch = 3
    trainer.on_train_epoch_start()
    trainer.optimizer_step = lambda: None
    trainer.train_step(next(trainer.dataloader_train))
    missing = [
        name for name, parameter in trainer.network.named_parameters()
        if parameter.grad is None or not torch.isfinite(parameter.grad).all() or not parameter.grad.any()
    ]  # fmt: skip
    assert missing == []
    trainer.on_train_end()


def test_the_jaccard_index_of_tags_chooses_the_best_checkpoint(patches: World):
    patches.settings(epochs=3, iterations_per_epoch=1)
    trainer = patches.construct(TRAINER)
    scripted = iter((0.25, 1.0, 0.0))
    ended = trainer.on_validation_epoch_end

    def with_jaccard(outputs: list[dict[str, Any]]) -> None:
        share = next(scripted)
        ended([{**output, "jaccard": share * output["count"]} for output in outputs])

    trainer.on_validation_epoch_end = with_jaccard
    trainer.run_training()
    assert read_checkpoint(patches.model(TRAINER) / "fold_0" / "checkpoint_best.pth")["current_epoch"] == 2
    assert [trainer.logger.get_value("mean_fg_dice", step) for step in range(3)] == [0.25, 1.0, 0.0]
    assert len(trainer.logger.get_value("dice_per_class_or_region", 0)) == 3
    assert log_of(trainer).count("exact match") == 3


def test_agreement_of_tags_is_counted_over_patches(patches: World):
    trainer = patches.construct(TRAINER)
    trainer.on_train_start()
    wanted = torch.tensor([[1.0, -1, -1], [1, 1, -1]])
    trainer.network.classifier.forward = lambda images: wanted[: len(images)]
    batch = {"images": torch.zeros(2, 3, 8, 8), "tags": torch.tensor([[1, 0, 0], [1, 0, 1]])}
    found = trainer.validation_step(batch)
    assert (found["exact"], found["count"]) == (1, 2)
    assert found["jaccard"] == pytest.approx(1 + 1 / 3)
    assert found["right"].tolist() == [2, 1, 1]
    trainer.on_train_end()


def test_scores_of_the_maps_are_those_of_the_written_masks_over_all_pixels(patches: World):
    patches.command(TRAINER)
    folder = patches.model(TRAINER) / "fold_0" / "validation_cam"
    found = read_json(folder / "iou.json")
    drawn, truth = (
        np.stack([np.asarray(Image.open(place / f"{name}.png")) for name in PATCHES.validation])
        for place in (folder, patches.raw / "labelsVal")
    )
    both = {f"tissue{kind}": (drawn == kind, truth == kind) for kind in (1, 2, 3)}
    assert list(found["IoU"]) == list(both)
    ious = [(one & other).sum() / (one | other).sum() if (one | other).any() else None for one, other in both.values()]
    assert list(found["IoU"].values()) == [None if iou is None else pytest.approx(iou) for iou in ious]
    assert found["mIoU"] == pytest.approx(np.mean([iou for iou in ious if iou is not None]))
    assert found["ACC"] == pytest.approx((drawn == truth).mean())
    assert found["cases"] == 2
    assert set(np.unique(drawn)) <= {1, 2, 3}


def test_pcnorm_changes_what_the_network_says_and_its_official_mode_computes_nothing(patches: World):
    images = torch.stack([torch.from_numpy(patch(PATCHES, n)[0] / 255).permute(2, 0, 1) for n in range(3)]).float()
    said = {}
    for mode in ("off", "official", "batch", "instance"):
        patches.settings(pcnorm=mode)
        trainer = patches.elsewhere(mode).construct(TRAINER)
        trainer.initialize()
        layers = [layer for layer in trainer.network.modules() if isinstance(layer, PCNorm)]
        assert len(layers) == (3 if mode in ("batch", "instance") else 0)
        with torch.no_grad():
            trainer.network.classifier.train()(images)  # gives statistics to mode batch
            said[mode] = trainer.network.eval()(images)
    assert torch.equal(said["off"], said["official"])
    for one, other in (("off", "instance"), ("off", "batch"), ("batch", "instance")):
        assert (said[one][:, 1:] - said[other][:, 1:]).abs().mean() > 0.01, (one, other)


def test_unequal_patches_are_segmented_in_their_own_geometry_whatever_the_padding(patches: World):
    patches.use(UNEQUAL).train(TRAINER)
    predictor = patches.predictor(patches.model(TRAINER))
    network, size = predictor.network.eval(), predictor.configuration_manager.patch_size
    predicted = predictor.predict_from_files_sequential(patches.images(), None)
    smaller = 0
    for number, found in zip((UNEQUAL.cases, UNEQUAL.cases + 1), predicted, strict=True):
        picture = patch(UNEQUAL, number)[0]
        assert found.shape == (1, *picture.shape[:2])
        image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        if all(own <= whole for own, whole in zip(picture.shape, size, strict=False)):
            smaller += picture.shape[:2] != tuple(size)
            with torch.no_grad():
                same = network(image)[0].argmax(0).numpy() == found[0]
                assert same.mean() > 0.995  # tiles are summed in half precision
                padded = network(torch.nn.functional.pad(image, (5, 3, 0, 9)))[..., :-9, 5:-3]
                torch.testing.assert_close(padded, network(image), rtol=0, atol=0)
    with torch.no_grad():
        nothing = network(torch.zeros(1, 3, 16, 16))
        few = network(torch.nn.functional.pad(torch.rand(1, 3, 2, 1), (4, 4, 4, 4)))
    assert nothing.argmax(1).eq(0).all()  # black is no tissue
    assert torch.isfinite(few).all()
    assert smaller == 1


def test_background_is_what_no_map_explains_where_it_is_a_class(patches: World):
    recipe = replace(PATCHES, name="Background", background=True)
    patches.use(recipe).train(TRAINER)
    shares = []
    for threshold in (0.0, 0.5, 1.0):
        patches.settings(background_threshold=threshold)
        patches.command(TRAINER, only_run_validation=True)  # may change after training
        predicted = np.stack(patches.predict(patches.model(TRAINER)))
        shares.append(float((predicted == 0).mean()))
    assert shares[0] <= shares[1] <= shares[2]
    assert shares[0] < 0.5 < shares[2]
    scores = read_json(patches.model(TRAINER) / "fold_0" / "validation_cam" / "iou.json")
    assert list(scores["IoU"]) == ["background", "tissue1", "tissue2", "tissue3"]


def test_some_epochs_teach_which_tissue_is_where(patches: World):
    recipe = replace(PATCHES, name="Learn", cases=26, sizes=((48, 48),))
    # the tissues here differ in plain colour alone, which PCNorm takes for style
    patches.use(recipe).settings(
        epochs=20, iterations_per_epoch=5, batch_size=8, initial_lr=0.01, width_divisor=16, pcnorm="off"
    )
    network = patches.train(TRAINER).network.eval()
    pictures, labels, tags = zip(*[patch(recipe, number) for number in range(26, 38)], strict=True)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        known = (network.classifier(images) > 0).numpy() == np.asarray(tags)
        right = network(images).argmax(1).numpy() == np.stack(labels)
    assert known.mean() > 0.8
    assert right.mean() > 0.6  # a third by chance
