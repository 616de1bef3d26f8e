"""From slice to canvas and back; zero padding never changes a bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sam_helpers import TINY
from torch.nn import functional as F

from nnunet_dgplugins.content import content_box, from_canvas
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam.preprocess import PIXEL_MEAN, PIXEL_STD, check_channels, resize_target, to_canvas
from nnunet_dgplugins.sam.store import slice_hash


def _slice(channels: int = 1, height: int = 40, width: int = 56, seed: int = 0) -> torch.Tensor:
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed))


def test_the_box_holds_all_content_and_nothing_else():
    x = torch.zeros(2, 20, 30)
    x[0, 3, 7] = 1
    x[1, 11, 4] = -1
    assert content_box(x) == (3, 12, 4, 8)
    assert content_box(torch.zeros(2, 5, 5)) is None
    assert content_box(torch.ones(1, 4, 6)) == (0, 4, 0, 6)


@pytest.mark.parametrize("padding", [(0, 9, 0, 0), (3, 4, 5, 6), (100, 101, 7, 300)])
@pytest.mark.parametrize("channels", [(0,), (1, 0, 1)])
def test_padding_with_zeros_changes_no_bit(padding: tuple[int, ...], channels: tuple[int, ...]):
    x = _slice(2)
    padded = F.pad(x, padding)
    assert torch.equal(to_canvas(padded, TINY, channels), to_canvas(x, TINY, channels))
    assert slice_hash(padded, channels) == slice_hash(x, channels)


def test_padding_changes_no_bit_of_a_strided_view():
    volume = _slice(1, 40, 56)[:, None].repeat(1, 3, 1, 1)
    assert torch.equal(to_canvas(volume[:, 1], TINY, (0,)), to_canvas(_slice(1, 40, 56), TINY, (0,)))


def test_values_span_sams_range_before_its_normalisation():
    canvas = to_canvas(_slice(), TINY, (0,))
    assert canvas.shape == (3, 256, 256)
    assert canvas.dtype == torch.float32
    raw = canvas * torch.tensor(PIXEL_STD)[:, None, None] + torch.tensor(PIXEL_MEAN)[:, None, None]
    assert raw.min() > -1e-3
    assert raw.max() < 255 + 1e-3
    assert raw.max() - raw.min() > 200
    torch.testing.assert_close(raw[0], raw[2], atol=1e-3, rtol=0)  # one channel is grey


def test_percentiles_are_those_of_numpy():
    x = _slice()
    low, high = np.percentile(x[0].numpy(), [0.5, 99.5])
    scaled = (x.clamp(float(low), float(high)) - float(low)) / float(high - low) * 255
    expected = F.interpolate(scaled[None], (256, 256), mode="bilinear", antialias=True)[0, 0]
    raw = to_canvas(x, TINY, (0,))[1] * PIXEL_STD[1] + PIXEL_MEAN[1]
    torch.testing.assert_close(raw, expected, atol=1e-2, rtol=0)


def test_brightness_and_contrast_do_not_matter():
    x = _slice()
    torch.testing.assert_close(to_canvas(7 * x + 3, TINY, (0,)), to_canvas(x, TINY, (0,)), atol=1e-3, rtol=0)


def test_three_channels_are_red_green_and_blue():
    x = _slice(4)
    canvas = to_canvas(x, TINY, (3, 0, 1))
    for place, channel in enumerate((3, 0, 1)):
        torch.testing.assert_close(canvas[place], to_canvas(x, TINY, (channel,))[place], atol=0, rtol=0)


@pytest.mark.parametrize("value", [0.0, 5.0, -3e30, 1e-30])
def test_constant_and_empty_slices_are_finite(value: float):
    canvas = to_canvas(torch.full((1, 30, 20), value), TINY, (0,))
    assert torch.isfinite(canvas).all()
    assert canvas.std(dim=(1, 2)).max() < 1e-5


def test_the_size_of_an_empty_slice_does_not_matter():
    assert torch.equal(to_canvas(torch.zeros(1, 5, 9), TINY, (0,)), to_canvas(torch.zeros(1, 300, 200), TINY, (0,)))


def test_single_pixels_rows_and_columns_work():
    for shape in ((1, 1, 1), (1, 1, 50), (1, 50, 1)):
        assert torch.isfinite(to_canvas(torch.rand(shape) + 0.5, TINY, (0,))).all()


def test_half_precision_input_is_prepared_in_float32():
    x = _slice().half()
    assert torch.equal(to_canvas(x, TINY, (0,)), to_canvas(x.float(), TINY, (0,)))


@pytest.mark.parametrize("channels", [(), (0, 1), (2,), (0, 1, 2), (-1,)])
def test_channels_that_cannot_be_shown_are_refused(channels: tuple[int, ...]):
    with pytest.raises(UserError, match=r"one channel \(grey\) or three"):
        check_channels(channels, 2, "case")


def test_logits_come_back_into_their_box():
    logits = torch.randn(2, 16, 16)
    found = from_canvas(logits, (3, 13, 4, 24), (20, 30))
    assert found.shape == (2, 20, 30)
    expected = F.interpolate(logits[None], (10, 20), mode="bilinear", align_corners=False)[0]
    assert torch.equal(found[:, 3:13, 4:24], expected)
    outside = found.clone()
    outside[:, 3:13, 4:24] = -50
    assert (outside == -50).all()
    assert (from_canvas(logits, None, (4, 5), closed=-7.0) == -7).all()


def test_targets_go_to_the_mask_by_nearest_centres():
    target = torch.randint(-1, 4, (1, 37, 53), dtype=torch.int16)
    found = resize_target(target, (2, 35, 5, 50), 32)
    expected = F.interpolate(target[:, 2:35, 5:50].float()[None], (32, 32), mode="nearest-exact")[0].short()
    assert found.dtype == torch.int16
    assert torch.equal(found, expected)
    assert torch.equal(resize_target(target, None, 37)[..., :, 0], target[..., :, 0])


def test_a_mask_survives_the_way_there_and_back():
    target = torch.zeros(1, 60, 80, dtype=torch.int16)
    target[:, 20:41, 30:62] = 1
    box = (5, 55, 10, 70)
    small = resize_target(target, box, 128)
    back = from_canvas(small.float() * 2 - 1, box, (60, 80)) > 0
    assert torch.equal(back[0], target[0] > 0)


def test_a_field_keeps_the_scale_of_small_content_and_leaves_larger_content_alone():
    x, field = _slice(1, 40, 56), (80, 90)
    canvas = to_canvas(x, TINY, (0,), field)
    black = to_canvas(torch.zeros(1, 5, 5), TINY, (0,))[:, :1, :1]
    height, width = (round(size * TINY.image_size / f) for size, f in zip((40, 56), field, strict=True))
    top, left = (TINY.image_size - height) // 2, (TINY.image_size - width) // 2
    frame = canvas.clone()
    # a pixel of x is about three of the canvas, which interpolation mixes at the border
    frame[:, top - 4 : top + height + 4, left - 4 : left + width + 4] = black
    torch.testing.assert_close(frame, black.expand_as(frame))
    assert (canvas[:, top + 4 : top + height - 4, left + 4 : left + width - 4] != black).float().mean() > 0.9
    assert torch.equal(to_canvas(x, TINY, (0,), (40, 56)), to_canvas(x, TINY, (0,)))
    assert torch.equal(to_canvas(x, TINY, (0,), (7, 9)), to_canvas(x, TINY, (0,)))
    assert torch.equal(to_canvas(F.pad(x, (3, 0, 0, 5)), TINY, (0,), field), canvas)
    assert torch.equal(to_canvas(torch.zeros(1, 5, 5), TINY, (0,), field), to_canvas(torch.zeros(1, 5, 5), TINY, (0,)))


@pytest.mark.parametrize("field", [(100, 90), (51, 99), (10, 61)])
def test_a_mask_survives_the_way_into_a_field_and_back(field: tuple[int, int]):
    target = torch.zeros(1, 60, 80, dtype=torch.int16)
    target[:, 20:41, 30:62] = 1
    box = (5, 55, 10, 70)
    small = resize_target(target, box, 256, field)
    assert float(small.sum()) == pytest.approx(21 * 32 * 256**2 / (max(50, field[0]) * max(60, field[1])), rel=0.05)
    back = from_canvas(small.float() * 2 - 1, box, (60, 80), -50.0, field)
    assert torch.equal(back[0] > 0, target[0] > 0)
    assert (back[:, :5] == -50).all()


def test_a_real_slice_is_prepared(sample_data: Path):
    import SimpleITK as sitk

    path = sorted(sample_data.glob("prostate/ProstateX/*/*/*_t2w.nii.gz"))[0]
    volume = torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32))
    x = volume[len(volume) // 2][None]
    canvas = to_canvas(F.pad(x, (10, 30, 40, 0)), TINY, (0,))
    assert torch.equal(canvas, to_canvas(x, TINY, (0,)))
    assert canvas.std() > 0.3
