from __future__ import annotations

import copy

import pytest

from nnunet_dgplugins.errors import BadInput
from nnunet_dgplugins.plans import shrink

PLANNED = {
    "batch_size": 12,
    "patch_size": [160, 128],
    "architecture": {
        "arch_kwargs": {"features_per_stage": [32, 64, 128], "strides": [[1, 1], [2, 2], [2, 1]], "n_stages": 3}
    },
}


def test_what_is_not_asked_for_stays_as_planned():
    found = copy.deepcopy(PLANNED)
    shrink(found)
    assert found == PLANNED


def test_batch_patch_and_width_are_changed_together():
    found = copy.deepcopy(PLANNED)
    shrink(found, batch_size=4, patch_size=(64, 62), width_divisor=2)
    assert (found["batch_size"], found["patch_size"]) == (4, [64, 62])
    assert found["architecture"]["arch_kwargs"]["features_per_stage"] == [16, 32, 64]


def test_a_patch_that_the_poolings_cannot_divide_and_a_wrong_divisor_are_one_error():
    with pytest.raises(BadInput) as error:
        shrink(copy.deepcopy(PLANNED), patch_size=(66, 63), width_divisor=3, where="Plans.json")
    assert "Plans.json, patch size: 66 63; expected 2 multiples, twice at least, of 4, 2" in str(error.value)
    assert "Plans.json, width divisor: 3; expected a divisor of [32, 64, 128]" in str(error.value)
    with pytest.raises(BadInput, match="patch size"):
        shrink(copy.deepcopy(PLANNED), patch_size=(64, 64, 64))
