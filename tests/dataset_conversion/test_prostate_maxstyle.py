from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from trees import convert, image, label, read, refused, save, verify

from dataset_conversion import Dataset502_ProstateMaxStyle as module
from nnunet_dgplugins.errors import UserError

pytestmark = pytest.mark.usefixtures("nnunet_folders")


def tree(root: Path, patients: tuple[str, ...] = ("patient_2", "patient_10")) -> Path:
    sites = ("A-ISBI", "B-ISBI_1.5", "C-I2CVB", "D-UCL", "E-BIDMC", "F-HK", "G-MedicalDecathlon")
    for index, site in enumerate(sites):
        for number, patient in enumerate(patients):
            folder = root / "reorganized" / site / patient
            save(folder / "t2_img_clipped.nii.gz", image(100 * index + number))
            save(folder / "label_clipped.nii.gz", label())
    return root


def test_patients_of_the_source_are_trained_on_and_decathlon_is_left_out(tmp_path: Path) -> None:
    out = convert(module, tree(tmp_path / "in"), sources=("B-ISBI_1.5",))
    assert out.name == "Dataset502_ProstateMaxStyle_BMC"
    cases = json.loads((out / "dataset.json").read_text())["dgplugins"]["cases"]
    assert {case["site"] for case in cases.values()} == {"RUNMC", "BMC", "I2CVB", "UCL", "BIDMC", "HK"}
    assert cases["BMC_patient_10"]["patient"] == "patient_10"
    assert cases["BMC_patient_10"]["original"] == "reorganized/B-ISBI_1.5/patient_10/t2_img_clipped.nii.gz"
    assert sorted(path.name for path in (out / "labelsTr").iterdir()) == [
        "BMC_patient_10.nii.gz",
        "BMC_patient_2.nii.gz",
    ]
    verify(out)


def test_decathlon_cases_are_used_when_named(tmp_path: Path) -> None:
    out = convert(module, tree(tmp_path / "in"), sources=("A",), targets=("G-MedicalDecathlon",))
    assert sorted(path.name for path in (out / "labelsTs").iterdir()) == [
        "MSD_patient_10.nii.gz",
        "MSD_patient_2.nii.gz",
    ]


def test_the_source_has_its_own_order_in_the_published_split(tmp_path: Path) -> None:
    out = convert(module, tree(tmp_path / "in"), sources=("A",), split="desam")
    folds = json.loads((out / "splits_final.json").read_text())
    assert folds == [{"train": ["RUNMC_patient_2"], "val": ["RUNMC_patient_10"]}]


def test_blanks_and_unicode_in_folder_names_become_safe_ids_and_the_name_is_kept(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    for number, patient in enumerate(("Jürgen Größe 7", "患者", "a.b (2)")):
        save(root / "reorganized" / "A-ISBI" / patient / "T2_IMG_CLIPPED.NII.GZ", image(900 + number))
        save(root / "reorganized" / "A-ISBI" / patient / "label_clipped.nii.gz", label())
    out = convert(module, root, sources=("A",))
    written = {path.name.removesuffix(".nii.gz") for path in (out / "labelsTr").iterdir()}
    assert written >= {"RUNMC_Jurgen-Groe-7", "RUNMC_u60a3-8005", "RUNMC_a-b-2"}
    cases = json.loads((out / "dataset.json").read_text())["dgplugins"]["cases"]
    assert cases["RUNMC_Jurgen-Groe-7"]["patient"] == "Jürgen Größe 7"
    assert np.array_equal(read(out / "imagesTr" / "RUNMC_u60a3-8005_0000.nii.gz"), image(901))


def test_two_patients_whose_safe_ids_agree_are_reported(tmp_path: Path) -> None:
    report = refused(module, tree(tmp_path / "in", ("a b", "a-b")), sources=("A",))
    assert "2 cases would all be called RUNMC_a-b" in str(report)


def test_a_folder_without_label_is_reported_and_can_be_left_out(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    (root / "reorganized" / "F-HK" / "patient_2" / "label_clipped.nii.gz").unlink()
    report = refused(module, root, sources=("A",))
    assert len(report.problems) == 1
    assert "no label_clipped.nii.gz" in str(report)
    assert convert(module, root, sources=("A",), exclude=("HK_patient_2",)).is_dir()


def test_keeping_zones_is_refused_for_a_source_without(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no zones to keep"):
        convert(module, tree(tmp_path / "in"), sources=("A",), zones="keep")
