"""The converter of the public prostate sources on made trees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from public_trees import SHAPE, gland, i2cvb, nci_isbi, promise12, scan, write, write_dicom
from trees import convert as run
from trees import refused as refused_by
from trees import verify

from dataset_conversion import Dataset513_ProstatePublic as module
from dataset_conversion._command import planned_name
from nnunet_dgplugins.errors import BadInput, UserError

TRAINING = "NCI-ISBI 2013 Prostate Challenge - Training/Training"


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    nci_isbi(tmp_path / "in" / "nci")
    i2cvb(tmp_path / "in" / "i2cvb")
    promise12(tmp_path / "in" / "promise")
    return tmp_path / "in"


def convert(root: Path, **options: object) -> Path:
    return run(module, root, **options)


def refused(root: Path, **options: object) -> BadInput:
    return refused_by(module, root, **options)


def voxels(image: sitk.Image | Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(image) if isinstance(image, Path) else image)


def same_place(one: sitk.Image, two: sitk.Image) -> bool:
    return all(
        np.allclose(getattr(one, get)(), getattr(two, get)(), atol=1e-4)
        for get in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize")
    )


def test_three_downloads_become_one_set_of_several_sites(root: Path) -> None:
    out = convert(root)
    assert out.name == "Dataset513_ProstatePublic_RUNMC"
    assert sorted(path.name for path in (out / "labelsTr").iterdir()) == [
        "RUNMC_Prostate3T-01-0001.nii.gz",
        "RUNMC_Prostate3T-01-0002.nii.gz",
    ]
    assert sorted(path.name[:-7] for path in (out / "labelsTs").iterdir()) == [
        "BMC_ProstateDx-01-0001", "BMC_ProstateDx-01-0002", "I2CVB_Patient-383", "I2CVB_Patient-90",
        "PROMISE12_Case00", "PROMISE12_Case01", "PROMISE12_Case02", "PROMISE12_Case03",
    ]  # fmt: skip
    cases = json.loads((out / "dataset.json").read_text())["dgplugins"]["cases"]
    assert cases["I2CVB_Patient-383"]["patient"] == "Patient 383"
    assert cases["I2CVB_Patient-383"]["original"] == "i2cvb/Siemens/Patient 383/T2W"
    assert cases["PROMISE12_Case03"]["original"] == "promise/TrainingData_Part2/Case03.mhd"
    verify(out)


def test_voxels_and_oblique_geometry_are_those_of_the_download(root: Path) -> None:
    out = convert(root)
    for name, part, source in (
        ("RUNMC_Prostate3T-01-0002", "Tr", scan(2)),
        ("BMC_ProstateDx-01-0001", "Ts", scan(11)),
        ("I2CVB_Patient-90", "Ts", scan(21)),
        ("PROMISE12_Case01", "Ts", scan(31)),
    ):
        written = sitk.ReadImage(out / f"images{part}" / f"{name}_0000.nii.gz")
        label = sitk.ReadImage(out / f"labels{part}" / f"{name}.nii.gz")
        assert np.array_equal(voxels(written), voxels(source))
        assert same_place(written, source)
        assert (label.GetOrigin(), label.GetSpacing(), label.GetDirection()) == (
            written.GetOrigin(), written.GetSpacing(), written.GetDirection(),
        )  # fmt: skip
        assert np.array_equal(voxels(label), voxels(gland((1, 2) if name[0] in "RB" else (1,))) > 0)


def test_each_download_can_be_named_by_its_option(root: Path) -> None:
    out = convert(root, nci_isbi=root / "nci", i2cvb=root / "i2cvb")
    assert len(list((out / "labelsTs").iterdir())) == 4
    arguments = ["--nci-isbi", str(root / "nci"), "--source", "A", "--target", "B", "--id", "613", "--jobs", "1"]
    result = CliRunner().invoke(module.command, arguments)
    assert result.exit_code == 0, result.output
    assert "Dataset613_ProstatePublic_RUNMC" in result.output


@pytest.mark.parametrize("arguments", [[], ["in", "--i2cvb", "x"]])
def test_the_command_wants_one_root_or_named_ones(arguments: list[str]) -> None:
    result = CliRunner().invoke(module.command, [*arguments, "--source", "RUNMC"])
    assert result.exit_code == 2
    assert "--nci-isbi, --i2cvb, --promise12" in result.output


def test_neighbouring_slices_become_channels(root: Path) -> None:
    out = convert(root, nci_isbi=root / "nci", neighbours=True)
    below, middle, above = (voxels(out / "imagesTr" / f"RUNMC_Prostate3T-01-0001_{n:04d}.nii.gz") for n in range(3))
    assert np.array_equal(middle, voxels(scan(1)))
    assert np.array_equal(below[1:], middle[:-1])
    assert np.array_equal(above[:-1], middle[1:])


def test_zones_are_kept_for_the_hospitals_that_have_them(root: Path) -> None:
    out = convert(root, zones="keep", targets=("BMC",))
    assert np.array_equal(voxels(out / "labelsTs" / "BMC_ProstateDx-01-0001.nii.gz"), voxels(gland((1, 2))))
    assert "no zones" in str(refused(root, zones="keep", targets=("I2CVB",), dataset_id=613))


def test_the_mask_with_corrected_labels_is_found_and_preferred(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "nci" / TRAINING
    (folder / "ProstateDx-01-0002.nrrd").rename(folder / "ProstateDx-01-0002_correctedLabels.nrrd")
    write(folder / "ProstateDx-01-0001_correctedLabels.nrrd", gland((2,)))
    out = convert(root, zones="keep", targets=("BMC",))
    assert np.array_equal(voxels(out / "labelsTs" / "BMC_ProstateDx-01-0001.nii.gz"), voxels(gland((2,))))
    assert (out / "labelsTs" / "BMC_ProstateDx-01-0002.nii.gz").is_file()
    assert "used in place of the mask that it corrects" in capsys.readouterr().err


def test_masks_of_the_challenge_s_test_subjects_are_found(root: Path) -> None:
    folder = root / "nci" / TRAINING
    (folder / "ProstateDx-01-0002.nrrd").rename(folder.parent / "ProstateDx-01-0002_truth.nrrd")
    out = convert(root, targets=("BMC",))
    assert np.array_equal(voxels(out / "labelsTs" / "BMC_ProstateDx-01-0002.nii.gz"), voxels(gland((1, 2))) > 0)


def test_linked_downloads_are_entered_once(root: Path, tmp_path: Path) -> None:
    everything = tmp_path / "everything"
    everything.mkdir()
    for name in ("nci", "i2cvb", "promise"):
        (everything / name).symlink_to(root / name)
    (root / "promise" / "back").symlink_to(everything)  # a circle
    out = convert(everything)
    assert {path.name.split("_")[0] for path in (out / "labelsTs").iterdir()} == {"BMC", "I2CVB", "PROMISE12"}


def test_the_subject_whose_mask_has_fewer_slices_than_its_image_is_placed_by_coordinates(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ProstateDx-01-0055 has 23 slices of 34 in the release; converters that want equal sizes leave it out."""
    whole = gland((1, 2))
    write(root / "nci" / TRAINING / "ProstateDx-01-0055.nrrd", whole[:, :, 1:5])
    write_dicom(root / "nci" / "PROSTATE-DIAGNOSIS" / "ProstateDx-01-0055" / "T2", scan(55))
    out = convert(root, targets=("BMC",))
    label = voxels(out / "labelsTs" / "BMC_ProstateDx-01-0055.nii.gz")
    assert np.array_equal(label, voxels(whole) > 0)
    assert "does not reach 2 of the image's 6 slices, which become background" in capsys.readouterr().err


