"""Stage 2 of D-CAM: what it trains on, what stays still, and the gate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATCHES, World
from stages import log_of, same, weights
from tiny_patches import PatchRecipe, patch

from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.methods.dcam.deeplab import DeepLab
from nnunet_dgplugins.methods.dcam.masks import IGNORE

FIRST, SECOND = "DCAMClassifierTrainer", "DCAMTrainer"
UNEQUAL = replace(PATCHES, name="Unequal", sizes=((48, 64), (64, 64), (80, 56)))
RELEASE = replace(PATCHES, name="Release", release=4)


def drawn(trainer: Any) -> set[str]:
    """The patches of a few epochs' batches."""
    trainer.on_train_start()
    seen = set()
    for epoch in range(4):
        trainer.dataloader_train.start_epoch(epoch)
        for batch in (next(trainer.dataloader_train) for _ in range(2)):
            seen |= {*batch["keys"]}
    trainer.on_train_end()
    return seen


@pytest.fixture
def ready(patches: World) -> World:
    """Patches with a finished stage 1."""
    patches.train(FIRST)
    return patches


def test_image_and_three_masks_are_cut_and_mirrored_together(patches: World):
    patches.use(UNEQUAL).train(FIRST)
    patches.settings(blur=False)
    trainer = patches.construct(SECOND)
    trainer.on_train_start()

    def coded(case: str) -> np.ndarray:  # each mask is a function of one colour of its pixel
        return patch(UNEQUAL, int(case[-1]))[0].transpose(2, 0, 1) % 97

    trainer.masks.read = coded
    size = tuple(trainer.configuration_manager.patch_size)
    mirrored, cut, padded = set(), 0, 0
    for epoch in range(4):
        trainer.dataloader_train.start_epoch(epoch)
        for batch in (next(trainer.dataloader_train) for _ in range(2)):
            colours = (batch["images"] * 255).round().long()
            three = torch.stack([batch["masks"][layer] for layer in ("b4_5", "b5_2", "bn7")], 1).long()
            for name, image, masks in zip(batch["keys"], colours, three, strict=True):
                assert image.shape[1:] == masks.shape[1:] == size
                known = (image > 0).all(0)  # pictures have no black
                assert torch.equal(masks[:, known], image[:, known] % 97)
                assert (masks[:, ~known] == IGNORE).all()
                whole = patch(UNEQUAL, int(name[-1]))[0].shape[:2]
                cut += any(own > wanted for own, wanted in zip(whole, size, strict=True))
                padded += bool((~known).any())
                mirrored.add(torch.equal(image, colours.new_tensor(_corner(name, size))))
    assert mirrored == {True, False}
    assert cut > 0
    assert padded > 0
    trainer.on_train_end()


def _corner(name: str, size: tuple[int, int]) -> np.ndarray:
    """The upper left part of a patch, padded below and on the right."""
    picture = patch(UNEQUAL, int(name[-1]))[0].transpose(2, 0, 1)[:, : size[0], : size[1]]
    return np.pad(picture, [(0, 0), *((0, want - have) for want, have in zip(size, picture.shape[1:], strict=True))])


def test_images_are_mirrored_left_to_right_only_and_half_of_them_are_blurred(ready: World):
    trainer = ready.construct(SECOND)
    trainer.on_train_start()
    ways, blurred, count = set(), 0, 0
    for epoch in range(6):
        trainer.dataloader_train.start_epoch(epoch)
        for batch in (next(trainer.dataloader_train) for _ in range(2)):
            for name, image in zip(batch["keys"], batch["images"], strict=True):
                picture = torch.from_numpy(patch(PATCHES, int(name[-1]))[0] / 255).permute(2, 0, 1).float()
                gaps = {axes: float((picture.flip(axes) - image).abs().mean()) for axes in ((), (1,), (2,), (1, 2))}
                ways.add(min(gaps, key=lambda axes: gaps[axes]))
                blurred += min(gaps.values()) > 1e-3
                count += 1
    assert ways == {(), (2,)}
    assert 0.2 * count < blurred < 0.8 * count
    trainer.on_train_end()


