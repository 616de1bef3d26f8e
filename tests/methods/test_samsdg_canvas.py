"""Four slices on one canvas of SAM's, their boxes, and the masks that come back."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samsdg_published import swapped_on_canvas

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
from nnunet_dgplugins.methods.samsdg.boxes import mask_boxes
from nnunet_dgplugins.methods.samsdg.canvas import draw_canvases, filled_up, merge, on_canvas, unmerge
from nnunet_dgplugins.methods.samsdg.decoder import (
    BoxDecoder,
    build_mask_decoder,
    load_mask_decoder,
    trainable_parameters,
    untrained_names,
)
from nnunet_dgplugins.methods.samsdg.losses import canvas_loss, coarse_loss

SIZES = SimpleNamespace(embed_dim=24, prompt_dim=32, decoder_mlp_dim=48, decoder_num_heads=4, iou_head_hidden=32)


def decoder_of(num_classes: int = 1, grid: int = 4, canvas: int = 64, seed: int = 0, folded: bool = True) -> BoxDecoder:
    torch.manual_seed(seed)
    prompts = build_prompt_encoder(SIZES.prompt_dim, grid, canvas)
    return BoxDecoder(prompts, build_mask_decoder(SIZES, num_classes), num_classes, folded=folded)


def asked(canvases: int, decoder: BoxDecoder, grid: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of some canvases and one box per tile and class."""
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(canvases, SIZES.prompt_dim, grid, grid, generator=generator)
    corners = torch.rand(4 * canvases, decoder.num_classes, 2, 2, generator=generator).sort(2).values * decoder.tile
    return embeddings, on_canvas(corners.flatten(2), decoder.tile)


# canvas


