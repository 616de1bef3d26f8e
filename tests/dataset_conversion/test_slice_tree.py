"""The converter of PNG slices on tiny trees in the layout of the released prostate splits, and on real slices."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from trees import image, read, verify
from weak_trees import TAGS, convert, mask, names, picture, refused, slice_patient, slice_roots, tar

from dataset_conversion import Dataset516_SliceTree as module
from nnunet_dgplugins.errors import BadInput, UserError


@pytest.fixture
def roots(tmp_path: Path, nnunet_folders: Path) -> list[Path]:
    return slice_roots(tmp_path / "in")


def folds_of(folder: Path) -> list[dict[str, list[str]]]:
    found: list[dict[str, list[str]]] = json.loads((folder / "splits_final.json").read_text())
    return found


def protocol(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())["dgplugins"]["protocol"]


def test_the_roots_are_the_folds_of_one_dataset(roots: list[Path]) -> None:
    out = convert(module, roots[0], more_roots=tuple(roots[1:]))
    assert out.name == "Dataset516_ProstateSlices_tags"
    assert [fold["val"] for fold in folds_of(out)] == [["case_0", "case_3"], ["case_1"], ["case_2"]]
    assert folds_of(out)[1]["train"] == ["case_0", "case_2", "case_3"]
    assert names(out / "labelsTr") == names(out / "labelsVal") == ["case_0", "case_1", "case_2", "case_3"]
    verify(out)


def test_what_masks_show_is_part_of_what_a_dataset_was_made_from(roots: list[Path]) -> None:
    convert(module, roots[0])
    with pytest.raises(UserError, match="other input or options"):
        convert(module, roots[0], label_name="tumour")


def test_slices_are_stacked_by_number_and_tags_follow_them(roots: list[Path]) -> None:
    out = convert(module, roots[0])
    for channel in (0, 1):
        written = sitk.ReadImage(out / "imagesTr" / f"case_1_{channel:04d}.nii.gz")
        expected = (image(10 + channel) % 256).transpose(2, 1, 0)  # the reader's (slice, y, x), slice 8 first
        assert np.array_equal(sitk.GetArrayFromImage(written), expected)
        assert written.GetSpacing() == (1, 1, 1)
        assert written.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    original = "prostate_data_1/train/case_1, slices 8 to 12"
    content = json.loads((out / "dataset.json").read_text())["dgplugins"]["cases"]["case_1"]
    assert content == {"patient": "case_1", "labelled": False, "tags": TAGS, "original": original}
    assert np.array_equal(read(out / "labelsVal" / "case_0.nii.gz"), mask())
    assert names(out / "labelsVal") == ["case_0", "case_3"]
    assert protocol(out)["spacing"] == "unknown, 1 mm written"


def test_the_folder_above_and_tar_files_give_the_same_bytes(roots: list[Path]) -> None:
    first = convert(module, roots[0], more_roots=tuple(roots[1:]))
    content = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    archives = [tar(roots[0], ".tar.gz"), tar(roots[1]), tar(roots[2])]
    for root, *more in ([roots[0].parent], archives):
        shutil.rmtree(first)
        again = convert(module, root, more_roots=tuple(more))
        assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == content


def test_folders_may_have_other_names(tmp_path: Path, nnunet_folders: Path) -> None:
    for seed, (side, patient) in enumerate({"train": "BraTS19_CBICA_AAP_1", "val": "BraTS19_TMC_06290_1"}.items()):
        slice_patient(tmp_path / "brats" / side, patient, 10 * seed, ("MR_T1", "MR_T2"))
        slice_patient(tmp_path / "own" / side, patient, 10 * seed, ("imgs_r", "extra"), masks="labels_r")
    out = convert(module, tmp_path / "brats", modalities="T1,T2", name="BraTS Slices", label_name="tumour")
    assert out.name == "Dataset516_BraTS-Slices_tags"
    assert protocol(out)["modalities"] == ["T1", "T2"]
    assert folds_of(out) == [{"train": ["BraTS19_CBICA_AAP_1"], "val": ["BraTS19_TMC_06290_1"]}]
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "tumour": 1}
    own = {"folders": ("t2=imgs_r", "ADC=extra"), "masks": "labels_r", "dataset_id": 616}
    assert names(convert(module, tmp_path / "own", **own) / "labelsTr") == names(out / "labelsTr")


def test_everything_wrong_is_listed_at_once(roots: list[Path]) -> None:
    train = roots[0] / "train"
    (train / "ADC" / "case_1_9.png").unlink()
    (train / "GT" / "case_1_10.png").unlink()
    (train / "T2" / "case_2_12.png").write_bytes(b"no picture")
    (train / "GT" / "._case_2_12.png").write_bytes(b"Mac OS X")
    slice_patient(roots[0] / "val", "case_2", 20)
    slice_patient(train, "twice", 50)
    picture(train / "T2" / "twice_008.png", image(50)[..., 0] % 256)
    slice_patient(train, "bent", 60)
    picture(train / "ADC" / "bent_9.png", np.zeros((5, 6)))
    text = refused(module, roots[0])
    for part in (
        f"{train / 'ADC'}: no case_1_9",
        f"{train / 'GT'}: no case_1_10",
        "case_2_12.png is no PNG file",
        f"patient case_2 is in {train} too; expected a patient on one side of a fold",
        "the same slice as twice_008.png",
        "bent_9.png has 5x6 pixels, the first slice has 12x14",
        "--exclude case_1",
    ):
        assert part in text, text
    assert "6 problems" in text


def test_a_patient_of_two_roots_must_have_the_same_slices(roots: list[Path]) -> None:
    (roots[1] / "train" / "GT" / "case_0_12.png").write_bytes((roots[1] / "train" / "GT" / "case_0_9.png").read_bytes())
    for folder in ("T2", "ADC", "GT"):
        (roots[2] / "val" / folder / "case_2_8.png").unlink()
    text = refused(module, roots[0], more_roots=tuple(roots[1:]))
    assert f"{roots[1] / 'train'}: patient case_0 has other slices in {roots[0] / 'val'}" in text
    assert f"{roots[2] / 'val'}: patient case_2 has other slices in {roots[0] / 'train'}" in text
    assert "2 problems" in text


def test_colour_pictures_and_missing_folders_are_named(roots: list[Path]) -> None:
    from PIL import Image

    place = roots[0] / "val" / "T2" / "case_0_8.png"
    Image.open(place).convert("RGB").save(place)
    assert "case_0_8.png is a colour picture" in refused(module, roots[0])
    (roots[0] / "train" / "GT").rename(roots[0] / "train" / "labels_r")
    assert "no folder gt; there are adc, labels_r, t2. Name it with" in refused(module, roots[0])


def test_gaps_in_slice_numbers_are_noted(roots: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("T2", "ADC", "GT"):
        (roots[0] / "train" / folder / "case_1_9.png").unlink()
    out = convert(module, roots[0])
    assert "slice numbers of 1 patients have gaps (case_1)" in capsys.readouterr().err
    assert read(out / "imagesTr" / "case_1_0000.nii.gz").shape == (12, 14, 4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("../evil.png", "leaves the folder"),
        ("/evil.png", "an absolute path"),
        ("a\\..\\evil.png", "leaves the folder"),
        ("C:/evil.png", "an absolute path"),
    ],
)
def test_an_archive_that_would_write_elsewhere_is_refused(
    roots: list[Path], tmp_path: Path, name: str, found: str
) -> None:
    archive = tmp_path / "prostate_data_1.tar"
    with tarfile.open(archive, "w") as file:
        file.add(roots[0], "prostate_data_1")
        member = tarfile.TarInfo(name)
        member.size = 4
        file.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(BadInput, match=found):
        convert(module, archive)
    assert not list(tmp_path.rglob("evil.png"))


def test_links_in_an_archive_are_refused_and_other_files_left_in_it(roots: list[Path], tmp_path: Path) -> None:
    (roots[0] / "read me.txt").write_text("x")
    convert(module, tar(roots[0]))
    (roots[0] / "train" / "T2" / "linked_1.png").symlink_to("/etc/hostname")
    with pytest.raises(BadInput, match=r"linked_1\.png: a link or a device"):
        convert(module, tar(roots[0]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folders": ("imgs_r",)}, "expected MODALITY=FOLDER"),
        ({"folders": ("T1=imgs_r",)}, "a modality of T2, ADC"),
        ({"modalities": "T2,ADCC"}, "did you mean 'ADC'"),
    ],
)
def test_options_that_make_no_sense_are_refused(roots: list[Path], options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        convert(module, roots[0], **options)


def test_what_is_neither_tree_nor_archive_is_refused(roots: list[Path], tmp_path: Path) -> None:
    (tmp_path / "plain.tar").write_text("no archive")
    with pytest.raises(UserError, match="cannot be unpacked"):
        convert(module, tmp_path / "plain.tar")
    with pytest.raises(UserError, match="no folders train and val"):
        convert(module, roots[0] / "train")
    with pytest.raises(UserError, match="no such folder or tar file"):
        convert(module, tmp_path / "nothing")


def test_real_slices_come_back_as_their_volume(tmp_path: Path, sample_data: Path, nnunet_folders: Path) -> None:
    folder = sample_data / "prostate" / "ProstateX" / "ProstateX-0000" / "07-07-2011"
    gland = read(next((sample_data / "prostate").glob("**/whole_gland/AI/Bosma22b/*.nii.gz"))) > 0
    grey = {}
    for modality, name in (("T2", "t2w"), ("ADC", "adc_on_t2w_grid")):
        voxels = read(folder / f"ProstateX-0000_07-07-2011_{name}.nii.gz")
        grey[modality] = (255 * (voxels / voxels.max())).astype(np.uint8)
    for side, patient, flip in (("train", "ProstateX-0000", 1), ("val", "mirrored", -1)):
        for index in range(gland.shape[2]):
            for modality, voxels in grey.items():
                picture(tmp_path / "in" / side / modality / f"{patient}_{index}.png", voxels[::flip, :, index])
            picture(tmp_path / "in" / side / "GT" / f"{patient}_{index}.png", 255 * gland[::flip, :, index])
    out = convert(module, tmp_path / "in")
    assert np.array_equal(read(out / "imagesTr" / "ProstateX-0000_0000.nii.gz"), grey["T2"])
    assert np.array_equal(read(out / "imagesTr" / "mirrored_0001.nii.gz"), grey["ADC"][::-1])
    assert np.array_equal(read(out / "labelsVal" / "mirrored.nii.gz"), gland[::-1])
    tags = json.loads((out / "image_tags.json").read_text())
    assert list(tags["ProstateX-0000"].values()) == gland.any(axis=(0, 1)).astype(int).tolist()
