from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_dgplugins.cli.main import main
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.raw_dataset import RawDataset

NAME = "Dataset321_Mixed"


def raw_dataset(root: Path, train: tuple[str, ...] = ("a1", "a2", "b1", "b2"), test: tuple[str, ...] = ("c1",)) -> Path:
    folder = root / "nnUNet_raw" / NAME
    image = sitk.GetImageFromArray(np.zeros((2, 4, 4), np.uint8))
    for part, names in (("Tr", train), ("Ts", test)):
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True)
        for name in names:
            sitk.WriteImage(image, folder / f"images{part}" / f"{name}_0000.nii.gz")
            sitk.WriteImage(image, folder / f"labels{part}" / f"{name}.nii.gz")
    content = {
        "channel_names": {"0": "T2"},
        "labels": {"background": 0, "x": 1},
        "numTraining": len(train),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def run(*arguments: str) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


GOOD = "case,site,patient\na1,A,p1\na2,A,p2\nb1,B,p1\nb2,B,p1\nc1,C,\n"


def test_every_case_gets_its_site_and_patient(nnunet_folders: Path) -> None:
    folder = raw_dataset(nnunet_folders)
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", GOOD), "--source", "A") == 0
    table = RawDataset.open(321).table
    assert table is not None
    assert {name: (case.site, case.patient) for name, case in table.cases.items()} == {
        "a1": ("A", "p1"),
        "a2": ("A", "p2"),
        "b1": ("B", "p1"),
        "b2": ("B", "p1"),
        "c1": ("C", None),
    }
    assert table.source == "A"
    assert "dgplugins" not in json.loads((folder / "dataset.json.bak").read_text())


def test_patients_are_kept_where_a_new_list_names_none(
    nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_dataset(nnunet_folders)
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", GOOD), "--source", "A") == 0
    renamed = "case,site\na1,Siemens\na2,Siemens\nb1,B\nb2,B\nc1,C\n"
    sites = write(nnunet_folders / "t.csv", renamed)
    assert run("annotate", "321", "--sites", sites) == 1
    assert "the table's source A is no site of the list" in capsys.readouterr().err
    assert run("annotate", "321", "--sites", sites, "--source", "Siemens") == 0
    assert "Patients of 4 cases are those of the table before" in capsys.readouterr().out
    table = RawDataset.open(321).table
    assert table is not None
    assert (table.cases["a2"].site, table.cases["a2"].patient, table.source) == ("Siemens", "p2", "Siemens")


def test_a_site_in_two_spellings_and_a_case_listed_twice_are_refused(
    nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_dataset(nnunet_folders)
    twice = GOOD.replace("a2,A,p2", "a2,a,p2").replace("b2,B,p1", "b2,B,P1")
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", twice)) == 1
    said = capsys.readouterr().err
    assert "site 'a'; expected 'A', as in" in said
    assert "patient 'P1'; expected 'p1', as in" in said
    listed = '{"a1": "A", "a2": "A", "b1": "B", "b2": "B", "c1": "C", "a1": "B"}'
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.json", listed)) == 1
    assert "case 'a1' is listed twice" in capsys.readouterr().err


def test_the_preprocessed_copy_is_written_too_and_keeps_what_else_it_says(nnunet_folders: Path) -> None:
    folder = raw_dataset(nnunet_folders)
    prepared = nnunet_folders / "nnUNet_preprocessed" / NAME
    prepared.mkdir()
    content = json.loads((folder / "dataset.json").read_text())
    (prepared / "dataset.json").write_text(json.dumps({**content, "note": "mine"}))
    assert run("annotate", NAME, "--sites", write(nnunet_folders / "s.csv", GOOD)) == 0
    written = json.loads((prepared / "dataset.json").read_text())
    assert written["note"] == "mine"
    assert written["dgplugins"] == json.loads((folder / "dataset.json").read_text())["dgplugins"]
    assert (prepared / "dataset.json.bak").is_file()


def test_all_faults_are_reported_together_and_nothing_is_written(
    nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = raw_dataset(nnunet_folders)
    before = (folder / "dataset.json").read_bytes()
    text = "case,site\na1,A\na1,A\nb1,B\nb3,B\nc1,\n"
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", text), "--source", "Z") == 1
    said = capsys.readouterr().err
    for part in (
        "'a1' is listed twice",
        "unknown case 'b3'; did you mean",
        "'a2' of Dataset321_Mixed is not listed",
        "'b2' of Dataset321_Mixed is not listed",
        "'c1' has no site",
        "unknown site 'Z'",
    ):
        assert part in said
    assert "6 problems" in said
    assert (folder / "dataset.json").read_bytes() == before
    assert not list(folder.glob("*.bak"))


def test_tags_and_labelled_marks_of_an_older_table_are_kept(nnunet_folders: Path) -> None:
    folder = raw_dataset(nnunet_folders)
    content = json.loads((folder / "dataset.json").read_text())
    content["dgplugins"] = {
        "format": 1,
        "source": "B",
        "cases": {"a1": {"labelled": False, "tags": [1]}},
        "protocol": {},
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", GOOD)) == 0
    table = CaseTable.from_dataset_json(json.loads((folder / "dataset.json").read_text()))
    assert table is not None
    assert (table.cases["a1"].site, table.cases["a1"].labelled, table.cases["a1"].tags) == ("A", False, [1])
    assert table.source == "B"


def test_annotating_twice_changes_nothing_and_makes_no_second_backup(nnunet_folders: Path) -> None:
    folder = raw_dataset(nnunet_folders)
    sites = write(nnunet_folders / "s.csv", GOOD)
    assert run("annotate", "321", "--sites", sites) == 0
    first = sorted((path.name, path.read_bytes()) for path in folder.glob("dataset.json*"))
    assert run("annotate", "321", "--sites", sites) == 0
    assert sorted((path.name, path.read_bytes()) for path in folder.glob("dataset.json*")) == first


def test_older_backups_are_never_overwritten(nnunet_folders: Path) -> None:
    folder = raw_dataset(nnunet_folders)
    for site in ("A", "B", "D"):
        assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", GOOD.replace(",C,", f",{site},"))) == 0
    assert sorted(path.name for path in folder.glob("*.bak*")) == [
        "dataset.json.bak",
        "dataset.json.bak2",
        "dataset.json.bak3",
    ]


def test_folds_that_mix_patients_are_pointed_out(nnunet_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = raw_dataset(nnunet_folders)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["a1", "b1"], "val": ["a2", "b2"]}]))
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", GOOD)) == 0
    assert "patient 'B/p1' trains and validates" in capsys.readouterr().out


def test_a_dataset_whose_files_are_listed_in_dataset_json_is_understood(nnunet_folders: Path) -> None:
    folder = raw_dataset(nnunet_folders)
    content = json.loads((folder / "dataset.json").read_text())
    content["dataset"] = {
        "a1": {"images": ["imagesTr/a1_0000.nii.gz"], "label": "labelsTr/a1.nii.gz"},
        "other": {"images": [str(folder / "imagesTr" / "b1_0000.nii.gz")], "label": "labelsTr/b1.nii.gz"},
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    assert run("annotate", "321", "--sites", write(nnunet_folders / "s.csv", "case,site\na1,A\nother,B\nc1,C\n")) == 0


def test_a_dataset_that_does_not_exist_is_refused(nnunet_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("annotate", "77", "--sites", write(nnunet_folders / "s.csv", GOOD)) == 1
    assert "No Dataset077_*" in capsys.readouterr().err


def test_real_cardiac_volumes_are_annotated_and_split_by_patient(nnunet_folders: Path, sample_data: Path) -> None:
    """ACDC: 15 patients with two frames each; a fold that parts the frames of a patient would leak."""
    folder = nnunet_folders / "nnUNet_raw" / "Dataset322_ACDC"
    rows = ["case,site,patient"]
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for label in sorted((sample_data / "cardiac" / "ACDC" / "training").glob("*/*_gt.nii.gz")):
        name = label.name.removesuffix("_gt.nii.gz")
        (folder / "labelsTr" / f"{name}.nii.gz").symlink_to(label)
        (folder / "imagesTr" / f"{name}_0000.nii.gz").symlink_to(label.with_name(f"{name}.nii.gz"))
        patient = name.split("_")[0]
        rows.append(f"{name},{'early' if int(patient[-3:]) < 45 else 'late'},{patient}")
    content = {
        "channel_names": {"0": "cine"},
        "labels": {"background": 0, "RV": 1, "MYO": 2, "LV": 3},
        "numTraining": len(rows) - 1,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    assert run("annotate", "322", "--sites", write(nnunet_folders / "s.csv", "\n".join(rows))) == 0
    assert run("splits", "322", "--single-source", "early") == 0
    folds = json.loads((folder / "splits_final.json").read_text())
    early = {row.split(",")[0] for row in rows if ",early," in row}
    for fold in folds:
        assert set(fold["train"]) | set(fold["val"]) == early
        assert not {name[:10] for name in fold["train"]} & {name[:10] for name in fold["val"]}