@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 4, 8), (5, 7)])
def test_every_slice_lies_in_its_own_tile_and_comes_back_exactly(shape):
    slices = torch.randn(8, *shape)
    found = merge(slices)
    height, width = shape[-2:]
    for index, item in enumerate(slices):
        row, column = divmod(index % 4, 2)
        tile = found[index // 4, ..., row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert torch.equal(tile, item)
    assert torch.equal(unmerge(found), slices)


@pytest.mark.parametrize("place", range(4))
def test_a_box_surrounds_on_the_canvas_what_it_surrounds_in_its_tile(place):
    masks = torch.zeros(4, 16, 16)
    masks[place, 3:7, 5:14] = 1
    own = torch.from_numpy(mask_boxes(masks[place : place + 1].numpy())[0])
    there = torch.from_numpy(mask_boxes(merge(masks).numpy())[0])
    boxes = torch.zeros(4, 4)
    boxes[place] = own
    assert torch.equal(on_canvas(boxes, 16)[place], there[0])
    # the released offsets put two of four boxes elsewhere
    assert torch.equal(swapped_on_canvas(boxes, 16)[place], there[0]) == (place in (0, 3))


def test_boxes_of_several_classes_move_with_their_tile():
    boxes = torch.rand(8, 3, 4)
    together = on_canvas(boxes, 32)
    assert torch.equal(together, torch.stack([on_canvas(boxes[:, k], 32) for k in range(3)], 1))


@pytest.mark.parametrize(("count", "expected"), [(1, 4), (3, 4), (4, 4), (5, 8)])
def test_a_canvas_that_is_not_full_repeats_its_last_slice(count, expected):
    slices = torch.randn(count, 2, 3)
    found = filled_up(slices)
    assert len(found) == expected
    assert torch.equal(found[:count], slices)
    assert all(torch.equal(item, slices[-1]) for item in found[count:])


@pytest.mark.parametrize("count", [1, 4, 6, 23])
def test_every_slice_has_its_place_on_a_canvas_in_every_pass(count):
    first, second = (draw_canvases(count, np.random.default_rng(seed)) for seed in (0, 0))
    assert first.shape == (-(-count // 4), 4)
    assert set(first.ravel()) == set(range(count))
    np.testing.assert_array_equal(first, second)
    assert count < 6 or not np.array_equal(first, draw_canvases(count, np.random.default_rng(1)))


# decoder


@pytest.mark.parametrize(("grid", "canvas"), [(4, 64), (8, 32), (6, 96), (2, 32)])
@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("folded", [True, False])
def test_a_tile_made_alone_equals_the_tile_cut_from_the_whole_canvas(grid, canvas, num_classes, folded):
    decoder = decoder_of(num_classes, grid, canvas, folded=folded)
    embeddings, boxes = asked(2, decoder, grid)
    with torch.no_grad():
        found, expected = decoder(embeddings, boxes), decoder.whole_canvas(embeddings, boxes)
    assert found.shape == (8, num_classes, canvas // 2, canvas // 2)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_folded_and_in_its_own_tile_a_box_trains_like_sam_on_the_whole_canvas():
    gradients = []
    for way, folded in (("forward", True), ("whole_canvas", False)):
        decoder = decoder_of(2, folded=folded)
        trainable_parameters(decoder.mask_decoder, 2)
        embeddings, boxes = asked(1, decoder)
        target = (torch.rand(4, 2, 32, 32, generator=torch.Generator().manual_seed(5)) > 0.7).float()
        canvas_loss(getattr(decoder, way)(embeddings, boxes), target)["total"].backward()
        gradients.append({name: p.grad for name, p in decoder.mask_decoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_tile_made_alone_enlarges_a_fraction_of_the_elements(monkeypatch):
    decoder = decoder_of(grid=16, canvas=256)
    embeddings, boxes = asked(1, decoder, grid=16)
    count = {"enlarged": 0, "upscaled": 0}
    plain = torch.nn.functional.interpolate

    def counting(*arguments, **options):
        found = plain(*arguments, **options)
        count["enlarged"] += found.numel()
        return found

    monkeypatch.setattr(torch.nn.functional, "interpolate", counting)

    def upscaled(module, arguments, found):
        count["upscaled"] += found.numel()

    decoder.mask_decoder.output_upscaling.register_forward_hook(upscaled)
    counts = []
    for way in (decoder, decoder.whole_canvas):
        count.update(enlarged=0, upscaled=0)
        way(embeddings, boxes)
        counts.append(dict(count))
    own, whole = counts
    assert whole["enlarged"] == 4 * 256**2
    assert own["enlarged"] == 4 * (9 * 16) ** 2  # half the tokens and one beside them
    assert own["upscaled"] * 16**2 == whole["upscaled"] * 9**2


@pytest.mark.parametrize("folded", [True, False])
def test_masks_are_those_of_sams_own_forward(folded):
    decoder = decoder_of(folded=folded)
    embeddings, boxes = asked(2, decoder)
    with torch.no_grad():
        found = decoder.low_resolution(embeddings, boxes)
        for canvas in range(2):
            own = boxes[4 * canvas : 4 * canvas + 4, 0]
            sparse, dense = decoder.prompt_encoder(points=None, boxes=own, masks=None)
            expected, _ = decoder.mask_decoder(
                image_embeddings=embeddings[canvas : canvas + 1],
                image_pe=decoder.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            torch.testing.assert_close(found[4 * canvas : 4 * canvas + 4], expected, atol=2e-6, rtol=1e-5)


def test_canvases_of_a_batch_do_not_see_each_other():
    decoder = decoder_of(2)
    embeddings, boxes = asked(3, decoder)
    together = decoder(embeddings, boxes)
    for index in range(3):
        alone = decoder(embeddings[index : index + 1], boxes[4 * index : 4 * index + 4])
        torch.testing.assert_close(together[4 * index : 4 * index + 4], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("folded", [True, False])
def test_mixed_precision_gives_nearly_the_same_masks_and_trains(folded):
    decoder = decoder_of(2, folded=folded)
    trained = trainable_parameters(decoder.mask_decoder, 2)
    embeddings, boxes = asked(1, decoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder(embeddings, boxes)
    plain = decoder(embeddings, boxes).detach()
    torch.testing.assert_close(found.float(), plain, atol=0.05 * plain.abs().max().item(), rtol=0)
    canvas_loss(found, torch.ones(4, 2, 32, 32))["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_gradients_reach_the_trained_part_of_the_decoder_and_nothing_else(num_classes):
    decoder = decoder_of(num_classes)
    kept = trainable_parameters(decoder.mask_decoder, num_classes)
    embeddings, boxes = asked(1, decoder)
    target = torch.ones(4, num_classes, 32, 32)
    canvas_loss(decoder(embeddings, boxes), target)["total"].backward()
    assert all(p.grad is None for p in decoder.prompt_encoder.parameters())
    untrained = set(untrained_names(decoder.mask_decoder, num_classes))
    assert {name for name, p in decoder.mask_decoder.named_parameters() if p.grad is None} == untrained
    assert len(kept) == sum(p.grad is not None for p in decoder.parameters())


def test_further_classes_start_from_sams_answer_and_learn_apart():
    plain, several = decoder_of(1), decoder_of(3, seed=1)
    state = {f"mask_decoder.{key}": value for key, value in plain.mask_decoder.state_dict().items()}
    load_mask_decoder(several.mask_decoder, state)
    embeddings, boxes = asked(1, plain)
    with torch.no_grad():
        same = several(embeddings, boxes.expand(-1, 3, -1))
        torch.testing.assert_close(same[:, 1], same[:, 0], atol=2e-6, rtol=1e-5)
        several.mask_decoder.output_hypernetworks_mlps[5].layers[2].bias += 1
        moved = several(embeddings, boxes.expand(-1, 3, -1))
    assert torch.equal(moved[:, :2], same[:, :2])
    assert not torch.allclose(moved[:, 2], same[:, 2])


def test_one_class_takes_sams_weights_as_they_are():
    decoder, other = decoder_of(1), decoder_of(1, seed=1)
    load_mask_decoder(
        other.mask_decoder, {f"mask_decoder.{k}": v for k, v in decoder.mask_decoder.state_dict().items()}
    )
    for key, value in decoder.mask_decoder.state_dict().items():
        assert torch.equal(other.mask_decoder.state_dict()[key], value), key


def test_weights_of_another_size_are_refused():
    state = {f"mask_decoder.{key}": value for key, value in decoder_of().mask_decoder.state_dict().items()}
    other = SimpleNamespace(**{**vars(SIZES), "prompt_dim": 64})
    with pytest.raises(UserError, match=r"(?s)do not fit.*instead of"):
        load_mask_decoder(build_mask_decoder(other), state)
    del state["mask_decoder.iou_token.weight"]
    with pytest.raises(UserError, match=r"iou_token\.weight"):
        load_mask_decoder(build_mask_decoder(SIZES), state)


# losses


def test_dice_is_pooled_over_the_four_slices_of_a_canvas():
    logits, target = torch.full((8, 1, 2, 2), -30.0), torch.zeros(8, 1, 2, 2)
    logits[0], target[1] = 30, 1  # on the first canvas one slice too much and one too little; the second is empty
    terms = canvas_loss(logits, target, ce_weight=0)
    assert terms["dice"].item() == pytest.approx((1 + 0) / 2, abs=1e-5)
    assert terms["total"].item() == terms["dice"].item()


def test_unknown_pixels_change_neither_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 6, 6, generator=generator)
    target = (torch.rand(4, 2, 6, 6, generator=generator) > 0.5).float()
    valid = torch.ones(4, 1, 6, 6)
    valid[..., 3:] = 0
    for loss in (canvas_loss, coarse_loss):
        masked, cropped = loss(logits, target, valid=valid), loss(logits[..., :3], target[..., :3])
        assert masked["total"].item() == pytest.approx(cropped["total"].item(), rel=1e-6)
        assert loss(logits, target, valid=torch.zeros_like(valid))["total"].item() == 0


def test_half_precision_neither_overflows_nor_differs():
    logits = torch.full((4, 1, 512, 512), 8.0, dtype=torch.float16)
    for loss in (canvas_loss, coarse_loss):
        terms = loss(logits, torch.ones(4, 1, 512, 512))
        assert terms["total"].item() == pytest.approx(math.log1p(math.exp(-8)), abs=1e-6)
