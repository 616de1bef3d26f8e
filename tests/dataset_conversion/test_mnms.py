"""The converter of M&Ms on tiny trees in the challenge's layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from few_label_trees import CINE, HEADER, cine, heart, mnms, patient, read_rows, write_table
from trees import convert as convert_any
from trees import read, refused, save, verify

from dataset_conversion import Dataset507_MnMs as module
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import BadInput, UserError

OPTIONS = {"sources": (), "targets": ("D",)}


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return mnms(tmp_path / "OpenDataset")


def convert(root: Path, **options: object) -> Path:
    return convert_any(module, root, **{**OPTIONS, **options})


def table_of(folder: Path) -> CaseTable:
    table = CaseTable.from_dataset_json(json.loads((folder / "dataset.json").read_text()))
    assert table is not None
    return table


def names(folder: Path) -> list[str]:
    return sorted(path.name[: -len(".nii.gz")] for path in folder.iterdir())


def information(root: Path) -> Path:
    return next(root.glob("*.csv"))


def change(root: Path, code: str, **values: object) -> None:
    """Change a patient's row of the information table."""
    rows = read_rows(information(root))
    for row in rows:
        if row[1] == code:
            for column, value in values.items():
                row[HEADER.index(column)] = str(value)
    write_table(information(root), rows)


def test_the_target_is_set_apart_and_every_other_vendor_is_trained_on(root: Path) -> None:
    out = convert(root)
    assert out.name == "Dataset507_MnMs_without_D"
    assert names(out / "labelsTs") == [f"D_D0A0A{n}_{phase}" for n in (1, 2) for phase in ("ED", "ES")]
    assert {name[0] for name in names(out / "labelsTr")} == {"A", "B", "C"}
    assert len(names(out / "imagesTr")) == 16
    assert table_of(out).sources == ["A", "B", "C"]
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "LV": 1, "MYO": 2, "RV": 3}
    verify(out)


def test_frames_are_counted_from_0_and_end_diastole_may_be_the_later_one(root: Path) -> None:
    out = convert(root)
    for code, seed, frames in (("A_A0A0A1", 1, (0, 5)), ("B_B0A0A1", 4, (7, 3))):
        for phase, frame in zip(("ED", "ES"), frames, strict=True):
            assert np.array_equal(read(out / "imagesTr" / f"{code}_{phase}_0000.nii.gz"), cine(seed)[..., frame])
            label = read(out / "labelsTr" / f"{code}_{phase}.nii.gz")
            assert label.dtype == np.uint8
            assert np.array_equal(label, heart(frame))


def test_an_unlabelled_case_is_all_ignore_and_nothing_of_its_mask_is_even_opened(root: Path) -> None:
    for code in ("Testing/A0A0A3/A0A0A3", "Training/Labeled/B0A0A3/B0A0A3"):
        (root / f"{code}_sa_gt.nii.gz").write_bytes(b"whoever opens this fails")
    out = convert(root, ratio=0.5)
    table = table_of(out)
    for patient_name in ("A_A0A0A3", "B_B0A0A3", "C_C0A0A2"):
        for phase in ("ED", "ES"):
            assert not table.cases[f"{patient_name}_{phase}"].labelled
            assert set(np.unique(read(out / "labelsTr" / f"{patient_name}_{phase}.nii.gz"))) == {4}
    labelled = {name for name in names(out / "labelsTr") if table.cases[name].labelled}
    assert len(labelled) == 10
    for name in labelled:
        assert set(np.unique(read(out / "labelsTr" / f"{name}.nii.gz"))) == {0, 1, 2, 3}
    assert all(table.cases[name].labelled for name in names(out / "labelsTs"))
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "LV": 1, "MYO": 2, "RV": 3, "ignore": 4}
    assert content["dgplugins"]["protocol"]["ratio"] == 0.5
    verify(out)


def test_folds_list_labelled_cases_only(root: Path) -> None:
    out = convert(root, ratio=0.5)
    labelled = sorted(name for name in names(out / "labelsTr") if table_of(out).cases[name].labelled)
    (fold,) = json.loads((out / "splits_final.json").read_text())
    assert fold == {"train": labelled, "val": labelled, "validates_on": "training cases"}
    out = convert(root, ratio=0.5, split="kfold", overwrite=True)
    for fold in json.loads((out / "splits_final.json").read_text()):
        assert not set(fold["train"]) & set(fold["val"])
        assert sorted([*fold["train"], *fold["val"]]) == labelled