def test_patches_that_show_nothing_are_left_out_and_white_pixels_give_no_gradient(patches: World):
    recipe = replace(PATCHES, name="WhiteEmpty", white=True, empty=2)
    patches.use(recipe).train(FIRST)
    patches.settings(blur=False)
    trainer = patches.construct(SECOND)
    trainer.on_train_start()
    assert "1 training patches show none of the classes and are left out." in log_of(trainer)
    seen = set()
    for epoch in range(4):
        trainer.dataloader_train.start_epoch(epoch)
        for batch in (next(trainer.dataloader_train) for _ in range(2)):
            seen |= {*batch["keys"]}
    assert seen == {*recipe.training} - {"case_2"}
    trainer.network.train()
    logits = trainer.network(batch["images"]).detach().requires_grad_()
    trainer.loss(logits, batch["masks"])["total"].backward()
    white = (batch["masks"]["bn7"] == 3)[:, None].expand_as(logits)
    assert white.any()
    assert not logits.grad[white].any()
    assert bool((logits.grad[~white] != 0).all())
    trainer.on_train_end()


@pytest.mark.parametrize("options", [{"published_loss": True}, {"focal": True}, {"easy_examples": True}])
def test_options_of_the_loss_reach_it(ready: World, options: dict[str, Any]):
    losses = []
    for chosen in ({}, options):
        ready.settings(**chosen)
        trainer = ready.elsewhere(f"model{len(chosen)}", keeping=FIRST).construct(SECOND)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
        trainer.on_train_end()
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert losses[0] != losses[1]


def test_the_classifier_inside_is_stage_ones_and_never_changes(ready: World):
    trainer = ready.construct(SECOND)
    trainer.initialize()
    segmenter = {key: value.clone() for key, value in trainer.network.segmenter.state_dict().items()}
    trainer.run_training()
    prefix = "classifier."
    inside = {k: v for k, v in weights(ready, SECOND).items() if k.startswith(prefix)}
    assert same(inside, weights(ready, FIRST))
    assert all(parameter.grad is None for parameter in trainer.network.classifier.parameters())
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in trainer.network.segmenter.parameters()}
    assert not trainer.network.train().classifier.training
    assert not same(segmenter, dict(trainer.network.segmenter.state_dict()))


def by_hand(network: torch.nn.Module, picture: np.ndarray, gate: str) -> np.ndarray:
    """The segmentation from the segmenter alone and the classifier's probabilities."""
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        logits, absent = network.segmenter(image)[0], network.classifier(image).sigmoid()[0] <= 0.1
    if gate != "none":
        logits[absent] = 0 if gate == "published" else -math.inf
    return 1 + logits.argmax(0).numpy()


def test_stock_prediction_applies_the_gate_which_may_change_after_training(ready: World):
    network = ready.train(SECOND).network.eval()
    pictures = [patch(PATCHES, number)[0] for number in (PATCHES.cases, PATCHES.cases + 1)]
    favourite = np.bincount(np.ravel([by_hand(network, picture, "none") for picture in pictures])).argmax()
    # a classifier that thinks the class absent that the segmenter sees most; features are not negative
    network.classifier.fc8.weight.data.fill_(100)[favourite - 1] = -100
    path = ready.model(SECOND) / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "network_weights": network.state_dict()}, path)
    masks = {}
    for gate in ("none", "published", "closed"):
        ready.settings(gate=gate)
        ready.command(SECOND, only_run_validation=True)
        ready.no_settings()
        masks[gate] = [x[0] for x in ready.predict(ready.model(SECOND))]
        for picture, mask in zip(pictures, masks[gate], strict=True):
            assert (mask == by_hand(network, picture, gate)).mean() > 0.995  # logits are summed in half precision
    assert favourite in np.stack(masks["none"])
    assert favourite not in np.stack(masks["closed"])


@pytest.mark.parametrize("shift", [0.0, -1000.0, 1000.0])
@pytest.mark.parametrize("gate", ["closed", "none"])
def test_deployed_logits_are_finite_and_moderate_and_a_tissue_wins_everywhere(ready: World, shift: float, gate: str):
    ready.settings(gate=gate, gate_threshold=0.5)
    trainer = ready.construct(SECOND)
    trainer.initialize()
    network = trainer.network.eval()
    network.segmenter.register_forward_hook(lambda module, inputs, output: 3e4 * output + shift)
    with torch.no_grad():
        found = network(torch.rand(2, 3, 64, 64) + 0.01)
    assert found.shape == (2, 4, 64, 64)
    assert float(found.min()) >= -50
    assert float(found.max()) == 0
    assert found.argmax(1).min() >= 1


def test_background_is_an_output_of_its_own_where_it_is_a_class(patches: World):
    patches.use(replace(PATCHES, name="Background", background=True)).train(FIRST)
    trainer = patches.train(SECOND)
    network = trainer.network.eval()
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 64) + 0.01
        alone, found = network.segmenter(images), network(images)
    assert alone.shape[1] == 4
    assert torch.equal(found[0, 0] == 0, alone[0].argmax(0) == 3)  # behind in training, in front when deployed
    assert len(trainer.logger.get_value("dice_per_class_or_region", 0)) == 4


