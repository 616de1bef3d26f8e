from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from trees import convert, image, label, read, refused, save, verify

from dataset_conversion import Dataset504_AbdomenCTMR as module

pytestmark = pytest.mark.usefixtures("nnunet_folders")


def tree(root: Path, count: int = 12) -> Path:
    for index, site in enumerate(("SABSCT", "CHAOST2")):
        for number in range(count):
            folder = root / site / "processed"
            save(folder / f"image_{number}.nii.gz", image(100 * index + number).clip(0, 255).astype(np.float32))
            save(folder / f"label_{number}.nii.gz", label((1, 2, 3, 4)).astype(np.float32))
    return root


@pytest.mark.parametrize(("source", "target"), [("CT", "MR"), ("MR", "CT")])
def test_one_modality_is_trained_on_and_the_other_tested(tmp_path: Path, source: str, target: str) -> None:
    out = convert(module, tree(tmp_path / "in"), sources=(source,))
    assert out.name == f"Dataset504_AbdomenCTMR_{source}"
    dataset = json.loads((out / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
    assert {path.name[:2] for path in (out / "imagesTr").iterdir()} == {source}
    assert {path.name[:2] for path in (out / "imagesTs").iterdir()} == {target}
    verify(out)


def test_the_channel_is_not_called_ct_so_that_nnunet_normalises_each_image_by_itself(tmp_path: Path) -> None:
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    out = convert(module, tree(tmp_path / "in"), sources=("CT",))
    channels = json.loads((out / "dataset.json").read_text())["channel_names"]
    assert get_normalization_scheme(channels["0"]).__name__ == "ZScoreNormalization"


def test_ct_in_hounsfield_units_is_windowed_and_mr_never(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "in")
    hounsfield = (image(7).astype(np.int16) * 4 - 1000).astype(np.int16)
    for site in ("SABSCT", "CHAOST2"):
        save(root / site / "processed" / "image_0.nii.gz", hounsfield + (site == "CHAOST2"))
    out = convert(module, root, sources=("CT",))
    assert "Hounsfield units, windowed to (-125, 275)" in capsys.readouterr().err
    assert np.array_equal(read(out / "imagesTr" / "CT_000_0000.nii.gz"), hounsfield.clip(-125, 275))
    assert np.array_equal(read(out / "imagesTs" / "MR_000_0000.nii.gz"), hounsfield + 1)


def test_ct_that_is_windowed_already_is_copied_byte_for_byte(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    out = convert(module, root, sources=("CT",))
    source = root / "SABSCT" / "processed" / "image_3.nii.gz"
    assert (out / "imagesTr" / "CT_003_0000.nii.gz").read_bytes() == source.read_bytes()


def test_the_published_split_counts_ids_as_numbers_and_tests_on_the_first_fifth(tmp_path: Path) -> None:
    out = convert(module, tree(tmp_path / "in", count=30), sources=("CT",), split="published")
    folds = json.loads((out / "splits_final.json").read_text())
    cases = [f"CT_{number:03d}" for number in range(30)]
    assert folds == [{"train": cases[9:], "val": cases[6:9]}]
    tested = sorted(path.name[:6] for path in (out / "imagesTs").iterdir() if path.name.startswith("CT"))
    assert tested == cases[:6]
    table = json.loads((out / "dataset.json").read_text())
    assert table["numTraining"] == 24
    assert table["dgplugins"]["cases"]["CT_000"]["site"] == "CT"


@pytest.mark.parametrize(("count", "test", "val"), [(20, 4, 2), (30, 6, 3), (13, 3, 1), (10, 2, 1), (45, 10, 4)])
def test_the_published_split_rounds_as_the_published_code_does(count: int, test: int, val: int) -> None:
    from dataset_conversion._protocols import cross_modality
    from nnunet_dgplugins.data.case_table import CaseTable

    cases = [f"{number:02d}" for number in range(count)]
    held_out, folds = cross_modality(CaseTable(), cases)
    assert held_out == cases[:test]
    assert folds == [{"train": cases[test + val :], "val": cases[test : test + val]}]


def test_a_number_in_two_files_is_reported(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    save(root / "SABSCT" / "processed" / "image_03.nii.gz", image(77))
    assert "the same image as" in str(refused(module, root, sources=("MR",)))


def test_an_image_without_label_is_reported(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    (root / "CHAOST2" / "processed" / "label_5.nii.gz").unlink()
    assert "case 5 has no label" in str(refused(module, root, sources=("CT",)))
