"""CutMix masks beyond the stored vectors: randomness, overlaps, volumes, mixing."""

from __future__ import annotations

import pytest
import torch

from nnunet_dgplugins.methods.epl.cutmix import AREA, mix, paint_boxes, sample_boxes, sample_masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def box(area: float, aspect: float, row: float, column: float) -> list[float]:
    return [area, aspect, row, column]


def test_the_same_generator_gives_the_same_masks_and_torchs_global_one_is_left_alone():
    before = torch.get_rng_state()
    first, second = (sample_masks(4, (40, 48), generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample_masks(4, (40, 48), generator(4)))
    assert torch.equal(before, torch.get_rng_state())


def test_draws_do_not_depend_on_the_size_they_are_painted_at():
    drawn = sample_boxes(2, generator())
    assert drawn.shape == (2, 3, 4)
    assert drawn.dtype == torch.float64
    small, large = paint_boxes(drawn, (40, 40)).float(), paint_boxes(drawn, (80, 80)).float()
    coarse = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - coarse).abs().mean() < 0.05  # the same boxes up to rounding of their borders


def test_drawn_areas_lie_in_their_range_and_the_rest_between_zero_and_one():
    drawn = sample_boxes(500, generator(), boxes=2, area=(0.1, 0.3))
    assert drawn[..., 0].min() >= 0.1
    assert drawn[..., 0].max() <= 0.3
    assert drawn[..., 0].max() - drawn[..., 0].min() > 0.19
    assert drawn[..., 1:].min() >= 0
    assert drawn[..., 1:].max() < 1


def test_a_single_box_covers_the_share_it_drew():
    drawn = sample_boxes(50, generator(), boxes=1)
    share = paint_boxes(drawn, (200, 200)).float().mean((1, 2, 3)).double()
    torch.testing.assert_close(share, drawn[:, 0, 0], atol=0.01, rtol=0)
    assert share.min() > AREA[0] - 0.01
    assert share.max() < AREA[1] + 0.01


def test_a_single_box_lies_where_it_was_drawn():
    masks = paint_boxes(torch.tensor([[box(0.25, 0.5, 0.0, 1.0)]], dtype=torch.float64), (8, 12))
    expected = torch.zeros(1, 1, 8, 12, dtype=torch.bool)
    expected[:, :, :4, 6:] = True  # half of each side, at the top and at the right
    assert torch.equal(masks, expected)


def test_where_two_boxes_overlap_the_mask_is_zero_again():
    first, second = box(0.5, 0.5, 0.0, 0.0), box(0.5, 0.5, 1.0, 1.0)
    both = paint_boxes(torch.tensor([[first, second]], dtype=torch.float64), (20, 20))
    twice = paint_boxes(torch.tensor([[first, first]], dtype=torch.float64), (20, 20))
    thrice = paint_boxes(torch.tensor([[first, first, first]], dtype=torch.float64), (20, 20))
    assert both.any()
    assert not twice.any()
    assert thrice.any()


def test_boxes_of_a_volume_go_through_all_its_slices():
    volume = sample_masks(3, (5, 20, 24), generator())
    flat = sample_masks(3, (20, 24), generator())
    assert volume.shape == (3, 1, 5, 20, 24)
    for z in range(5):
        assert torch.equal(volume[:, :, z], flat)


@pytest.mark.parametrize("size", [(6, 8), (2, 6, 8)])
@pytest.mark.parametrize("kind", [bool, float, int])
def test_mixing_takes_the_second_where_the_mask_is_one(size, kind):
    masks = sample_masks(2, size, generator())
    first, second = torch.randn(2, 3, *size), torch.randn(2, 3, *size)
    found = mix(first, second, masks.to(torch.tensor(kind(1)).dtype))
    assert torch.equal(found, first * ~masks + second * masks)
    labels = mix(first.argmax(1), second.argmax(1), masks)
    assert torch.equal(labels, found.argmax(1))
    assert labels.dtype == torch.int64


def test_arguments_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="within"):
        sample_masks(1, (8, 8), area=(0.0, 0.5))
    with pytest.raises(ValueError, match="within"):
        sample_boxes(1, area=(0.6, 0.5))
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        paint_boxes(sample_boxes(1), (8,))
