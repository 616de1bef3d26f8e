"""Converters on real volumes, linked or renamed into the layouts of the downloads."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from trees import convert, read, save, verify

from dataset_conversion import Dataset501_ProstateSAML, Dataset504_AbdomenCTMR

MASKS = "picai_labels/anatomical_delineations"


def one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    assert found, f"{folder}/{pattern}"
    return found[0]


@pytest.fixture
def prostates(tmp_path: Path, sample_data: Path) -> Path:
    """ProstateX-0000: T2 with zones as a case of RUNMC, ADC with the whole gland as one of UCL."""
    source = sample_data / "prostate"
    files = {
        "RUNMC/Case00.nii.gz": one(source, "**/ProstateX-0000*t2w.nii.gz"),
        "RUNMC/Case00_segmentation.nii.gz": one(source, f"**/{MASKS.split('/')[1]}/zonal_pz_tz/AI/HeviAI23/*.nii.gz"),
        "UCL/Case07.nii.gz": one(source, "**/ProstateX-0000*adc_on_t2w_grid.nii.gz"),
        "UCL/Case07_segmentation.nii.gz": one(source, "**/whole_gland/AI/Bosma22b/*.nii.gz"),
    }
    root = tmp_path / "Processed_data_nii"
    for name, path in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(path)
    return root


def test_a_real_oblique_prostate_keeps_its_voxels_and_geometry(prostates: Path, nnunet_folders: Path) -> None:
    out = convert(Dataset501_ProstateSAML, prostates)
    for site, number, part in (("RUNMC", 0, "Tr"), ("UCL", 7, "Ts")):
        source = sitk.ReadImage(prostates / site / f"Case{number:02d}.nii.gz")
        mask = sitk.ReadImage(prostates / site / f"Case{number:02d}_segmentation.nii.gz")
        image = sitk.ReadImage(out / f"images{part}" / f"{site}_Case{number:02d}_0000.nii.gz")
        label = sitk.ReadImage(out / f"labels{part}" / f"{site}_Case{number:02d}.nii.gz")
        assert np.array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(source))
        assert np.array_equal(sitk.GetArrayFromImage(label), sitk.GetArrayFromImage(mask) > 0)
        for other in (image, label):
            assert other.GetOrigin() == source.GetOrigin()
            assert other.GetDirection() == source.GetDirection()
            assert other.GetSpacing() == source.GetSpacing()
    verify(out)


def test_a_real_gland_survives_dropping_empty_slices(prostates: Path, nnunet_folders: Path) -> None:
    out = convert(Dataset501_ProstateSAML, prostates, drop_empty_slices=True)
    mask = nibabel.load(prostates / "RUNMC" / "Case00_segmentation.nii.gz")
    label = nibabel.load(out / "labelsTr" / "RUNMC_Case00.nii.gz")
    assert label.shape[2] < mask.shape[2]
    assert np.asanyarray(label.dataobj).any(axis=(0, 1)).all()
    centres = []
    for volume in (mask, label):  # the gland's centre of mass in scanner coordinates
        voxels = np.argwhere(np.asanyarray(volume.dataobj) > 0).mean(axis=0)
        centres.append(volume.affine @ [*voxels, 1])
    assert np.allclose(centres[0], centres[1], atol=1e-2)


ORGANS = {"CT": {5: 1, 2: 2, 3: 3, 1: 4}, "MR": {5: 1, 2: 2, 3: 3, 1: 4}}  # spleen 1, kidneys 2 and 3, liver 5


@pytest.fixture
def abdomen(tmp_path: Path, sample_data: Path) -> Path:
    """One CT and one MR in the processed layout, labels mapped by organ name."""
    source = sample_data / "abdomen" / "totalsegmentator_reference_files"
    files = {"CT": ("SABSCT", "example_ct_sm", "example_seg"), "MR": ("CHAOST2", "example_mr_sm", "example_seg_mr")}
    for modality, (folder, image, label) in files.items():
        target = tmp_path / "in" / folder / "processed"
        target.mkdir(parents=True)
        (target / "image_1.nii.gz").symlink_to(source / f"{image}.nii.gz")
        volume = nibabel.load(source / f"{label}.nii.gz")
        values = np.zeros(volume.shape, np.uint8)
        for theirs, ours in ORGANS[modality].items():
            values[np.asanyarray(volume.dataobj) == theirs] = ours
        save(target / "label_1.nii.gz", values, volume.affine)
    return tmp_path / "in"


@pytest.mark.parametrize(("source", "target"), [("CT", "MR"), ("MR", "CT")])
def test_a_real_ct_is_windowed_and_a_real_mr_is_not(
    abdomen: Path, nnunet_folders: Path, source: str, target: str
) -> None:
    out = convert(Dataset504_AbdomenCTMR, abdomen, sources=(source,))
    parts = {source: "Tr", target: "Ts"}
    ct = read(out / f"images{parts['CT']}" / "CT_001_0000.nii.gz")
    original = read(abdomen / "SABSCT" / "processed" / "image_1.nii.gz")
    assert original.min() < -125
    assert (ct.min(), ct.max()) == (-125, min(275, original.max()))
    inside = (original >= -125) & (original <= 275)
    assert np.array_equal(ct[inside], original[inside])
    mr = read(out / f"images{parts['MR']}" / "MR_001_0000.nii.gz")
    assert np.array_equal(mr, read(abdomen / "CHAOST2" / "processed" / "image_1.nii.gz"))
    verify(out)
