"""The papers' own numbers, by hand and against the vectors of the released preprocessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_dgplugins.evaluation.desam_protocol import SIZE, case_dice, clear_frame, kept_slices
from nnunet_dgplugins.evaluation.samsdg_protocol import canvas_dice, slice_counts

ORGAN = {"organ": (1,)}
VECTORS = Path(__file__).parents[1] / "vectors" / "desam" / "preprocess.npz"


def _square(slices: range, rows: slice, columns: slice, depth: int = 6, size: int = 256) -> np.ndarray:
    labels = np.zeros((depth, size, size), np.uint8)
    labels[slices.start : slices.stop, rows, columns] = 1
    return labels


@pytest.mark.parametrize("name", ["down", "up"])
def test_desam_keeps_and_resizes_the_slices_of_the_released_preprocessing(name: str):
    vectors = np.load(VECTORS)
    kept, masks = kept_slices(vectors[f"{name}/in/label_zyx"] > 0, int(vectors[f"{name}/in/image_size"]))
    assert kept == vectors[f"{name}/out/slice_index"].tolist()
    np.testing.assert_array_equal(masks, vectors[f"{name}/out/gts"])


def test_desam_dice_of_half_a_square_is_two_thirds():
    truth = _square(range(1, 5), slice(100, 140), slice(100, 140))
    guess = _square(range(1, 5), slice(100, 140), slice(100, 120))
    assert case_dice(truth, guess, ORGAN)["organ"]["dice_desam"] == pytest.approx(2 * 20 / 60)


def test_desam_ignores_the_last_foreground_slice_and_slices_without_organ():
    truth = _square(range(1, 5), slice(100, 140), slice(100, 140))
    guess = truth.copy()
    guess[4] = 0  # last slice of the organ missed
    guess[0] = guess[5] = 1  # false positives outside of the organ's range
    assert case_dice(truth, guess, ORGAN)["organ"]["dice_desam"] == 1.0


def test_desam_clears_a_frame_of_the_prediction_but_not_of_the_reference():
    truth = _square(range(0, 2), slice(100, 140), slice(30, 70))  # half of it lies in the frame of 50 pixels
    assert case_dice(truth, truth, ORGAN)["organ"]["dice_desam"] == pytest.approx(2 * 20 / 60)
    cleared = clear_frame(np.ones((1, SIZE, SIZE), np.uint8))
    assert cleared.sum() == 156 * 156


def test_desam_leaves_out_a_case_that_keeps_no_slice():
    one_slice = _square(range(2, 3), slice(100, 140), slice(100, 140))
    assert np.isnan(case_dice(one_slice, one_slice, ORGAN)["organ"]["dice_desam"])
    nothing = np.zeros_like(one_slice)
    assert np.isnan(case_dice(nothing, one_slice, ORGAN)["organ"]["dice_desam"])


def test_desam_gives_0_for_an_empty_prediction():
    truth = _square(range(1, 5), slice(100, 140), slice(100, 140))
    assert case_dice(truth, np.zeros_like(truth), ORGAN)["organ"]["dice_desam"] == 0.0


def test_desam_stretches_slices_that_are_not_square():
    truth, guess = np.zeros((3, 128, 512), np.uint8), np.zeros((3, 128, 512), np.uint8)
    truth[:, 50:70, 200:280] = 1
    guess[:, 50:70, 200:240] = 1
    # anti-aliasing erodes the long side, hence the wide tolerance
    assert case_dice(truth, guess, ORGAN)["organ"]["dice_desam"] == pytest.approx(2 / 3, abs=0.05)


def test_samsdg_counts_organ_slices_without_the_ends_of_the_volume():
    truth = _square(range(0, 4), slice(0, 128), slice(0, 256))  # half of each of slices 0 to 3
    guess = _square(range(0, 6), slice(0, 256), slice(0, 128))  # the other half, and false positives in 4 and 5
    counts = slice_counts(truth, guess, ORGAN)["organ"]
    # slice 0 is an end; slices 1, 2, 3 at 512 x 512: a quarter is shared, each mask is a half
    assert counts == [(512 * 512 // 4, 512 * 512)] * 3


def test_samsdg_counts_all_slices_of_volumes_that_come_without_their_ends():
    truth = _square(range(0, 4), slice(0, 128), slice(0, 256))
    assert len(slice_counts(truth, truth, ORGAN, ends_left_out=True)["organ"]) == 4


def test_samsdg_dice_of_a_canvas_is_pooled_with_smoothing_1():
    # four slices; one is missed wholly: (2 * 30 + 1) / (80 + 1), not a mean of four Dice values
    counts = [(10, 20), (10, 20), (10, 20), (0, 20)]
    assert list(canvas_dice(counts)) == [pytest.approx(61 / 81)]


def test_samsdg_drops_an_incomplete_last_canvas():
    perfect, wrong = (10, 20), (0, 20)
    assert list(canvas_dice([perfect] * 4 + [wrong] * 3)) == [1.0]
    assert list(canvas_dice([perfect] * 3)) == []
    assert list(canvas_dice([perfect] * 4 + [wrong] * 4)) == [1.0, pytest.approx(1 / 81)]


def test_samsdg_takes_an_image_as_one_slice():
    image = np.ones((10, 14), np.uint8)
    assert slice_counts(image, image, ORGAN)["organ"] == [(512 * 512, 2 * 512 * 512)]
    assert slice_counts(image[None], image[None], ORGAN)["organ"] == [(512 * 512, 2 * 512 * 512)]


def test_both_protocols_leave_ignored_voxels_out():
    truth = _square(range(1, 5), slice(100, 140), slice(100, 140))
    guess = _square(range(1, 5), slice(100, 140), slice(100, 160))
    truth[:, :, 140:] = 9
    assert case_dice(truth, guess, ORGAN, ignore=9)["organ"]["dice_desam"] == 1.0
    assert next(canvas_dice(slice_counts(truth, guess, ORGAN, ignore=9)["organ"])) == 1.0
