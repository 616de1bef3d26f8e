from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_annotate import NAME, raw_dataset, run, write

SITES = {"A": 6, "B": 4, "C": 5}
CASES = tuple(f"{site}{number}" for site, count in SITES.items() for number in range(count))


@pytest.fixture
def mixed(nnunet_folders: Path) -> Path:
    """A mixed dataset of three sites, annotated; a case of site D is a test case already."""
    folder = raw_dataset(nnunet_folders, CASES, ("D0",))
    rows = "\n".join(f"{name},{name[0]},p{name}" for name in (*CASES, "D0"))
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", f"case,site,patient\n{rows}\n")) == 0
    return folder


def prepare(folder: Path, cases: tuple[str, ...] = CASES) -> Path:
    prepared = folder.parents[1] / "nnUNet_preprocessed" / NAME
    (prepared / "gt_segmentations").mkdir(parents=True)
    (prepared / "dataset.json").write_bytes((folder / "dataset.json").read_bytes())
    for name in cases:
        (prepared / "gt_segmentations" / f"{name}.nii.gz").touch()
    return prepared


def folds_of(folder: Path) -> list[dict[str, list[str]]]:
    content: list[dict[str, list[str]]] = json.loads((folder / "splits_final.json").read_text())
    return content


def test_a_single_source_is_split_and_the_user_is_told_that_planning_saw_the_targets(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("splits", "321", "--single-source", "A") == 0
    folds = folds_of(mixed)
    assert len(folds) == 5
    for fold in folds:
        assert {name[0] for name in fold["train"] + fold["val"]} == {"A"}
    assert "--as-dataset" in capsys.readouterr().out


def test_leaving_one_site_out_gives_a_fold_per_site(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("splits", "321", "--leave-one-site-out") == 0
    folds = folds_of(mixed)
    assert [fold["held_out"] for fold in folds] == ["A", "B", "C"]
    for fold in folds:
        assert fold["held_out"] not in {name[0] for name in fold["train"] + fold["val"]}
    assert "fold 0: 7 train, 2 validate, A held out" in capsys.readouterr().out


def test_k_folds_cover_every_case_once(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("splits", "321", "--k-fold", "3") == 0
    assert sorted(name for fold in folds_of(mixed) for name in fold["val"]) == sorted(CASES)
    assert "--as-dataset" not in capsys.readouterr().out


def test_k_folds_need_no_case_table(nnunet_folders: Path) -> None:
    folder = raw_dataset(nnunet_folders)
    assert run("splits", "321", "--k-fold", "2") == 0
    assert len(folds_of(folder)) == 2


def test_sites_without_a_case_table_are_refused_with_the_command_to_run(
    nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_dataset(nnunet_folders)
    assert run("splits", "321", "--single-source", "A") == 1
    assert "dgplugins annotate" in capsys.readouterr().err


def test_raw_and_preprocessed_copies_are_written_and_the_old_ones_kept(mixed: Path) -> None:
    prepared = prepare(mixed)
    (prepared / "splits_final.json").write_text("[]")
    assert run("splits", "321", "--single-source", "A") == 0
    assert folds_of(mixed) == folds_of(prepared)
    assert (prepared / "splits_final.json.bak").read_text() == "[]"


def test_a_preprocessed_copy_that_lacks_cases_is_refused_and_nothing_is_written(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare(mixed, CASES[1:])
    assert run("splits", "321", "--single-source", "A") == 1
    assert "unknown case 'A0'" in capsys.readouterr().err
    assert not (mixed / "splits_final.json").exists()
    assert not (prepared / "splits_final.json").exists()


def test_neither_copy_changes_when_one_cannot_be_written(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare(mixed)
    (mixed / "splits_final.json").write_text("[]")
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target) == prepared / "splits_final.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run("splits", "321", "--single-source", "A") == 1
    assert "Nothing was changed" in capsys.readouterr().err
    assert (mixed / "splits_final.json").read_text() == "[]"
    assert not (prepared / "splits_final.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--single-source", "A", "--leave-one-site-out"], ["--k-fold", "3", "--as-dataset", "520"], ["--k-fold", "1"]],
)
def test_contradictory_options_are_usage_errors(mixed: Path, arguments: list[str]) -> None:
    assert run("splits", "321", *arguments) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--single-source", "AA"], "did you mean 'A'"),
        (["--single-source", "B", "--folds", "5"], "5 folds need 5 labelled patients, there are 4"),
        (["--k-fold", "16"], "there are 15"),
    ],
)
def test_impossible_splits_are_refused(
    mixed: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("splits", "321", *arguments) == 1
    assert said in capsys.readouterr().err


def test_a_clean_linked_dataset_has_the_targets_in_images_ts(mixed: Path) -> None:
    assert run("splits", "321", "--single-source", "A", "--as-dataset", "520") == 0
    out = mixed.with_name("Dataset520_Mixed_A")
    assert sorted(path.name for path in (out / "labelsTr").iterdir()) == [f"A{n}.nii.gz" for n in range(6)]
    assert {path.name[0] for path in (out / "imagesTs").iterdir()} == {"B", "C", "D"}
    link = out / "imagesTs" / "B0_0000.nii.gz"
    assert link.is_symlink()
    assert link.read_bytes() == (mixed / "imagesTr" / "B0_0000.nii.gz").read_bytes()
    content = json.loads((out / "dataset.json").read_text())
    assert content["numTraining"] == 6
    assert content["dgplugins"]["source"] == "A"
    assert content["dgplugins"]["cases"]["D0"]["site"] == "D"
    assert len(folds_of(out)) == 5
    assert not (mixed / "splits_final.json").exists()


def test_leaving_one_site_out_as_datasets_makes_one_per_site(mixed: Path) -> None:
    assert run("splits", "321", "--leave-one-site-out", "--as-dataset", "520") == 0
    for number, site in enumerate("ABC"):
        out = mixed.with_name(f"Dataset{520 + number}_Mixed_without_{site}")
        assert site not in {path.name[0] for path in (out / "imagesTr").iterdir()}
        assert json.loads((out / "dataset.json").read_text())["dgplugins"]["source"] == sorted({*"ABC"} - {site})


def test_labels_that_are_no_truth_are_none_in_a_linked_dataset(mixed: Path) -> None:
    """Cases with tags have labels for planning only; masks of those that validate lie in a folder of their own."""
    path = mixed / "dataset.json"
    content = json.loads(path.read_text())
    for name in CASES:
        content["dgplugins"]["cases"][name] |= {"labelled": False, "tags": [0, 1]}
    path.write_text(json.dumps(content))
    (mixed / "labelsVal").mkdir()
    for name in ("A0", "B0"):
        (mixed / "labelsVal" / f"{name}.nii.gz").write_bytes(b"mask")
    assert run("splits", "321", "--single-source", "A", "--as-dataset", "520") == 0
    out = mixed.with_name("Dataset520_Mixed_A")
    assert sorted(path.name for path in (out / "labelsTs").iterdir()) == ["B0.nii.gz", "D0.nii.gz"]
    assert (out / "labelsTs" / "B0.nii.gz").read_bytes() == b"mask"
    assert [path.name for path in (out / "labelsVal").iterdir()] == ["A0.nii.gz"]
    assert len(list((out / "labelsTr").iterdir())) == 6
    cases = json.loads((out / "dataset.json").read_text())["dgplugins"]["cases"]
    assert (cases["A1"]["labelled"], cases["B0"]["labelled"], cases["B1"]["labelled"]) == (False, True, False)
    assert "tags" in cases["A1"]
    assert "tags" not in cases["B1"]


def test_linking_twice_changes_nothing_and_another_split_under_the_same_id_is_refused(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("splits", "321", "--single-source", "A", "--as-dataset", "520") == 0
    out = mixed.with_name("Dataset520_Mixed_A")
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*")}
    assert run("splits", "321", "--single-source", "A", "--as-dataset", "520") == 0
    assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == before
    assert run("splits", "321", "--single-source", "A", "--as-dataset", "520", "--seed", "1") == 1
    assert "--overwrite" not in capsys.readouterr().err
    assert run("splits", "321", "--single-source", "C", "--as-dataset", "520") == 1


def test_nnunet_finds_nothing_wrong_with_a_linked_dataset(mixed: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

    assert run("splits", "321", "--single-source", "A", "--as-dataset", "520") == 0
    out = mixed.with_name("Dataset520_Mixed_A")
    names = get_identifiers_from_splitted_dataset_folder(str(out / "imagesTr"), ".nii.gz")
    assert sorted(names) == [f"A{number}" for number in range(6)]
    for name in names:
        image, label = out / "imagesTr" / f"{name}_0000.nii.gz", out / "labelsTr" / f"{name}.nii.gz"
        assert check_cases([str(image)], str(label), 1, SimpleITKIO)
