"""Converters on real volumes, linked or renamed into the layouts of the downloads."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from few_label_trees import write_table
from trees import convert, read, save, verify

from dataset_conversion import (
    Dataset501_ProstateSAML,
    Dataset504_AbdomenCTMR,
    Dataset507_MnMs,
    Dataset508_SCGM,
)

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


@pytest.fixture
def real_hearts(tmp_path: Path, sample_data: Path) -> tuple[Path, dict[str, dict[str, Path]]]:
    """Six real ACDC patients as an M&Ms tree of three vendors: frames put back into a series, LV and RV renumbered."""
    root, originals, rows = tmp_path / "OpenDataset", {}, []
    folders = [path for path in sorted((sample_data / "cardiac" / "ACDC" / "training").iterdir()) if path.is_dir()]
    for number, folder in enumerate(folders[:6]):
        vendor, code = "ABD"[number // 2], f"{'ABD'[number // 2]}0A0A{number}"
        images = sorted(path for path in folder.glob("*_frame??.nii.gz"))
        first = nibabel.load(images[0])
        series = np.zeros((*first.shape, 12), np.float32)
        mask = np.zeros((*first.shape, 12), np.float32)
        frames = (9, 3) if number % 2 else (0, 7)  # ED may be the later one
        for image, frame in zip(images, frames, strict=True):
            series[..., frame] = read(image)
            truth = read(image.with_name(image.name.replace(".nii.gz", "_gt.nii.gz")))
            mask[..., frame] = np.array([0, 3, 2, 1])[truth.astype(int)]  # ACDC: RV 1, LV 3; M&Ms: LV 1, RV 3
        save(root / "Training" / "Labeled" / code / f"{code}_sa.nii.gz", series, first.affine)
        save(root / "Training" / "Labeled" / code / f"{code}_sa_gt.nii.gz", mask, first.affine)
        rows.append([code, vendor, number, *frames])
        originals[f"{vendor}_{code}"] = dict(zip(("ED", "ES"), images, strict=True))
    write_table(root / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv", rows,
                ["External code", "Vendor", "Centre", "ED", "ES"])  # fmt: skip
    return root, originals


def test_real_hearts_of_acdc_come_out_of_an_mnms_tree_unchanged(
    real_hearts: tuple[Path, dict[str, dict[str, Path]]], nnunet_folders: Path
) -> None:
    root, originals = real_hearts
    out = convert(Dataset507_MnMs, root, sources=(), targets=("D",), labelled=1)
    kinds = []
    for patient, phases in originals.items():
        part = "Ts" if patient[0] == "D" else "Tr"
        for phase, path in phases.items():
            written = nibabel.load(out / f"images{part}" / f"{patient}_{phase}_0000.nii.gz")
            assert np.array_equal(np.asanyarray(written.dataobj), read(path))
            assert np.allclose(written.affine, nibabel.load(path).affine)
            label = read(out / f"labels{part}" / f"{patient}_{phase}.nii.gz")
            truth = read(path.with_name(path.name.replace(".nii.gz", "_gt.nii.gz")))
            hidden = bool((label == 4).all())
            kinds.append((part, hidden))
            assert hidden or (np.array_equal(label == 1, truth == 3) and np.array_equal(label == 3, truth == 1))
    assert sorted(kinds) == [("Tr", False)] * 4 + [("Tr", True)] * 4 + [("Ts", False)] * 4
    verify(out)


def test_a_real_spinal_cord_of_four_raters_goes_the_same_way(
    tmp_path: Path, sample_data: Path, nnunet_folders: Path
) -> None:
    """A real T2* cord; two of the four raters shift its grey matter, and a tie between them is no grey matter."""
    source = sample_data / "spinal" / "sct_testing_data" / "t2s"
    image = nibabel.load(source / "t2s.nii.gz")
    grey, cord = read(source / "t2s_gmseg_manual.nii.gz") > 0, read(source / "t2s_seg.nii.gz") > 0
    for site, number in ((1, 1), (1, 2), (2, 1)):
        plain = f"site{site}-sc{number:02d}"
        voxels = np.asanyarray(image.dataobj) * (1 + site + 0.5 * number)  # no patient twice
        save(tmp_path / "train" / f"{plain}-image.nii.gz", voxels.astype(np.float32), image.affine)
        for rater in range(1, 5):
            own = np.roll(grey, 1, axis=0) if rater > 2 else grey
            mask = np.where(own, 1, np.where(cord, 2, 0)).astype(np.float32)
            save(tmp_path / "train" / f"{plain}-mask-r{rater}.nii.gz", mask, image.affine)
    out = convert(Dataset508_SCGM, tmp_path, sources=("site1",), labelled=1, zones="keep")
    label = read(out / "labelsTs" / "site2_sc01.nii.gz")
    assert np.array_equal(label == 1, grey & np.roll(grey, 1, axis=0))
    assert np.array_equal(label > 0, cord | (label == 1))
    assert np.array_equal(label, read(out / "labelsTr" / "site1_sc01.nii.gz"))
    assert (read(out / "labelsTr" / "site1_sc02.nii.gz") == 3).all()
    verify(out)
