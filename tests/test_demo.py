"""The main job, as a person with a bare machine runs it, with a few epochs instead of fifty."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UNSEEN = ("BIDMC", "BMC", "HK", "I2CVB", "UCL")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_prints_its_table_and_draws_one_overlay_per_site_and_runs_again_at_once(tmp_path: Path):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("scripts/demo.sh would install .venv; scripts/test.sh has made one where this test counts")
    few = tmp_path / "few.yaml"
    few.write_text("DeSAMTrainer: {epochs: 3}\n")
    command = ["bash", str(ROOT / "scripts" / "demo.sh"), "--out", str(tmp_path / "demo"), "--device", "cpu"]
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment = {**kept, "DGPLUGINS_SETTINGS": str(few), "COLUMNS": "120"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    for word in ("DeSAM", "stock nnU-Net", "constant mask", "mean unseen", *UNSEEN):
        assert word in first.stdout
    pictures = {path.stem for path in (tmp_path / "demo" / "overlays").glob("*.png")}
    assert pictures == set(UNSEEN)
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0
    assert again.stdout.count("done before") >= 8
