"""The whole command on a tiny phantom: real conversions, trainings, predictions and evaluations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from click.testing import CliRunner

from nnunet_dgplugins.cli.report import command as report
from nnunet_dgplugins.cli.study import command
from nnunet_dgplugins.errors import BadInput

STUDY: dict[str, Any] = {
    "datasets": {
        "tiny": {
            "convert": "prostate-saml",
            "prepare": "python -m nnunet_dgplugins.phantom {download} --size tiny --cases 5",
            "first_id": 701,
            "sources": ["RUNMC"],
        }
    },
    "methods": {"stock": {"trainer": "nnUNetTrainer"}, "DeSAM": {"trainer": "DeSAMTrainer"}},
    "baseline": "stock",
    "budget": {"iterations": 2},
    "mirroring": False,
    "device": "cpu",
}


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return file


def start(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    command = [str(Path(sys.executable).parent / "dgplugins"), "study", str(file), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_study_runs_reports_and_runs_again_only_what_changed(tmp_path: Path):
    done = start(written(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = tmp_path / "tiny"
    table = pandas.read_csv(out / "results.csv")
    assert set(table["method"]) == {"stock", "DeSAM"}
    assert set(table.loc[table["split"] == "unseen", "target"]) == {"BIDMC", "BMC", "HK", "I2CVB", "UCL"}
    assert set(table.loc[table["split"] == "validation", "target"]) == {"RUNMC"}
    assert "mean unseen" in done.stdout
    assert (out / "results.md").read_text().startswith("### tiny")
    assert CliRunner().invoke(report, [str(out)], catch_exceptions=False).exit_code == 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/webp") == 2 * 5 * 3  # methods, unseen sites, best to worst
    for text in ("Learning curves", "Costs", "DeSAM: ", "GiB"):
        assert text in page
    trained = sorted(out.glob("runs/*/*/*/nnUNet_results/*/*/fold_0/checkpoint_final.pth"))
    assert len(trained) == 2
    ages = [file.stat().st_mtime_ns for file in trained]

    again = start(written(tmp_path))
    assert "12 tasks, 12 done before" in again.stdout
    methods = {**STUDY["methods"], "DeSAM": {"trainer": "DeSAMTrainer", "settings": {"loss": "code"}}}
    changed = start(written(tmp_path, methods=methods))
    assert changed.returncode == 0, changed.stdout[-3000:]
    assert "13 tasks, 7 done before" in changed.stdout  # phantom, convert, plan, and the four of the stock method ...
    assert [file.stat().st_mtime_ns for file in trained] == ages
    assert len(list(out.glob("runs/*/*/*/nnUNet_results/*/*/fold_0/checkpoint_final.pth"))) == 3
    status = start(written(tmp_path, methods=methods), "--status")
    assert "13 of 13 tasks done, 0 failed, nothing runs it" in status.stdout


def test_a_bad_file_starts_nothing(tmp_path: Path):
    with pytest.raises(BadInput, match="no trainer"):
        CliRunner().invoke(command, [str(written(tmp_path, methods={"x": {"trainer": "y"}}))], catch_exceptions=False)
    assert not (tmp_path / "tiny").exists()


def test_commands_are_shown_and_nothing_is_started(tmp_path: Path):
    done = CliRunner().invoke(command, [str(written(tmp_path)), "--commands"])
    assert done.exit_code == 0
    assert "dgplugins convert prostate-saml" in done.output
    assert "nnunet_dgplugins.budget 701 2d 0 -tr DeSAMTrainer" in done.output
    assert not (tmp_path / "tiny").exists()


def test_cancelling_what_does_not_run_says_so(tmp_path: Path):
    done = CliRunner().invoke(command, [str(written(tmp_path)), "--cancel"])
    assert "Nothing runs this study" in done.output
