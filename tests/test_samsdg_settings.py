"""SAM-SDG's settings: the paper's numbers, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import BadInput
from nnunet_dgplugins.settings.samsdg import SAMSDGCoarseSettings, SAMSDGSettings


def test_the_defaults_are_the_papers():
    coarse, sam = SAMSDGCoarseSettings(), SAMSDGSettings()
    assert (coarse.epochs, coarse.batch_size, coarse.initial_lr) == (100, 8, 1e-3)
    assert (sam.epochs, sam.batch_size, sam.initial_lr, sam.weight_decay) == (200, 16, 1e-4, 1e-3)
    assert (sam.box_threshold, sam.threshold, sam.jitter) == (0.75, 0.5, 9)


@pytest.mark.parametrize("cls", [SAMSDGCoarseSettings, SAMSDGSettings])
def test_every_setting_says_what_it_means_and_survives_json(cls):
    assert all(field.metadata["help"] for field in dataclasses.fields(cls))
    assert settings.build(cls, settings.to_dict(cls()), "here") == cls()


def test_values_out_of_range_are_refused_together():
    wrong = {"batch_size": 3, "empty": "zero_box", "threshold": 1.0, "boxs": "tile"}
    with pytest.raises(BadInput, match=r"(?s)4 problems.*did you mean 'boxes'"):
        settings.build(SAMSDGSettings, wrong, "SAMSDGTrainer")
