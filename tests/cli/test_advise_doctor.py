"""advise reads a dataset's JSON files; doctor checks the installation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.registry import TRAINERS

OF_TAGS = [name for name, info in TRAINERS.items() if info.tags]


def _dataset(root: Path, cases: dict[str, dict] | None, source: str | None = None) -> None:
    folder = root / "nnUNet_raw" / "Dataset520_Test"
    folder.mkdir(parents=True)
    content: dict = {
        "channel_names": {"0": "T2"},
        "labels": {"background": 0, "prostate": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    if cases is not None:
        content["dgplugins"] = {"format": 1, "source": source, "cases": cases, "protocol": {}}
    (folder / "dataset.json").write_text(json.dumps(content))


def _advice() -> dict:
    done = CliRunner().invoke(cli, ["advise", "520", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_a_single_source_dataset_is_what_desam_is_made_for(nnunet_folders: Path):
    cases = {"a": {"site": "A", "labelled": True}, "b": {"site": "B", "labelled": True}}
    _dataset(nnunet_folders, cases, source="A")
    advice = _advice()
    assert [item["name"] for item in advice["trainers"] if not item["fits"]] == OF_TAGS
    assert "One source site (A), 1 unseen" in " ".join(advice["trainers"][0]["why"])
    assert advice["next"] == ["nnUNetv2_plan_and_preprocess -d 520 -c 2d --verify_dataset_integrity"]


def test_without_masks_no_trainer_that_reads_masks_fits(nnunet_folders: Path):
    _dataset(nnunet_folders, {"a": {"site": "A", "labelled": False, "tags": [1]}})
    advice = _advice()
    assert [item["name"] for item in advice["trainers"] if item["fits"]] == ["EquivariantCAMTrainer"]
    assert "image tags: yes" in advice["facts"]


def test_tags_of_patches_speak_for_dcam(nnunet_folders: Path):
    _dataset(nnunet_folders, {"a": {"site": "A", "labelled": False, "tags": [[1]]}})
    fits = [item["name"] for item in _advice()["trainers"] if item["fits"]]
    assert fits == ["DCAMClassifierTrainer", "DCAMTrainer"]


def test_cases_without_masks_speak_for_epl(nnunet_folders: Path):
    cases = {"a": {"site": "A", "labelled": True}, "b": {"site": "A", "labelled": False}}
    _dataset(nnunet_folders, cases, source="A")
    _images(nnunet_folders, Tr="ab")
    assert _about_epl(nnunet_folders) == ("1 cases without masks", "nnUNetv2_train 520 2d 0 -tr EPLTrainer")


def test_cases_without_masks_of_the_target_or_of_the_test_set_do_not_speak_for_epl(nnunet_folders: Path):
    cases = {
        "a": {"site": "A", "labelled": True},
        "b": {"site": "A", "labelled": False},
        "c": {"site": "B", "labelled": False},
    }
    _dataset(nnunet_folders, cases, source="A")
    _images(nnunet_folders, Tr="ac", Ts="b")
    assert _about_epl(nnunet_folders) == (
        "No case without masks", "nnUNetv2_train 520 2d 0 -tr DeSAMTrainer"
    )  # fmt: skip


def _images(root: Path, **sides: str) -> None:
    for side, names in sides.items():
        folder = root / "nnUNet_raw" / "Dataset520_Test" / f"images{side}"
        folder.mkdir()
        for name in names:
            (folder / f"{name}_0000.nii.gz").touch()


def _about_epl(root: Path) -> tuple[str, str]:
    """The beginning of what is said of EPL and masks, and the next command."""
    preprocessed = root / "nnUNet_preprocessed" / "Dataset520_Test"
    preprocessed.mkdir()
    (preprocessed / "nnUNetPlans.json").write_text("{}")
    advice = _advice()
    (why,) = [item["why"] for item in advice["trainers"] if item["name"] == "EPLTrainer"]
    (said,) = [text for text in why if "without masks" in text]
    return said[: said.index("without masks") + len("without masks")], advice["next"][0]


def test_without_a_case_table_annotate_is_named(nnunet_folders: Path):
    _dataset(nnunet_folders, None)
    assert any("dgplugins annotate" in fact for fact in _advice()["facts"])


MASKS = {"site": "A", "labelled": True}
TAGS_OF_SLICES = {"site": "A", "labelled": False, "tags": [1]}
TAGS_OF_A_PATCH = {"site": "A", "labelled": False, "tags": [[1]]}


@pytest.mark.parametrize(
    ("case", "trained", "following"),
    [
        (MASKS, [], "nnUNetv2_train 520 2d 0 -tr DeSAMTrainer"),
        (MASKS, ["DeSAMTrainer"], "-f 0 -tr DeSAMTrainer"),
        (MASKS, ["SAMSDGCoarseTrainer"], "nnUNetv2_train 520 2d 0 -tr SAMSDGTrainer"),
        (MASKS, ["SAMSDGCoarseTrainer", "SAMSDGTrainer"], "-f 0 -tr SAMSDGTrainer"),
        (TAGS_OF_SLICES, [], "nnUNetv2_train 520 2d 0 -tr EquivariantCAMTrainer"),
        (TAGS_OF_A_PATCH, [], "nnUNetv2_train 520 2d 0 -tr DCAMClassifierTrainer"),
        (TAGS_OF_A_PATCH, ["DCAMClassifierTrainer"], "nnUNetv2_train 520 2d 0 -tr DCAMTrainer"),
        (TAGS_OF_A_PATCH, ["DCAMClassifierTrainer", "DCAMTrainer"], "-f 0 -tr DCAMTrainer"),
    ],
)
def test_the_next_command_follows_what_is_there(nnunet_folders: Path, case: dict, trained: list[str], following: str):
    _dataset(nnunet_folders, {"a": case}, source="A")
    preprocessed = nnunet_folders / "nnUNet_preprocessed" / "Dataset520_Test"
    preprocessed.mkdir()
    (preprocessed / "nnUNetPlans.json").write_text("{}")
    for trainer in trained:
        _finished(nnunet_folders, f"{trainer}__nnUNetPlans__2d", "fold_0")
    first, *rest = _advice()["next"]
    assert first.endswith(following)
    assert rest == (["dgplugins evaluate 520 predictions"] if "predict" in first else [])


def _finished(root: Path, model: str, fold: str) -> None:
    folder = root / "nnUNet_results" / "Dataset520_Test" / model / fold
    folder.mkdir(parents=True)
    (folder / "checkpoint_final.pth").touch()


def test_the_next_command_is_of_the_plans_and_fold_that_have_been_trained(nnunet_folders: Path):
    _dataset(nnunet_folders, {"a": TAGS_OF_A_PATCH}, source="A")
    preprocessed = nnunet_folders / "nnUNet_preprocessed" / "Dataset520_Test"
    preprocessed.mkdir()
    (preprocessed / "nnUNetPlans.json").write_text("{}")
    _finished(nnunet_folders, "DCAMClassifierTrainer__Small__2d", "fold_1")
    assert _advice()["next"] == ["nnUNetv2_train 520 2d 1 -tr DCAMTrainer -p Small"]
    _finished(nnunet_folders, "DCAMTrainer__Small__2d", "fold_1")
    assert _advice()["next"][0].endswith("-c 2d -f 1 -tr DCAMTrainer -p Small")
    _finished(nnunet_folders, "DCAMTrainer__nnUNetPlans__2d", "fold_0")
    assert _advice()["next"][0].endswith("-c 2d -f 0 -tr DCAMTrainer")


def test_where_no_trainer_fits_what_is_missing_is_said(nnunet_folders: Path):
    _dataset(nnunet_folders, {"a": {"site": "A", "labelled": False}}, source="A")
    assert _advice()["next"] == []
    said = CliRunner().invoke(cli, ["advise", "520"]).output
    assert "No trainer fits: cases need masks in labelsTr, or tags in the case table" in said
    assert "Next:" not in said


def test_a_broken_case_table_is_reported_with_every_problem(nnunet_folders: Path):
    _dataset(nnunet_folders, {"a": {"site": 3, "labelled": True}, "b": {"sites": "B", "labelled": True}})
    done = CliRunner().invoke(cli, ["advise", "520"])
    text = str(done.exception)
    assert "2 problems" in text
    assert "did you mean 'site'" in text


def test_doctor_finds_every_trainer_and_fails_without_the_folders(
    nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
):
    from nnunet_dgplugins.registry import TRAINERS

    done = CliRunner().invoke(cli, ["doctor", "--json"])
    report = json.loads(done.output)
    assert done.exit_code == 0, done.output
    states = {check["what"]: check["state"] for check in report["checks"]}
    assert all(states[name] == "good" for name in TRAINERS)
    monkeypatch.delenv("nnUNet_results")
    failed = CliRunner().invoke(cli, ["doctor", "--json"])
    assert failed.exit_code == 1
    assert json.loads(failed.output)["good"] is False


def _sam_rows() -> dict[str, dict]:
    from nnunet_dgplugins.cli import doctor

    return {check["what"]: check for check in doctor._sam_files()}


def test_doctor_names_the_encoder_that_runs_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DGPLUGINS_SAM_DIR", raising=False)
    rows = _sam_rows()
    default = rows["SAM encoder, sam=auto"]
    assert (default["state"], default["found"]) == ("good", "vit_tiny (shipped)")
    assert "vit_b 357.7 MiB" in default["fix"]
    assert rows["vit_tiny"]["state"] == "good"
    assert rows["vit_b"]["state"] == "note"
    monkeypatch.setenv("DGPLUGINS_SAM_DIR", str(tmp_path))
    (tmp_path / "sam_vit_b_01ec64.pth").touch()
    rows = _sam_rows()
    assert rows["SAM encoder, sam=auto"]["found"] == "vit_b"
    assert rows["vit_b"]["state"] == "good"


def test_doctor_fails_where_the_shipped_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from nnunet_dgplugins.sam import models

    monkeypatch.setattr(models, "_PACKAGE", tmp_path)
    row = _sam_rows()["vit_tiny"]
    assert (row["state"], row["fix"]) == ("failed", "install nnunet_dgplugins again")


@pytest.fixture
def logger_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, tuple[str, str]]]:
    """State and finding of the loggers' rows, with some variables set and some packages installed."""
    from nnunet_dgplugins.cli import doctor
    from nnunet_dgplugins.trainers import loggers

    def rows(installed: str, **variables: str) -> dict[str, tuple[str, str]]:
        monkeypatch.setattr(loggers, "is_installed", lambda package: package in installed.split())
        for name in ("nnUNet_wandb_enabled", "DGPLUGINS_LOGGERS", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return {check["what"]: (check["state"], check["found"]) for check in doctor._loggers()}

    return rows


def test_doctor_says_which_loggers_are_on_and_what_they_lack(logger_rows: Callable[..., dict[str, tuple[str, str]]]):
    assert logger_rows("tensorboard") == {
        "logger wandb": ("note", "off, not installed"),
        "logger tensorboard": ("note", "off, installed"),
        "logger mlflow": ("note", "off, not installed"),
    }
    rows = logger_rows("tensorboard", nnUNet_wandb_enabled="1", DGPLUGINS_LOGGERS="tensorboard, MLflow")
    assert rows["logger wandb"] == ("failed", "on, not installed")
    assert rows["logger tensorboard"] == ("good", "on, installed")
    assert rows["logger mlflow"] == ("failed", "on, not installed")
    assert logger_rows("mlflow", DGPLUGINS_LOGGERS="mlflow")["DGPLUGINS_LOGGERS"][0] == "failed"  # no address
    assert "DGPLUGINS_LOGGERS" not in logger_rows("mlflow", DGPLUGINS_LOGGERS="mlflow", MLFLOW_TRACKING_URI="http://x")
    assert "no logger 'comet'" in logger_rows("", DGPLUGINS_LOGGERS="comet")["DGPLUGINS_LOGGERS"][1]
