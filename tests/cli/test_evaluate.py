"""``dgplugins evaluate``: exit codes, JSON on standard output only, files written in one step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))  # made_dataset lies beside the tests of the package

from made_dataset import make

from nnunet_dgplugins.cli.main import cli, main
from nnunet_dgplugins.evaluation.doubt import FILE


def _run(*arguments: object):
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


def _doubt(predictions: Path) -> None:
    # A_1 .9, A_2 .7, B_1 .6, C_1 .2, C_2 .4, C_3 .6: doubt in the opposite order
    values = {"A_1": 0.05, "A_2": 0.2, "B_1": 0.3, "C_1": 0.9, "C_2": 0.6, "C_3": 0.35}
    content = {case: {"doubt": v, "per_class": {"prostate": v}, "slices": [0.0, v]} for case, v in values.items()}
    (predictions / FILE).write_text(json.dumps(content))


def test_help_needs_neither_torch_nor_pandas():
    code = (
        "import sys\nfrom nnunet_dgplugins.cli.main import cli\n"
        "cli.main(['evaluate', '--help'], standalone_mode=False)\n"
        "bad = {'torch', 'pandas', 'scipy', 'SimpleITK', 'nnunetv2', 'rich'} & set(sys.modules)\nassert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_evaluating_needs_no_torch(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    code = (
        "import sys\nfrom nnunet_dgplugins.cli.main import cli\n"
        f"cli.main(['evaluate', '501', {str(predictions)!r}, '--jobs', '1'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_table_is_printed_and_the_csv_written(nnunet_folders: Path, tmp_path: Path):
    done = _run(501, make(nnunet_folders), "--csv", tmp_path / "values.csv", "--jobs", 1)
    assert done.exit_code == 0, done.output
    for part in ("RUNMC", "mean of sites", "pooled", "0.800 ± 0.141"):
        assert part in done.output, part
    assert (tmp_path / "values.csv").read_text().startswith("case,site,patient,class,metric,value\n")


def test_json_alone_goes_to_standard_output(nnunet_folders: Path, tmp_path: Path):
    done = _run(501, make(nnunet_folders), "--json", "--csv", tmp_path / "values.csv", "--jobs", 1)
    content = json.loads(done.stdout)
    assert content["source"] == "RUNMC"
    assert content["matrix"][0]["sites"]["A"]["mean"] == pytest.approx(0.8)


@pytest.mark.parametrize(("protocol", "metric"), [("desam", "dice_desam"), ("samsdg", "dice_samsdg")])
def test_the_papers_protocols_name_themselves(nnunet_folders: Path, protocol: str, metric: str):
    predictions = make(nnunet_folders)
    content = json.loads(_run(501, predictions, "--protocol", protocol, "--json", "--jobs", 1).stdout)
    assert content["protocol"] == protocol
    assert list(content["metrics"]) == [metric]
    assert f"protocol {protocol}" in _run(501, predictions, "--protocol", protocol, "--jobs", 1).output


def test_bad_input_exits_with_1_and_writes_nothing(
    nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    predictions = make(nnunet_folders)
    (predictions / "A_1.nii.gz").unlink()
    (predictions / "A_2.nii.gz").unlink()
    target = tmp_path / "values.csv"
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "501", str(predictions), "--csv", str(target), "--json", "--jobs", "1"])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "2 problems" in printed.err
    assert printed.out == ""
    assert not target.exists()


@pytest.mark.parametrize(
    "arguments",
    [["501"], ["501", "nowhere"], ["501", ".", "--protocol", "mine"], ["501", ".", "--no-labels", "--csv", "x"]],
)
def test_wrong_usage_exits_with_2(nnunet_folders: Path, arguments: list[str]):
    assert _run(*arguments).exit_code == 2


def test_an_unknown_dataset_exits_with_1(nnunet_folders: Path, tmp_path: Path):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "999", str(tmp_path)])
    assert caught.value.code == 1


def test_no_labels_ranks_by_doubt_and_correlates_where_labels_exist(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    _doubt(predictions)
    done = _run(501, predictions, "--no-labels", "--jobs", 1)
    assert done.exit_code == 0, done.output
    assert done.output.index("C_1") < done.output.index("C_2") < done.output.index("A_1")
    assert "n = 6" in done.output
    content = json.loads(_run(501, predictions, "--no-labels", "--json", "--jobs", 1).stdout)
    assert content["ranking"][0]["case"] == "C_1"
    # one tie in Dice (B_1 and C_3), otherwise the opposite order
    assert content["rank_correlation_with_dice"]["rho"] == pytest.approx(-0.9856, abs=1e-4)


def test_no_labels_works_without_any_label(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    _doubt(predictions)
    for path in (nnunet_folders / "nnUNet_raw/Dataset501_Bars/labelsTs").iterdir():
        path.unlink()
    content = json.loads(_run(501, predictions, "--no-labels", "--json").stdout)
    assert len(content["ranking"]) == 6
    assert content["rank_correlation_with_dice"] is None


def test_faulty_labels_do_not_hide_the_ranking(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    _doubt(predictions)
    (nnunet_folders / "nnUNet_raw/Dataset501_Bars/labelsTs/A_1.nii.gz").write_bytes(b"no volume")
    done = _run(501, predictions, "--no-labels", "--jobs", 1)
    assert done.exit_code == 0
    assert "Look at these first" in done.output
    assert "labels cannot be used" in done.stderr


def test_no_labels_without_doubt_file_says_what_writes_it(nnunet_folders: Path, capsys: pytest.CaptureFixture[str]):
    predictions = make(nnunet_folders)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "501", str(predictions), "--no-labels"])
    assert caught.value.code == 1
    assert "--model" in capsys.readouterr().err


def test_doubt_beside_the_predictions_is_correlated_in_a_normal_evaluation(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    _doubt(predictions)
    content = json.loads(_run(501, predictions, "--json", "--jobs", 1).stdout)
    assert content["doubt"]["rank_correlation_with_dice"]["n"] == 6


def test_a_model_that_is_named_is_asked_for_its_doubt_every_time(
    nnunet_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import types

    calls = []

    def write_doubt(model: Path, images: Path, predictions: Path, fold, checkpoint: str, device: str | None) -> None:
        calls.append((model.name, images.name, fold, checkpoint))
        _doubt(predictions)

    module = types.ModuleType("nnunet_dgplugins.trainers.doubt")
    module.write_doubt = write_doubt
    monkeypatch.setitem(sys.modules, "nnunet_dgplugins.trainers.doubt", module)
    predictions = make(nnunet_folders)
    (tmp_path / "model").mkdir()
    for options in ([], ["-f", "all", "-chk", "checkpoint_best.pth"]):
        done = _run(501, predictions, "--no-labels", "--model", tmp_path / "model", "--jobs", 1, *options)
        assert done.exit_code == 0, done.output
    assert calls == [
        ("model", "imagesTs", 0, "checkpoint_final.pth"),
        ("model", "imagesTs", "all", "checkpoint_best.pth"),
    ]


def test_overlays_are_written_one_per_case(nnunet_folders: Path, tmp_path: Path):
    done = _run(501, make(nnunet_folders), "--overlays", tmp_path / "pictures", "--jobs", 1)
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6
