"""Rater fusion beyond the stored vectors, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nnunet_dgplugins.methods.epl.raters import divide_by_slice_maximum, fuse_raters


def votes(*values: int) -> np.ndarray:
    """One voxel, one value per rater."""
    return np.array(values).reshape(-1, 1)


@pytest.mark.parametrize(
    ("values", "cord", "grey"),
    [
        ((1, 1, 1, 0), True, True),
        ((1, 1, 0, 0), False, False),  # a tie goes to the background
        ((1, 1, 2, 2), True, False),
        ((1, 1, 1, 2), True, True),
        ((1, 2, 2, 0), True, False),
        ((1, 1, 0), True, True),  # one rater is missing: majority of the rest
        ((1, 0), False, False),
        ((1,), True, True),
    ],
)
def test_a_voxel_is_what_more_than_half_of_the_raters_say(values, cord, grey):
    fused = fuse_raters(votes(*values))
    assert (fused.cord.item(), fused.grey.item()) == (cord, grey)
    assert fused.labels().item() == int(grey)
    assert fused.labels(white_matter=True).item() == (1 if grey else 2 if cord else 0)


def test_grey_matter_lies_within_the_cord():
    raters = np.random.default_rng(0).integers(0, 3, (4, 5, 6, 7)).astype(np.uint8)
    fused = fuse_raters(raters)
    assert fused.grey.any()
    assert not (fused.grey & ~fused.cord).any()
    assert fused.labels().dtype == np.uint8


def test_no_rater_at_all_is_refused():
    with pytest.raises(ValueError, match="At least one"):
        fuse_raters(np.zeros((0, 2, 2)))


def test_slices_without_positive_values_are_left_alone():
    image = np.stack([np.zeros((2, 2)), np.full((2, 2), -3), np.array([[1, 2], [0, 4]])]).astype(np.int16)
    found = divide_by_slice_maximum(image)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(found[1], -3)
    np.testing.assert_allclose(found[2], [[0.25, 0.5], [0, 1]])


def test_converters_can_import_it_without_torch():
    code = "import sys, nnunet_dgplugins.methods.epl.raters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
