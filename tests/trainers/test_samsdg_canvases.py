"""Canvases of SAM-SDG's training: who shares one, what is embedded and kept, jitter, and slices without a box."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from samsdg_worlds import SAM, step_one
from tiny_dataset import Recipe

from nnunet_dgplugins.content import CLOSED
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.samsdg.canvas import merge
from nnunet_dgplugins.trainers.samsdg_canvases import neighbours


def batches(world: World, epochs: int = 1, **values: Any) -> tuple[Any, list[list[dict[str, Any]]], list[int]]:
    """Train; returns the trainer, each epoch's training batches, and how many canvases the encoder saw in each."""
    world.settings(epochs=epochs, iterations_per_epoch=None, **values)
    built = world.construct(SAM)
    built.initialize()
    seen: list[list[dict[str, Any]]] = [[] for _ in range(epochs)]
    encoded = [0] * epochs
    begun: list[bool] = []
    forward, step, start = built.network.image_encoder.forward, built.train_step, built.on_epoch_start

    def counted(canvas: torch.Tensor) -> Any:
        if begun and built.current_epoch < epochs:
            encoded[built.current_epoch] += len(canvas)
        return forward(canvas)

    built.network.image_encoder.forward = counted
    built.train_step = lambda batch: seen[built.current_epoch].append(batch) or step(batch)
    built.on_epoch_start = lambda: begun.append(True) or start()
    built.run_training()
    return built, seen, encoded


def together(epoch: list[dict[str, Any]]) -> set[frozenset[tuple[str, int]]]:
    """Which slices share a canvas."""
    keys = [key for batch in epoch for key in batch["keys"]]
    return {frozenset((key.case, key.z) for key in keys[start : start + 4]) for start in range(0, len(keys), 4)}


def test_an_epoch_is_one_pass_over_all_slices_grouped_anew_each_time(world: World):
    step_one(world)
    built, seen, encoded = batches(world, epochs=2)
    train = built.do_split()[0]
    slices = {(case, z) for case in train for z in range(4 + int(case[-1]) % 3)}
    for epoch, count in zip(seen, encoded, strict=True):
        assert {(key.case, key.z) for batch in epoch for key in batch["keys"]} == slices
        assert all(len(batch["keys"]) % 4 == 0 for batch in epoch)
        assert count == sum(len(batch["keys"]) for batch in epoch) // 4
    assert together(seen[0]) != together(seen[1])


def test_groupings_take_turns_and_the_encoder_never_runs_while_training(world: World):
    world.use(Recipe(), own=True)
    step_one(world)
    built, seen, encoded = batches(world, epochs=3, groupings=2)
    assert encoded == [0, 0, 0]
    assert together(seen[0]) == together(seen[2]) != together(seen[1])
    assert not any("tiles" in batch for epoch in seen for batch in epoch)
    batch = seen[0][0]
    dataset = built.dataset_class(built.preprocessed_dataset_folder)
    slices = [torch.from_numpy(np.asarray(dataset.load_case(key.case)[0][:, key.z])) for key in batch["keys"]]
    fresh = built.network.embed(built.network.tiles(slices)[0])
    torch.testing.assert_close(batch["embeddings"], fresh, atol=2e-3 * float(fresh.abs().max()), rtol=0)
    text = Path(world.train(SAM).log_file).read_text()
    assert "Embedding" not in text  # all canvases are there


def test_a_damaged_canvas_is_embedded_again(world: World):
    world.use(Recipe(), own=True)
    # the shared dataset may bring canvases that other tests grouped in other ways
    shutil.rmtree(world.preprocessed / "dgplugins_embeddings", ignore_errors=True)
    step_one(world)
    world.settings(groupings=1)
    world.train(SAM)
    (store,) = (world.preprocessed / "dgplugins_embeddings").glob("*canvases*")
    paths = sorted(store.rglob("*.emb"))
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    paths[0].unlink()
    world.elsewhere("again")
    step_one(world)
    world.train(SAM)
    assert [path.read_bytes() for path in paths] == whole


def test_boxes_jitter_in_training_alone(world: World):
    step_one(world)
    world.settings(iterations_per_epoch=1)
    built = world.construct(SAM)
    built.initialize()
    asked: list[tuple[bool, torch.Tensor]] = []
    decode = built.network.decode
    built.network.decode = lambda embeddings, boxes: (
        asked.append((torch.is_grad_enabled(), boxes)) or decode(embeddings, boxes)
    )
    step, batches = built.train_step, []
    built.train_step = lambda batch: batches.append(batch) or step(batch)
    built.run_training()
    ((_, moved),) = [item for item in asked if item[0]]
    plain = batches[0]["boxes"]
    outward = torch.cat([plain[..., :2] - moved[..., :2], moved[..., 2:] - plain[..., 2:]], -1)
    assert outward.min() >= 0
    assert 0 < outward.max() <= 9 * built.network.decoder.tile / 512
    for _, boxes in (item for item in asked if not item[0]):
        assert (boxes % (built.network.decoder.tile / 64) == 0).all()  # of the coarse map's pixels


