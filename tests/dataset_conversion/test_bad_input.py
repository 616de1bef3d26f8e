from __future__ import annotations

import gzip
import shutil
from collections import namedtuple
from pathlib import Path

import nibabel
import numpy as np
import pytest
from trees import AFFINE, SHAPE, convert, image, label, read, refused, saml, save

from dataset_conversion import Dataset501_ProstateSAML as module
from nnunet_dgplugins.errors import UserError


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return saml(tmp_path / "in")


def only(root: Path, **options: object) -> str:
    """The one problem of the report."""
    report = refused(module, root, **options)
    assert len(report.problems) == 1, str(report)
    return str(report.problems[0])


def test_every_problem_is_listed_at_once_and_nothing_is_written(root: Path, nnunet_folders: Path) -> None:
    (root / "UCL" / "Case00_segmentation.nii.gz").unlink()
    save(root / "UCL" / "Case01_segmentation.nii.gz", label((5,)))
    save(root / "HK" / "Case00_segmentation.nii.gz", label(shape=(12, 14, 6)))
    (root / "HK" / "Case01.nii.gz").write_bytes((root / "HK" / "Case01.nii.gz").read_bytes()[:-200])
    broken = image(3).astype(np.float32)
    broken[0, 0, 0] = np.nan
    save(root / "I2CVB" / "Case00.nii.gz", broken)
    save(root / "I2CVB" / "Case01_segmentation.nii.gz", label().astype(np.float32) * 0.5)
    shutil.copy(root / "RUNMC" / "Case00.nii.gz", root / "BMC" / "Case00.nii.gz")
    report = refused(module, root)
    text = str(report)
    assert len(report.problems) == 7, text
    for part in (
        "UCL/Case00: no label",
        "unknown label value 5",
        "shape 12x14x6; expected 12x14x5",
        "truncated",
        "1 voxels are NaN",
        "no whole numbers",
        "the same image twice",
    ):
        assert part in text
    assert list((nnunet_folders / "nnUNet_raw").iterdir()) == []


def test_a_missing_label_names_the_way_out_which_works(root: Path) -> None:
    (root / "UCL" / "Case00_segmentation.nii.gz").unlink()
    assert "--exclude UCL_Case00" in only(root)
    out = convert(module, root, exclude=("UCL_Case00",))
    assert not (out / "imagesTs" / "UCL_Case00_0000.nii.gz").exists()
    assert (out / "imagesTs" / "UCL_Case01_0000.nii.gz").exists()


def test_a_missing_image_is_reported(root: Path) -> None:
    (root / "UCL" / "Case00.nii.gz").unlink()
    assert "UCL/Case00: no image" in only(root)


def test_trouble_at_a_site_nobody_asked_for_does_not_matter(root: Path) -> None:
    (root / "UCL" / "Case00_segmentation.nii.gz").unlink()
    assert convert(module, root, targets=("BMC",)).is_dir()


def test_two_files_for_one_case_are_reported(root: Path) -> None:
    save(root / "UCL" / "Case00_Segmentation.nii", label())
    assert "two files for one label" in only(root)


def test_a_case_to_exclude_that_does_not_exist_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'UCL_Case01'"):
        convert(module, root, exclude=("UCL_Case1",))


def test_labels_stored_as_floats_become_small_whole_numbers(root: Path) -> None:
    save(root / "RUNMC" / "Case00_segmentation.nii.gz", label().astype(np.float32) * np.float32(0.99999997))
    written = read(convert(module, root) / "labelsTr" / "RUNMC_Case00.nii.gz")
    assert written.dtype == np.uint8
    assert np.array_equal(written, label())


def test_wide_integer_labels_become_small_whole_numbers(root: Path) -> None:
    save(root / "RUNMC" / "Case00_segmentation.nii.gz", label().astype(np.int64))
    assert read(convert(module, root) / "labelsTr" / "RUNMC_Case00.nii.gz").dtype == np.uint8


def test_a_nan_in_a_label_is_reported(root: Path) -> None:
    broken = label().astype(np.float32)
    broken[0, 0, 0] = np.nan
    save(root / "RUNMC" / "Case00_segmentation.nii.gz", broken)
    assert "1 label voxels are NaN" in only(root)


def test_a_volume_with_a_fourth_axis_of_one_is_squeezed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root / "RUNMC" / "Case00.nii.gz", image(71)[..., None])
    save(root / "RUNMC" / "Case00_segmentation.nii.gz", label()[..., None])
    out = convert(module, root)
    assert "4D with a single volume" in capsys.readouterr().err
    assert np.array_equal(read(out / "imagesTr" / "RUNMC_Case00_0000.nii.gz"), image(71))
    assert read(out / "labelsTr" / "RUNMC_Case00.nii.gz").shape == SHAPE


