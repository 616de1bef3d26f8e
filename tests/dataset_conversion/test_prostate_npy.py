"""The converter of .npy slices on made trees in the layout of RAM-DSIR and SAM-SDG."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from trees import convert, read, refused, verify

from dataset_conversion import Dataset512_ProstateNPY as module
from nnunet_dgplugins.errors import UserError

pytestmark = pytest.mark.usefixtures("nnunet_folders")
ROWS, COLUMNS, COUNT = 14, 12, 8
SITES = ("RUNMC", "BMC", "I2CVB", "UCL", "BIDMC", "HK")


def volume(seed: int) -> np.ndarray:
    """(slice, row, column), in [-1, 1] over the volume."""
    values = np.random.default_rng(seed).random((COUNT, ROWS, COLUMNS)).astype(np.float32)
    return 2 * (values - values.min()) / (values.max() - values.min()) - 1


def write(root: Path, domain: int, number: int, names: str = "Case{volume:02d}_{slice}", start: int = 0) -> None:
    """Slices 2 to 5 of 8 show prostate and are written, as in the release."""
    scan = volume(10 * domain + number)
    for index in range(2, 6):
        name = names.format(volume=number, slice=index, running=start + index)
        mask = np.zeros((ROWS, COLUMNS), np.uint8)
        mask[3:8, 2 : 3 + index] = 1
        for what, array in (("image", scan[index - 1 : index + 2].transpose(1, 2, 0)), ("mask", mask)):
            path = root / f"Domain{domain}" / what / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for domain in range(1, 7):
        for number in range(2):
            write(tmp_path / "data" / "prostate", domain, number)
    return tmp_path / "data" / "prostate"


def test_each_volume_is_a_case_of_its_site(root: Path) -> None:
    out = convert(module, root.parent.parent)
    assert out.name == "Dataset512_ProstateNPY_RUNMC"
    assert sorted(path.name for path in (out / "imagesTr").iterdir()) == [
        "RUNMC_Case00_0000.nii.gz",
        "RUNMC_Case01_0000.nii.gz",
    ]
    table = json.loads((out / "dataset.json").read_text())["dgplugins"]
    assert {name.split("_")[0] for name in table["cases"]} == set(SITES)
    case = table["cases"]["HK_Case01"]
    assert (case["site"], case["patient"]) == ("HK", "Case01")
    assert case["original"] == "data/prostate/Domain6/image/Case01_2.npy to Case01_5.npy"
    assert table["protocol"]["spacing"] == "unknown, 1 mm written"
    assert table["protocol"]["ends_left_out"] is True
    verify(out)


def test_the_middle_channel_is_the_slice_and_rows_run_along_y(root: Path) -> None:
    out = convert(module, root)
    written = sitk.ReadImage(out / "imagesTr" / "RUNMC_Case01_0000.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(written), volume(11)[2:6])
    assert written.GetSpacing() == (1, 1, 1)
    assert written.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    label = sitk.ReadImage(out / "labelsTr" / "RUNMC_Case01.nii.gz")
    assert sitk.GetArrayFromImage(label)[3, 3:8, 2:6].all()
    assert sitk.GetArrayFromImage(label).sum() == 5 * (3 + 4 + 5 + 6)
    assert (label.GetOrigin(), label.GetDirection()) == (written.GetOrigin(), written.GetDirection())


def test_intensities_stay_as_the_release_scaled_them(root: Path) -> None:
    written = read(convert(module, root) / "imagesTs" / "UCL_Case00_0000.nii.gz")
    assert written.dtype == np.float32
    assert written.min() >= -1
    assert written.max() <= 1


def test_neighbours_are_those_that_the_arrays_bring_along(root: Path) -> None:
    out = convert(module, root, neighbours=True)
    for channel, first in enumerate((1, 2, 3)):
        written = sitk.ReadImage(out / "imagesTr" / f"RUNMC_Case00_{channel:04d}.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(written), volume(10)[first : first + 4])
    assert json.loads((out / "dataset.json").read_text())["channel_names"]["2"] == "T2_above"


def test_slices_are_counted_as_numbers_and_gaps_are_closed_with_a_note(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what in ("image", "mask"):
        folder = root / "Domain1" / what
        (folder / "Case00_4.npy").unlink()
        (folder / "Case00_5.npy").rename(folder / "Case00_10.npy")
    out = convert(module, root)
    written = sitk.GetArrayFromImage(sitk.ReadImage(out / "imagesTr" / "RUNMC_Case00_0000.nii.gz"))
    assert np.array_equal(written, volume(10)[[2, 3, 5]])
    assert "missing inside 1 volumes (RUNMC_Case00)" in capsys.readouterr().err


def test_a_stray_file_is_left_out_and_the_others_keep_their_volumes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what in ("image", "mask"):
        folder = root / "Domain1" / what
        (folder / "mean.npy").write_bytes((folder / "Case00_3.npy").read_bytes())
    out = convert(module, root)
    assert sorted(path.name for path in (out / "labelsTr").iterdir()) == [
        "RUNMC_Case00.nii.gz", "RUNMC_Case01.nii.gz",
    ]  # fmt: skip
    assert "left out: mean" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["{running}", "slice_{running:04d}"])
def test_names_that_tell_no_volume_are_sorted_out_by_what_the_slices_show(
    tmp_path: Path, names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        write(tmp_path, 1, number, names, start=100 * number)
        write(tmp_path, 2, number)
    for what in ("image", "mask"):  # a slice without prostate inside a volume
        (tmp_path / "Domain1" / what / f"{names.format(running=103)}.npy").unlink()
    out = convert(module, tmp_path)
    shapes = [read(path).shape[2] for path in sorted((out / "imagesTr").iterdir())]
    assert sorted(shapes) == [3, 4, 4]
    assert "11 slices, 3 volumes, taken for as many patients" in capsys.readouterr().err


def test_a_label_of_two_zones_is_one_prostate(root: Path) -> None:
    path = root / "Domain2" / "mask" / "Case00_3.npy"
    mask = np.load(path)
    mask[3:5] *= 2
    np.save(path, mask.astype(np.float64))
    label = read(convert(module, root) / "labelsTs" / "BMC_Case00.nii.gz")
    assert set(np.unique(label)) == {0, 1}
    assert label[:, :, 1].sum() == (mask > 0).sum()


def test_half_precision_and_boolean_arrays_are_read(root: Path) -> None:
    for path in (root / "Domain1" / "image").glob("Case00*"):
        np.save(path, np.load(path).astype(np.float16))
    for path in (root / "Domain1" / "mask").glob("Case00*"):
        np.save(path, np.load(path) > 0)
    out = convert(module, root)
    assert np.abs(read(out / "imagesTr" / "RUNMC_Case00_0000.nii.gz").transpose(2, 1, 0) - volume(10)[2:6]).max() < 1e-3
    assert read(out / "labelsTr" / "RUNMC_Case00.nii.gz").sum() == 5 * (3 + 4 + 5 + 6)


def test_everything_wrong_is_listed_at_once_and_nothing_is_written(root: Path, nnunet_folders: Path) -> None:
    (root / "Domain1" / "mask" / "Case00_3.npy").unlink()
    (root / "Domain2" / "image" / "Case01_4.npy").unlink()
    np.save(root / "Domain3" / "image" / "Case00_2.npy", np.zeros((ROWS, COLUMNS)))
    np.save(root / "Domain4" / "mask" / "Case00_2.npy", np.full((ROWS, COLUMNS), 255, np.uint8))
    np.save(root / "Domain4" / "mask" / "Case01_2.npy", np.full((ROWS, COLUMNS), 0.5))
    broken = root / "Domain5" / "image" / "Case00_2.npy"
    broken.write_bytes(broken.read_bytes()[:200])
    np.save(root / "Domain6" / "image" / "Case00_2.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(root / "Domain6" / "mask" / "Case01_2.npy", np.zeros((ROWS, 9), np.uint8))
    report = refused(module, root)
    for part in (
        "Domain1/mask: no Case00_3.npy",
        "--exclude RUNMC_Case00",
        "Domain2/image: no Case01_4.npy",
        "Case00_2.npy has shape 14x12, expected rows x columns x 3",
        "unknown label value 255",
        "no whole numbers (0.5",
        "Case00_2.npy is no readable .npy array",
        "Case01_3.npy has 12x14 pixels, the first slice has 9x14",
    ):
        assert part in str(report), str(report)
    assert len(report.problems) == 8
    assert not list((nnunet_folders / "nnUNet_raw").iterdir())


def test_a_volume_is_left_out_with_its_trouble(root: Path) -> None:
    (root / "Domain1" / "mask" / "Case00_3.npy").unlink()
    out = convert(module, root, exclude=("RUNMC_Case00",))
    assert [path.name for path in (out / "labelsTr").iterdir()] == ["RUNMC_Case01.nii.gz"]


def test_a_domain_without_masks_is_reported_and_other_files_are_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "Domain1" / "image_volume").mkdir()
    (root / "Domain1" / "image" / "readme.txt").write_text("hello")
    for path in (root / "Domain6" / "mask").iterdir():
        path.unlink()
    (root / "Domain6" / "mask").rmdir()
    assert "Domain6: no folder mask" in str(refused(module, root))
    out = convert(module, root, targets=("BMC",))
    said = capsys.readouterr().err
    assert "image_volume" in said
    assert "readme.txt: no .npy file" in said
    assert nibabel.load(out / "imagesTr" / "RUNMC_Case00_0000.nii.gz").shape == (COLUMNS, ROWS, 4)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the folders Domain1"):
        convert(module, tmp_path)
