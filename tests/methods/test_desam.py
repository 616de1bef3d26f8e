"""DeSAM's decoder, losses and prompts beyond the stored vectors: tiny cases, gradient flow, several classes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.desam import losses, prompts
from nnunet_dgplugins.methods.desam.blocks import ResSE
from nnunet_dgplugins.methods.desam.decoder import DeSAMDecoder
from nnunet_dgplugins.methods.desam.network import build_decoder, load_decoder, trainable_parameters, untrained_names
from nnunet_dgplugins.methods.desam.preprocess import preprocess_volume
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder

TINY = SimpleNamespace(embed_dim=24, prompt_dim=64, decoder_mlp_dim=32, decoder_num_heads=4, iou_head_hidden=32)
VIT_H = SimpleNamespace(embed_dim=1280, prompt_dim=256, decoder_mlp_dim=2048, decoder_num_heads=8, iou_head_hidden=256)
CANVAS, TOKENS = 64, 4


def tiny_decoder(num_classes: int = 1, seed: int = 0) -> DeSAMDecoder:
    torch.manual_seed(seed)
    return build_decoder(TINY, num_classes)


def tiny_prompts(count: int, mode: str = "points") -> prompts.EncodedPrompts:
    torch.manual_seed(1)
    encoder = build_prompt_encoder(TINY.prompt_dim, TOKENS, CANVAS)
    if mode == "box":
        return prompts.encode_box(encoder, count)
    return prompts.encode_points(encoder, torch.arange(count * 2).reshape(count, 1, 2) * 7.0 % CANVAS)


def features(batch: int, seed: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, TINY.embed_dim, TOKENS, TOKENS)
    taps = [torch.randn(shape, generator=generator) for _ in range(3)]
    return taps, torch.randn(batch, TINY.prompt_dim, TOKENS, TOKENS, generator=generator)


def run(decoder: DeSAMDecoder, batch: int, mode: str = "points") -> tuple[torch.Tensor, torch.Tensor]:
    prompt, (taps, neck) = tiny_prompts(batch, mode), features(batch)
    return decoder(taps, neck, prompt.sparse, prompt.dense, prompt.dense_pe)


# losses, by hand


def test_one_undecided_pixel_costs_what_the_formulas_say():
    terms = losses.desam_loss(
        torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), iou=torch.tensor([[0.5]]), iou_target=torch.ones(1, 1)
    )
    assert terms["dice"].item() == pytest.approx(1 - (1 + 1e-5) / (1.25 + 1e-5))
    assert terms["bce"].item() == pytest.approx(math.log(2))
    assert terms["iou"].item() == pytest.approx(0.25)
    assert terms["total"].item() == pytest.approx(terms["dice"].item() + math.log(2) + 10 * 0.25)


def test_the_code_variant_has_no_cross_entropy_and_an_absolute_difference():
    logits, target = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])
    terms = losses.desam_loss(
        logits, target, variant="code", iou=torch.tensor([[0.25]]), iou_target=torch.tensor([[1.0]])
    )
    assert set(terms) == {"dice", "iou", "total"}
    assert terms["total"].item() == pytest.approx(1 - (1 + 1e-5) / (1.5 + 1e-5) + 0.75)
    assert set(losses.desam_loss(logits, target, variant="code")) == {"dice", "total"}


def test_the_loss_of_several_classes_is_their_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 4, generator=generator)
    target = (torch.rand(2, 3, 5, 4, generator=generator) > 0.5).float()
    together = losses.desam_loss(logits, target)["total"]
    apart = [losses.desam_loss(logits[:, k : k + 1], target[:, k : k + 1])["total"] for k in range(3)]
    assert together.item() == pytest.approx(torch.stack(apart).mean().item(), rel=1e-6)


def test_unknown_pixels_change_neither_loss_nor_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 6, 6, generator=generator, requires_grad=True)
    target = (torch.rand(2, 2, 6, 6, generator=generator) > 0.5).float()
    valid = torch.zeros(2, 1, 6, 6)
    valid[..., :3] = 1
    masked = losses.desam_loss(logits, target, valid=valid)["total"]
    cropped = losses.desam_loss(logits[..., :3], target[..., :3])["total"]
    assert masked.item() == pytest.approx(cropped.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(masked, logits)
    assert gradient[..., 3:].abs().max() == 0
    assert gradient[..., :3].abs().max() > 0


@pytest.mark.parametrize("variant", losses.VARIANTS)
def test_empty_targets_and_slices_that_are_all_unknown_stay_finite(variant):
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    iou, flag = torch.randn(2, 4, requires_grad=True), torch.zeros(2, 2)
    empty = torch.zeros(2, 2, 8, 8)
    nothing = torch.zeros(2, 1, 8, 8)
    first = losses.desam_loss(logits, empty, variant=variant, iou=iou, iou_target=flag)["total"]
    second = losses.desam_loss(
        logits, empty, variant=variant, iou=iou, iou_target=flag, speaks=torch.zeros(2, 2), valid=nothing
    )["total"]
    assert second.item() == 0
    for loss in (first, second):
        gradients = torch.autograd.grad(loss, (logits, iou), retain_graph=True)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert torch.isfinite(first)


def test_a_large_slice_in_half_precision_does_not_overflow():
    logits = torch.full((1, 1, 512, 512), 8.0, dtype=torch.float16)
    terms = losses.desam_loss(logits, torch.ones(1, 1, 512, 512))
    assert terms["total"].dtype == torch.float32
    assert terms["total"].item() == pytest.approx(0.0, abs=2e-3)


def test_a_point_speaks_only_about_the_class_it_was_drawn_for():
    predicted = torch.tensor([[0.0, 5.0, 9.0, 9.0], [3.0, 1.0, 9.0, 9.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    speaks = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = losses.iou_loss(predicted, target, "mse", speaks)
    assert loss.item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert gradient.nonzero().tolist() == [[0, 0]]


def test_the_learning_rate_starts_at_its_value_and_ends_near_zero():
    assert losses.poly_lr(1e-4, 0, 50) == 1e-4
    assert losses.poly_lr(1e-4, 25, 50) == pytest.approx(1e-4 * 0.5**0.9)
    assert losses.poly_lr(1e-4, 50, 50) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda x: losses.desam_loss(x, x, variant="official"),
        lambda x: losses.desam_loss(x, x, iou=torch.zeros(1, 1)),
        lambda x: losses.iou_loss(x, x, "l2"),
    ],
)
def test_a_wrong_option_is_an_error(call):
    with pytest.raises(ValueError, match=r"."):
        call(torch.zeros(1, 1, 1, 1))


# decoder


def test_the_decoder_of_vit_h_has_the_published_number_of_parameters():
    with torch.device("meta"):
        decoder = build_decoder(VIT_H)
    assert sum(p.numel() for p in decoder.parameters()) == 13_815_204
    assert sum(p.numel() for p in decoder.pimm.parameters()) == 9_756_864


@pytest.mark.parametrize("channels", [768, 1024, 1280])
def test_every_sam_size_gets_a_decoder_for_its_channels(channels):
    with torch.device("meta"):
        decoder = build_decoder(SimpleNamespace(**{**vars(VIT_H), "embed_dim": channels}))
        taps = [torch.zeros(1, channels, 4, 4)] * 3
        assert [tuple(c.shape) for c in decoder.contexts(taps)] == [(1, 256, 4, 4), (1, 128, 8, 8), (1, 64, 16, 16)]


@pytest.mark.parametrize(("classes", "columns"), [(1, 4), (3, 4), (6, 6)])
def test_several_classes_come_from_one_pass(classes, columns):
    logits, iou = run(tiny_decoder(classes), 2)
    assert tuple(logits.shape) == (2, classes, 4 * TOKENS, 4 * TOKENS)
    assert tuple(iou.shape) == (2, columns)


def test_the_gate_behind_the_normalisation_is_one_half():
    torch.manual_seed(0)
    block = ResSE(32, 32)
    inner = torch.nn.functional.instance_norm(torch.randn(2, 32, 9, 7))
    torch.testing.assert_close(block.se(inner), 0.5 * inner, atol=1e-6, rtol=1e-6)


def test_a_block_fed_in_halves_equals_the_concatenation():
    torch.manual_seed(0)
    block = ResSE(64, 32)
    a, b = torch.randn(3, 32, 8, 8), torch.randn(1, 32, 8, 8)
    expected = block(torch.cat([a, b.expand(3, -1, -1, -1)], 1))
    torch.testing.assert_close(block.forward_halves(a, block.second_half(b)), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="identity"):
        ResSE(32, 32).forward_halves(a, block.second_half(b))


def test_one_image_shared_by_its_prompts_equals_copies_of_it():
    decoder, prompt, (taps, neck) = tiny_decoder(3), tiny_prompts(5), features(1)
    shared, iou = decoder.prim(neck, prompt.sparse, prompt.dense, prompt.dense_pe)
    copied, iou_copied = decoder.prim(neck.repeat(5, 1, 1, 1), prompt.sparse, prompt.dense, prompt.dense_pe)
    torch.testing.assert_close(shared, copied, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(iou, iou_copied, atol=1e-5, rtol=1e-5)
    contexts = decoder.contexts(taps)
    copies = [context.repeat(5, 1, 1, 1) for context in contexts]
    expected = decoder.mask(copied, copies)
    for given in (contexts, decoder.share(contexts)):
        torch.testing.assert_close(decoder.mask(shared, given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("images", [1, 4])
def test_the_folded_transformer_equals_sams_own(images):
    decoder, prompt, (_, neck) = tiny_decoder().double(), tiny_prompts(4).to(torch.float64), features(images)
    given = (neck.double(), prompt.sparse, prompt.dense, prompt.dense_pe)
    expected = decoder.prim(*given)
    with torch.no_grad():
        found = decoder.prim(*given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_prompts_that_do_not_match_the_images_are_an_error():
    prompt, (taps, neck) = tiny_prompts(3), features(2)
    with pytest.raises(ValueError, match="3 prompts need 3 images or 1, got 2"):
        tiny_decoder().prim(neck, prompt.sparse, prompt.dense, prompt.dense_pe)
    with pytest.raises(ValueError, match="3 taps"):
        tiny_decoder().contexts(taps[:2])


def test_the_mask_term_trains_prim_and_the_iou_term_leaves_the_mask_module_alone():
    decoder = tiny_decoder()
    logits, iou = run(decoder, 2)
    target = (torch.rand(2, 1, 4 * TOKENS, 4 * TOKENS) > 0.5).float()
    mask_term = losses.desam_loss(logits, target)["total"]
    iou_term = losses.iou_loss(iou, torch.ones(2, 1))

    def reached(loss: torch.Tensor) -> set[str]:
        names = [name for name, _ in decoder.named_parameters()]
        found = torch.autograd.grad(loss, list(decoder.parameters()), retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(names, found, strict=True) if gradient is not None}

    by_mask, by_iou = reached(mask_term), reached(iou_term)
    everything = {name for name, _ in decoder.named_parameters()}
    assert by_mask == everything - set(untrained_names(decoder, "box"))
    assert "transformer.layers.0.self_attn.q_proj.weight" in by_mask & by_iou
    assert not [name for name in by_iou if name.startswith("pimm.")]
    assert "iou_prediction_head.layers.2.weight" in by_iou - by_mask
    assert by_mask | by_iou == everything - set(untrained_names(decoder, "points"))


@pytest.mark.parametrize("mode", ["points", "box"])
def test_every_parameter_of_the_optimiser_gets_a_gradient_and_no_other(mode):
    decoder = tiny_decoder(2)
    kept = trainable_parameters(decoder, mode)
    logits, iou = run(decoder, 2, mode)
    target = torch.zeros_like(logits)
    with_iou = {"iou": iou, "iou_target": torch.zeros(2, 2)} if mode == "points" else {}
    losses.desam_loss(logits, target, **with_iou)["total"].backward()
    assert {id(p) for p in decoder.parameters() if p.grad is not None} == {id(p) for p in kept}
    with pytest.raises(ValueError, match="mode"):
        untrained_names(decoder, "grid")


def test_bfloat16_autocast_gives_finite_gradients_near_those_of_float32():
    decoder = tiny_decoder(2)
    target = (torch.rand(2, 2, 4 * TOKENS, 4 * TOKENS) > 0.5).float()
    found = []
    for enabled in (False, True):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, iou = run(decoder, 2)
            loss = losses.desam_loss(logits, target, iou=iou, iou_target=torch.ones(2, 2))["total"]
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)
        found.append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_positions_of_points_keep_full_precision_under_autocast():
    encoder = build_prompt_encoder(TINY.prompt_dim, TOKENS, CANVAS)
    plain = prompts.encode_points(encoder, torch.tensor([[13.0, 57.0]]))
    with torch.autocast("cpu", torch.bfloat16):
        cast = prompts.encode_points(encoder, torch.tensor([[13.0, 57.0]]))
        box = prompts.encode_box(encoder)
    assert torch.equal(plain.sparse, cast.sparse)
    assert torch.equal(plain.dense_pe, cast.dense_pe)
    assert torch.equal(box.sparse, prompts.encode_box(encoder).sparse)


def test_one_image_can_be_learned_by_heart():
    decoder, prompt, (taps, neck) = tiny_decoder(2), tiny_prompts(1), features(1)
    target = torch.zeros(1, 2, 4 * TOKENS, 4 * TOKENS)
    target[:, 0, 3:9, 2:8] = 1
    target[:, 1, 10:14, 8:15] = 1
    flag = torch.tensor([[1.0, 0.0]])
    optimiser = torch.optim.Adam(trainable_parameters(decoder, "points"), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        logits, iou = decoder(taps, neck, prompt.sparse, prompt.dense, prompt.dense_pe)
        losses.desam_loss(logits, target, iou=iou, iou_target=flag)["total"].backward()
        optimiser.step()
    with torch.no_grad():
        logits, iou = decoder(taps, neck, prompt.sparse, prompt.dense, prompt.dense_pe)
    assert torch.equal(logits > 0, target > 0)
    assert torch.equal(iou[:, :2] > 0.5, flag > 0.5)


# weights


def official_state(classes: int = 1) -> dict[str, torch.Tensor]:
    return {f"mask_decoder.{key}": value for key, value in tiny_decoder(classes, seed=7).state_dict().items()}


def test_official_weights_fill_a_decoder_of_one_class_completely():
    decoder, state = tiny_decoder(), official_state()
    assert load_decoder(decoder, state) == []
    assert all(torch.equal(value, state[f"mask_decoder.{key}"]) for key, value in decoder.state_dict().items())


def test_sams_weights_leave_the_mask_module_as_it_was():
    decoder = tiny_decoder()
    before = decoder.pimm.state_dict()["seg_outputs.1.weight"].clone()
    state = {key: value for key, value in official_state().items() if ".pimm." not in key}
    kept = load_decoder(decoder, {**state, "image_encoder.pos_embed": torch.zeros(1)})
    assert kept
    assert all(key.startswith("pimm.") for key in kept)
    assert torch.equal(decoder.iou_token.weight, state["mask_decoder.iou_token.weight"])
    assert torch.equal(decoder.pimm.state_dict()["seg_outputs.1.weight"], before)


def test_a_decoder_of_six_classes_takes_the_four_iou_columns_of_the_file():
    decoder, state = tiny_decoder(6), official_state()
    kept = load_decoder(decoder, state)
    assert set(kept) == {
        "iou_prediction_head.layers.2.weight",
        "iou_prediction_head.layers.2.bias",
        "pimm.seg_outputs.0.weight",
        "pimm.seg_outputs.1.weight",
    }
    assert torch.equal(
        decoder.iou_prediction_head.layers[2].bias[:4], state["mask_decoder.iou_prediction_head.layers.2.bias"]
    )


def test_weights_of_another_size_or_another_model_are_refused():
    wider = build_decoder(SimpleNamespace(**{**vars(TINY), "embed_dim": 32}))
    with pytest.raises(UserError, match="another SAM size"):
        load_decoder(wider, official_state())
    with pytest.raises(UserError, match="missing"):
        load_decoder(tiny_decoder(), {})
    with pytest.raises(UserError, match="1 unknown"):
        load_decoder(tiny_decoder(), {**official_state(), "mask_decoder.extra": torch.zeros(1)})


# prompts


def target_with_corner(classes: int = 1, size: int = 32) -> np.ndarray:
    target = np.zeros((1, classes, size, size), dtype=np.uint8)
    for k in range(classes):
        target[0, k, 4 * k : 4 * k + 3, 5:9] = 1
    return target


def test_training_points_are_half_on_the_organ_and_spread_over_all_its_pixels():
    target = np.repeat(target_with_corner(), 2000, axis=0)
    found = prompts.sample_points(target, np.random.default_rng(0), canvas=64)
    assert found.xy.shape == (2000, 1, 2)
    x, y = (found.xy[:, 0].numpy() / 2).astype(int).T
    on = target[0, 0, y, x] == 1
    np.testing.assert_array_equal(found.on_class[:, 0].numpy(), on)
    assert 0.46 < on.mean() < 0.54
    assert len(set(zip(x[on], y[on], strict=True))) == 12
    assert len(set(zip(x[~on], y[~on], strict=True))) > 500
    assert found.speaks.min() == 1


def test_coordinates_are_pixel_indices_times_the_scale_of_each_side():
    target = np.zeros((1, 1, 8, 16))
    target[0, 0, 5, 11] = 1
    draw = prompts.PointDraw(np.array([0]), np.array([True]), np.array([0.99]))
    assert prompts.place_points(draw, target, canvas=64).xy.tolist() == [[[44.0, 40.0]]]


def test_the_same_generator_state_gives_the_same_points():
    target = torch.from_numpy(np.repeat(target_with_corner(3), 20, axis=0))
    first = prompts.sample_points(target, np.random.default_rng(3), 64)
    second = prompts.sample_points(target, np.random.default_rng(3), 64)
    other = prompts.sample_points(target, np.random.default_rng(4), 64)
    assert torch.equal(first.xy, second.xy)
    assert not torch.equal(first.xy, other.xy)


def test_a_slice_without_the_organ_gets_a_background_point():
    found = prompts.sample_points(np.zeros((50, 2, 16, 16)), np.random.default_rng(0), 64)
    assert found.on_class.max() == 0
    assert found.speaks.sum(1).tolist() == [1] * 50


def test_a_slice_that_is_all_organ_gets_a_point_on_it():
    found = prompts.sample_points(np.ones((50, 1, 16, 16)), np.random.default_rng(0), 64)
    assert found.on_class.min() == 1


def test_every_class_sees_as_many_good_points_as_bad_ones():
    target = np.repeat(target_with_corner(3), 3000, axis=0)
    found = prompts.sample_points(target, np.random.default_rng(0), 64)
    for k in range(3):
        about = found.speaks[:, k] == 1
        assert 850 < about.sum() < 1150
        assert 0.45 < found.on_class[about, k].mean() < 0.55


def test_points_avoid_unknown_pixels_and_stay_silent_where_nothing_is_known():
    target = np.ones((40, 1, 16, 16))
    target[:, :, :, 8:] = 0
    valid = np.zeros((40, 1, 16, 16))
    valid[:20, :, :4] = 1
    found = prompts.sample_points(target, np.random.default_rng(0), 16, valid)
    assert found.xy[:20, 0, 1].max() <= 3
    assert found.speaks[:20].min() == 1
    assert found.speaks[20:].max() == 0
    assert torch.isfinite(found.xy).all()


def test_fixed_points_do_not_depend_on_the_batch():
    target = np.repeat(target_with_corner(2), 6, axis=0)
    together = prompts.fixed_points(target, [10, 11, 12, 13, 14, 15], 64)
    alone = prompts.fixed_points(target[3:4], [13], 64)
    assert torch.equal(together.xy[3:4], alone.xy)
    assert torch.equal(together.on_class[3:4], alone.on_class)
    assert len({tuple(xy) for xy in together.xy.reshape(-1, 2).tolist()}) > 1


def test_an_official_case_without_organ_has_no_slices():
    found = preprocess_volume(np.ones((3, 8, 8), np.float32), np.zeros((3, 8, 8), np.uint8), 16)
    assert found.images.shape == (0, 16, 16, 3)
    assert found.labels.shape == (0, 16, 16)
