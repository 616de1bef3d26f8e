"""``dgplugins embed``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nnunet_dgplugins.cli.embed import command
from nnunet_dgplugins.errors import UserError


@pytest.fixture
def planned(nnunet_folders: Path) -> Path:
    """A dataset as nnU-Net leaves it after preprocessing, as far as the command looks."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    base = nnunet_folders / "nnUNet_preprocessed" / "Dataset902_Small"
    data = base / "nnUNetPlans_2d"
    data.mkdir(parents=True)
    random = np.random.default_rng(0)
    for case in ("one", "two"):
        volume = random.normal(size=(1, 2, 20, 24)).astype(np.float32)
        seg = np.zeros(volume.shape, dtype=np.int16)
        blocks = (1, 1, 20, 24)
        nnUNetDatasetBlosc2.save_case(volume, seg, {}, str(data / case), chunks=blocks, blocks=blocks)
    plans = {
        "plans_name": "nnUNetPlans",
        "configurations": {
            "2d": {
                "data_identifier": "nnUNetPlans_2d",
                "dgplugins": {"DeSAMTrainer": {"sam": "vit_tiny", "store": "half"}},
            },
            "2d_big": {"inherits_from": "2d"},
        },
    }
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    (base / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T2"}, "labels": {"background": 0, "a": 1}}))
    return base


def _run(*arguments: str) -> str:
    done = CliRunner().invoke(command, [*arguments, "--give-back-memory"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def _stores(base: Path) -> list[str]:
    return sorted(path.name for path in (base / "dgplugins_embeddings").iterdir())


def test_settings_come_from_the_plans(planned: Path):
    output = _run("902", "--device", "cpu")
    assert "Embedding 4 of 4 slices with vit_tiny (shipped), mode half" in output
    (store,) = _stores(planned)
    assert store.startswith("nnUNetPlans_2d__vit_tiny-")
    assert store.endswith("__half")


def test_the_sources_field_of_view_is_found_as_the_trainer_finds_it(planned: Path, monkeypatch: pytest.MonkeyPatch):
    settings = planned / "settings.yaml"
    settings.write_text("DeSAMTrainer: {field_of_view: source}")
    monkeypatch.setenv("DGPLUGINS_SETTINGS", str(settings))
    _run("902", "--device", "cpu")
    (store,) = _stores(planned)
    assert re.search(r"__half__f20x24$", store)


def test_a_configuration_that_inherits_shares_the_embeddings(planned: Path):
    _run("902", "--device", "cpu")
    assert "complete" in _run("902", "-c", "2d_big", "--device", "cpu")


def test_options_win_over_settings(planned: Path):
    _run(
        "Dataset902_Small",
        "--mode",
        "compact",
        "--model",
        "vit_tiny",
        "--device",
        "cpu",
        "--part-id",
        "1",
        "--num-parts",
        "2",
    )
    (store,) = _stores(planned)
    assert store.endswith("__compact")
    assert [path.name for path in (planned / "dgplugins_embeddings" / store).iterdir()] == ["two"]


def test_verify_is_passed_on(planned: Path):
    _run("902", "--device", "cpu")
    assert "Read 4 entries: 0 damaged" in _run("902", "--verify", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("902", "-p", "nnUNetPlansX"), "no such plans"),
        (("902", "-c", "3d"), "no configuration '3d', only 2d, 2d_big"),
        (("903",), "No Dataset903"),
        (("902", "--model", "vit_x"), "did you mean"),
    ],
)
def test_mistakes_are_explained(planned: Path, arguments: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        _run(*arguments, "--device", "cpu")


def test_an_unknown_mode_is_a_usage_error(planned: Path):
    assert CliRunner().invoke(command, ["902", "--mode", "tiny"]).exit_code == 2
