"""The rules from maps to masks: joint scaling, tags, ties, constant maps, white background."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_dgplugins.methods.dcam.masks import (
    IGNORE,
    cam_mask,
    pseudo_masks,
    scale_jointly,
    tagged_mask,
    white_pixels,
)
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38
from nnunet_dgplugins.methods.dcam.white import SMALLEST_COMPONENT, grey, white_background


def dark(height: int = 30, width: int = 30) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def tags(*flags: int) -> torch.Tensor:
    return torch.tensor([flags])


@pytest.mark.parametrize(("pixels", "kept"), [(49, False), (50, True), (51, True)])
@pytest.mark.parametrize("across", [False, True])
def test_white_regions_of_fifty_pixels_are_kept_and_smaller_ones_are_tissue(pixels, kept, across):
    image = dark(60, 60)
    image[3, 2 : 2 + pixels] = 255
    if across:
        image = image.transpose(1, 0, 2)
    assert int(white_background(image).sum()) == (pixels if kept else 0)


def test_regions_that_touch_at_a_corner_are_two():
    image = dark()
    image[0:5, 0:5] = 255
    image[5:10, 5:10] = 255
    image[20:30, 0:5] = 255  # 50 of its own, at the image's edge
    expected = np.zeros((30, 30), bool)
    expected[20:30, 0:5] = True
    np.testing.assert_array_equal(white_background(image), expected)


def test_a_region_of_any_shape_counts_its_pixels():
    image = dark()
    image[2:12, 2:12] = 255
    image[4:10, 4:10] = 90  # a frame of 64 pixels around tissue
    found = white_background(image)
    assert int(found.sum()) == 100 - 36
    assert not found[6, 6]


@pytest.mark.parametrize(("level", "white"), [(200, False), (201, True)])
def test_white_begins_above_grey_200(level, white):
    assert bool(white_background(np.full((10, 10, 3), level, np.uint8)).any()) == white


def test_grey_is_opencvs_integer_formula():
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [201, 200, 201]], np.uint8)
    # (9798 R + 19235 G + 3735 B + 16384) >> 15
    np.testing.assert_array_equal(grey(colours), [0, 255, 76, 150, 29, 200])
    assert grey(colours).dtype == np.uint8


def test_an_image_without_white_and_one_that_is_all_white():
    assert not white_background(dark()).any()
    assert white_background(np.full((30, 30, 3), 255, np.uint8)).all()
    assert SMALLEST_COMPONENT == 50


def test_white_pixels_of_floating_point_images_are_those_of_their_levels():
    levels = torch.randint(195, 206, (2, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    levels[1] = 201
    found = white_pixels(levels.float() / 255)
    for number in range(2):
        expected = white_background(levels[number].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(found[number], expected)
    assert found[1].all()


def test_scaling_is_over_all_classes_and_pixels_of_an_image():
    maps = torch.tensor([[[[0.0, 1.0]], [[-1.0, 3.0]]], [[[5.0, 5.0]], [[5.0, 9.0]]]])
    expected = torch.tensor([[[[0.25, 0.5]], [[0.0, 1.0]]], [[[0.0, 0.0]], [[0.0, 1.0]]]])
    torch.testing.assert_close(scale_jointly(maps), expected)


def test_constant_maps_scale_to_zero_and_fall_to_the_lowest_tagged_class():
    maps = torch.full((1, 3, 4, 4), 7.0)
    assert torch.equal(scale_jointly(maps), torch.zeros_like(maps))
    assert torch.equal(tagged_mask(maps, tags(0, 1, 1)), torch.ones(1, 4, 4, dtype=torch.uint8))
    published = tagged_mask(maps, tags(0, 1, 1), published_ties=True)
    assert torch.equal(published, torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_the_largest_tagged_score_wins_and_untagged_classes_never():
    maps = torch.tensor([[[[9.0, 9.0, 9.0]], [[1.0, 2.0, 0.0]], [[2.0, 1.0, 0.0]]]])
    assert tagged_mask(maps, tags(0, 1, 1)).tolist() == [[[2, 1, 1]]]
    # as released, the pixel at the joint minimum ties with the untagged class's 0
    assert tagged_mask(maps, tags(0, 1, 1), published_ties=True).tolist() == [[[2, 1, 0]]]


def test_a_class_alone_fills_the_image():
    maps = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tagged_mask(maps, tags(0, 0, 0, 1)), torch.full((1, 6, 6), 3, dtype=torch.uint8))


def test_an_image_without_tags_is_unknown_everywhere_also_where_it_is_white():
    torch.manual_seed(0)
    network = ResNet38(2, width_divisor=32).eval()
    images = torch.ones(2, 3, 32, 32)
    images[:, :, :, 16:] = 0.3
    made = pseudo_masks(network, images, torch.tensor([[0, 0], [1, 0]]), white=True)
    for mask in made.values():
        assert torch.equal(mask[0], torch.full((32, 32), IGNORE, dtype=torch.uint8))
        assert torch.equal(mask[1][:, :16], torch.full((32, 16), 2, dtype=torch.uint8))
        assert torch.equal(mask[1][:, 16:], torch.zeros(32, 16, dtype=torch.uint8))


def test_the_classifiers_own_masks_hold_the_classes_it_believes_in():
    maps = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = cam_mask(maps, torch.tensor([[0.1, 0.3, 0.9]]), (16, 16))
    assert set(found.unique().tolist()) == {1, 2}
    assert set(cam_mask(maps, torch.tensor([[0.1, 0.2, 0.25]]), (16, 16)).unique().tolist()) == {2}
