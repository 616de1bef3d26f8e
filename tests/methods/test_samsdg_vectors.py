"""SAM-SDG against the outputs of the released code, stored in ``tests/vectors/samsdg``.

Everything is read from the files, so the same tests hold for files made with another seed.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from samsdg_published import search, swapped_on_canvas

from nnunet_dgplugins.evaluation.samsdg_protocol import canvas_dice
from nnunet_dgplugins.methods.samsdg import boxes, canvas, location_scale, losses, preprocess, saliency
from nnunet_dgplugins.methods.samsdg.decoder import BoxDecoder, untrained_names
from nnunet_dgplugins.sam.preprocess import resize_target

FOLDER = Path(os.environ.get("DGPLUGINS_VECTORS") or Path(__file__).parents[1] / "vectors") / "samsdg"
DTYPES = (torch.float32, torch.float64)


@lru_cache
def vector(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensor(name: str, key: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.asarray(vector(name)[key])).to(dtype)


def assert_close(found: torch.Tensor, name: str, key: str, atol: float) -> None:
    np.testing.assert_allclose(found.detach().numpy(), vector(name)[key], atol=atol, rtol=0, err_msg=key)


# boxes


def test_the_largest_components_are_found_exactly_as_released():
    masks, expected = vector("filter_mask")["masks"], vector("filter_mask")["boxes_small"]
    found, _ = boxes.refined_boxes(torch.from_numpy(masks).float(), threshold=0.5, grid=masks.shape[-1])
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(found.numpy() * 4, vector("filter_mask")["boxes_times4"])
    kept, there = boxes.mask_boxes(np.stack([boxes.filter_mask(mask) for mask in masks]))
    np.testing.assert_array_equal(there, masks.any((1, 2)))
    np.testing.assert_array_equal(kept[there], expected[there])


def test_the_search_that_others_are_compared_with_is_the_released_one():
    masks, expected = vector("filter_mask")["masks"], vector("filter_mask")["boxes_small"]
    for mask, box in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(search(torch.from_numpy(mask)).numpy(), box)


@pytest.mark.parametrize("antialias", [False, True])
def test_refined_boxes_match_the_released_code(antialias):
    name, kind = "step2_refined_box", "aa" if antialias else "noaa"
    probability = tensor(name, "prob_uint8") / 255
    side = vector(name)[f"small_{kind}"].shape[-1]
    assert_close(boxes.smaller(probability, side, antialias), name, f"small_{kind}", 1e-6)
    thresholds = [key.rpartition("_t")[2] for key in vector(name) if key.startswith(f"box_{kind}_t")]
    assert thresholds
    for threshold in thresholds:
        found, _ = boxes.refined_boxes(probability, int(threshold) / 100, side, antialias)
        np.testing.assert_array_equal(found.numpy(), vector(name)[f"box_{kind}_t{threshold}"])


def test_true_and_stored_boxes_are_jittered_as_released():
    name = "box_jitter"
    masks = vector(name)["masks"]
    plain, found = boxes.mask_boxes(masks)
    draw = vector(name)["gt_draws_xmin_xmax_ymin_ymax"]
    moved = boxes.jittered(torch.from_numpy(plain), draw, masks.shape[-1], torch.from_numpy(found))
    np.testing.assert_array_equal(moved.numpy(), vector(name)["gt_boxes"])
    stored = tensor(name, "refined_in")
    moved = boxes.jittered(stored, vector(name)["refined_draws_xmin_xmax_ymin_ymax"], boxes.PUBLISHED_SIDE)
    np.testing.assert_array_equal(moved.numpy(), vector(name)["refined_out"])


def test_boxes_without_the_filter_match_the_released_code():
    probability = tensor("step2_refined_box", "prob_uint8") / 255
    plain, found = boxes.unfiltered_boxes(probability, vector("coarse_box")["thresh"].item())
    draw = vector("coarse_box")["draws_xmin_xmax_ymin_ymax"]
    moved = boxes.jittered(plain, draw, probability.shape[-1], found)
    np.testing.assert_array_equal(moved.numpy(), vector("coarse_box")["boxes"])


def test_the_overlap_of_boxes_matches_the_released_code():
    found = boxes.box_iou(tensor("box_iou", "box1"), tensor("box_iou", "box2"))
    assert_close(found, "box_iou", "iou", 1e-6)


# images


def test_images_are_prepared_as_released():
    image = tensor("preprocess", "image_hwc").permute(2, 0, 1)
    eight_bit = preprocess.to_8_bit(image)
    np.testing.assert_array_equal(eight_bit.numpy(), vector("preprocess")["u8_chw"])
    spread = preprocess.equalised(eight_bit)
    np.testing.assert_array_equal(spread.numpy(), vector("preprocess")["equalized_u8"])
    assert_close(spread.float() / 255, "preprocess", "network_input", 1e-7)
    large = preprocess.resized(image, vector("preprocess")["resized64"].shape[0])
    assert_close(large.permute(1, 2, 0), "preprocess", "resized64", 1e-5)


def test_masks_keep_their_area_where_the_released_resize_shrinks_them():
    mask = vector("preprocess")["mask"]
    shrunk = vector("preprocess")["mask64_float_linear_then_trunc"]
    large = resize_target(torch.from_numpy(mask)[None], None, shrunk.shape[0])[0].numpy()
    assert set(np.unique(large)) <= set(np.unique(mask))
    share = abs(large.astype(bool).mean() / mask.astype(bool).mean() - 1)
    assert share < 0.1
    assert share < abs(shrunk.astype(bool).mean() / mask.astype(bool).mean() - 1)


def test_four_slices_lie_on_a_canvas_as_released_and_come_back_exactly():
    images, masks = tensor("merge4", "image"), tensor("merge4", "mask")
    np.testing.assert_array_equal(canvas.merge(images).numpy(), vector("merge4")["merged_images"])
    np.testing.assert_array_equal(canvas.merge(masks).numpy(), vector("merge4")["merged_masks"])
    np.testing.assert_array_equal(canvas.unmerge(tensor("merge4", "merged_images")).numpy(), images.numpy())


def test_boxes_lie_on_the_canvas_where_their_tiles_lie():
    plain, tile = tensor("merge4", "boxes_tile_xyxy"), vector("merge4")["image"].shape[-1]
    found = canvas.on_canvas(plain, tile).numpy()
    np.testing.assert_array_equal(found, vector("merge4")["boxes_canvas_correct"])
    swapped = vector("merge4")["boxes_canvas_official_swapped"]
    np.testing.assert_array_equal(swapped_on_canvas(plain, tile).numpy(), swapped)
    assert [index for index in range(len(plain)) if (found[index] != swapped[index]).any()] == [
        index for index in range(len(plain)) if index % 4 in (1, 2)
    ]


# decoder


def released_decoder(dtype: torch.dtype, folded: bool = True) -> BoxDecoder:
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

    state = {key[6:]: torch.from_numpy(value) for key, value in vector("merged_decode").items() if key[:6] == "param."}
    parts = {}
    for part in ("prompt_encoder", "mask_decoder"):
        start = f"{part}."
        parts[part] = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    embedding = vector("merged_decode")["image_embeddings"]
    width, grid = embedding.shape[1], embedding.shape[-1]
    side = vector("merged_decode")["merged_masks"].shape[-1]
    prompts = PromptEncoder(
        embed_dim=width,
        image_embedding_size=(grid, grid),
        input_image_size=(side, side),
        mask_in_chans=len(parts["prompt_encoder"]["mask_downscaling.3.weight"]),
    )
    decoder = MaskDecoder(
        transformer_dim=width,
        transformer=TwoWayTransformer(
            depth=2,
            embedding_dim=width,
            num_heads=4,
            mlp_dim=len(parts["mask_decoder"]["transformer.layers.0.mlp.lin1.weight"]),
        ),
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=len(parts["mask_decoder"]["iou_prediction_head.layers.0.weight"]),
    )
    prompts.load_state_dict(parts["prompt_encoder"], strict=True)
    decoder.load_state_dict(parts["mask_decoder"], strict=True)
    return BoxDecoder(prompts, decoder.to(dtype), folded=folded)  # SAM encodes positions in float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folded", [True, False])
@torch.no_grad()
def test_four_boxes_on_one_embedding_give_the_released_masks(dtype, folded):
    decoder, name = released_decoder(dtype, folded), "merged_decode"
    embeddings, prompts = tensor(name, "image_embeddings", dtype), tensor(name, "boxes_canvas", dtype)[:, None]
    assert_close(decoder.low_resolution(embeddings, prompts), name, "low_res_logits", 1e-4)
    for way in (decoder, decoder.whole_canvas):
        assert_close(canvas.merge(way(embeddings, prompts)), name, "merged_logits", 1e-4)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("way", ["forward", "whole_canvas"])
def test_the_loss_of_a_canvas_reaches_the_weights_as_released(way, folded):
    name = "merged_decode"
    decoder = released_decoder(torch.float32, folded)
    ask = getattr(decoder, way)
    logits = ask(tensor(name, "image_embeddings"), tensor(name, "boxes_canvas")[:, None])
    loss = losses.canvas_loss(logits, canvas.unmerge(tensor(name, "merged_masks")))["total"]
    assert_close(loss, name, "loss_monai13", 1e-4)
    loss.backward()
    expected = dict(zip(vector(name)["grad_names"].tolist(), vector(name)["grad_norms"].tolist(), strict=True))
    own = dict(decoder.named_parameters())
    assert set(own) <= set(expected)
    for key, parameter in own.items():
        # -1 is no gradient, 0 exactly zero; abs: softmax ignores the bias of a key, whose gradient is rounding alone
        found = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert found == pytest.approx(max(expected[key], 0.0), rel=1e-3, abs=1e-8), key
    for key, stored in (("mask_tokens.weight", "g_mask_tokens"), ("output_upscaling.0.weight", "g_upscale0")):
        gradient, truth = decoder.mask_decoder.get_parameter(key).grad.numpy(), vector(name)[stored]
        np.testing.assert_allclose(gradient, truth, atol=1e-3 * np.abs(truth).max(), rtol=0, err_msg=stored)


def test_only_what_has_a_gradient_in_the_released_code_is_trained():
    name = "merged_decode"
    decoder = released_decoder(torch.float32)
    pairs = zip(vector(name)["grad_names"].tolist(), vector(name)["grad_norms"].tolist(), strict=True)
    without = {
        key.removeprefix("mask_decoder.") for key, norm in pairs if norm < 1e-8 and key.startswith("mask_decoder.")
    }
    assert set(untrained_names(decoder.mask_decoder)) == without


# losses


def loss_gradient(total: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize(("ce_weight", "monai"), [(1.0, "monai13"), (0.0, "monai12")])
def test_the_loss_of_step_3_matches_both_versions_of_monai(ce_weight, monai):
    logits, target = tensor("losses", "logits").requires_grad_(), tensor("losses", "target")
    # each stored sample stands for a canvas: its four tiles are its four quarters
    terms = losses.canvas_loss(canvas.unmerge(logits), canvas.unmerge(target), ce_weight=ce_weight)
    assert_close(terms["dice"], "losses", "sam_dice", 1e-6)
    assert_close(terms["bce"], "losses", "sam_bce_logits", 1e-6)
    assert_close(terms["total"], "losses", f"sam_total_{monai}", 1e-6)
    assert_close(loss_gradient(terms["total"], logits), "losses", f"sam_total_grad_{monai}", 1e-7)


@pytest.mark.parametrize(("double", "monai"), [(False, "monai12"), (True, "monai13")])
def test_the_loss_of_step_1_matches_both_versions_of_monai(double, monai):
    logits, target = tensor("losses", "logits").requires_grad_(), tensor("losses", "target")
    terms = losses.coarse_loss(logits, target, double_sigmoid=double)
    assert_close(terms["dice"], "losses", "step1_dice", 1e-6)
    assert_close(terms["bce"], "losses", "step1_bce", 1e-6)
    if double:
        assert_close(terms["double_sigmoid"], "losses", "step1_bce_logits_of_prob", 1e-6)
    assert_close(terms["total"], "losses", f"step1_total_{monai}", 1e-6)
    assert_close(loss_gradient(terms["total"], logits), "losses", f"step1_grad_{monai}", 1e-7)


@pytest.mark.parametrize("threshold", [50, 75])
def test_the_pooled_dice_matches_the_released_code_and_the_protocol(threshold):
    mask = tensor("losses", "logits").sigmoid() > threshold / 100
    truth = tensor("losses", "target")
    assert_close(losses.pooled_dice(mask, truth), "losses", f"dice_score_t{threshold}", 1e-6)
    counts = [
        (int((guess & (true > 0)).sum()), int(guess.sum() + true.sum()))
        for guess, true in zip(mask, truth, strict=True)
    ]
    missing = [(0, 0)] * (canvas.TILES - len(counts))  # slices that add nothing to the sums
    assert next(canvas_dice(counts + missing)) == pytest.approx(vector("losses")[f"dice_score_t{threshold}"], abs=1e-6)


# augmentation


def drawn(name: str, kind: int) -> np.ndarray:
    kinds, values = vector("location_scale")[f"{name}_draw_kind"], vector("location_scale")[f"{name}_draw_value"]
    return values[kinds == kind]


def curve_draw(name: str, regions: list[np.ndarray], inversion: list[float]) -> location_scale.CurveDraw:
    """Stored draws, in call order, as shares of each region's range; a region without pixels has no draws."""
    image = vector("location_scale")["image"].astype(np.float64)
    count = len(regions)
    control, falling = np.full((1, count, 4), 0.5), np.zeros((1, count), dtype=bool)
    scale, location = np.ones((1, count)), np.zeros((1, count))
    values = {kind: iter(drawn(name, kind)) for kind in range(4)}
    for index, region in enumerate(regions):
        if not region.any():
            continue
        low, high = image[region].min(), image[region].max()
        control[0, index] = [(next(values[0]) - low) / (high - low) for _ in range(4)]
        falling[0, index] = inversion[index] >= 0 and next(values[1]) <= inversion[index]
        scale[0, index], location[0, index] = next(values[2]), next(values[3])
    assert all(next(rest, None) is None for rest in values.values())
    return location_scale.CurveDraw(control, falling, scale, location)


