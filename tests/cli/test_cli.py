"""The command line: quick without torch, JSON for machines, exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nnunet_dgplugins.cli.main import COMMANDS, cli, main
from nnunet_dgplugins.registry import TRAINERS


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["describe", "DeSAMTrainer"], *[[name, "--help"] for name in COMMANDS]]
)
def test_help_list_and_describe_never_import_torch(arguments: list[str]):
    code = (
        "import sys\nfrom nnunet_dgplugins.cli.main import cli\n"
        f"cli.main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'nnunetv2', 'pandas', 'scipy', 'matplotlib', 'SimpleITK'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_list_and_describe_speak_json():
    listed = json.loads(CliRunner().invoke(cli, ["list", "--json"]).output)
    assert [item["name"] for item in listed["trainers"]] == list(TRAINERS)
    described = json.loads(CliRunner().invoke(cli, ["describe", "DeSAMGridTrainer", "--json"]).output)
    assert {item["name"]: item["default"] for item in described["settings"]}["grid_size"] == 9


def test_list_names_the_shipped_encoder_and_what_a_real_file_would_add(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DGPLUGINS_SAM_DIR", raising=False)
    text = CliRunner().invoke(cli, ["list"]).output
    assert "vit_tiny (shipped)" in text
    (line,) = [line for line in text.splitlines() if "DGPLUGINS_SAM_DIR" in line]
    for size in ("vit_h 2.4 GiB", "vit_l 1.2 GiB", "vit_b 357.7 MiB"):
        assert size in line
    sam = json.loads(CliRunner().invoke(cli, ["list", "--json"]).output)["sam"]
    assert (sam["name"], sam["shipped"]) == ("vit_tiny", True)
    assert Path(sam["file"]).is_file()


def test_list_names_the_largest_file_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DGPLUGINS_SAM_DIR", str(tmp_path))
    path = tmp_path / "sam_vit_b_01ec64.pth"
    path.touch()
    text = CliRunner().invoke(cli, ["list"]).output
    assert f"vit_b, {path}" in text
    assert "vit_tiny" not in text
    sam = json.loads(CliRunner().invoke(cli, ["list", "--json"]).output)["sam"]
    assert (sam["name"], sam["shipped"], sam["file"]) == ("vit_b", False, str(path))


def test_a_wrong_name_is_a_usage_error_with_a_suggestion():
    done = CliRunner().invoke(cli, ["describe", "DeSAMTrainr"])
    assert done.exit_code == 2
    assert "did you mean 'DeSAMTrainer'" in done.output


def test_an_error_of_the_user_is_one_message_and_exit_code_1(nnunet_folders, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["advise", "999"])
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("Error: No Dataset999_*")
    assert "Traceback" not in text


def test_what_only_epl_has_is_a_usage_error_where_desam_is_imported(tmp_path: Path):
    (tmp_path / "model.pth").touch()
    done = CliRunner().invoke(
        cli, ["import-checkpoint", str(tmp_path / "model.pth"), "--dataset", "501", "--spacing", "1.1"]
    )
    assert done.exit_code == 2
    assert "EPLTrainer" in done.output
