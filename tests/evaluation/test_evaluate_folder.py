"""A folder of predictions against a folder of labels: what is compared, and every problem in one report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from made_dataset import CASES, SPACING, bar, evaluated, make, write

from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.evaluation.evaluate import COLUMNS, Classes, Dataset, evaluate
from nnunet_dgplugins.evaluation.label_maps import read_label_map


def _dice(table, case: str, name: str = "prostate") -> float:
    chosen = table[(table["case"] == case) & (table["class"] == name) & (table["metric"] == "dice")]
    assert len(chosen) == 1
    return float(chosen["value"].iloc[0])


def test_each_case_gets_the_dice_computed_by_hand(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    result = evaluate(Dataset.load(501), predictions, jobs=1)
    assert list(result.table.columns) == COLUMNS
    for case, (site, shared) in CASES.items():
        assert _dice(result.table, case) == pytest.approx(shared / 10)
        assert set(result.table[result.table["case"] == case]["site"]) == {site}
    assert result.labels.name == "labelsTs"


def test_two_processes_give_the_same_table_as_one(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    one, two = (evaluate(Dataset.load("Dataset501_Bars"), predictions, jobs=jobs).table for jobs in (1, 2))
    assert one.equals(two)


def test_a_dataset_without_case_table_has_one_unnamed_site(nnunet_folders: Path):
    result = evaluated(nnunet_folders, source=None)
    assert set(result.table["site"]) == {"unknown site"}
    assert set(result.table["patient"]) == set(CASES)


def test_all_problems_are_reported_at_once(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    (predictions / "A_1.nii.gz").unlink()
    write(bar(2), predictions / "Z_9.nii.gz")
    write(bar(2, value=3), predictions / "A_2.nii.gz")
    write(bar(2, shape=(6, 4, 20)), predictions / "B_1.nii.gz")
    write(bar(2), predictions / "C_1.nii.gz", (0.5, 1.0, 4.0))
    write(bar(2).astype(np.float32) * 0.5, predictions / "C_2.nii.gz")
    (predictions / "C_3.nii.gz").write_bytes((predictions / "C_3.nii.gz").read_bytes()[:60])
    with pytest.raises(BadInput) as caught:
        evaluate(Dataset.load(501), predictions, jobs=1)
    text = str(caught.value)
    assert len(caught.value.problems) == 7
    for part in (
        "A_1.nii.gz: no prediction",
        "Z_9.nii.gz: no label",
        "A_2.nii.gz: unknown values 3; expected 0, 1 (dataset.json)",
        "shape (6, 4, 24) against (6, 4, 20)",
        "spacing (3, 1, 0.5) against (4, 1, 0.5)",
        "40 values are not whole numbers, such as 0.5",
        "C_3.nii.gz: cannot be read",
    ):
        assert part in text, part


def test_a_shifted_origin_is_a_problem_and_header_rounding_is_not(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    image = SimpleITK.ReadImage(str(predictions / "A_1.nii.gz"))
    image.SetOrigin((0.001, 0.0, 0.0))
    SimpleITK.WriteImage(image, str(predictions / "A_1.nii.gz"))
    evaluate(Dataset.load(501), predictions, jobs=1)
    image.SetOrigin((5.0, 0.0, 0.0))
    SimpleITK.WriteImage(image, str(predictions / "A_1.nii.gz"))
    with pytest.raises(BadInput, match="origin"):
        evaluate(Dataset.load(501), predictions, jobs=1)


def test_a_flipped_axis_is_a_problem(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    image = SimpleITK.ReadImage(str(predictions / "B_1.nii.gz"))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(predictions / "B_1.nii.gz"))
    with pytest.raises(BadInput, match="direction"):
        evaluate(Dataset.load(501), predictions, jobs=1)


def test_partial_evaluates_the_cases_that_have_both(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    (predictions / "A_1.nii.gz").unlink()
    write(bar(2), predictions / "Z_9.nii.gz")
    result = evaluate(Dataset.load(501), predictions, partial_folder=True, jobs=1)
    assert sorted(result.table["case"].unique()) == sorted(set(CASES) - {"A_1"})
    assert len(result.notes) == 2
    for path in predictions.iterdir():
        path.unlink()
    write(bar(2), predictions / "Z_9.nii.gz")
    with pytest.raises(UserError, match="No case has both"):
        evaluate(Dataset.load(501), predictions, partial_folder=True, jobs=1)


def test_a_case_without_annotation_by_the_table_needs_no_label(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    path = nnunet_folders / "nnUNet_raw/Dataset501_Bars/dataset.json"
    content = json.loads(path.read_text())
    content["dgplugins"]["cases"]["Z_9"] = {"site": "C", "labelled": False}
    path.write_text(json.dumps(content))
    write(bar(2), predictions / "Z_9.nii.gz")
    result = evaluate(Dataset.load(501), predictions, jobs=1)
    assert "Z_9" not in set(result.table["case"])
    assert "1 predicted cases have no voxel annotation" in result.notes[0]


def test_an_empty_folder_and_a_missing_folder_are_said(nnunet_folders: Path, tmp_path: Path):
    make(nnunet_folders)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file ending in \.nii\.gz"):
        evaluate(Dataset.load(501), tmp_path / "empty", jobs=1)
    with pytest.raises(UserError, match="no such folder"):
        evaluate(Dataset.load(501), tmp_path / "absent", jobs=1)


def test_regions_and_ignore_label_come_from_the_dataset(nnunet_folders: Path):
    labels = {"background": 0, "gland": [1, 2], "zone": [2], "ignore": 3}
    predictions = make(nnunet_folders, labels=labels)
    truth = bar(2)
    truth[:, :, 2:7] *= 2  # half of the bar is the zone
    truth[:, :, 11] = np.where(truth[:, :, 11] > 0, 3, 0)  # its last voxel is not annotated
    guess = bar(2, value=2)
    labels_folder = nnunet_folders / "nnUNet_raw/Dataset501_Bars/labelsTs"
    write(truth, labels_folder / "A_1.nii.gz")
    write(guess, predictions / "A_1.nii.gz")
    table = evaluate(Dataset.load(501), predictions, jobs=1).table
    assert _dice(table, "A_1", "gland") == 1.0
    assert _dice(table, "A_1", "zone") == pytest.approx(2 * 5 / (5 + 9))
    write(truth, predictions / "A_1.nii.gz")
    with pytest.raises(BadInput, match="unknown values 3"):  # only a reference may hold the ignore label
        evaluate(Dataset.load(501), predictions, jobs=1)


def test_classes_leave_background_and_ignore_out():
    classes = Classes.from_dataset_json({"labels": {"background": 0, "a": 1, "ab": [1, 2], "ignore": 5}})
    assert classes.values == {"a": (1,), "ab": (1, 2)}
    assert classes.allowed(reference=True) == {0, 1, 2, 5}
    assert classes.allowed(reference=False) == {0, 1, 2}


def test_png_images_are_measured_in_pixels(nnunet_folders: Path):
    from skimage import io

    raw, predictions = nnunet_folders / "nnUNet_raw/Dataset502_Cells", nnunet_folders / "cells"
    content = {"channel_names": {"0": "R"}, "labels": {"background": 0, "cell": 1}, "file_ending": ".png"}
    truth, guess = np.zeros((12, 16), np.uint8), np.zeros((12, 16), np.uint8)
    truth[5, 2:6], guess[5, 3:7] = 1, 1
    for folder, values in ((raw / "labelsTs", truth), (predictions, guess)):
        folder.mkdir(parents=True)
        io.imsave(folder / "cell_1.png", values, check_contrast=False)
    (raw / "dataset.json").write_text(json.dumps(content))
    table = evaluate(Dataset.load(502), predictions, jobs=1).table.set_index("metric")["value"]
    assert table["dice"] == pytest.approx(0.75)
    assert table["assd"] == pytest.approx(2 / 8)
    assert np.isnan(table["volume_error_ml"])
    io.imsave(predictions / "cell_1.png", np.stack([guess] * 3, -1), check_contrast=False)
    with pytest.raises(BadInput, match="3 channels"):
        evaluate(Dataset.load(502), predictions, jobs=1)


def test_a_label_map_is_read_in_slice_row_column_order(tmp_path: Path):
    labels = read_label_map(write(bar(2), tmp_path / "a.nii.gz"))
    assert labels.values.shape == (6, 4, 24)
    assert labels.spacing == pytest.approx(SPACING[::-1])


def test_a_fourth_dimension_of_one_is_dropped(tmp_path: Path):
    image = SimpleITK.JoinSeries([SimpleITK.ReadImage(str(write(bar(2), tmp_path / "a.nii.gz")))])
    SimpleITK.WriteImage(image, str(tmp_path / "b.nii.gz"))
    flat, four = read_label_map(tmp_path / "a.nii.gz"), read_label_map(tmp_path / "b.nii.gz")
    assert flat.geometry_difference(four) == ""
    np.testing.assert_array_equal(flat.values, four.values)


def test_float_label_files_of_whole_numbers_are_accepted(tmp_path: Path):
    path = write(bar(2).astype(np.float32), tmp_path / "a.nii.gz")
    assert read_label_map(path).values.dtype == np.int32
    broken = bar(2).astype(np.float32)
    broken[0, 0, 0] = np.nan
    with pytest.raises(UserError, match="1 values are not whole numbers, such as nan"):
        read_label_map(write(broken, tmp_path / "b.mha"))  # ITK reads NaN in NIfTI as 0


def test_a_tif_volume_is_read_by_nnunets_reader(tmp_path: Path):
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", bar(2))
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [3.0, 1.0, 0.5]}))
    labels = read_label_map(tmp_path / "a.tif")
    assert labels.values.shape == (6, 4, 24)
    assert labels.spacing == (3.0, 1.0, 0.5)


def test_unknown_protocols_are_refused_with_the_nearest_name(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    with pytest.raises(UserError, match="did you mean 'desam'"):
        evaluate(Dataset.load(501), predictions, protocol="dsam", jobs=1)


def test_canvases_are_made_per_site(nnunet_folders: Path):
    # a bar of 4 slices per case: C has three cases of 4 organ slices, so three canvases of 4 slices
    result = evaluated(nnunet_folders, protocol="samsdg")
    assert result.table.groupby("site")["value"].count().to_dict() == {"A": 2, "B": 1, "C": 3}
    # masks are 1 row of 10 of 4 x 24 pixels; the smoothing of 1 is beyond the third decimal
    assert result.table[result.table["site"] == "B"]["value"].item() == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("reason", ["ends_left_out", "drop_empty_slices"])
def test_canvases_have_the_end_slices_of_a_dataset_that_was_converted_without_the_scans_ends(
    nnunet_folders: Path, reason: str
):
    predictions = make(nnunet_folders)
    raw = nnunet_folders / "nnUNet_raw/Dataset501_Bars"
    for path in [*(raw / "labelsTs").glob("*.nii.gz"), *predictions.glob("*.nii.gz")]:
        write(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[1:5], path)  # organ on every slice
    result = evaluate(Dataset.load(501), predictions, protocol="samsdg", jobs=1)
    assert result.table.groupby("site")["value"].count().to_dict() == {"A": 1, "C": 1}  # two slices of each case
    assert any(note.startswith("B: 2 slices with ") and "no canvas" in note for note in result.notes)
    content = json.loads((raw / "dataset.json").read_text())
    content["dgplugins"]["protocol"] = {reason: True}
    (raw / "dataset.json").write_text(json.dumps(content))
    result = evaluate(Dataset.load(501), predictions, protocol="samsdg", jobs=1)
    assert result.table.groupby("site")["value"].count().to_dict() == {"A": 2, "B": 1, "C": 3}


def test_desam_protocol_says_how_many_cases_it_leaves_out(nnunet_folders: Path):
    predictions = make(nnunet_folders)
    labels = nnunet_folders / "nnUNet_raw/Dataset501_Bars/labelsTs"
    write(np.zeros_like(bar(2)), labels / "B_1.nii.gz")
    result = evaluate(Dataset.load(501), predictions, protocol="desam", jobs=1)
    assert np.isnan(result.table[result.table["case"] == "B_1"]["value"].item())
    assert result.notes == ["1 cases keep no foreground slice of some class and are left out of its mean."]
