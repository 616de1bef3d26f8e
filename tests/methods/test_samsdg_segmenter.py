"""Both networks of SAM-SDG as nnU-Net's predictor sees them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_dgplugins.content import CLOSED
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
from nnunet_dgplugins.methods.samsdg.boxes import BoxRule, draw_jitter
from nnunet_dgplugins.methods.samsdg.canvas import merge
from nnunet_dgplugins.methods.samsdg.decoder import BoxDecoder, build_mask_decoder
from nnunet_dgplugins.methods.samsdg.preprocess import resized, seen
from nnunet_dgplugins.methods.samsdg.segmenter import CoarseSegmenter, SAMSDGSegmenter

SIZES = SimpleNamespace(embed_dim=24, prompt_dim=32, decoder_mlp_dim=48, decoder_num_heads=4, iou_head_hidden=32)
GRID, CANVAS, TILE, COARSE = 4, 64, 32, 64
# these slices stand for whole patches
pytestmark = pytest.mark.filterwarnings("ignore:A slice fills")


class Encoder(nn.Module):
    """Patches that see the whole canvas, as after global attention; keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, SIZES.prompt_dim, CANVAS // GRID, CANVAS // GRID)
        self.shown: list[torch.Tensor] = []

    def forward(self, canvas: torch.Tensor) -> list[torch.Tensor]:
        self.shown.append(canvas)
        found = self.patches(canvas)
        return [canvas, found + found.mean((2, 3), keepdim=True)]


class Bright(nn.Module):
    """Coarse network that finds class k in the k-th brightest band, sharply; batch statistics that must not move."""

    def __init__(self, num_classes: int = 1):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.edges = [0.945 - 0.2 * k for k in range(num_classes)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value = images[:, :1] + 0 * self.norm(images)[:, :1]
        return torch.cat([60 * (value - edge) * (edge + 0.2 - value) * 20 for edge in self.edges], 1)


def network(num_classes: int = 1, **options: Any) -> SAMSDGSegmenter:
    torch.manual_seed(0)
    prompts = build_prompt_encoder(SIZES.prompt_dim, GRID, CANVAS)
    decoder = BoxDecoder(prompts, build_mask_decoder(SIZES, num_classes), num_classes)
    made = SAMSDGSegmenter(Encoder(), decoder, Bright(num_classes), COARSE, **options)
    return made.eval()


def slices(count: int = 3, height: int = 30, width: int = 26, channels: int = 1) -> torch.Tensor:
    """Dim noise with a bright blob at another place in each slice."""
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(count, channels, height, width, generator=generator) + 0.1
    for index in range(count):
        x[index, :, 4 + 2 * index : 9 + 2 * index, 6:12] += 9
    return x


def padded(x: torch.Tensor, rows: tuple[int, int] = (5, 9), columns: tuple[int, int] = (11, 3)) -> torch.Tensor:
    return nn.functional.pad(x, (*columns, *rows))


class Never(nn.Module):
    """Coarse network that finds nothing."""

    def __init__(self, num_classes: int = 1):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :1].expand(-1, self.num_classes, -1, -1) * 0 - 9


# lone slices


def test_a_slice_has_the_same_result_alone_and_in_any_order_of_a_batch():
    net, x = network(), slices(4)
    together = net(x)
    order = [2, 0, 3, 1]
    shuffled = net(x[order])
    for place, index in enumerate(order):
        assert torch.equal(shuffled[place], together[index])
        assert torch.equal(net(x[index : index + 1])[0], together[index])
    assert torch.equal(net(x), together)


def test_zero_padding_around_a_slice_never_changes_a_bit():
    net, x = network(), slices(2)
    for found, plain in zip(
        (net(padded(x)), net.segment_four(padded(x))[0]), (net(x), net.segment_four(x)[0]), strict=True
    ):
        assert torch.equal(found[:, :, 5:35, 11:37], plain)
        outside = torch.ones(44, 40, dtype=torch.bool)
        outside[5:35, 11:37] = False
        assert (found[:, 1, outside] == CLOSED).all()
        assert (found[:, 0] == 0).all()


