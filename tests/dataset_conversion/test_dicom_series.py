"""DICOM series as downloads hold them, and a real prostate written as one."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from public_trees import gland, nci_isbi, placed, scan, write, write_dicom
from trees import convert, refused, verify

from dataset_conversion import Dataset513_ProstatePublic as module
from dataset_conversion._dicom import find_series, in_order
from dataset_conversion._nifti import Unreadable
from dataset_conversion._scans import put_on_grid, read_scan
from dataset_conversion._sources import Scan

CASE = "RUNMC_Prostate3T-01-0001"


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return nci_isbi(tmp_path / "in")


def subject(root: Path) -> Path:
    return root / "Prostate-3T" / "Prostate3T-01-0001" / "study"


def written(out: Path) -> sitk.Image:
    return sitk.ReadImage(out / "imagesTr" / f"{CASE}_0000.nii.gz")


def test_slices_are_put_in_order_by_place_not_by_name(tmp_path: Path) -> None:
    paths = write_dicom(tmp_path, scan(1))
    for path, name in zip(paths, ("f", "b", "e", "a", "d", "c"), strict=True):
        path.rename(tmp_path / name)  # without an ending, as many archives have them
    (series,) = find_series(tmp_path)
    assert [path.name for path in in_order(series.files)[0]] == ["f", "b", "e", "a", "d", "c"]
    assert np.array_equal(read_scan(Scan(series.files)).array.transpose(2, 1, 0), sitk.GetArrayFromImage(scan(1)))


def test_an_oblique_series_keeps_its_directions(tmp_path: Path) -> None:
    volume = read_scan(Scan(tuple(write_dicom(tmp_path, scan(1)))))
    assert not volume.straightened
    for voxel in ((0, 0, 0), (9, 11, 5), (3, 7, 2)):
        x, y, z = scan(1).TransformIndexToPhysicalPoint(voxel)
        assert np.allclose((volume.affine @ [*voxel, 1])[:3], [-x, -y, z], atol=1e-4)


def test_a_tilted_gantry_gets_the_nearest_rotation_with_a_note(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = subject(root) / "3-T2"
    shutil.rmtree(folder)
    write_dicom(folder, scan(1), shear=0.4)
    out = convert(module, root)
    assert "axes not at right angles" in capsys.readouterr().err
    direction = np.array(written(out).GetDirection()).reshape(3, 3)
    assert np.allclose(direction.T @ direction, np.eye(3), atol=1e-5)
    assert np.array_equal(sitk.GetArrayFromImage(written(out)), sitk.GetArrayFromImage(scan(1)))


def test_other_files_beside_the_slices_do_no_harm(root: Path) -> None:
    folder = subject(root) / "3-T2"
    (folder / "LICENSE").write_text("Creative Commons")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (folder / "._IM000.dcm").write_bytes(b"litter")
    assert np.array_equal(sitk.GetArrayFromImage(written(convert(module, root))), sitk.GetArrayFromImage(scan(1)))


@pytest.mark.parametrize("own_folder", [True, False])
def test_the_axial_t2_is_found_among_several_series(
    root: Path, own_folder: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, description in enumerate(("localizer", "t2_tse_cor", "ep2d_diff")):
        folder = subject(root) / (f"9{number}" if own_folder else "3-T2")
        write_dicom(folder, scan(50 + number), f"1.2.{40 + number}", description, f"{number}_{{}}.dcm")
    for path in (subject(root) / "3-T2").glob("IM*"):  # the folder's name must not decide
        path.rename(path.with_name(f"zz{path.name}"))
    if not own_folder:
        (subject(root) / "3-T2").rename(subject(root) / "all")
    out = convert(module, root)
    assert np.array_equal(sitk.GetArrayFromImage(written(out)), sitk.GetArrayFromImage(scan(1)))
    assert "left out: " in capsys.readouterr().err


def test_several_series_that_could_be_it_are_refused_by_name(root: Path) -> None:
    write_dicom(subject(root) / "4-T2", scan(51), "1.2.41", "t2_tse_tra_repeat")
    report = str(refused(module, root))
    assert (
        "not clear which is the axial T2: 3-T2 ('t2_tse_tra', 6 files); 4-T2 ('t2_tse_tra_repeat', 6 files)" in report
    )
    assert f"--exclude {CASE}" in report


def test_copies_of_a_slice_are_left_out_with_a_note(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = subject(root) / "3-T2"
    shutil.copy(folder / "IM002.dcm", folder / "IM002 (1).dcm")
    out = convert(module, root)
    assert np.array_equal(sitk.GetArrayFromImage(written(out)), sitk.GetArrayFromImage(scan(1)))
    assert "copies of slices left out: IM002.dcm" in capsys.readouterr().err


def test_two_images_of_one_place_are_refused_by_name(root: Path) -> None:
    write_dicom(subject(root) / "3-T2", scan(60), pattern="second{}.dcm")
    assert "IM000.dcm and second0.dcm show one place in two ways" in str(refused(module, root))


def test_a_missing_slice_is_refused_by_name_and_one_at_the_end_makes_the_volume_shorter(root: Path) -> None:
    folder = subject(root) / "3-T2"
    (folder / "IM005.dcm").unlink()
    assert written(convert(module, root)).GetSize()[2] == 5
    (folder / "IM003.dcm").unlink()
    report = refused(module, root, dataset_id=613)
    assert "a slice is missing between IM002.dcm and IM004.dcm: 7 mm, 3.5 mm elsewhere" in str(report)
    assert f"--exclude {CASE}" in str(report)


def test_slices_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    paths = write_dicom(tmp_path / "a", scan(1))
    turned = scan(2)
    turned.SetDirection(np.eye(3).ravel().tolist())
    others = write_dicom(tmp_path / "b", turned, pattern="B{}.dcm")
    small = write_dicom(tmp_path / "c", scan(3)[:8], pattern="C{}.dcm")
    half = write_dicom(tmp_path / "d", sitk.Cast(scan(4), sitk.sitkUInt16), pattern="D{}.dcm")
    for files, words in (
        ([*paths[:3], others[5]], "another orientation"),
        ([*paths[:3], small[5]], "C5.dcm has 8x12 pixels, IM000.dcm has 10x12"),
        ([*paths[:3], half[5]], "another voxel type or kind of scale factor"),
        (paths[:1], "a single slice"),
    ):
        with pytest.raises(Unreadable, match=words):
            in_order(files)


def test_damaged_files_are_refused(root: Path) -> None:
    (subject(root) / "3-T2" / "IM001.dcm").write_bytes(b"no image")
    other = root / "Prostate-3T" / "Prostate3T-01-0002" / "study" / "3-T2" / "IM003.dcm"
    other.write_bytes(other.read_bytes()[:-60])
    report = refused(module, root)
    assert "IM001.dcm is no readable DICOM file" in str(report)
    assert "IM003.dcm is no readable DICOM file" in str(report)  # cut short
    assert len(report.problems) == 2


def test_a_file_of_several_frames_is_refused(tmp_path: Path) -> None:
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "frames.dcm"))
    writer.Execute(sitk.Cast(scan(1), sitk.sitkUInt16))
    with pytest.raises(Unreadable, match="holds 6 frames"):
        in_order([tmp_path / "frames.dcm", tmp_path / "frames.dcm"])


def test_a_mask_on_its_image_s_grid_is_not_touched(tmp_path: Path) -> None:
    image = read_scan(Scan((write(tmp_path / "image.mhd", scan(1)),)))
    rounded = gland((1, 2))
    rounded.SetOrigin([value + 0.01 for value in rounded.GetOrigin()])  # as another program may have written it
    mask = read_scan(Scan((write(tmp_path / "mask.nrrd", rounded),)))
    moved, notes = put_on_grid(mask, image)
    assert notes == []
    assert moved.array is mask.array
    assert np.array_equal(moved.affine, image.affine)


def test_a_small_part_of_a_mask_outside_its_image_is_lost_and_told(tmp_path: Path) -> None:
    array = np.ones((10, 12, 6), np.uint8)
    image = read_scan(Scan((write(tmp_path / "image.mhd", placed(np.ones((40, 12, 6), np.int16))[:39]),)))
    wide = placed(np.concatenate([array] * 4))  # 40 columns; the image has 39
    moved, notes = put_on_grid(read_scan(Scan((write(tmp_path / "mask.nrrd", wide),))), image)
    assert moved.array.shape == (39, 12, 6)
    assert moved.array.all()
    assert notes[1] == "2.50% of the mask lies outside the image and is lost"


def test_a_real_prostate_comes_back_from_dicom_and_nrrd_as_it_was(
    tmp_path: Path, sample_data: Path, nnunet_folders: Path
) -> None:
    """ProstateX-0000 as NCI-ISBI would hold it: T2 as DICOM, zones as an NRRD whose axes run the other way."""
    source = sample_data / "prostate"
    t2 = source / "ProstateX" / "ProstateX-0000" / "07-07-2011" / "ProstateX-0000_07-07-2011_t2w.nii.gz"
    zones = next(source.glob("**/zonal_pz_tz/AI/HeviAI23/*.nii.gz"))
    image, mask = sitk.ReadImage(t2), sitk.Cast(sitk.ReadImage(zones), sitk.sitkUInt8)
    for name, part in (("Prostate3T-01-0001", slice(None)), ("ProstateDx-01-0001", slice(4, 14))):
        write_dicom(tmp_path / "images" / name / "T2", image[:, :, part])
        turned = sitk.PermuteAxes(sitk.Flip(mask[:, :, part], [True, False, True]), [1, 0, 2])
        write(tmp_path / "Training" / f"{name}.nrrd", turned, packed=True)
    out = convert(module, tmp_path, zones="keep", nci_isbi=tmp_path)
    result, label = written(out), sitk.ReadImage(out / "labelsTr" / f"{CASE}.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(result), sitk.GetArrayFromImage(image))
    assert np.array_equal(sitk.GetArrayFromImage(label), sitk.GetArrayFromImage(mask))
    assert np.allclose(
        nibabel.load(out / "imagesTr" / f"{CASE}_0000.nii.gz").affine, nibabel.load(t2).affine, atol=1e-3
    )
    verify(out)
