"""The script that makes vit_tiny: it stops, goes on, and writes untrained weights too."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import train_vit_tiny as script
from click.testing import CliRunner

from nnunet_dgplugins.sam.models import MODELS
from nnunet_dgplugins.sam.tiny.training import Phase, Recipe
from nnunet_dgplugins.sam.weights import load_parts

MODEL = replace(
    MODELS["vit_tiny"], image_size=128, embed_dim=32, depth=4, global_attn_indexes=(0, 1, 2, 3), prompt_dim=32,
    decoder_mlp_dim=32, iou_head_hidden=16, window_size=8,
)  # fmt: skip
PHASES = (Phase(64, 2, 3, 1, 1), Phase(64, 1, 2, 1, 1), Phase(128, 1, 2, 2, 1))


def test_the_script_trains_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODELS, "vit_tiny", MODEL)
    monkeypatch.setattr(script, "_LINE_STEPS", 1)
    out = tmp_path / "run"
    command = ["train", "--out", str(out), "--maps", "2", "--steps", *"11111", "--jobs", "1", "--device", "cpu"]
    monkeypatch.setattr(script, "Recipe", partial(Recipe, phases=PHASES, robust=PHASES[:2], warmup=1))
    stopped = CliRunner().invoke(script.cli, [*command, "--minutes", "0"])
    assert stopped.exit_code == 0
    assert "run again to go on" in stopped.output
    assert not (out / "vit_tiny.safetensors").exists()
    done = CliRunner().invoke(script.cli, command)
    assert done.exit_code == 0, done.output
    assert "goes on behind step 1" in done.output
    assert (out / "vit_tiny.safetensors").is_file()
    with open(out / "log.csv", newline="") as handle:
        assert [row[0] for row in csv.reader(handle)][-2:] == ["4", "5"]


def test_untrained_weights_repeat_with_their_seed(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = CliRunner().invoke(script.cli, ["random", str(tmp_path / f"{name}.safetensors"), "--seed", str(seed)])
        assert done.exit_code == 0, done.output
    a, b, c = (load_parts(f"vit_tiny:{tmp_path / name}.safetensors").weights_hash for name in "abc")
    assert a == b != c


def test_what_the_training_sees_can_be_looked_at(tmp_path: Path):
    done = CliRunner().invoke(script.cli, ["show", str(tmp_path / "seen.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "seen.png").stat().st_size > 50_000
