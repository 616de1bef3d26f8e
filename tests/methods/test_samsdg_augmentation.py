"""Location-scale augmentation and saliency-balancing fusion beyond the stored vectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnunet_dgplugins.methods.samsdg import location_scale, saliency
from nnunet_dgplugins.methods.samsdg.location_scale import CurveDraw, draw_curves, global_version, local_version


def images_and_masks(batch: int = 3, channels: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, channels, 12, 14, generator=generator)
    masks = torch.zeros(batch, 2, 12, 14)
    masks[:, 0, 2:6, 2:8] = 1
    masks[:, 1, 7:11, 3:12] = 1
    return images, masks


def test_draws_repeat_with_their_seed_and_have_the_published_spread():
    first, second = (draw_curves(4000, 2, np.random.default_rng(0)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.control, other.control)
        np.testing.assert_array_equal(one.location, other.location)
    whole, local = first
    assert whole.control.shape == (4000, 1, 4)
    assert local.control.shape == (4000, 3, 4)
    assert not whole.falling.any()
    assert local.falling[:, 0].all()
    assert abs(local.falling[:, 1:].mean() - 0.5) < 0.03
    assert abs(local.scale.mean() - 1) < 0.01
    assert abs(local.scale.std() - 0.1) < 0.01
    assert abs(local.location.mean()) < 0.03
    assert abs(local.location.std() - 0.5) < 0.02


def test_the_global_version_keeps_the_order_of_intensities():
    images, _ = images_and_masks()
    found = global_version(images, draw_curves(3, 2, np.random.default_rng(1))[0])
    for before, after in zip(images.flatten(1), found.flatten(1), strict=True):
        assert (after[before.argsort()].diff() >= -1e-6).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert not torch.allclose(found, images, atol=0.01)


def test_the_background_of_the_local_version_turns_over_and_near_black_stays():
    images, masks = images_and_masks()
    images[:, :, 0, :3] = 0.005
    draw = draw_curves(3, 2, np.random.default_rng(2))[1]
    draw.control[:] = (0.2, 0.7, 0.9, 0.3)  # a curve without a wiggle
    found = local_version(images, masks, draw)
    assert torch.equal(found[:, :, 0, :3], images[:, :, 0, :3])
    for image, result, classes in zip(images, found, masks.any(1, keepdim=True), strict=True):
        chosen = ~classes & (image > 0.01)
        before, after = image[chosen], result[chosen]
        assert (after[before.argsort()].diff() <= 1e-6).all()


def test_several_channels_share_one_curve():
    images, masks = images_and_masks(channels=1)
    thrice = images.expand(-1, 3, -1, -1)
    whole, local = draw_curves(3, 2, np.random.default_rng(3))
    # without a shift: percentiles lie between other pixels where each is there three times
    whole, local = (replace(draw, location=np.zeros_like(draw.location)) for draw in (whole, local))
    torch.testing.assert_close(global_version(thrice, whole), global_version(images, whole).expand(-1, 3, -1, -1))
    alone = local_version(images, masks, local)
    torch.testing.assert_close(local_version(thrice, masks, local), alone.expand(-1, 3, -1, -1))


def test_a_batch_is_augmented_like_its_images_one_by_one():
    images, masks = images_and_masks(channels=2)
    whole, local = draw_curves(3, 2, np.random.default_rng(4))
    for index in range(3):
        own = slice(index, index + 1)
        assert torch.equal(global_version(images, whole)[own], global_version(images[own], whole.of(own)))
        alone = local_version(images[own], masks[own], local.of(own))
        assert torch.equal(local_version(images, masks, local)[own], alone)


def test_each_image_is_shown_in_the_version_that_was_drawn_for_it():
    images, masks = images_and_masks()
    draws = draw_curves(3, 2, np.random.default_rng(8))
    whole, local = global_version(images, draws[0]), local_version(images, masks, draws[1])
    for chosen in ([True, False, True], [True] * 3, [False] * 3):
        found = location_scale.either_version(images, masks, draws, np.array(chosen))
        expected = [local[index] if is_local else whole[index] for index, is_local in enumerate(chosen)]
        assert torch.equal(found, torch.stack(expected))


def test_a_class_that_is_not_there_changes_nothing():
    images, masks = images_and_masks()
    masks[:, 1] = 0
    local = draw_curves(3, 2, np.random.default_rng(5))[1]
    other = replace(local, control=local.control.copy(), location=local.location.copy())
    other.control[:, 2], other.location[:, 2] = 0.9, 3.0
    found = local_version(images, masks, local)
    assert torch.equal(found, local_version(images, masks, other))
    assert torch.equal(found, local_version(images, masks[:, :1], part_of_regions(local, 2)))


def part_of_regions(draw: CurveDraw, count: int) -> CurveDraw:
    return CurveDraw(draw.control[:, :count], draw.falling[:, :count], draw.scale[:, :count], draw.location[:, :count])


def test_where_classes_overlap_the_later_one_counts():
    images, masks = images_and_masks()
    masks[:, 0] = 1
    apart = masks.clone()
    apart[:, 0] -= apart[:, 1]
    local = draw_curves(3, 2, np.random.default_rng(6))[1]
    assert torch.equal(local_version(images, masks, local), local_version(images, apart, local))


def test_a_constant_image_stays_finite():
    images, masks = torch.full((1, 1, 8, 8), 0.3), torch.zeros(1, 1, 8, 8)
    whole, local = draw_curves(1, 1, np.random.default_rng(7))
    for found in (global_version(images, whole), local_version(images, masks, local)):
        assert torch.isfinite(found).all()
        assert (found == found[0, 0, 0, 0]).all()


def test_scale_and_shift_follow_the_formula():
    values = torch.linspace(0.2, 0.6, 11, dtype=torch.float64)[None]
    everywhere = torch.ones_like(values, dtype=torch.bool)
    one, far = torch.ones(1, dtype=torch.float64), torch.full((1,), 9.0, dtype=torch.float64)
    # the 20 percentile 0.28 may go down to 0, the 80 percentile 0.52 up to 1; the scale ends at 1.1
    down = location_scale.shifted(values, everywhere, one, -far)
    torch.testing.assert_close(down, (values - 0.28).clamp(0, 1))
    up = location_scale.shifted(values, everywhere, far, far)
    torch.testing.assert_close(up, (values * 1.1 + 0.48).clamp(0, 1))


# saliency


def published_map(gradient: torch.Tensor, grid: int) -> torch.Tensor:
    """The released order of work: two-dimensional kernel, transposed convolution, enlarging; square cells."""
    cell = gradient.shape[-1] // grid
    box = torch.ones(1, 1, cell, cell)
    kernel = box
    for index in (1, 2):
        kernel = F.conv2d(kernel, box, padding=index * cell) / cell**2
    pooled = F.adaptive_avg_pool2d(gradient, grid)
    smooth = F.conv_transpose2d(pooled, kernel, stride=cell, padding=(kernel.shape[-1] - 1) // 2)
    large = F.interpolate(smooth, size=gradient.shape[-2:], mode="bilinear", align_corners=True)
    low, high = large.amin((-2, -1), keepdim=True), large.amax((-2, -1), keepdim=True)
    return (large - low + 1e-20) / (high - low + 1e-20)


@pytest.mark.parametrize(("side", "grid"), [(32, 3), (45, 4), (30, 30), (64, 18)])
def test_the_map_is_that_of_the_two_dimensional_order_of_work(side, grid):
    gradient = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(side)) ** 4
    torch.testing.assert_close(saliency.saliency_map(gradient, grid), published_map(gradient, grid), atol=2e-5, rtol=0)


def test_images_need_not_be_square():
    gradient = torch.rand(1, 1, 24, 60, generator=torch.Generator().manual_seed(0))
    turned = saliency.saliency_map(gradient.transpose(2, 3), 3).transpose(2, 3)
    torch.testing.assert_close(saliency.saliency_map(gradient, 3), turned)


def test_the_global_version_stays_where_the_loss_looks():
    gradient = torch.zeros(1, 3, 48, 48)
    gradient[..., :16, :16] = -1
    found = saliency.saliency_map(saliency.input_saliency(gradient), 3)
    assert found.min() == pytest.approx(0, abs=1e-6)
    assert found.max() == 1
    assert found[0, 0, 4, 4] > 0.8
    assert found[0, 0, 44, 44] < 0.05
    fused = saliency.fuse(torch.ones(1, 3, 48, 48, requires_grad=True), torch.zeros(1, 3, 48, 48), found)
    assert torch.equal(fused, found.expand(1, 3, -1, -1))
    assert not fused.requires_grad


def test_the_gradient_is_measured_by_its_root_mean_square_over_channels():
    gradient = torch.tensor([3.0, -4.0])[None, :, None, None].expand(1, 2, 2, 2)
    torch.testing.assert_close(saliency.input_saliency(gradient), torch.full((1, 1, 2, 2), 12.5**0.5))


def test_more_cells_than_pixels_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        saliency.saliency_map(torch.rand(1, 1, 8, 8), 9)