def test_a_lone_slice_is_the_mean_of_its_four_places_on_a_canvas_of_itself():
    net, x = network(), slices(1)
    net(x)
    (canvas,) = net.image_encoder.shown
    assert torch.equal(canvas, merge(net.tiles(x.expand(4, -1, -1, -1))[0]))
    four = net.segment_four(x.expand(4, -1, -1, -1))[0]
    torch.testing.assert_close(net(x)[0], four.mean(0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(four[0], four[3], atol=1e-5)


# four neighbours


def test_neighbouring_slices_share_canvases_in_order_and_the_last_one_is_filled_up():
    net, x = network(), slices(6)
    net.segment_four(x)
    tiles = net.tiles(x)[0]
    expected = [merge(tiles[:4]), merge(tiles[[4, 5, 5, 5]])]
    assert len(net.image_encoder.shown) == 2
    for canvas, wanted in zip(net.image_encoder.shown, expected, strict=True):
        assert torch.equal(canvas, wanted)


def test_slices_on_one_canvas_see_each_other_and_lone_ones_do_not():
    net, x = network(), slices(4)
    other = x.clone()
    other[3] = other[3].flip(1)
    assert not torch.equal(net.segment_four(x)[0][0], net.segment_four(other)[0][0])
    assert torch.equal(net(x)[0], net(other)[0])


def test_both_ways_give_the_slices_own_geometry():
    net = network()
    for size in ((30, 26), (64, 128), (7, 90)):
        x = slices(5, *size)
        for logits, confidence in (net.segment(x), net.segment_four(x)):
            assert logits.shape == (5, 2, *size)
            assert confidence.shape == (5, 1)
            assert torch.isfinite(logits).all()
            assert logits.min() >= CLOSED
            assert logits.max() <= -CLOSED


def test_true_boxes_can_take_the_place_of_the_coarse_networks():
    net, x = network(), slices(3)
    boxes = torch.tensor([[[2.0, 3, 20, 25]], [[0, 0, 0, 0]], [[4, 4, 9, 9]]])
    found, confidence = net.segment_four(x, boxes)
    assert (found[1, 1] == CLOSED).all()
    assert confidence[1] == 1
    assert (found[[0, 2], 1] != CLOSED).all()
    assert not torch.equal(found, net.segment_four(x)[0])


# empty coarse masks


@pytest.mark.parametrize("way", ["segment", "segment_four"])
def test_where_the_coarse_network_finds_nothing_all_is_background_and_sam_is_not_asked(way):
    net = network()
    net.coarse = Never()
    logits, confidence = getattr(net, way)(slices(5))
    assert (logits[:, 1] == CLOSED).all()
    # as sure as its highest probability is low
    torch.testing.assert_close(confidence, 1 - torch.full((5, 1), -9.0).sigmoid())
    assert not net.image_encoder.shown


@pytest.mark.parametrize("way", ["segment", "segment_four"])
def test_as_published_it_is_asked_with_the_whole_tile(way, monkeypatch):
    net = network(empty="full_box")
    net.coarse = Never()
    asked = []
    plain = net.decode
    monkeypatch.setattr(net, "decode", lambda embeddings, boxes: (asked.append(boxes), plain(embeddings, boxes))[1])
    logits, _ = getattr(net, way)(slices(2))
    assert (logits[:, 1] != CLOSED).any()
    # the last of the coarse map's pixels, as in the released code: 508 of 512
    assert all((boxes == torch.tensor([0, 0, TILE - 0.5, TILE - 0.5])).all() for boxes in asked)


def test_slices_without_a_box_take_no_place_on_a_canvas():
    net, x = network(), slices(5)
    plain = net.prompts

    def without_the_second(images):
        asked = plain(images)
        asked.found[1:2] = False  # of the first four
        return asked

    net.prompts = without_the_second
    logits, _ = net.segment_four(x)
    (canvas,) = net.image_encoder.shown
    assert torch.equal(canvas, merge(net.tiles(x[[0, 2, 3, 4]])[0]))
    assert (logits[1, 1] == CLOSED).all()
    assert (logits[[0, 2, 3, 4], 1] != CLOSED).all()


def test_a_slice_of_zeros_is_background_for_sure():
    net, x = network(), slices(3)
    x[1] = 0
    for segment in (net.segment, net.segment_four):
        logits, confidence = segment(x)
        assert (logits[1, 1] == CLOSED).all()
        assert confidence[1] == 1
        assert (logits[[0, 2], 1] > CLOSED).all()
    assert (net(torch.zeros(2, 1, 8, 8))[:, 1] == CLOSED).all()


# options


def test_every_class_has_its_own_box_and_may_be_missing_alone():
    net, x = network(3), slices(4)
    _, images = net.tiles(x)
    boxes, found, _ = net.prompts(images)
    assert boxes.shape == (4, 3, 4)
    assert found.all()
    assert not torch.equal(boxes[:, 0], boxes[:, 1])
    plain = net.prompts

    def without_class_2(images):
        asked = plain(images)
        asked.found[:, 1], asked.peak[:, 1] = False, 0.25
        return asked

    net.prompts = without_class_2
    logits, confidence = net.segment(x)
    assert logits.shape[1] == 4
    assert (logits[:, 2] == CLOSED).all()
    assert (confidence[:, 1] == 0.75).all()
    assert (logits[:, [1, 3]] > CLOSED).all()


def test_boxes_are_found_on_the_coarse_map_and_given_in_pixels_of_the_tile():
    net = network(rule=BoxRule("tile"))
    x = slices(2)
    boxes = net.prompts(net.tiles(x)[1]).boxes
    assert boxes.tolist() == [[[0, 0, TILE, TILE]]] * 2
    boxes = network().prompts(net.tiles(x)[1]).boxes
    for index, box in enumerate(boxes[:, 0]):
        # the blob's rows 4 + 2i to 9 + 2i of 30 and columns 6 to 12 of 26, within a pixel
        expected = torch.tensor([6 / 26, (4 + 2 * index) / 30, 12 / 26, (9 + 2 * index) / 30]) * TILE
        torch.testing.assert_close(box, expected, atol=1.5, rtol=0)


def test_boxes_do_not_move_with_mixed_precision():
    net = network()
    net.coarse = nn.Conv2d(3, 1, 9, padding=4).requires_grad_(False)
    images = net.tiles(slices(2))[1]
    plain = net.prompts(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net.coarse(images).dtype == torch.bfloat16
        assert all(torch.equal(*pair) for pair in zip(net.prompts(images), plain, strict=True))


def test_jitter_is_the_same_share_of_a_tile_of_any_size():
    net = network()
    boxes = torch.tensor([[[10.0, 12, 20, 22]]])
    draw = draw_jitter((1, 1), np.random.default_rng(0))
    step = TILE / 512
    left, right, up, down = draw[0, 0] * step
    expected = torch.tensor([[[10 - left, 12 - up, 20 + right, 22 + down]]], dtype=torch.float32)
    torch.testing.assert_close(net.with_jitter(boxes, draw), expected)


def test_a_higher_threshold_moves_the_logits_by_its_own():
    low, high = network(threshold=0.5), network(threshold=0.9)
    x = slices(2)
    torch.testing.assert_close(low(x)[:, 1] - high(x)[:, 1], torch.full((2, 30, 26), np.log(9.0)).float())


def test_regions_have_no_background_channel():
    net, x = network(2, background=False), slices(2)
    assert net(x).shape == (2, 2, 30, 26)
    assert torch.equal(net(x), network(2)(x)[:, 1:])


def test_the_encoder_sees_the_pixels_it_was_trained_with_only_if_asked():
    x = slices(1)
    plain, normalised = network(), network(pixels=((100.0, 90, 80), (50.0, 40, 30)))
    plain(x), normalised(x)
    (before,), (after,) = plain.image_encoder.shown, normalised.image_encoder.shown
    mean, std = torch.tensor([100.0, 90, 80])[:, None, None], torch.tensor([50.0, 40, 30])[:, None, None]
    torch.testing.assert_close(after, (before * 255 - mean) / std)
    assert before.min() >= 0
    assert before.max() <= 1


def test_a_larger_field_shows_the_slice_smaller_and_comes_back_to_its_place():
    x = slices(1)
    image = seen(x[0], (0,), (60, 52))
    assert image.shape == (3, 60, 52)
    assert torch.equal(image[:, 15:45, 13:39], seen(x[0], (0,)))
    assert image[:, :15].max() == 0
    net = network(field=(60, 52))
    assert net(x).shape == (1, 2, 30, 26)
    assert torch.equal(net(padded(x))[:, :, 5:35, 11:37], net(x))


def test_three_channels_are_shown_as_colours_with_one_common_range():
    x = slices(1, channels=3)
    x[:, 1] *= 0.5
    image = seen(x[0], (0, 1, 2), equalise=False)
    assert image.shape == (3, 30, 26)
    assert image[0].max() == 1
    assert image[1].max() < 0.6
    assert seen(torch.zeros(3, 5, 5), (0, 1, 2)) is None


def test_a_constant_slice_is_black_and_stays_finite():
    image = seen(torch.full((1, 9, 9), -3.0), (0,))
    assert image.shape == (3, 9, 9)
    assert (image == 0).all()
    assert torch.isfinite(network()(torch.full((1, 1, 9, 9), 2.0))).all()


def test_slices_that_may_be_cut_into_tiles_are_warned_about_once():
    net, x = network(), slices(1)
    with pytest.warns(UserWarning, match="A slice fills the whole patch"):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x), network()(padded(x))


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="empty is one of"):
        network(empty="zero_box")


# training


def test_only_the_mask_decoder_trains_and_step_1_keeps_its_batch_statistics():
    net, x = network().train(), slices(4)
    assert net.training
    assert net.decoder.mask_decoder.training
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert not net.coarse.training
    assert not net.image_encoder.training
    tiles, images = net.tiles(x)
    boxes = net.prompts(images).boxes
    net.decode(net.embed(tiles), boxes).sum().backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained
    assert all(name.startswith("decoder.mask_decoder.") for name in trained)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_network_knows_which_step_1_it_holds():
    net, other = network(), network()
    state = {key: value + 1 for key, value in Bright().state_dict().items()}
    net.adopt_coarse(state, "ab" * 32)
    other.load_state_dict(net.state_dict(), strict=True)
    assert bytes(other.coarse_hash.tolist()).hex() == "ab" * 32
    assert all(torch.equal(value, state[key]) for key, value in other.coarse.state_dict().items())


# step 1 alone


def test_the_coarse_network_segments_alone():
    net, x = CoarseSegmenter(Bright(2), COARSE, 2), slices(3)
    x[1] = 0
    logits, confidence = net.eval().segment(x)
    assert logits.shape == (3, 3, 30, 26)
    assert (logits[1, 1:] == CLOSED).all()
    assert confidence[1].tolist() == [1, 1]
    assert logits[0, :, 5, 8].argmax() == 1
    assert logits[0, 1, 20, 20] < 0
    assert torch.equal(net(padded(x))[:, :, 5:35, 11:37], logits)
    assert torch.equal(net(x[2:])[0], logits[2])


def test_images_of_the_coarse_network_are_what_sam_is_asked_about():
    x = slices(2)
    images = CoarseSegmenter(Bright(), COARSE, 1).images(x)
    assert torch.equal(images, network().tiles(x)[1])
    assert torch.equal(images[0], resized(seen(x[0], (0,)), COARSE))
