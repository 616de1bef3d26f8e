"""The converter of the simulated vendors, on tiny trees as scripts/simulate_vendors.py writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from trees import convert as convert_any
from trees import image, label, read, refused, save, verify

from dataset_conversion import Dataset514_SimulatedVendors as module
from nnunet_dgplugins.data.case_table import CaseTable

SITES = ("SimA", "SimB", "SimC", "SimD")


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    """Six patients of two frames at SimA, two at the others."""
    root, number = tmp_path / "in", 0
    for site in SITES:
        for _ in range(6 if site == "SimA" else 2):
            number += 1
            for frame in (1, 9 + number):
                plain = f"patient{number:03d}_frame{frame:02d}"
                save(root / site / f"{plain}.nii.gz", image(100 * number + frame))
                save(root / site / f"{plain}_gt.nii.gz", label((1, 2, 3)))
    (root / "README.txt").write_text("simulated")
    return root


def convert(root: Path, **options: object) -> Path:
    return convert_any(module, root, **{"sources": ("SimA",), **options})


def description(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_source_vendor_is_trained_on_and_the_other_three_are_test_sites(root: Path) -> None:
    out = convert(root)
    assert out.name == "Dataset514_SimulatedVendors_SimA"
    assert len(names(out / "imagesTr")) == len(names(out / "labelsTr")) == 12
    assert len(names(out / "imagesTs")) == len(names(out / "labelsTs")) == 12
    assert names(out / "imagesTr")[0] == "SimA_patient001_frame01_0000.nii.gz"
    assert {name[:4] for name in names(out / "labelsTs")} == {"SimB", "SimC", "SimD"}


def test_the_case_table_knows_site_patient_and_original(root: Path) -> None:
    table = CaseTable.from_dataset_json(description(convert(root)))
    assert table is not None
    assert (table.sources, table.sites()) == (["SimA"], list(SITES))
    case = table.cases["SimB_patient007_frame16"]
    assert (case.site, case.patient, case.labelled) == ("SimB", "patient007", True)
    assert case.original == "SimB/patient007_frame16.nii.gz"


def test_everything_that_names_the_data_says_that_it_is_simulated(root: Path) -> None:
    content = description(convert(root))
    assert content["dgplugins"]["protocol"]["converter"] == "simulated-vendors"
    assert content["dgplugins"]["protocol"]["simulated"] is True
    assert content["name"] == "SimulatedVendors_SimA"
    assert "SIMULATED" in content["reference"]
    assert {case["site"][:3] for case in content["dgplugins"]["cases"].values()} == {"Sim"}


def test_labels_are_those_of_acdc_and_not_those_of_mnms(root: Path) -> None:
    out = convert(root)
    assert description(out)["labels"] == {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    for case, part, site in (("patient001_frame01", "Tr", "SimA"), ("patient012_frame21", "Ts", "SimD")):
        written = read(out / f"labels{part}" / f"{site}_{case}.nii.gz")
        assert np.array_equal(written, read(root / site / f"{case}_gt.nii.gz"))
        voxels = read(out / f"images{part}" / f"{site}_{case}_0000.nii.gz")
        assert np.array_equal(voxels, read(root / site / f"{case}.nii.gz"))


def test_both_frames_of_a_patient_are_on_one_side_of_every_fold(root: Path) -> None:
    folds = json.loads((convert(root) / "splits_final.json").read_text())
    assert len(folds) == 5
    for fold in folds:
        train, val = ({name.split("_")[1] for name in fold[part]} for part in ("train", "val"))
        assert not train & val
        assert len(train | val) == 6
    validated = [name for fold in folds for name in fold["val"]]
    assert len(validated) == len(set(validated)) == 12


def test_any_vendor_can_be_the_source_and_short_names_will_do(root: Path) -> None:
    out = convert(root, sources=("c",), targets=("A",), dataset_id=620)
    assert out.name == "Dataset620_SimulatedVendors_SimC"
    assert {name[:4] for name in names(out / "imagesTs")} == {"SimA"}


def test_a_simulation_that_was_stopped_is_refused(root: Path) -> None:
    (root / "README.txt").unlink()
    report = refused(module, root, sources=("SimA",))
    assert [problem.where for problem in report.problems] == [str(root / "README.txt")]
    assert "simulate_vendors.py again" in str(report)


def test_the_readme_is_no_stray_file_and_others_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "SimB" / "notes.txt").write_text("x")
    convert(root)
    said = capsys.readouterr().err
    assert "README.txt" not in said
    assert "notes.txt: neither" in said


def test_a_patient_at_two_vendors_is_refused(root: Path) -> None:
    for ending in ("", "_gt"):
        shutil.move(root / "SimA" / f"patient002_frame01{ending}.nii.gz", root / "SimD")
    report = refused(module, root, sources=("SimA",))
    assert len(report.problems) == 1
    assert "patient002 is at SimA too" in str(report)


def test_missing_and_double_files_are_listed_at_once(root: Path) -> None:
    (root / "SimA" / "patient001_frame01_gt.nii.gz").unlink()
    (root / "SimB" / "patient007_frame01.nii.gz").unlink()
    save(root / "SimC" / "patient009_frame01.nii", image(77))
    text = str(refused(module, root, sources=("SimA",)))
    for part in ("SimA/patient001_frame01: no label", "SimB/patient007_frame01: no image", "two files for one image"):
        assert part in text
    assert "3 problems" in text


def test_nnunet_finds_nothing_wrong_with_the_simulated_vendors(root: Path) -> None:
    verify(convert(root))
