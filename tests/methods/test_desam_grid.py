"""Grid inference against the plain selection over all masks, and how much work it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_dgplugins.methods.desam import prompts
from nnunet_dgplugins.methods.desam.decoder import DeSAMDecoder
from nnunet_dgplugins.methods.desam.grid import CLOSED, predict_grid, select_lazily
from nnunet_dgplugins.methods.desam.head import DeSAMHead
from nnunet_dgplugins.methods.desam.selection import SelectionRule, clean, mask_box, select_masks, suppress_border
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder

SIZE, CANVAS, TOKENS = 24, 64, 4
SMALL_REGION = 9 * (256 / SIZE) ** 2  # nine pixels of these small masks


def random_masks(rng: np.random.Generator, points: int, classes: int) -> torch.Tensor:
    """Logits of rectangles with holes and specks, near copies of each other, some empty, some full."""
    logits = np.full((points, classes, SIZE, SIZE), -1.0)
    templates = rng.integers(0, SIZE - 3, size=(3, 2))
    for point in range(points):
        for k in range(classes):
            canvas = logits[point, k]
            kind = rng.random()
            if kind < 0.12:
                continue
            y, x = templates[rng.integers(3)] + rng.integers(0, 2, 2)
            height, width = rng.integers(1, 16, 2) if kind < 0.5 else (10, 9)
            canvas[y : y + height, x : x + width] = 1
            for _ in range(rng.integers(0, 3)):
                holes = rng.integers(0, SIZE, 2)
                canvas[holes[0], holes[1]] *= -1
            if kind > 0.97:
                canvas[:] = 1
    magnitude = rng.choice([0.0, 0.01, 0.5, 3.0], size=logits.shape, p=[0.02, 0.2, 0.28, 0.5])
    return torch.from_numpy(logits * magnitude).float()


def others(logits: torch.Tensor, k: int) -> np.ndarray | None:
    """What each decode (N, K, H, W) gives to classes other than k."""
    masks = np.delete(logits.detach().numpy() > 0, k, axis=1)
    return masks.any(axis=1) if masks.shape[1] else None


def random_scores(rng: np.random.Generator, points: int, classes: int) -> torch.Tensor:
    """Scores with many ties, exact thresholds and now and then something that is no number."""
    if rng.random() < 0.5:
        values = rng.choice([0.2, 0.5, 0.50001, 0.6, 0.9, 1.3], size=(points, classes))
    else:
        values = rng.normal(rng.choice([0.2, 0.6]), 0.2, size=(points, classes))
    if rng.random() < 0.1:
        values[rng.integers(points)] = np.nan
    return torch.from_numpy(values).float()


@pytest.mark.parametrize("seed", range(8))
def test_deciding_early_never_changes_the_selected_mask(seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        points, classes = int(rng.integers(1, 20)), int(rng.integers(1, 4))
        logits, iou = random_masks(rng, points, classes), random_scores(rng, points, classes)
        rule = SelectionRule(
            nms_threshold=float(rng.choice([0.3, 0.7])),
            min_region_area=float(rng.choice([0, SMALL_REGION, 4 * SMALL_REGION])),
            border=int(rng.choice([0, 0, 30])),
        )
        decoded: list[int] = []

        def decode(wanted, logits=logits, decoded=decoded):
            decoded.extend(wanted)
            return logits[list(wanted)]

        found, winners = select_lazily(iou, decode, (SIZE, SIZE), rule, decode_batch=int(rng.integers(1, 4)))
        assert torch.isfinite(found).all()
        assert len(decoded) == len(set(decoded))
        assert all((iou[point] > rule.iou_threshold).any() for point in decoded)
        for k in range(classes):
            kept = select_masks(logits[:, k], iou[:, k], rule, others(logits, k))
            expected = suppress_border(kept.selected, rule.frame_in(kept.masks.shape))
            np.testing.assert_array_equal(found[k].numpy() > 0, expected)
            assert winners[k] == (kept.points[0] if len(kept.points) else -1)
            if winners[k] < 0:
                assert (found[k] == CLOSED).all()


def lazily(logits: torch.Tensor, iou: list[float], rule: SelectionRule) -> tuple[list[int], int]:
    decoded: list[int] = []

    def decode(wanted):
        decoded.extend(wanted)
        return logits[list(wanted)]

    _, winners = select_lazily(torch.tensor(iou)[:, None], decode, (SIZE, SIZE), rule)
    return decoded, winners[0]


def rectangles(*boxes: tuple[int, int, int, int]) -> torch.Tensor:
    logits = torch.full((len(boxes), 1, SIZE, SIZE), -2.0)
    for i, (y0, x0, y1, x1) in enumerate(boxes):
        logits[i, 0, y0:y1, x0:x1] = 2.0
    return logits


RULE = SelectionRule(min_region_area=SMALL_REGION)


def test_a_clear_winner_needs_one_decode():
    logits = rectangles((2, 2, 10, 10), (3, 3, 11, 11), (12, 12, 20, 20))
    assert lazily(logits, [0.7, 0.9, 0.8], RULE) == ([1], 1)


def test_points_at_or_below_the_threshold_are_never_decoded():
    logits = rectangles((0, 0, 2, 2), (10, 10, 12, 12), (12, 12, 20, 20))  # the first two are too small to be clean
    assert lazily(logits, [0.7, 0.6, 0.5], RULE) == ([0, 1], 0)


def test_a_clean_mask_of_lower_score_beats_a_dirty_one():
    logits = rectangles((0, 0, 2, 2), (12, 12, 20, 20), (2, 2, 10, 10))
    assert lazily(logits, [0.9, 0.8, 0.7], RULE) == ([0, 1], 1)


def test_a_clean_mask_that_a_dirty_one_suppresses_does_not_count():
    logits = rectangles((2, 2, 12, 12), (2, 2, 12, 12), (14, 14, 20, 20))
    logits[0, 0, 5, 5] = -2.0  # a hole: same box as the clean mask behind it
    assert lazily(logits, [0.9, 0.8, 0.7], RULE) == ([0, 1, 2], 2)


def test_only_what_clean_up_changed_gets_another_logit():
    logits = rectangles((2, 2, 12, 12))
    logits[0, 0, 5, 5], logits[0, 0, 20, 20] = -0.25, 7.0
    found, _ = select_lazily(torch.ones(1, 1), lambda _: logits, (SIZE, SIZE), RULE)
    expected = logits[0, 0].clone()
    expected[5, 5], expected[20, 20] = 1.0, -1.0
    assert torch.equal(found[0], expected)


def test_a_single_small_island_counts_as_changed_though_no_pixel_differs():
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[3:5, 3:5] = True
    cleaned, changed = clean(mask, 9)
    assert changed
    np.testing.assert_array_equal(cleaned, mask)
    assert clean(mask, 4)[1] is False


def test_equally_large_islands_are_ranked_by_blocks_of_four_pixels():
    mask = np.zeros((4, 8), dtype=bool)
    mask[1, 0] = mask[0, 6] = True  # (0, 6) comes first by pixel, (1, 0) by block
    assert clean(mask, 5)[0].nonzero()[1].tolist() == [0]


def test_empty_masks_have_an_empty_box_and_are_never_suppressed():
    assert mask_box(np.zeros((4, 4), dtype=bool)) == (0, 0, 0, 0)
    assert len(select_masks(torch.full((3, SIZE, SIZE), -1.0), torch.ones(3)).points) == 3


def test_areas_and_frames_follow_the_size_of_the_mask():
    rule = SelectionRule(min_region_area=1000, border=50)
    assert rule.area_in((256, 256)) == 1000
    assert rule.area_in((3, 128, 128)) == 250
    assert rule.frame_in((128, 256)) == (25, 50)


# the whole decoder


@pytest.fixture(scope="module")
def setting() -> tuple[DeSAMDecoder, list[torch.Tensor], torch.Tensor, torch.nn.Module]:
    torch.manual_seed(0)
    decoder = DeSAMDecoder(
        encoder_channels=24, width=64, mlp_dim=32, num_heads=4, iou_head_hidden=32, num_classes=3
    ).requires_grad_(False)
    taps = [torch.randn(1, 24, TOKENS, TOKENS) for _ in range(3)]
    return decoder, taps, torch.randn(1, 64, TOKENS, TOKENS), build_prompt_encoder(64, TOKENS, CANVAS)


def grid_of(encoder: torch.nn.Module, n: int = 9) -> prompts.EncodedPrompts:
    return prompts.encode_points(encoder, prompts.grid_points(n, (CANVAS, CANVAS), CANVAS))


@pytest.mark.parametrize("area", [0, 2000, 30000])
@torch.no_grad()
def test_the_grid_gives_what_decoding_every_point_gives(setting, area):
    decoder, taps, neck, encoder = setting
    prompt = grid_of(encoder)
    embeddings, iou = decoder.prim(neck, prompt.sparse, prompt.dense, prompt.dense_pe)
    threshold = float(iou[:, :3].median(0).values.min())  # untrained scores lie anywhere
    rule = SelectionRule(iou_threshold=threshold, min_region_area=area)
    shared = decoder.share(decoder.contexts(taps))
    every = torch.cat([decoder.mask(one[None], shared) for one in embeddings])
    found = predict_grid(decoder, taps, neck, prompt, rule, prim_batch=81)
    for k in range(3):
        kept = select_masks(every[:, k], iou[:, k], rule, others(every, k))
        np.testing.assert_array_equal(found.logits[k].numpy() > 0, kept.selected)
        assert found.points[k] == kept.points[0]
        assert found.iou[k] == iou[kept.points[0], k]


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[int]:
    sizes: list[int] = []
    original = getattr(owner, name)

    def counted(*args):
        sizes.append(len(args[0]) if isinstance(args[0], torch.Tensor) else len(args[0][0]))
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return sizes


def test_a_slice_costs_one_context_evaluation_and_81_points_and_no_needless_mask(setting, monkeypatch):
    decoder, taps, neck, encoder = setting
    contexts = count_calls(monkeypatch, decoder, "contexts")
    masks = count_calls(monkeypatch, decoder, "mask")
    scored: list[int] = []
    prim = decoder.prim
    monkeypatch.setattr(decoder, "prim", lambda *a: scored.append(len(a[1])) or prim(*a))

    found = predict_grid(decoder, taps, neck, grid_of(encoder), SelectionRule(iou_threshold=-9, min_region_area=0))
    assert contexts == [1]
    assert sum(scored) == 81
    assert sum(masks) == len(set(found.points))  # a clear winner per class, decoded once even when two classes share it
    assert (found.stats.contexts, found.stats.prim_points, found.stats.masks_decoded) == (1, 81, sum(masks))

    masks.clear()
    nothing = predict_grid(decoder, taps, neck, grid_of(encoder), SelectionRule(iou_threshold=99))
    assert masks == []
    assert nothing.points == (-1, -1, -1)
    assert (nothing.logits == CLOSED).all()
    assert torch.isfinite(nothing.iou).all()


def test_the_whole_box_is_one_decoder_pass_for_all_slices(setting, monkeypatch):
    decoder, taps, neck, encoder = setting
    taps, neck = [torch.cat([tap, -tap]) for tap in taps], torch.cat([neck, -neck])
    contexts, masks = count_calls(monkeypatch, decoder, "contexts"), count_calls(monkeypatch, decoder, "mask")
    rule = SelectionRule(min_region_area=3000, border=30)
    head = DeSAMHead(decoder, encoder, "box", rule=rule)
    raw = head.box([*taps, neck])
    assert (contexts, masks) == ([2], [2])
    assert tuple(raw.shape) == (2, 3, 4 * TOKENS, 4 * TOKENS)

    cleaned, confidence = head([*taps, neck])
    assert ((confidence >= 0) & (confidence <= 1)).all()
    for b in range(2):
        for k in range(3):
            expected = clean(raw[b, k].numpy() > 0, rule.area_in(raw.shape), others(raw, k)[b])[0]
            expected = suppress_border(expected, rule.frame_in(raw.shape))
            np.testing.assert_array_equal(cleaned[b, k].numpy() > 0, expected)


def test_grid_prediction_repeats_itself_exactly(setting):
    decoder, taps, neck, encoder = setting
    rule = SelectionRule(iou_threshold=-9)
    first, second = (predict_grid(decoder, taps, neck, grid_of(encoder), rule) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert first.points == second.points


def test_grid_prediction_in_bfloat16_stays_finite_and_close(setting):
    decoder, taps, neck, encoder = setting
    rule = SelectionRule(iou_threshold=-9, min_region_area=0)
    plain = predict_grid(decoder, taps, neck, grid_of(encoder), rule)
    with torch.autocast("cpu", torch.bfloat16):
        cast = predict_grid(decoder, taps, neck, grid_of(encoder), rule)
    assert cast.logits.dtype == cast.iou.dtype == torch.float32
    assert torch.isfinite(cast.logits).all()
    torch.testing.assert_close(cast.iou, plain.iou, atol=0.05, rtol=0.05)