def test_slices_without_a_box_take_no_part_in_training_and_are_background_in_validation(world: World):
    step_one(world)
    world.settings(empty="background", box_threshold=0.0, iterations_per_epoch=None)
    built = world.construct(SAM)
    built.initialize()
    plain = built.network.prompts
    hidden: list[int] = []

    def without_dark_slices(images: torch.Tensor) -> Any:
        found = plain(images)
        for place in range(0, len(images), 2):
            found.found[place] = False
            hidden.append(place)
        return found

    built.network.prompts = without_dark_slices
    deployed: list[torch.Tensor] = []
    counts = built.hard_counts
    built.hard_counts = lambda logits, *rest: deployed.append(logits) or counts(logits, *rest)
    trained: list[Any] = []
    step = built.train_step
    built.train_step = lambda batch: trained.extend(batch["keys"]) or step(batch)
    built.run_training()
    train, _ = built.do_split()
    assert {(key.case, key.z) for key in trained} < {(case, z) for case in train for z in range(7)}
    (case,) = deployed
    closed = (case == CLOSED).flatten(1).all(1)
    assert closed[::2].all()
    assert not closed[1::2].all()
    assert (
        f"{len(hidden) - (case.shape[0] + 1) // 2} more, where step 1 finds nothing" in Path(built.log_file).read_text()
    )


def test_a_coarse_network_that_finds_nothing_at_all_is_an_error_with_advice(world: World):
    step_one(world)
    world.settings(empty="background", box_threshold=1.0)
    with pytest.raises(UserError, match=r"finds nothing on any training slice.*empty=full_box"):
        world.train(SAM)


def test_a_class_that_is_not_found_gets_no_gradient(world: World):
    world.use(Recipe("Classes", classes=3))
    step_one(world)
    world.settings(empty="background", box_threshold=0.0, iterations_per_epoch=1)
    built = world.construct(SAM)
    built.initialize()
    plain = built.network.prompts

    def without_class_2(images: torch.Tensor) -> Any:
        found = plain(images)
        found.found[:, 1] = False
        return found

    built.network.prompts = without_class_2
    loss, seen = built.loss, []

    def watched(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None = None) -> Any:
        if logits.requires_grad:
            logits.retain_grad()
            seen.append(logits)
        return loss(logits, target, valid=valid)

    built.loss = watched
    built.run_training()
    (logits,) = seen
    assert (logits.grad[:, 1] == 0).all()
    assert (logits.grad[:, [0, 2]] != 0).any()


def test_augmentation_shows_both_networks_the_same_new_intensities(world: World):
    step_one(world)
    built, seen, encoded = batches(world, augmentation="location_scale")
    assert encoded[0] == sum(len(batch["keys"]) for batch in seen[0]) // 4
    batch = seen[0][0]
    built.augmentation = np.random.default_rng(0)
    target = built.target_of(batch["labels"])[0]
    shown: list[torch.Tensor] = []
    prompts = built.network.prompts
    built.network.prompts = lambda images: shown.append(images) or prompts(images)
    tiles, boxes, asked = built._augmented(batch, target)
    assert boxes.shape == batch["boxes"].shape
    assert asked.all()
    assert not torch.equal(tiles, batch["tiles"])
    smaller = torch.nn.functional.interpolate(shown[0], size=tiles.shape[-2:], mode="bilinear", antialias=True)
    agreement = torch.corrcoef(torch.stack([smaller.flatten(), tiles.flatten()]))[0, 1]
    assert agreement > 0.9


def test_groupings_with_augmentation_and_batches_that_are_no_canvases_are_refused(world: World):
    step_one(world)
    world.settings(groupings=2, augmentation="location_scale")
    with pytest.raises(UserError, match="choose one of them"):
        world.construct(SAM)
    world.settings(batch_size=6)
    with pytest.raises(UserError, match="batch_size=6 is no multiple of 4"):
        world.construct(SAM)


def test_neighbours_fill_canvases_in_order_and_the_last_slice_fills_up_the_last_canvas():
    assert neighbours(np.array([3, 4, 6, 7, 9])).tolist() == [[3, 4, 6, 7], [9, 9, 9, 9]]
    assert neighbours(np.array([], int)).shape == (0, 4)
    tiles = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    assert merge(tiles)[0, 0, ::2, ::2].tolist() == [[0, 1], [2, 3]]