def test_a_volume_with_two_time_points_is_reported(root: Path) -> None:
    save(root / "RUNMC" / "Case00.nii.gz", np.stack([image(1), image(2)], -1))
    assert "shape 12x14x5x2, expected one 3D volume" in only(root)


def test_complex_voxels_are_reported(root: Path) -> None:
    save(root / "RUNMC" / "Case00.nii.gz", image(1).astype(np.complex64))
    assert "expected real numbers" in only(root)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a readable NIfTI volume"),
        (b"this is a web page about a failed download", "not a readable NIfTI volume"),
        (gzip.compress(b"too short", mtime=0), "not a readable NIfTI volume"),
    ],
)
def test_a_file_that_is_no_volume_is_reported(root: Path, content: bytes, said: str) -> None:
    (root / "RUNMC" / "Case00.nii.gz").write_bytes(content)
    assert said in only(root)


def test_a_plain_nifti_cut_short_is_reported(root: Path) -> None:
    (root / "HK" / "Case00.nii.gz").unlink()
    path = save(root / "HK" / "Case00.nii", image(4))
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a readable NIfTI volume" in only(root)


def test_a_voxel_size_of_zero_is_reported(root: Path) -> None:
    affine = AFFINE.copy()
    affine[:, 2] = 0
    volume = nibabel.Nifti1Image(image(1), None)
    volume.header.set_sform(affine, 1)
    path = root / "RUNMC" / "Case00.nii.gz"
    nibabel.Nifti1Image(image(1), None, volume.header).to_filename(path)
    assert "voxel size that is zero" in only(root)


def test_skewed_axes_are_put_right_because_nnunet_s_reader_refuses_them(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import SimpleITK as sitk

    affine = AFFINE.copy()
    affine[0, 1] = 0.05
    for name in ("Case00.nii.gz", "Case00_segmentation.nii.gz"):
        path = root / "RUNMC" / name
        skewed = nibabel.Nifti1Image(read(path), None)
        skewed.set_sform(affine, 1)
        skewed.set_qform(None, 0)
        nibabel.save(skewed, path)
    with pytest.raises(RuntimeError):
        sitk.ReadImage(root / "RUNMC" / "Case00.nii.gz")
    out = convert(module, root)
    assert "right angles" in capsys.readouterr().err
    written = sitk.ReadImage(out / "imagesTr" / "RUNMC_Case00_0000.nii.gz")
    mask = sitk.ReadImage(out / "labelsTr" / "RUNMC_Case00.nii.gz")
    assert written.GetDirection() == mask.GetDirection()
    assert written.GetSpacing() == pytest.approx((0.6, 0.602, 3.6), abs=1e-3)


def test_scaled_voxels_keep_their_value_when_they_have_to_be_written_again(root: Path) -> None:
    volume = nibabel.Nifti1Image(image(1), AFFINE)
    volume.header.set_slope_inter(0.5, -100)
    path = root / "RUNMC" / "Case00.nii.gz"
    nibabel.save(volume, path)
    wanted = read(path)
    out = convert(module, root, drop_empty_slices=True)
    assert np.allclose(read(out / "imagesTr" / "RUNMC_Case00_0000.nii.gz"), wanted[:, :, 1:3])


def test_a_label_without_organ_is_named_and_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root / "RUNMC" / "Case00_segmentation.nii.gz", np.zeros(SHAPE, np.uint8))
    out = convert(module, root)
    assert "no organ is marked" in capsys.readouterr().err
    assert (out / "labelsTr" / "RUNMC_Case00.nii.gz").is_file()


def test_dropping_empty_slices_of_a_case_without_organ_is_a_problem(root: Path) -> None:
    save(root / "RUNMC" / "Case00_segmentation.nii.gz", np.zeros(SHAPE, np.uint8))
    assert "every slice would be dropped" in only(root, drop_empty_slices=True)


def test_too_little_disk_is_part_of_the_report(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    (root / "UCL" / "Case00_segmentation.nii.gz").unlink()
    report = refused(module, root)
    assert ["no label" in str(p) or "Not enough disk" in str(p) for p in report.problems] == [True, True]


def test_a_folder_that_is_no_download_is_refused(tmp_path: Path, nnunet_folders: Path) -> None:
    with pytest.raises(UserError, match="none of the folders RUNMC"):
        convert(module, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        convert(module, tmp_path / "absent")


def test_a_site_that_is_not_there_is_refused(root: Path) -> None:
    shutil.rmtree(root / "RUNMC")
    with pytest.raises(UserError, match="no cases of RUNMC; found BIDMC"):
        convert(module, root)
