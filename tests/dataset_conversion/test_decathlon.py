"""The converter of the Decathlon's prostates on tiny trees in its layout, and on a real T2 and ADC put into it."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from trees import AFFINE, image, read, save, verify
from weak_trees import TAGS, convert, decathlon, mask, names, refused

from dataset_conversion import Dataset506_ProstateDecathlon as module
from nnunet_dgplugins.errors import UserError

NUMBERS = ["prostate_00", "prostate_02", "prostate_04", "prostate_06", "prostate_08", "prostate_10"]


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return decathlon(tmp_path / "in" / "Task05_Prostate")


def test_a_file_of_two_volumes_becomes_two_channels_on_its_grid(root: Path) -> None:
    out = convert(module, root.parent)
    assert out.name == "Dataset506_ProstateDecathlon_tags"
    source = nibabel.load(root / "imagesTr" / "prostate_04.nii.gz")
    for channel in (0, 1):
        written = nibabel.load(out / "imagesTr" / f"prostate_04_{channel:04d}.nii.gz")
        assert np.array_equal(np.asanyarray(written.dataobj), np.asanyarray(source.dataobj)[..., channel])
        assert np.array_equal(written.affine, source.affine)
    content = json.loads((out / "dataset.json").read_text())
    assert content["dgplugins"]["protocol"]["modalities"] == ["T2", "ADC"]
    assert content["labels"] == {"background": 0, "prostate": 1}
    verify(out)


def test_five_folds_part_the_patients_and_every_one_validates_once(root: Path) -> None:
    out = convert(module, root)
    folds = json.loads((out / "splits_final.json").read_text())
    assert sorted(name for fold in folds for name in fold["val"]) == NUMBERS
    assert all(sorted(fold["train"] + fold["val"]) == NUMBERS for fold in folds)
    assert names(out / "labelsVal") == NUMBERS
    assert np.array_equal(read(out / "labelsVal" / "prostate_02.nii.gz"), mask((1, 2)) > 0)


def test_test_images_without_masks_and_files_of_a_mac_are_left_out(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(module, root)
    assert names(out / "labelsTr") == NUMBERS
    assert not (out / "imagesTs").exists()
    assert "._prostate" not in capsys.readouterr().err


def test_zones_are_kept_for_other_methods_and_refused_for_tags(root: Path) -> None:
    with pytest.raises(UserError, match="--supervision masks"):
        convert(module, root, zones="keep")
    out = convert(module, root, zones="keep", supervision="masks")
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    assert np.array_equal(read(out / "labelsTr" / "prostate_06.nii.gz"), mask((1, 2)))


def test_everything_wrong_is_listed_at_once(root: Path) -> None:
    (root / "labelsTr" / "prostate_00.nii.gz").unlink()
    save(root / "imagesTr" / "prostate_02.nii.gz", image(2), AFFINE)
    save(root / "imagesTr" / "prostate_04.nii.gz", np.stack([image(n) for n in (1, 2, 3)], axis=-1), AFFINE)
    save(root / "labelsTr" / "prostate_06.nii.gz", mask((1, 3)), AFFINE)
    (root / "imagesTr" / "prostate_08.nii.gz").write_bytes(b"no volume")
    save(root / "imagesTr" / "prostate_10.nii", np.zeros((3, 3, 3, 2), np.int16), AFFINE)
    text = refused(module, root)
    for part in (
        "labelsTr/prostate_00.nii.gz: no such file",
        "prostate_02.nii.gz: volumes in it: 1; expected two, T2 and ADC",
        "prostate_04.nii.gz: volumes in it: 3",
        "prostate_06.nii.gz: unknown label value 3",
        "prostate_08.nii.gz: not a readable NIfTI",
        "prostate_10.nii and prostate_10.nii.gz: two files for one case",
    ):
        assert part in text, text
    assert "6 problems" in text  # a file that holds both channels is named once


def test_a_case_is_left_out_with_its_trouble(root: Path) -> None:
    (root / "labelsTr" / "prostate_00.nii.gz").unlink()
    assert names(convert(module, root, exclude=("prostate_00",)) / "labelsTr") == NUMBERS[1:]


def test_another_folder_is_refused(tmp_path: Path, nnunet_folders: Path) -> None:
    with pytest.raises(UserError, match="no folder imagesTr"):
        convert(module, tmp_path)


def test_a_real_t2_and_adc_go_the_same_way(tmp_path: Path, sample_data: Path, nnunet_folders: Path) -> None:
    """ProstateX-0000 as the Decathlon would hold it: ADC on the T2 grid, zones; its lower half is a second case."""
    source = sample_data / "prostate"
    folder = source / "ProstateX" / "ProstateX-0000" / "07-07-2011"
    t2 = nibabel.load(folder / "ProstateX-0000_07-07-2011_t2w.nii.gz")
    adc = read(folder / "ProstateX-0000_07-07-2011_adc_on_t2w_grid.nii.gz")
    zones = read(next(source.glob("**/zonal_pz_tz/AI/HeviAI23/*.nii.gz")))
    both = np.stack([read(folder / "ProstateX-0000_07-07-2011_t2w.nii.gz"), adc], axis=-1)
    root = tmp_path / "Task05_Prostate"
    for number, part in ((0, slice(None)), (1, slice(0, 10))):
        save(root / "imagesTr" / f"prostate_{number:02d}.nii.gz", both[:, :, part], t2.affine)
        save(root / "labelsTr" / f"prostate_{number:02d}.nii.gz", zones[:, :, part], t2.affine)
    out = convert(module, root)
    for channel, voxels in enumerate((both[..., 0], adc)):
        written = sitk.ReadImage(out / "imagesTr" / f"prostate_00_{channel:04d}.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(written), voxels.transpose(2, 1, 0))
        first = sitk.ReadImage(folder / "ProstateX-0000_07-07-2011_t2w.nii.gz")
        assert np.allclose(written.GetDirection(), first.GetDirection(), atol=1e-6)
        assert np.allclose(written.GetOrigin(), first.GetOrigin(), atol=1e-3)
    tags = json.loads((out / "dataset.json").read_text())["dgplugins"]["cases"]["prostate_00"]["tags"]
    assert tags == [int((zones[:, :, index] > 0).any()) for index in range(zones.shape[2])]
    assert 0 < sum(tags) < len(tags)
    assert np.array_equal(read(out / "labelsVal" / "prostate_00.nii.gz"), zones > 0)


def test_tags_follow_the_slices_of_the_mask(root: Path) -> None:
    tags = json.loads((convert(module, root) / "image_tags.json").read_text())
    assert tags["prostate_10"] == {str(index): tag for index, tag in enumerate(TAGS)}