@pytest.mark.parametrize(("name", "inversion"), [("nl_plain", None), ("nl_inv1", 1.0), ("nl_inv05", 0.5)])
def test_curves_match_the_released_code(name, inversion):
    image = tensor("location_scale", "image", torch.float64).flatten()[None]
    low, high = image.min().item(), image.max().item()
    control = torch.from_numpy((drawn(name, 0) - low) / (high - low))[None]
    falling = torch.tensor([inversion is not None and drawn(name, 1).item() <= inversion])
    found = location_scale.curved(image, torch.ones_like(image, dtype=torch.bool), control, falling)
    assert_close(found.view(vector("location_scale")["image"].shape), "location_scale", f"{name}_out", 1e-5)


def test_scale_and_shift_match_the_released_code():
    image = tensor("location_scale", "image", torch.float64).flatten()[None]
    everywhere = torch.ones_like(image, dtype=torch.bool)
    scale, location = (torch.from_numpy(drawn("ls", kind)) for kind in (2, 3))
    found = location_scale.shifted(image, everywhere, scale, location)
    assert_close(found.view(vector("location_scale")["image"].shape), "location_scale", "ls_out", 1e-5)


def test_global_and_local_versions_match_the_released_code():
    image, label = tensor("location_scale", "image"), vector("location_scale")["label"]
    batch = image[None, None]
    names = [match[1] for key in vector("location_scale") if (match := re.fullmatch(r"([gl]la\d*)_out", key))]
    assert {name[:3] for name in names} == {"gla", "lla"}
    classes = np.stack([label == value for value in range(1, label.max() + 1)])
    for name in names:
        if name.startswith("gla"):
            draw = curve_draw(name, [np.ones_like(label, dtype=bool)], [-1.0])
            found = location_scale.global_version(batch, draw)
        else:
            draw = curve_draw(name, [label == 0, *classes], [1.0] + [0.5] * len(classes))
            found = location_scale.local_version(batch, torch.from_numpy(classes)[None], draw)
        assert_close(found[0, 0], "location_scale", f"{name}_out", 1e-5)