def test_a_patch_of_background_alone_trains_and_is_predicted_so_where_background_is_a_class(patches: World):
    recipe = replace(PATCHES, name="Empty", background=True, empty=0)
    trainers = [patches.use(recipe).train(FIRST), patches.train(SECOND)]
    assert drawn(patches.construct(SECOND)) == {*recipe.training}  # without such a class it is left out
    for trainer in trainers:
        network = trainer.network.eval()
        network.classifier.fc8.weight.data.fill_(-100)  # no tissue is there; features are not negative
        with torch.no_grad():
            assert not network(torch.rand(1, 3, 64, 64) + 0.01).argmax(1).any()


def test_validation_compares_real_masks_without_the_gate(ready: World):
    trainer = ready.construct(SECOND)
    trainer.on_train_start()
    trainer.network.eval()
    outputs = [trainer.validation_step(next(trainer.dataloader_val)) for _ in PATCHES.validation]
    for number, output in zip(range(6, 8), outputs, strict=True):
        picture, label, _ = patch(PATCHES, number)
        drawn = by_hand(trainer.network, picture, "none")
        expected = [[((label == a) & (drawn == b)).sum() for b in (1, 2, 3)] for a in (1, 2, 3)]
        assert output["matrix"][:, :3].tolist() == expected
    trainer.on_train_end()


def test_protocol_release_trains_on_the_targets_tagged_patches_and_strict_never_draws_them(patches: World):
    patches.use(RELEASE, own=True)
    for protocol, expected in (("release", RELEASE.targets), ("strict", RELEASE.training)):
        patches.edit_json(
            "dataset.json", lambda content, name=protocol: content["dgplugins"]["protocol"].update(protocol=name)
        )
        patches.elsewhere(protocol)
        assert drawn(patches.construct(FIRST)) == {*RELEASE.training}
        patches.train(FIRST)
        trainer = patches.construct(SECOND)
        assert drawn(trainer) == {*expected}
        assert trainer.do_split()[1] == RELEASE.validation


def test_patches_of_every_size_train_validate_and_keep_their_geometry(patches: World):
    patches.use(UNEQUAL).train(FIRST)
    patches.command(SECOND)
    folder = patches.model(SECOND) / "fold_0" / "validation_cam"
    assert read_json(folder / "iou.json")["cases"] == 2
    predicted = patches.predict(patches.model(SECOND))
    assert [x.shape[1:] for x in predicted] == [UNEQUAL.sizes[number % 3] for number in (8, 9)]
    assert {int(value) for x in predicted for value in np.unique(x)} <= {1, 2, 3}


def test_some_epochs_bring_the_segmenter_nearer_to_its_masks(ready: World):
    ready.settings(epochs=4, initial_lr=0.02, blur=False)
    log = ready.train(SECOND).logger
    losses = [float(log.get_value("train_losses", epoch)) for epoch in range(4)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_deeplab_trains_validates_and_predicts_with_its_head_ten_times_as_fast(patches: World):
    recipe = PatchRecipe("DeepLab", sizes=((48, 48), (40, 56)))
    patches.use(recipe).train(FIRST)
    patches.settings(network="deeplabv3plus", batch_size=2, iterations_per_epoch=1)
    trainer = patches.construct(SECOND)
    trainer.initialize()
    body, head = trainer.optimizer.param_groups
    assert head["lr"] == 10 * body["lr"]
    inside = trainer.network.segmenter
    assert isinstance(inside, DeepLab)
    assert {id(p) for p in body["params"]} == {id(p) for p in inside.backbone.parameters()}
    trainer.run_training()
    patches.no_settings()
    predictor = patches.predictor(patches.model(SECOND))
    assert isinstance(predictor.network.segmenter, DeepLab)
    predicted = predictor.predict_from_files_sequential(patches.images(), None)
    assert [x.shape[1:] for x in predicted] == [(48, 48), (40, 56)]
    network = predictor.network.eval()
    with torch.no_grad():  # padding changes nothing
        image = torch.from_numpy(patch(recipe, 9)[0]).permute(2, 0, 1)[None].float() / 255
        padded = network(torch.nn.functional.pad(image, (3, 5, 0, 8)))[..., :-8, 3:-5]
        torch.testing.assert_close(padded, network(image), rtol=0, atol=0)
