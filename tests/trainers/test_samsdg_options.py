"""Several classes, bfloat16, a loss that is no number, both policies for empty masks, in both SAM-SDG trainers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from samsdg_worlds import COARSE, SAM, TRAINERS, before, step_one
from tiny_dataset import Recipe

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.mask_losses import dice_loss
from nnunet_dgplugins.methods.samsdg.losses import pooled
from nnunet_dgplugins.trainers.doubt import write_doubt

both = pytest.mark.parametrize("trainer", TRAINERS)


@both
def test_three_classes_train_and_predict(world: World, trainer: str):
    world.use(Recipe("Classes", classes=3))
    before(world, trainer)
    built = world.train(trainer)
    assert built.heads == [(1,), (2,), (3,)]
    assert len(built.logger.get_value("dice_per_class_or_region", 0)) == 3
    predictor = world.predictor(world.model(trainer))
    assert predictor.network.num_classes == 3
    assert {int(value) for x in world.predict(world.model(trainer)) for value in np.unique(x)} <= {0, 1, 2, 3}


@both
def test_bfloat16_on_the_cpu_is_used_when_asked_for(world: World, trainer: str):
    before(world, trainer)
    world.settings(cpu_bfloat16=True)
    built = world.construct(trainer)
    built.initialize()
    loss, dtypes = built.loss, set()
    built.loss = lambda logits, *rest, **more: dtypes.add(logits.dtype) or loss(logits, *rest, **more)
    built.run_training()
    assert torch.bfloat16 in dtypes
    assert np.isfinite(built.logger.get_value("train_losses", 0))


@both
def test_a_loss_that_is_no_number_stops_the_training_and_names_the_cases(world: World, trainer: str):
    before(world, trainer)
    built = world.construct(trainer)
    built.initialize()
    start = {key: value.clone() for key, value in built.network.state_dict().items()}
    loss = built.loss
    built.loss = lambda *given, **more: {"total": loss(*given, **more)["total"] * float("nan")}
    with pytest.raises(UserError, match=r"the loss is nan at epoch 0, cases case_\d") as caught:
        built.run_training()
    assert trainer in str(caught.value)
    after = built.network.state_dict()
    trained = {name for name, _ in built.network.named_parameters()}  # batches seen are counted on
    assert all(torch.equal(start[key], after[key]) for key in start if key in trained)


@both
def test_doubt_can_be_asked_of_predictions(world: World, trainer: str):
    before(world, trainer)
    world.train(trainer)
    out = world.root / "out"
    out.mkdir()
    names = [str(out / f"case_{number}") for number in (5, 6)]
    world.predictor(world.model(trainer)).predict_from_files_sequential(world.images(), names)
    path = write_doubt(world.model(trainer), world.raw / "imagesTs", out, device="cpu", progress=False)
    assert path.is_file()


def test_cross_entropy_counts_as_much_as_asked_for_and_dice_is_pooled_over_a_canvas(world: World):
    step_one(world)
    found = {}
    for weight in (0.0, 1.0):
        world.settings(ce_weight=weight, jitter=0, iterations_per_epoch=1)
        built = world.elsewhere(f"weight{weight}")
        step_one(world)
        built = world.construct(SAM)
        built.initialize()
        loss, seen = built.loss, []

        def watched(logits: Any, target: Any, valid: Any = None, loss: Any = loss, seen: list[Any] = seen) -> Any:
            seen.append((logits.detach(), target, loss(logits, target, valid=valid)["total"]))
            return {"total": seen[-1][2]}

        built.loss = watched
        built.run_training()
        found[weight] = seen[0]
    logits, target, alone = found[0.0]
    torch.testing.assert_close(alone.detach(), dice_loss(pooled(logits), pooled(target)))
    assert torch.equal(logits, found[1.0][0])
    assert found[1.0][2] > alone


def test_where_nothing_is_found_the_result_is_background_or_as_published_what_sam_finds_in_the_tile(world: World):
    step_one(world)
    shares = {}
    for empty in ("full_box", "background"):
        if empty == "background":
            world.elsewhere(empty)
            step_one(world)
        world.settings(empty=empty, box_threshold=0.0)  # training finds something everywhere
        world.train(SAM)
        predictor = world.predictor(world.model(SAM))
        predictor.network.coarse.forward = lambda images: images[:, :1] * 0 - 99.0
        encoded: list[int] = []
        forward = predictor.network.image_encoder.forward
        predictor.network.image_encoder.forward = lambda canvas, f=forward, e=encoded: e.append(1) or f(canvas)
        found = predictor.predict_from_files_sequential(world.images(), None)
        shares[empty] = (np.concatenate(found).mean(), len(encoded))
    assert shares["background"] == (0, 0)
    assert shares["full_box"][1] == 10


def test_the_papers_other_boxes_can_be_asked_for(world: World):
    step_one(world)
    boxes = {}
    for kind in ("refined", "unfiltered", "tile", "masks"):
        world.settings(boxes=kind)
        built = world.construct(SAM)
        built.initialize()
        batch = next(built.get_dataloaders()[0])
        boxes[kind] = batch["boxes"]
        assert built.network.rule.kind == ("refined" if kind == "masks" else kind)  # nobody has masks of new cases
    tile = built.network.decoder.tile
    assert (boxes["tile"] == torch.tensor([0.0, 0, tile, tile])).all()
    assert not torch.equal(boxes["refined"], boxes["tile"])
    assert (boxes["unfiltered"][..., :2] <= boxes["refined"][..., :2]).all()
    target, _ = built.target_of(batch["labels"])
    for own, asked, mask in zip(boxes["masks"][:, 0], batch["asked"][:, 0], target[:, 0], strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        assert asked == (len(rows) > 0)
        if asked:
            assert own.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]


def test_the_coarse_network_is_asked_with_its_own_threshold(world: World):
    world.settings(threshold=0.9)
    high = world.train(COARSE)
    assert high.network.shift == pytest.approx(np.log(9))