def test_the_basis_of_the_curves_runs_as_in_the_released_code():
    every = location_scale.bernstein()[:, :: (location_scale.POINTS - 1) // 10]
    expected = vector("location_scale")["bernstein_every_9999"]
    assert_close(every[:, : expected.shape[1]], "location_scale", "bernstein_every_9999", 1e-6)


def test_saliency_maps_and_fusion_match_the_released_code():
    name = "saliency_fusion"
    gradient = saliency.input_saliency(tensor(name, "input_grad"))
    assert_close(gradient, name, "gradient", 1e-5)
    grids = [int(key.removeprefix("saliency_g")) for key in vector(name) if key.startswith("saliency_g")]
    assert grids
    for grid in grids:
        kernel = saliency.spline(gradient.shape[-1] // grid)
        assert_close(torch.outer(kernel, kernel)[None, None], name, f"kernel_g{grid}", 1e-5)
        assert vector(name)[f"pad_g{grid}"].tolist() == [(len(kernel) - 1) // 2] * 2
        found = saliency.saliency_map(tensor(name, "gradient"), grid)
        assert_close(found, name, f"saliency_g{grid}", 1e-5)
        fused = saliency.fuse(tensor(name, "gla"), tensor(name, "lla"), found)
        assert_close(fused, name, f"fused_g{grid}", 1e-5)
