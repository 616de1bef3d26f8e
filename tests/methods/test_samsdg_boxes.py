"""Boxes that prompt SAM: found, jittered, compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samsdg_published import search

from nnunet_dgplugins.methods.samsdg import boxes
from nnunet_dgplugins.methods.samsdg.boxes import BoxRule, find_boxes, jittered, refined_boxes


def map_of(*rectangles: tuple[int, int, int, int], side: int = 512, value: float = 1.0) -> torch.Tensor:
    """Probability map (1, side, side), ``value`` inside rectangles (top, bottom, left, right)."""
    probability = torch.zeros(1, side, side)
    for top, bottom, left, right in rectangles:
        probability[0, top:bottom, left:right] = value
    return probability


@pytest.mark.parametrize("density", [0.15, 0.4, 0.6, 0.95])
def test_boxes_equal_the_released_search_on_masks_of_many_components(density):
    random = np.random.default_rng(int(100 * density))
    masks = random.random((12, 22, 27)) < density
    found, there = boxes.component_boxes(masks)
    assert there.all()
    for mask, box in zip(masks, found, strict=True):
        np.testing.assert_array_equal(box, search(torch.from_numpy(mask)).numpy())


def test_filtered_masks_hold_the_pixels_of_the_largest_component_only():
    mask = np.zeros((20, 20), np.uint8)
    mask[2:6, 3:8] = 1  # 20 pixels
    mask[6:9, 8:11] = 1  # touches at a corner only
    mask[15, :12] = 1
    expected = np.zeros_like(mask, dtype=bool)
    expected[2:6, 3:8] = True
    np.testing.assert_array_equal(boxes.filter_mask(mask), expected)
    assert not boxes.filter_mask(np.zeros((5, 5), np.uint8)).any()


def test_of_equally_large_components_all_count():
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 1:3, 1:4], mask[0, 10:13, 12:14], mask[0, 6, 6] = True, True, True
    np.testing.assert_array_equal(boxes.component_boxes(mask)[0], [[1, 1, 13, 12]])
    assert boxes.filter_mask(mask[0]).sum() == 12


def test_a_box_ends_on_the_last_block_of_four_pixels():
    found, there = refined_boxes(map_of((40, 80, 100, 160)))
    assert found.tolist() == [[100, 40, 156, 76]]
    assert there.all()


def test_nothing_found_gives_the_released_box_of_the_whole_map_and_says_so():
    found, there = refined_boxes(torch.cat([map_of(), map_of((40, 80, 100, 160), value=0.7)]))
    assert found.tolist() == [[0, 0, 508, 508]] * 2
    assert not there.any()


def test_the_map_is_made_smaller_before_the_threshold():
    # one pixel of the two that a block's mean looks at per axis: 0.25, below the threshold that the pixel itself passes
    assert not refined_boxes(map_of((41, 42, 101, 102)))[1].any()
    assert refined_boxes(map_of((41, 43, 101, 103)))[1].all()


def test_a_map_no_larger_than_the_grid_is_searched_as_it_is():
    found, _ = refined_boxes(map_of((5, 9, 7, 20), side=64))
    assert found.tolist() == [[7, 5, 19, 8]]
    found, _ = refined_boxes(map_of((40, 80, 100, 160), side=256), grid=128)
    assert found.tolist() == [[100, 40, 158, 78]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("refined", [200, 200, 296, 296]), ("unfiltered", [20, 20, 299, 299]), ("tile", [0, 0, 512, 512])],
)
def test_each_rule_gives_its_own_box(kind, expected):
    probability = map_of((20, 28, 20, 28), (200, 300, 200, 300))
    assert find_boxes(probability, BoxRule(kind))[0].tolist() == [expected]


@pytest.mark.parametrize(("kind", "there"), [("refined", False), ("unfiltered", False), ("tile", True)])
def test_only_the_whole_tile_is_always_found(kind, there):
    assert find_boxes(map_of(), BoxRule(kind))[1].tolist() == [there]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="kind is one of"):
        BoxRule("coarse")


def test_jitter_draws_every_number_up_to_its_limit_and_none_beyond():
    draw = boxes.draw_jitter((500, 2), np.random.default_rng(0))
    assert draw.shape == (500, 2, 4)
    assert all(set(np.unique(draw[..., edge])) == set(range(10)) for edge in range(4))
    np.testing.assert_array_equal(draw, boxes.draw_jitter((500, 2), np.random.default_rng(0)))
    assert not boxes.draw_jitter((50,), np.random.default_rng(0), largest=0).any()


def test_each_edge_moves_outward_by_its_own_number():
    found = jittered(torch.tensor([[100.0, 200, 300, 400]]), np.array([[1, 2, 3, 4]]), 512)
    assert found.tolist() == [[99, 197, 302, 404]]
    half = jittered(torch.tensor([[100.0, 200, 300, 400]]), np.array([[1, 2, 3, 4]]), 512, step=0.5)
    assert half.tolist() == [[99.5, 198.5, 301, 402]]


def test_jitter_never_leaves_the_tile_and_never_shrinks_a_box():
    random = np.random.default_rng(1)
    corners = np.sort(random.integers(0, 128, (200, 2, 2)), axis=1)
    plain = torch.from_numpy(corners.reshape(200, 4)).float()
    moved = jittered(plain, boxes.draw_jitter((200,), random), 128)
    assert moved.min() >= 0
    assert moved.max() <= 128
    assert (moved[:, :2] <= plain[:, :2]).all()
    assert (moved[:, 2:] >= plain[:, 2:]).all()


def test_boxes_of_nothing_stay_where_they_are():
    plain = torch.tensor([[10.0, 10, 20, 20], [0, 0, 0, 0]])
    moved = jittered(plain, np.full((2, 4), 5), 64, torch.tensor([True, False]))
    assert moved.tolist() == [[5, 5, 25, 25], [0, 0, 0, 0]]


def test_the_overlap_is_that_of_the_rectangles():
    one = torch.tensor([0.0, 0, 10, 10])
    others = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [30, 30, 40, 40], [0, 0, 0, 0]])
    found = boxes.box_iou(one.expand(5, 4), others)
    torch.testing.assert_close(found, torch.tensor([1, 1 / 3, 0, 0, 0]), atol=1e-6, rtol=0)
