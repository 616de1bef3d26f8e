from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dataset_conversion._registry import CONVERTERS
from nnunet_dgplugins.cli.convert import command
from nnunet_dgplugins.cli.main import main
from nnunet_dgplugins.phantom import make_phantom


def run(*arguments: str) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("phantom"), 2, size="tiny")


def test_converting_prints_cost_sites_and_the_next_command(
    phantom: Path, nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", "prostate-saml", str(phantom), "--source", "BMC", "--id", "601", "--jobs", "1") == 0
    said = capsys.readouterr()
    assert "Checking 12 cases, 24 files" in said.out
    assert "Writing 24 files, about" in said.out
    assert "nnUNetv2_plan_and_preprocess -d 601" in said.out
    assert "Writing: 12/12" in said.err
    assert len(list((nnunet_folders / "nnUNet_raw" / "Dataset601_ProstateSAML_BMC" / "imagesTs").iterdir())) == 10


def test_bad_input_ends_with_exit_code_one_and_the_list(
    phantom: Path, nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    root = tmp_path / "in"
    shutil.copytree(phantom, root)
    (root / "UCL" / "Case00_segmentation.nii.gz").unlink()
    (root / "HK" / "Case01.nii.gz").write_bytes(b"")
    assert run("convert", "prostate-saml", str(root), "--source", "RUNMC", "--jobs", "1") == 1
    assert "2 problems, nothing was written" in capsys.readouterr().err
    assert not list((nnunet_folders / "nnUNet_raw").iterdir())


@pytest.mark.parametrize(
    "arguments", [["prostate-saml"], ["nonsense", "x"], ["prostate-saml", "x", "--source", "A", "--id", "0"]]
)
def test_wrong_use_ends_with_exit_code_two(arguments: list[str]) -> None:
    assert run("convert", *arguments) == 2


def test_every_converter_has_its_own_module_and_file_name() -> None:
    root = Path(__file__).parents[2] / "dataset_conversion"
    assert {f"{module}.py" for module, _ in CONVERTERS.values()} == {path.name for path in root.glob("Dataset*.py")}


@pytest.mark.parametrize("name", CONVERTERS)
def test_each_converter_names_its_options_and_its_default_id(name: str) -> None:
    text = CliRunner().invoke(command, [name, "--help"]).output
    tagged = name in ("brats", "prostate-decathlon", "slice-tree")  # no sites, but image tags in place of masks
    patches = {
        **dict.fromkeys(("luad-histoseg", "bcss-wsss", "wsss4luad"), ("--classes", "--target", "--train-masks")),
        "patch-folder": ("--tags", "--masks", "--classes-file", "--source"),
    }
    own = ("--supervision", "--min-pixels") if tagged else ("--source", "--target", "--drop-empty-slices")
    if name in patches:
        own = ("--supervision", "--protocol", "--resize", *patches[name])
    for option in (*own, "--id", "--exclude", "--copy / --link", "--overwrite"):
        assert option in text
    assert ("--source SITE" in text) != (tagged or (name in patches and name != "patch-folder"))
    assert CONVERTERS[name][0][7:10] in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "dataset_conversion.Dataset501_ProstateSAML"],
        ["-m", "nnunet_dgplugins.cli", "convert", "prostate-saml"],
    ],
)
def test_both_ways_to_call_a_converter_answer_without_torch_or_numpy(arguments: list[str]) -> None:
    code = f"""
import runpy, sys
sys.argv = {["x", *arguments[2:], "--help"]!r}
try:
    runpy.run_module({arguments[1]!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
for heavy in ("torch", "nibabel", "SimpleITK", "nnunetv2"):
    assert heavy not in sys.modules, heavy
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "--source SITE" in shown.stdout


def test_a_converter_runs_as_a_module_and_ends_with_exit_code_one_on_bad_input(
    phantom: Path, nnunet_folders: Path
) -> None:
    call = [sys.executable, "-m", "dataset_conversion.Dataset501_ProstateSAML", str(phantom), "--source"]
    good = subprocess.run([*call, "RUNMC", "--jobs", "2"], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert (nnunet_folders / "nnUNet_raw" / "Dataset501_ProstateSAML_RUNMC" / "dataset.json").is_file()
    bad = subprocess.run([*call, "RUMNC"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stderr.startswith("Error: prostate-saml: unknown site 'RUMNC'; did you mean 'RUNMC'?")
    assert "Traceback" not in bad.stderr
