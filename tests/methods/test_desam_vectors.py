"""DeSAM against the outputs of the released code, stored in ``tests/vectors/desam``.

Everything is read from the files, so the same tests hold for files made with another seed.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_dgplugins.methods.desam import losses, preprocess, prompts
from nnunet_dgplugins.methods.desam.decoder import DeSAMDecoder
from nnunet_dgplugins.methods.desam.network import trainable_parameters, untrained_names
from nnunet_dgplugins.methods.desam.selection import SelectionRule, select_masks, suppress_border

FOLDER = Path(os.environ.get("DGPLUGINS_VECTORS") or Path(__file__).parents[1] / "vectors") / "desam"
MODES = ("points", "box")
FLOAT32 = {"atol": 5e-4, "rtol": 1e-3}


@lru_cache
def vector(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensor(name: str, key: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.asarray(vector(name)[key])).to(dtype)


def weights(name: str, prefix: str) -> dict[str, torch.Tensor]:
    start = f"param/{prefix}"
    return {key[len(start) :]: torch.from_numpy(value) for key, value in vector(name).items() if key.startswith(start)}


def prompt_encoder(name: str, grid: tuple[int, int], image: tuple[int, int]) -> torch.nn.Module:
    from segment_anything.modeling.prompt_encoder import PromptEncoder

    state = weights(name, "prompt_encoder.")
    encoder = PromptEncoder(
        embed_dim=state["no_mask_embed.weight"].shape[1],
        image_embedding_size=grid,
        input_image_size=image,
        mask_in_chans=state["mask_downscaling.3.weight"].shape[0],
    )
    encoder.load_state_dict(state, strict=True)
    return encoder.requires_grad_(False)


def small_decoder(dtype: torch.dtype) -> DeSAMDecoder:
    state = weights("mask_decoder", "mask_decoder.")
    decoder = DeSAMDecoder(encoder_channels=24, width=64, mlp_dim=32, num_heads=4, iou_head_hidden=32)
    decoder.load_state_dict(state, strict=True)  # official names, all of them and nothing else
    return decoder.to(dtype)


def encoded(mode: str, dtype: torch.dtype) -> prompts.EncodedPrompts:
    encoder = prompt_encoder("mask_decoder", (4, 6), (64, 96))
    if mode == "points":
        return prompts.encode_points(encoder, tensor("mask_decoder", "in/points")).to(dtype)
    return prompts.encode_box(encoder, count=2).to(dtype)


def taps_and_neck(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [tensor("mask_decoder", f"in/tap{i}", dtype) for i in range(3)], tensor("mask_decoder", "in/neck", dtype)


def assert_matches(found: torch.Tensor, key: str, dtype: torch.dtype, exact: float = 2e-4) -> None:
    limits = FLOAT32 if dtype == torch.float32 else {"atol": exact, "rtol": 0}
    np.testing.assert_allclose(found.detach().numpy(), vector("mask_decoder")[key], **limits, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contexts_match_the_released_code(dtype):
    taps, _ = taps_and_neck(dtype)
    for i, context in enumerate(small_decoder(dtype).contexts(taps)):
        assert_matches(context, f"out/context{i}", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gradients", [True, False])  # without gradients the transformer runs in its folded form
def test_the_whole_decoder_matches_the_released_code(mode, dtype, gradients, request):
    before = torch.is_grad_enabled()
    request.addfinalizer(lambda: torch.set_grad_enabled(before))
    torch.set_grad_enabled(gradients)
    decoder, prompt, (taps, neck) = small_decoder(dtype), encoded(mode, dtype), taps_and_neck(dtype)
    assert_matches(prompt.dense_pe, "out/dense_pe", dtype)
    assert_matches(prompt.sparse, f"out/{mode}/sparse", dtype)
    assert_matches(prompt.dense.expand(2, -1, -1, -1), f"out/{mode}/dense", dtype)

    mask_embedding, iou = decoder.prim(neck, prompt.sparse, prompt.dense, prompt.dense_pe)
    contexts = decoder.contexts(taps)
    assert_matches(mask_embedding, f"out/{mode}/mask_embedding", dtype)
    assert_matches(iou, f"out/{mode}/iou_all4", dtype, exact=2e-5)
    assert_matches(iou[:, :1], f"out/{mode}/iou", dtype, exact=2e-5)
    assert_matches(decoder.fuse(mask_embedding, contexts), f"out/{mode}/fused", dtype)
    assert_matches(decoder.mask(mask_embedding, contexts), f"out/{mode}/mask_logits", dtype)
    full, half = decoder.pimm.deep_supervision(mask_embedding, contexts)
    assert_matches(full, f"out/{mode}/mask_logits", dtype)
    assert_matches(half, f"out/{mode}/aux_logits_half", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_masks_match_when_one_image_is_shared_by_its_prompts(mode, dtype):
    decoder, prompt, (taps, neck) = small_decoder(dtype), encoded(mode, dtype), taps_and_neck(dtype)
    for i in range(2):
        contexts = decoder.contexts([tap[i : i + 1] for tap in taps])
        mask_embedding, iou = decoder.prim(neck[i : i + 1], prompt.sparse, prompt.dense, prompt.dense_pe)
        assert_matches_row(iou[i], f"out/{mode}/iou_all4", i, dtype)
        assert_matches_row(decoder.mask(mask_embedding, contexts)[i], f"out/{mode}/mask_logits", i, dtype)
        shared = decoder.share(contexts)
        assert_matches_row(decoder.fuse(mask_embedding, shared)[i], f"out/{mode}/fused", i, dtype)
        assert_matches_row(decoder.mask(mask_embedding, shared)[i], f"out/{mode}/mask_logits", i, dtype)


def assert_matches_row(found: torch.Tensor, key: str, row: int, dtype: torch.dtype) -> None:
    limits = FLOAT32 if dtype == torch.float32 else {"atol": 2e-4, "rtol": 0}
    np.testing.assert_allclose(found.detach().numpy(), vector("mask_decoder")[key][row], **limits, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_match_the_released_code(mode, dtype):
    decoder, prompt, (taps, neck) = small_decoder(dtype), encoded(mode, dtype), taps_and_neck(dtype)
    logits, iou = decoder(taps, neck, prompt.sparse, prompt.dense, prompt.dense_pe)
    target, label = tensor("mask_decoder", "in/gt", dtype), tensor("mask_decoder", "in/iou_label", dtype)
    with_iou = {"iou": iou, "iou_target": label} if mode == "points" else {}
    terms = losses.desam_loss(logits, target, variant="code", **with_iou)
    terms["total"].backward()

    assert_matches(terms["dice"], f"out/{mode}/loss_dicece", dtype)
    assert_matches(losses.iou_loss(iou, label, "l1"), f"out/{mode}/loss_iou_l1", dtype)
    assert_matches(terms["total"], f"out/{mode}/loss_total", dtype)

    without, start = set(vector("mask_decoder")[f"out/{mode}/keys_without_grad"].tolist()), f"out/{mode}/grad/"
    assert {f"mask_decoder.{n}" for n, p in decoder.named_parameters() if p.grad is None} == without
    stored = [key for key in vector("mask_decoder") if key.startswith(start)]
    assert stored
    for key in stored:
        name, expected = key.removeprefix(f"{start}mask_decoder."), vector("mask_decoder")[key]
        limit = 1e-6 if ".se.fc." in name else 2e-3 * np.abs(expected).max()
        found = decoder.get_parameter(name).grad.numpy()
        np.testing.assert_allclose(found, expected, atol=limit, rtol=0, err_msg=key)


@pytest.mark.parametrize("mode", MODES)
def test_only_parameters_that_are_trained_go_to_the_optimiser(mode):
    decoder = small_decoder(torch.float32)
    expected = {key.removeprefix("mask_decoder.") for key in vector("mask_decoder")[f"out/{mode}/keys_without_grad"]}
    assert set(untrained_names(decoder, mode)) == expected
    kept = trainable_parameters(decoder, mode)
    assert {n for n, p in decoder.named_parameters() if not p.requires_grad} == expected
    assert len(kept) == len(list(decoder.parameters())) - len(expected)


def test_prompts_are_encoded_as_in_the_released_code_at_the_real_geometry():
    encoder = prompt_encoder("prompt_encoder", (64, 64), (1024, 1024))
    expected = vector("prompt_encoder")
    points = prompts.encode_points(encoder, tensor("prompt_encoder", "in/points"))
    box = prompts.encode_box(encoder, count=len(expected["in/box"]))
    np.testing.assert_array_equal(np.stack([prompts.whole_box(1024)] * len(expected["in/box"])), expected["in/box"])
    np.testing.assert_allclose(points.sparse.numpy(), expected["out/points_sparse"], atol=1e-4)
    np.testing.assert_allclose(box.sparse.numpy(), expected["out/box_sparse"], atol=1e-4)
    for found in (points, box):
        count = len(found.sparse)
        assert tuple(found.dense.expand(count, -1, -1, -1).shape)[1:] == tuple(expected["out/dense_shape"])[1:]
        constant = expected["out/dense_constant"][None, :, None, None]
        np.testing.assert_allclose(found.dense.numpy(), np.broadcast_to(constant, found.dense.shape), atol=1e-4)
        np.testing.assert_allclose(found.dense_pe.numpy()[..., ::4, ::4], expected["out/dense_pe_every4"], atol=1e-4)


@pytest.mark.parametrize("case", "abc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_terms_match_the_released_code_and_the_paper(case, dtype):
    logits = tensor("losses", f"{case}/in/logits", dtype).requires_grad_()
    target, label = tensor("losses", f"{case}/in/target", dtype), tensor("losses", f"{case}/in/iou_label", dtype)
    iou = tensor("losses", f"{case}/in/iou_pred", dtype)
    code = losses.desam_loss(logits, target, variant="code", iou=iou, iou_target=label)
    paper = losses.desam_loss(logits, target, variant="paper", iou=iou, iou_target=label)
    box = losses.desam_loss(logits, target, variant="paper")
    found = {
        "official_dicece": losses.desam_loss(logits, target, variant="code")["total"],
        "official_dice_term": code["dice"],
        "official_ce_term": code["total"] - code["dice"] - code["iou"],
        "bce_with_logits": paper["bce"],
        "iou_l1": code["iou"],
        "iou_mse": paper["iou"],
        "official_total_points": code["total"],
        "paper_total_points": paper["total"],
        "paper_total_box": box["total"],
    }
    for key, value in found.items():
        np.testing.assert_allclose(value.item(), vector("losses")[f"{case}/out/{key}"], atol=1e-5, err_msg=key)
    (gradient,) = torch.autograd.grad(found["official_dicece"], logits)
    np.testing.assert_allclose(gradient.numpy(), vector("losses")[f"{case}/out/grad_logits"], atol=1e-5)


@pytest.mark.parametrize(("epochs", "row"), [(50, 0), (20, 1)])
def test_the_learning_rate_decays_as_published(epochs, row):
    initial = vector("losses")["poly_lr/initial"][row]
    found = [losses.poly_lr(initial, epoch, epochs) for epoch in range(epochs)]
    np.testing.assert_allclose(found, vector("losses")[f"poly_lr/E{epochs}"], rtol=1e-7)


@pytest.mark.parametrize("n", [1, 3, 4, 9, 16])
def test_grid_points_lie_where_the_released_code_puts_them(n):
    expected = vector("grid_points")
    np.testing.assert_allclose(prompts.grid_points(n, (1, 1), 1), expected[f"grid{n}/unit"], atol=1e-9)
    np.testing.assert_allclose(prompts.grid_points(n, (256, 256), 1024), expected[f"grid{n}/model_xy"], atol=1e-9)


def test_grid_points_follow_the_longest_side_of_an_oblong_image():
    height, width = (int(side) for side in vector("grid_points")["rect/hw"])
    found = prompts.grid_points(4, (height, width), 1024)
    np.testing.assert_allclose(found, vector("grid_points")["rect/model_xy"], atol=1e-9)


@pytest.mark.parametrize("area", [0, 60])
@pytest.mark.parametrize("case", range(6))
def test_masks_are_selected_exactly_as_in_the_released_code(case, area):
    start = f"case{case}/area{area}"
    expected = {key: vector("mask_selection")[f"{start}/{key}"] for key in ("kept_masks", "kept_iou", "kept_point")}
    logits = tensor("mask_selection", f"case{case}/in/logits")[:, 0]
    iou = tensor("mask_selection", f"case{case}/in/iou")[:, 0]
    kept = select_masks(logits, iou, SelectionRule(min_region_area=area * (256 / 64) ** 2))
    np.testing.assert_array_equal(kept.masks, expected["kept_masks"])
    np.testing.assert_array_equal(kept.iou, expected["kept_iou"])
    points = prompts.grid_points(3, (64, 64), 64)[kept.points]
    np.testing.assert_allclose(points, expected["kept_point"], rtol=1e-6)
    np.testing.assert_array_equal(kept.selected, vector("mask_selection")[f"{start}/selected"])
    framed = suppress_border(kept.selected, SelectionRule(border=48).frame_in(kept.masks.shape))
    np.testing.assert_array_equal(framed, vector("mask_selection")[f"{start}/selected_border12"])


@pytest.mark.parametrize("case", ["down", "up"])
def test_preprocessing_matches_the_released_code(case):
    expected = {
        key.removeprefix(f"{case}/"): value for key, value in vector("preprocess").items() if key.startswith(case)
    }
    volume, size = expected["in/volume_zyx"], int(expected["in/image_size"])
    np.testing.assert_allclose(np.percentile(volume, preprocess.PERCENTILES), expected["out/percentiles"], rtol=1e-5)
    found = preprocess.preprocess_volume(volume, expected["in/label_zyx"], size, drop_last_slice=True)
    np.testing.assert_array_equal(found.index, expected["out/slice_index"])
    np.testing.assert_array_equal(found.labels, expected["out/gts"])
    assert_nearly_equal_grey(found.images, expected["out/imgs"])
    resized = preprocess.to_canvas(expected["out/imgs"][0], 2 * size)
    assert_nearly_equal_grey(resized, expected["out/first_resized_to_64"])
    normalised = preprocess.normalise(expected["out/first_resized_to_64"], 2 * size)
    np.testing.assert_allclose(normalised, expected["out/first_normalised_to_64"], atol=1e-4)


def test_the_last_slice_is_kept_unless_asked_otherwise():
    volume, label = vector("preprocess")["up/in/volume_zyx"], vector("preprocess")["up/in/label_zyx"]
    last = np.flatnonzero((label == 1).any(axis=(1, 2)))[-1]
    assert last in preprocess.preprocess_volume(volume, label, 32).index
    assert last not in preprocess.preprocess_volume(volume, label, 32, drop_last_slice=True).index


def assert_nearly_equal_grey(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to one grey level in one per cent of the pixels: scikit-image's versions differ in rounding."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.01


def test_features_are_tapped_where_the_released_code_taps_them():
    from segment_anything.modeling.image_encoder import ImageEncoderViT

    from nnunet_dgplugins.sam.encoder import TappedEncoder

    blocks = [int(i) for i in vector("encoder_taps")["in/global_attn_indexes"]]
    x = tensor("encoder_taps", "in/x")
    encoder = ImageEncoderViT(
        img_size=x.shape[-1],
        patch_size=16,
        embed_dim=16,
        depth=8,
        num_heads=2,
        mlp_ratio=2,
        out_chans=12,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        window_size=3,
        use_rel_pos=True,
        global_attn_indexes=tuple(blocks),
    )
    encoder.load_state_dict(weights("encoder_taps", "image_encoder."), strict=True)
    with torch.no_grad():
        features = TappedEncoder(encoder, tuple(blocks[:-1]))(x)
    for name, found in zip(("tap0", "tap1", "tap2", "neck"), features, strict=True):
        expected = vector("encoder_taps")[f"out/{name}"]
        limit = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(found.numpy(), expected, atol=limit, rtol=0, err_msg=name)
