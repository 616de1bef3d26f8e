"""The objective says what SAM says, and a training repeats, resumes and ends in a loadable file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam.encoder import TappedEncoder
from nnunet_dgplugins.sam.models import MODELS, get_model
from nnunet_dgplugins.sam.seeded import seeded_weights
from nnunet_dgplugins.sam.tiny import objective
from nnunet_dgplugins.sam.tiny.objective import (
    ContrastTerm,
    Prompts,
    TinySam,
    first_prompts,
    mask_losses,
    next_points,
)
from nnunet_dgplugins.sam.tiny.training import (
    Phase,
    Recipe,
    Training,
    apply_views,
    build_network,
    draw_map,
    sample_views,
    write_weights,
)
from nnunet_dgplugins.sam.weights import load_parts

MODEL = replace(
    MODELS["vit_tiny"], image_size=128, embed_dim=32, depth=4, global_attn_indexes=(0, 1, 2, 3), prompt_dim=32,
    decoder_mlp_dim=32, iou_head_hidden=16, window_size=8,
)  # fmt: skip
RECIPE = Recipe(
    seed=3, maps=3, phases=(Phase(64, 2, 3, 1, 2), Phase(128, 1, 2, 2, 2)), warmup=1,
    robust=(Phase(64, 1, 2, 1, 2, noise=0.3, contrast=0.5, projected=False),),
)  # fmt: skip


@pytest.fixture(scope="module")
def drawings() -> list:
    return [draw_map(RECIPE.seed, number, 128) for number in range(RECIPE.maps)]


@pytest.fixture
def network() -> TinySam:
    return build_network(MODEL, seeded_weights(MODEL, 1))


def weights(run: Training) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in run.average.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def test_the_features_in_training_are_those_in_use(network: TinySam):
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    used = TappedEncoder(network.image_encoder, MODEL.taps)(images)
    for mine, theirs in zip(network.encode(images), used, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["point", "box", "box, point and mask"])
def test_a_decode_is_what_sam_itself_answers(network: TinySam, kind: str):
    generator = torch.Generator().manual_seed(0)
    neck = torch.randn(1, 32, 16, 16, generator=generator)
    points, labels, box, before = None, None, None, None
    if kind != "point":
        box = torch.tensor([[10.0, 20.0, 90.0, 70.0]])
    if kind != "box":
        points, labels = torch.tensor([[[30.0, 40.0]]]), torch.tensor([[1]])
    if "mask" in kind:
        before = torch.randn(1, 1, 64, 64, generator=generator)
    sam = network.prompt_encoder
    sparse, dense = sam(None if points is None else (points, labels), box, before)
    decoder: MaskDecoder = network.mask_decoder
    assert isinstance(decoder.transformer, TwoWayTransformer)
    wanted, wanted_iou = decoder.predict_masks(neck, sam.get_dense_pe(), sparse, dense)
    if kind == "point":
        prompts = Prompts(torch.tensor([[[30.0, 40.0], [0.0, 0.0]]]), torch.tensor([[1, -1]]))
    else:
        prompts = Prompts(box.view(1, 2, 2), torch.tensor([[2, 3]]))
        if points is not None:
            prompts = prompts.add(points[:, 0], labels[:, 0])
    masks, iou = network.decode(neck, torch.tensor([0]), prompts, before)
    torch.testing.assert_close(masks, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou, wanted_iou, atol=1e-4, rtol=1e-4)


def test_a_first_prompt_is_a_point_in_the_mask_or_a_box_around_it():
    masks = torch.zeros(200, 32, 32, dtype=torch.bool)
    masks[:, 8:12, 16:28] = True
    prompts, boxed = first_prompts(masks, 128, torch.Generator().manual_seed(0))
    assert 60 < int(boxed.sum()) < 140
    x, y = prompts.points[~boxed, 0].unbind(1)
    assert bool(((x >= 64) & (x < 112) & (y >= 32) & (y < 48)).all())
    assert prompts.labels[~boxed].tolist() == [[1, -1]] * int((~boxed).sum())
    middle = prompts.points[boxed].median(0).values
    torch.testing.assert_close(middle, torch.tensor([[64.0, 32.0], [112.0, 48.0]]) - 0.5, atol=2, rtol=0)


def test_the_next_point_lies_where_the_mask_is_wrong():
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[:, 4:8, 4:8] = True
    logits = torch.full((2, 16, 16), -1.0)
    logits[1, 4:8, 4:8] = 1.0
    logits[1, 10, 12] = 1.0  # too much, in one pixel
    points, labels = next_points(masks, logits, 64, torch.Generator().manual_seed(0))
    assert labels.tolist() == [1, 0]
    assert bool(((points[0] >= 16 - 0.5) & (points[0] < 32)).all())
    assert points[1].tolist() == [12.5 * 4 - 0.5, 10.5 * 4 - 0.5]


def test_a_perfect_mask_costs_nothing_and_its_iou_is_one():
    masks = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    perfect = torch.where(masks, 20.0, -20.0)[:, None]
    loss, iou = mask_losses(torch.cat([perfect, -perfect], 1), masks)
    assert float(loss[:, 0].max()) < 1e-4
    assert bool((loss[:, 1] > 1).all())
    assert iou[:, 0].tolist() == [1.0] * 3
    assert iou[:, 1].tolist() == [0.0] * 3


def test_the_contrast_term_rewards_features_that_follow_the_parts_and_not_the_rendering():
    parts = torch.zeros(2, 64, 64, dtype=torch.uint8)
    parts[:, :, 32:] = 1
    parts[:, 32:] += 2
    code = torch.nn.functional.one_hot(parts[:, 4::8, 4::8].long(), 4).permute(0, 3, 1, 2).float()
    swapped = code.clone()
    swapped[1] = swapped[1].flip(0)  # the second rendering gives every part another code
    term = ContrastTerm([4])
    with torch.no_grad():
        term.projections[0].weight.zero_()[:4, :, 0, 0] = torch.eye(4)
        term.projections[0].bias.zero_()
        good, bad = (float(term([x], parts, torch.Generator().manual_seed(0))) for x in (code, swapped))
        strict = [
            float(term([x], parts, torch.Generator().manual_seed(0), projected=False)) for x in (3 * code - 7, swapped)
        ]
    assert good < 3.0 < bad
    assert strict[0] < 3.0 < strict[1]  # without the projection, whatever the scale and the mean


def test_strict_contrast_has_no_use_for_the_projection():
    features = [torch.randn(2, 4, 8, 8, requires_grad=True)]
    term = ContrastTerm([4])
    term(features, torch.arange(64).view(1, 8, 8).repeat(2, 1, 1), torch.Generator().manual_seed(0), False).backward()
    assert features[0].grad is not None
    assert bool(features[0].grad.any())
    assert all(p.grad is None for p in term.parameters())


def test_moved_maps_keep_their_tissues_and_move_all_planes_alike():
    plane = torch.from_numpy(draw_map(0, 0, 128).planes[0])
    moved = apply_views(plane.expand(1, 3, -1, -1), sample_views(1, torch.Generator().manual_seed(1)), 64)
    assert moved.shape == (1, 3, 64, 64)
    assert set(moved.unique().tolist()) <= {0, *plane.unique().tolist()}
    assert torch.equal(moved[0, 0], moved[0, 2])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(drawings: list):
    found = []
    for seed in (3, 3, 4):
        run = Training(replace(RECIPE, seed=seed), drawings, model=MODEL)
        for _ in range(3):
            run.run_step()
        found.append(weights(run))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_killed_training_ends_with_the_same_bits(drawings: list, tmp_path: Path):
    whole = Training(RECIPE, drawings, model=MODEL)
    for _ in range(RECIPE.steps):
        whole.run_step()
    first = Training(RECIPE, drawings, model=MODEL)
    for _ in range(3):  # in the middle of the second phase
        first.run_step()
    first.save(tmp_path / "state.pt")
    second = Training(RECIPE, drawings, model=MODEL)
    second.resume(tmp_path / "state.pt")
    while second.step < RECIPE.steps:
        second.run_step()
    assert same(weights(whole), weights(second))
    assert same(whole.network.state_dict(), second.network.state_dict())


def test_a_state_of_another_recipe_is_refused(drawings: list, tmp_path: Path):
    Training(RECIPE, drawings, model=MODEL).save(tmp_path / "state.pt")
    other = Training(replace(RECIPE, lr=1e-5), drawings, model=MODEL)
    with pytest.raises(UserError, match="another recipe"):
        other.resume(tmp_path / "state.pt")


@pytest.mark.parametrize("content", [b"half a file", None])
def test_a_broken_or_foreign_state_is_one_clear_error(content: bytes | None, drawings: list, tmp_path: Path):
    path = tmp_path / "state.pt"
    if content is None:
        torch.save({"weights": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="Remove it to start again"):
        Training(RECIPE, drawings, model=MODEL).resume(path)


def test_a_step_that_is_not_finite_changes_nothing(drawings: list, monkeypatch: pytest.MonkeyPatch):
    run = Training(RECIPE, drawings, model=MODEL)
    before = {key: value.clone() for key, value in run.network.state_dict().items()}
    monkeypatch.setattr(objective, "IOU_WEIGHT", float("nan"))
    with pytest.raises(UserError, match="Step 0"):
        run.run_step()
    assert run.step == 0
    assert same(before, run.network.state_dict())


def test_training_moves_every_part_of_sam(drawings: list):
    run = Training(RECIPE, drawings, model=MODEL)
    before = {key: value.clone() for key, value in run.network.state_dict().items()}
    for _ in range(RECIPE.steps):
        run.run_step()
    still = [key for key, value in run.network.state_dict().items() if torch.equal(value, before[key])]
    # random frequencies are fixed; in so few steps a point outside the mask may not have come up, nor each of the three
    # masks have been the best
    chance = ("gaussian_matrix", "point_embeddings.0", "output_hypernetworks_mlps")
    assert [key for key in still if not any(part in key for part in chance)] == []
    assert not [key for key in still if "output_hypernetworks_mlps.0" in key]


def test_the_learning_rate_rises_and_falls():
    part = (Phase(64, 1, 1, 1, 100),)
    recipe = replace(RECIPE, phases=part, robust=part, warmup=10, lr=1.0, robust_lr=0.5)
    rates = [recipe.rate(step) for step in range(200)]
    for own, highest in ((rates[:100], 1.0), (rates[100:], 0.5)):
        assert own[0] == pytest.approx(0.1 * highest)
        assert max(own) == own[9] == pytest.approx(highest)
        assert own[10:] == sorted(own[10:], reverse=True)
        assert own[-1] < 0.02 * highest


def test_the_written_file_is_a_model_like_any_other(tmp_path: Path):
    state = seeded_weights(MODELS["vit_tiny"], 5)
    write_weights(state, tmp_path / "own.safetensors", "a test")
    parts = load_parts(get_model(str(tmp_path / "own.safetensors")))
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(parts.image_encoder.state_dict()[key], state["image_encoder." + key].half().float())


def test_weights_beyond_half_precision_are_not_written(tmp_path: Path):
    with pytest.raises(UserError, match="half precision"):
        write_weights({"a": torch.tensor([1e6])}, tmp_path / "own.safetensors", "")
    assert not list(tmp_path.iterdir())