def test_the_honest_share_counts_a_vendor_and_the_published_one_each_centre(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(root, ratio=0.1)
    assert "B: 1 of 3 annotated patients labelled" in capsys.readouterr().out
    out = convert(root, ratio=0.1, count="published", dataset_id=607)
    said = capsys.readouterr().out
    assert "B centre 2: 2 of 2" in said
    assert "B centre 3: 1 of 1" in said
    assert "A centre 1: 2 of 3" in said
    assert table_of(out).protocol["protocol"] == "published"
    with pytest.raises(UserError, match="give the share with --ratio"):
        convert(root, count="published")


def frames_of(folder: Path, start: str) -> list[str]:
    return [name.rsplit("_", 1)[1] for name in names(folder / "labelsTr") if name.startswith(start)]


def test_more_frames_are_taken_of_unlabelled_patients_and_of_labelled_ones_under_all_only(root: Path) -> None:
    out = convert(root, labelled=2, frames="every=3")
    assert frames_of(out, "A_A0A0A1") == ["ED", "ES"]
    assert frames_of(out, "A_A0A0A3") == ["ED", "ES", "f03", "f06"]  # 0 and 5 are there already
    out = convert(root, labelled=2, frames="all", overwrite=True)
    for code in ("A_A0A0A1", "A_A0A0A3"):
        assert frames_of(out, code) == ["ED", "ES", "f01", "f02", "f03", "f04", "f06", "f07"]
    assert np.array_equal(read(out / "imagesTr" / "A_A0A0A1_f06_0000.nii.gz"), cine(1)[..., 6])
    assert not table_of(out).cases["A_A0A0A1_f06"].labelled
    assert set(np.unique(read(out / "labelsTr" / "A_A0A0A1_f06.nii.gz"))) == {4}
    assert len(names(out / "imagesTs")) == 4
    with pytest.raises(UserError, match="every=N"):
        convert(root, frames="every=0")


def test_patients_without_masks_are_left_out_or_unlabelled_and_frame_0_is_never_annotation(root: Path) -> None:
    assert not frames_of(convert(root), "C_C0A0A9")
    save(root / "Training" / "Unlabeled" / "C0A0A9" / "C0A0A9_sa_gt.nii.gz", np.ones((10, 12, 3, 8), np.uint8), CINE)
    out = convert(root, unannotated=True, overwrite=True)
    assert frames_of(out, "C_C0A0A9") == ["f00"]
    assert not table_of(out).cases["C_C0A0A9_f00"].labelled
    assert set(np.unique(read(out / "labelsTr" / "C_C0A0A9_f00.nii.gz"))) == {4}


def test_directions_that_are_not_orthonormal_become_the_nearest_rotation(root: Path) -> None:
    sheared = CINE.copy()
    sheared[0, 1] += 0.05
    patient(root / "Testing" / "D0A0A1", 50, (0, 5), sheared)
    out = convert(root)
    image = sitk.ReadImage(out / "imagesTs" / "D_D0A0A1_ED_0000.nii.gz")  # ITK refuses the sheared one
    label = sitk.ReadImage(out / "labelsTs" / "D_D0A0A1_ED.nii.gz")
    axes = np.reshape(image.GetDirection(), (3, 3))
    assert np.allclose(axes @ axes.T, np.eye(3), atol=1e-6)
    assert (image.GetDirection(), image.GetOrigin()) == (label.GetDirection(), label.GetOrigin())


def underscores(root: Path) -> None:
    path = information(root)
    header = ["External_code", "Vendor", "Center", "ed", "es"]
    rows = [[row[1], row[3], row[4], f"{row[5]}.0", f"{row[6]}.0"] for row in read_rows(path)]
    path.unlink()
    write_table(root / "201014_M&Ms_Dataset_Information_-_opendataset.csv", rows, header, ";")


def names_only(root: Path) -> None:
    rows = [[row[1].lower(), row[2], row[4], row[5], row[6]] for row in read_rows(information(root))]
    path = information(root).rename(root / "211006_M&Ms_dataset_information.CSV")
    write_table(path, rows, ["External code", "VendorName", "Centre", "ED", "ES"], "\t")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def blank_where_nothing_is_annotated(root: Path) -> None:
    change(root, "C0A0A9", ED="", ES="NaN")


@pytest.mark.parametrize("respell", [underscores, names_only, blank_where_nothing_is_annotated])
def test_every_spelling_of_the_information_table_gives_the_same_dataset(
    root: Path, respell: Callable[[Path], None]
) -> None:
    respell(root)
    out = convert(root.parent, unannotated=True)  # the folder above will do as well
    assert len(names(out / "imagesTr")) == 17
    assert np.array_equal(read(out / "labelsTr" / "B_B0A0A2_ED.nii.gz"), heart(7))


def test_the_table_can_be_named_and_must_be_there(root: Path, tmp_path: Path) -> None:
    path = information(root).rename(tmp_path / "table.csv")
    with pytest.raises(UserError, match=r"no information table.*--info"):
        convert(root)
    assert convert(root, site_map=path).is_dir()
    write_table(path, [["A0A0A1", "A"]], ["External code", "Vendor"])
    with pytest.raises(BadInput, match="Centre, ED and ES"):
        convert(root, site_map=path)


@pytest.mark.parametrize(("code", "ed", "es"), [("A0A0A1", 5, 0), ("A0A0A3", 0, 6)])
def test_frames_corrected_in_the_table_are_other_content(root: Path, code: str, ed: int, es: int) -> None:
    """The same files give other images under the same names; of an unlabelled patient no mask would tell."""
    out = convert(root, labelled=1)
    change(root, code, ED=ed, ES=es)
    with pytest.raises(UserError, match="--overwrite"):
        convert(root, labelled=1)
    assert right_frames(out, code, 0, 5)
    assert right_frames(convert(root, labelled=1, overwrite=True), code, ed, es)


def right_frames(folder: Path, code: str, ed: int, es: int) -> bool:
    return all(
        np.array_equal(read(folder / "imagesTr" / f"A_{code}_{phase}_0000.nii.gz"), cine(int(code[-1]))[..., frame])
        for phase, frame in (("ED", ed), ("ES", es))
    )


def test_vendor_columns_that_contradict_each_other_are_a_problem(root: Path) -> None:
    change(root, "D0A0A1", Vendor="A")  # VendorName stays Canon: a target patient would be trained on
    assert "D0A0A1: Vendor is 'A' but VendorName is 'Canon', vendors A and D" in str(refused(module, root, **OPTIONS))
    assert names(convert(root, exclude=("D0A0A1",)) / "labelsTs") == ["D_D0A0A2_ED", "D_D0A0A2_ES"]


def test_a_vendor_column_that_says_nothing_leaves_it_to_the_other(root: Path) -> None:
    change(root, "D0A0A1", Vendor="")
    change(root, "D0A0A2", VendorName="a scanner")
    assert len(names(convert(root) / "labelsTs")) == 4


@pytest.mark.parametrize("vendor", ["A", "D"])
def test_a_patient_listed_twice_is_one_problem_and_can_be_left_out(
    root: Path, capsys: pytest.CaptureFixture[str], vendor: str
) -> None:
    rows = read_rows(information(root))
    again = list(next(row for row in rows if row[1] == "A0A0A1"))
    again[HEADER.index("Vendor")], again[HEADER.index("VendorName")] = vendor, ""
    write_table(information(root), [*rows, again])
    report = refused(module, root, targets=("B",), sources=("A", "C"))
    assert str(report).count("A0A0A1 is listed twice") == 1
    convert(root, exclude=("A0A0A1",))
    assert "no folder" not in capsys.readouterr().err


def test_every_problem_is_listed_at_once_and_leaving_the_patients_out_settles_it(
    root: Path, nnunet_folders: Path
) -> None:
    change(root, "A0A0A1", ED=0, ES=0)
    change(root, "A0A0A2", ES=99)
    change(root, "B0A0A1", ES=4)
    change(root, "B0A0A2", Vendor="Q", VendorName="Quorum")
    change(root, "C0A0A1", ED="first")
    shutil.rmtree(root / "Testing" / "C0A0A2")
    patient(root / "Testing" / "X0A0A1", 60)
    (root / "Training" / "Labeled" / "B0A0A3" / "B0A0A3_sa_gt.nii.gz").unlink()
    save(root / "Testing" / "D0A0A1" / "D0A0A1_sa_gt.nii.gz", np.zeros((10, 12, 4, 8), np.uint8), CINE)
    report = refused(module, root, **OPTIONS)
    text = str(report)
    for part in (
        "A0A0A1: has a mask, but the information table",
        "says ED 0, ES 0",
        "frame 99 is wanted, but it holds 8",
        "B0A0A1_sa_gt.nii.gz: no organ is marked in frame 4",
        "unknown vendor 'Q Quorum'",
        "ED is 'first'",
        "X0A0A1 is not in the information table",
        "no B0A0A3_sa_gt.nii.gz",
        "shape 10x12x4; expected 10x12x3",
    ):
        assert part in text, part
    assert not list((nnunet_folders / "nnUNet_raw").iterdir())
    bad = ("A_A0A0A1", "A_A0A0A2", "B_B0A0A1", "B0A0A2", "C0A0A1", "X0A0A1", "B_B0A0A3", "D_D0A0A1")
    shutil.copytree(root / "Training" / "Unlabeled" / "C0A0A9", root / "Testing" / "C0A0A2")
    for path in (root / "Testing" / "C0A0A2").iterdir():
        path.rename(path.with_name(path.name.replace("C0A0A9", "C0A0A2")))
    save(root / "Testing" / "C0A0A2" / "C0A0A2_sa_gt.nii.gz", np.stack([heart(f) for f in range(8)], -1), CINE)
    out = convert(root, exclude=bad)
    assert {name[:8] for name in names(out / "labelsTr")} == {"A_A0A0A3", "C_C0A0A2"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def stopped(root: Path, **options: object) -> None:
    """Convert until the disk is full, after nine files."""
    from dataset_conversion import _volumes

    save_file, left = _volumes._save, [1] * 9

    def full(*arguments: object) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        save_file(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_volumes, "_save", full)
        with pytest.raises(UserError, match="Run the same command again"):
            convert(root, **options)


def test_a_conversion_that_was_stopped_finishes_with_the_same_bytes(root: Path) -> None:
    out = convert(root, labelled=1)
    whole = content(out)
    shutil.rmtree(out)
    stopped(root, labelled=1)
    assert not out.exists()
    assert content(convert(root, labelled=1)) == whole


def test_a_conversion_that_was_stopped_does_not_go_on_with_frames_of_a_corrected_table(root: Path) -> None:
    stopped(root, labelled=1)
    change(root, "A0A0A2", ES=6)
    assert right_frames(convert(root, labelled=1), "A0A0A2", 0, 6)
