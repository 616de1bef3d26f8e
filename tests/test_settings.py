"""Settings reach a trainer along one road, checked and complete."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.settings import DeSAMSettings


def _plans(**blocks: dict) -> dict:
    """Plans with one configuration per keyword; a block may name its parent under ``parent``."""
    configurations = {}
    for name, block in blocks.items():
        content: dict = {"dgplugins": {"DeSAMTrainer": {k: v for k, v in block.items() if k != "parent"}}}
        if "parent" in block:
            content["inherits_from"] = block["parent"]
        configurations[name] = content
    return {"plans_name": "nnUNetPlans", "configurations": configurations}


def test_defaults_are_the_papers():
    resolved = settings.resolve(DeSAMSettings, {"configurations": {"2d": {}}}, "2d", "DeSAMTrainer")
    assert (resolved.epochs, resolved.batch_size, resolved.initial_lr) == (50, 8, 1e-4)
    assert (resolved.grid_size, resolved.iou_threshold, resolved.nms_threshold, resolved.min_region_area) == (
        9,
        0.5,
        0.7,
        1000,
    )
    assert (resolved.loss, resolved.border_suppression, resolved.drop_last_slice) == ("paper", 0, False)


def test_a_child_configuration_keeps_what_its_parent_set():
    plans = _plans(**{"2d": {"epochs": 7, "sam": "vit_b"}, "2d_quick": {"parent": "2d", "epochs": 2}})
    resolved = settings.resolve(DeSAMSettings, plans, "2d_quick", "DeSAMTrainer")
    assert (resolved.epochs, resolved.sam) == (2, "vit_b")


def test_a_trial_file_goes_over_the_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trial = tmp_path / "trial.yaml"
    trial.write_text("DeSAMTrainer:\n  epochs: 3\n  initial_lr: 1e-3\n")
    monkeypatch.setenv("DGPLUGINS_SETTINGS", str(trial))
    resolved = settings.resolve(DeSAMSettings, _plans(**{"2d": {"epochs": 9, "batch_size": 2}}), "2d", "DeSAMTrainer")
    assert (resolved.epochs, resolved.batch_size, resolved.initial_lr) == (3, 2, 1e-3)
    assert settings.resolve(DeSAMSettings, _plans(**{"2d": {}}), "2d", "DeSAMGridTrainer").epochs == 50


def test_a_trial_file_for_an_unknown_trainer_is_refused_with_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trial = tmp_path / "trial.json"
    trial.write_text('{"DeSAMTrainr": {"epochs": 3}}')
    monkeypatch.setenv("DGPLUGINS_SETTINGS", str(trial))
    with pytest.raises(UserError, match="did you mean 'DeSAMTrainer'"):
        settings.resolve(DeSAMSettings, _plans(**{"2d": {}}), "2d", "DeSAMTrainer")


def test_every_problem_is_reported_at_once_with_the_nearest_name():
    with pytest.raises(BadInput) as caught:
        settings.build(
            DeSAMSettings, {"epoch": 3, "batch_size": "eight", "loss": "dice", "grid_size": 0, "amp": 1}, "here"
        )
    text = str(caught.value)
    assert "did you mean 'epochs'" in text
    assert "5 problems" in text
    for part in ("'eight'; expected int or null", "one of paper, code", "at least 1", "here, amp: 1; expected bool"):
        assert part in text


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-4", 1e-4), ("true", True), ("null", None), ("[0, 1, 2]", [0, 1, 2]), ("vit_b", "vit_b")],
)
def test_values_typed_on_the_command_line_get_their_type(text: str, value: object):
    assert settings.parse_value(text) == value


def test_resolved_settings_survive_json():
    chosen = DeSAMSettings(channels=(0, 1, 2), epochs=2)
    assert settings.build(DeSAMSettings, settings.to_dict(chosen), "json") == chosen


def test_every_setting_says_what_it_means():
    for item in dataclasses.fields(DeSAMSettings):
        assert item.metadata["help"].endswith((".", ")")), item.name


def test_off_is_a_word_where_it_is_a_choice_whatever_yaml_says():
    from nnunet_dgplugins.settings import DCAMClassifierSettings

    for value in ("off", settings.parse_value("off")):
        assert settings.build(DCAMClassifierSettings, {"pcnorm": value}, "here").pcnorm == "off"
    with pytest.raises(BadInput, match="one of instance, batch"):
        settings.build(DCAMClassifierSettings, {"pcnorm": "on"}, "here")
    with pytest.raises(BadInput, match="expected str"):
        settings.build(DCAMClassifierSettings, {"pcnorm": True}, "here")