def test_the_patient_whose_mask_lacks_a_slice_is_left_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "i2cvb" / "Siemens" / "Patient_428260"
    write_dicom(folder / "T2W", scan(77))
    paths = write_dicom(folder / "GT" / "prostate", gland())
    paths[2].unlink()
    out = convert(root)
    assert len(list((out / "labelsTs").glob("I2CVB_*"))) == 2
    assert "Patient_428260: left out, a slice of its mask is missing" in capsys.readouterr().err


def test_a_mask_on_another_grid_is_resampled_by_physical_coordinates_and_it_is_said(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "nci" / TRAINING
    turned = sitk.PermuteAxes(gland((1, 2)), [1, 0, 2])  # the same voxels, axes in another order
    write(folder / "Prostate3T-01-0001.nrrd", sitk.Flip(turned, [False, False, True]))
    twice = sitk.Image([SHAPE[0], SHAPE[1], 2 * SHAPE[2]], sitk.sitkUInt8)  # every slice twice, half as thick
    twice.SetSpacing((0.6, 0.6, 1.75))
    twice.SetDirection(gland().GetDirection())
    twice.SetOrigin(gland().TransformContinuousIndexToPhysicalPoint((0, 0, -0.25)))
    write(
        folder / "ProstateDx-01-0001.nrrd",
        sitk.Resample(gland((1, 2)), twice, sitk.Transform(), sitk.sitkNearestNeighbor),
    )
    out = convert(root, zones="keep", targets=("BMC",))
    assert np.array_equal(voxels(out / "labelsTr" / "RUNMC_Prostate3T-01-0001.nii.gz"), voxels(gland((1, 2))))
    assert np.array_equal(voxels(out / "labelsTs" / "BMC_ProstateDx-01-0001.nii.gz"), voxels(gland((1, 2))))
    said = capsys.readouterr().err
    assert "its grid (12x10x6, 0.6 x 0.6 x 3.5 mm) is not the image's (10x12x6" in said
    assert "its grid (10x12x12, 0.6 x 0.6 x 1.75 mm)" in said
    assert said.count("resampled by physical coordinates, nearest neighbour") == 2


def test_a_mask_outside_its_image_is_refused(root: Path) -> None:
    far = gland((1, 2))
    far.SetOrigin((200.0, 0, 0))
    write(root / "nci" / TRAINING / "Prostate3T-01-0001.nrrd", far)
    report = refused(root, targets=("BMC",))
    assert len(report.problems) == 1
    assert "100% of the mask lies outside the image" in str(report)
    assert "--exclude RUNMC_Prostate3T-01-0001" in str(report)


def test_the_site_map_tells_the_hospitals_of_promise12_apart(root: Path, tmp_path: Path) -> None:
    sites = tmp_path / "sites.csv"
    sites.write_text("case;site\nCase00;UCL\n1;BIDMC\nCase02;F-HK\n3;RUNMC\n")
    out = convert(root, site_map=sites)
    names = {path.name[:-7] for path in (out / "labelsTs").iterdir()}
    assert {"UCL_Case00", "BIDMC_Case01", "HK_Case02"} <= names
    assert not any("Case03" in name for name in names)  # RUNMC's are kept apart from the source site
    out = convert(root, site_map=sites, targets=("RUNMC-PROMISE12",), dataset_id=613)
    assert [path.name for path in (out / "labelsTs").iterdir()] == ["RUNMC-PROMISE12_Case03.nii.gz"]


def test_without_a_site_map_promise12_is_one_site_with_a_warning(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(root, sources=("PROMISE12",), targets=("RUNMC",))
    assert out.name == "Dataset513_ProstatePublic_PROMISE12"
    assert len(list((out / "labelsTr").iterdir())) == 4
    assert "all cases are one site, PROMISE12" in capsys.readouterr().err


def test_what_is_wrong_with_a_site_map_is_listed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = tmp_path / "sites.json"
    sites.write_text(json.dumps({"Case00": "UCL", "Case01": "Nowhere", "Case44": "UCL", "first": "UCL", "Case02": ""}))
    report = refused(root, site_map=sites)
    for part in ("unknown site 'Nowhere'", "case 'first'", "'Case02' has no site", "no site for Case03"):
        assert part in str(report)
    assert len(report.problems) == 4
    twice = tmp_path / "sites.csv"
    twice.write_text("case,site\nCase00,UCL\n0,HK\n1,HK\n2,HK\n3,HK\n")
    assert "line 3: Case00 is listed twice, first at" in str(refused(root, site_map=twice))
    assert "there is no Case44" in capsys.readouterr().err
    with pytest.raises(UserError, match="name its folder with --promise12"):
        convert(root, site_map=sites, nci_isbi=root / "nci")


def test_test_data_of_promise12_are_left_out_and_a_missing_mask_is_a_problem(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root / "promise" / "TestData" / "Case00.mhd", scan(80))
    (root / "promise" / "TrainingData_Part1" / "Case01_segmentation.mhd").unlink()
    report = refused(root)
    assert len(report.problems) == 1
    assert "Case01: no mask" in str(report)
    assert "TestData: 1 images without masks" in capsys.readouterr().err
    assert convert(root, exclude=("PROMISE12_Case01",)).is_dir()


def test_the_other_scanner_of_i2cvb_is_used_only_when_named(root: Path) -> None:
    out = convert(root, targets=("GE",))
    assert [path.name for path in (out / "labelsTs").iterdir()] == ["I2CVB-GE_Patient-383.nii.gz"]


def test_everything_wrong_is_listed_at_once_and_nothing_is_written(root: Path, nnunet_folders: Path) -> None:
    (root / "nci" / TRAINING / "Prostate3T-01-0002.nrrd").write_bytes(b"NRRD0004\ntype: nonsense\n")
    shutil.rmtree(root / "nci" / "PROSTATE-DIAGNOSIS" / "ProstateDx-01-0001")
    shutil.rmtree(root / "i2cvb" / "Siemens" / "Patient 383" / "GT")
    (root / "i2cvb" / "Siemens" / "Patient 90" / "T2W" / "IM002.dcm").unlink()
    (root / "promise" / "TrainingData_Part1" / "Case00.raw").write_bytes(b"12")
    write(root / "promise" / "TrainingData_Part1" / "Case01_segmentation.mhd", gland((3,)))
    write(root / "promise" / "other" / "Case02.mhd", scan(81))
    write(root / "promise" / "other" / "Case02_segmentation.mhd", gland())
    report = refused(root)
    for part in (
        "Prostate3T-01-0002.nrrd: not readable by SimpleITK",
        "no folder ProstateDx-01-0001 with DICOM images",
        "Patient 383: no folder GT/prostate",
        "a slice is missing between IM001.dcm and IM003.dcm: 7 mm, 3.5 mm elsewhere",
        "Case00.mhd: not readable by SimpleITK",
        "unknown label value 3",
        "Case02 once more, first in",
    ):
        assert part in str(report), str(report)
    assert len(report.problems) == 7
    assert not list((nnunet_folders / "nnUNet_raw").iterdir())


def test_a_folder_without_any_of_them_is_refused(tmp_path: Path, nnunet_folders: Path) -> None:
    with pytest.raises(UserError, match="no cases found"):
        convert(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        convert(tmp_path, i2cvb=tmp_path / "absent")


def test_the_same_again_does_nothing_and_changed_voxels_are_noticed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(root)
    convert(root)
    assert "nothing to do" in capsys.readouterr().out
    raw = root / "promise" / "TrainingData_Part1" / "Case00.raw"
    raw.write_bytes(raw.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="--overwrite"):
        convert(root)


def test_a_study_knows_the_dataset_s_name_beforehand(root: Path) -> None:
    words = [str(root), "--source", "C", "--neighbours", "--id", "613"]
    assert planned_name(module, words) == "Dataset613_ProstatePublic_I2CVB"
