"""The converter of BraTS 2019 on tiny trees in its layout, and on real brains linked into it."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from trees import AFFINE, image, read, save
from weak_trees import IDS, brats, brats_patient, convert, mask, names, refused

from dataset_conversion import Dataset505_BraTS2019 as module
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UserError


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return brats(tmp_path / "in" / "MICCAI_BraTS_2019_Data_Training")


def description(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def table(folder: Path) -> CaseTable:
    found = CaseTable.from_dataset_json(description(folder))
    assert found is not None
    return found


def test_scans_of_one_patient_of_brats_2015_are_one_patient() -> None:
    names = ("brats_tcia_pat309_0001", "brats_tcia_pat309_0120", "brats_2013_pat0001_1", "BraTS19_TCIA01_201_1")
    patients = ["brats_tcia_pat309", "brats_tcia_pat309", "brats_2013_pat0001", "BraTS19_TCIA01_201_1"]
    assert [module._patient(name) for name in names] == patients


def test_the_modalities_become_channels_in_the_order_asked_for(root: Path) -> None:
    out = convert(module, root.parent, modalities="flair,T1c,t2")
    assert out.name == "Dataset505_BraTS2019_Flair-T1c-T2_tags"
    case, place = IDS[1], root / "HGG" / IDS[1]
    part = "Tr" if (out / "imagesTr" / f"{case}_0000.nii.gz").exists() else "Ts"
    for index, suffix in enumerate(("flair", "t1ce", "t2")):
        written = out / f"images{part}" / f"{case}_{index:04d}.nii.gz"
        assert np.array_equal(read(written), read(place / f"{case}_{suffix}.nii.gz"))
    content = description(out)
    assert content["channel_names"] == {"0": "noNorm", "1": "noNorm", "2": "noNorm"}
    assert content["dgplugins"]["protocol"]["modalities"] == ["Flair", "T1c", "T2"]
    assert content["dgplugins"]["protocol"]["supervision"] == "tags"
    assert content["labels"] == {"background": 0, "tumour": 1}


def test_every_grade_gives_its_share_to_validation_and_test(tmp_path: Path, nnunet_folders: Path) -> None:
    root = brats(tmp_path / "in", high=10, low=5)
    out = convert(module, root, val=0.2, test=0.2)
    (fold,) = json.loads((out / "splits_final.json").read_text())
    low = {path.name for path in (root / "LGG").iterdir()}
    for cases, high_count, low_count in ((fold["val"], 2, 1), (names(out / "labelsTs"), 2, 1), (fold["train"], 6, 3)):
        assert (len(set(cases) - low), len(set(cases) & low)) == (high_count, low_count)
    assert sorted(fold["train"] + fold["val"]) == names(out / "labelsTr")
    assert convert(module, root, val=0.2, test=0.2, seed=1, dataset_id=605).is_dir()
    other = json.loads((out.parent / "Dataset605_BraTS2019_T1-T2_tags" / "splits_final.json").read_text())
    assert other[0] != fold


def test_a_share_of_nothing_keeps_no_case_for_testing(root: Path) -> None:
    out = convert(module, root, test=0.0)
    assert not (out / "imagesTs").exists()
    assert len(names(out / "labelsTr")) == 10


def test_the_centre_of_an_id_is_the_site_and_unknown_names_have_none(root: Path) -> None:
    brats_patient(root / "LGG" / "brats_2013_pat0005_1", 900)
    cases = table(convert(module, root)).cases
    assert [cases[name].site for name in IDS] == ["CBICA", "TMC", "TCIA02", "2013"]
    assert cases["brats_2013_pat0005_1"].site is None
    assert cases[IDS[0]].patient == IDS[0]


def test_plain_nii_files_give_the_same_voxels_and_tags(root: Path, tmp_path: Path) -> None:
    packed = convert(module, root)
    plain = convert(module, brats(tmp_path / "plain", ending=".nii"), dataset_id=605)
    assert names(plain / "labelsTr") == names(packed / "labelsTr")
    for path in (packed / "imagesTr").iterdir():
        assert np.array_equal(read(path), read(plain / "imagesTr" / path.name))
    assert (plain / "image_tags.json").read_bytes() == (packed / "image_tags.json").read_bytes()


def test_everything_wrong_is_listed_at_once(root: Path) -> None:
    folder = root / "HGG" / IDS[0]
    (folder / f"{IDS[0]}_t2.nii.gz").unlink()
    (root / "HGG" / IDS[1] / f"{IDS[1]}_seg.nii.gz").unlink()
    save(root / "HGG" / IDS[2] / f"{IDS[2]}_seg.nii.gz", mask((1, 3)), AFFINE)
    save(root / "HGG" / IDS[3] / f"{IDS[3]}_t1.nii.gz", image(1, (12, 14, 4)), AFFINE)
    save(root / "HGG" / IDS[3] / f"{IDS[3]}_t2.nii", image(2), AFFINE)
    (root / "LGG" / "empty").mkdir()
    text = refused(module, root)
    for part in (
        f"{IDS[0]}: no T2 (*_t2.nii.gz). Leave the patient out with --exclude {IDS[0]}",
        f"{IDS[1]}: no seg",
        f"{IDS[2]}_seg.nii.gz: unknown label value 3 (20 voxels); expected 0, 1, 2, 4",
        f"{IDS[3]}_t2.nii and {IDS[3]}_t2.nii.gz: two files for T2",
        "empty: no T1 (*_t1.nii.gz); no T2 (*_t2.nii.gz); no seg",
    ):
        assert part in text, text
    assert "5 problems" in text


def test_modalities_of_other_shape_are_refused_and_unused_ones_do_not_matter(root: Path) -> None:
    save(root / "HGG" / IDS[3] / f"{IDS[3]}_t2.nii.gz", image(2, (12, 14, 4)), AFFINE)
    assert f"{IDS[3]}_t2.nii.gz: shape 12x14x4; expected 12x14x5" in refused(module, root)
    assert convert(module, root, modalities="T1,Flair").is_dir()


def test_the_older_code_with_a_three_needs_an_explicit_option(root: Path) -> None:
    save(root / "HGG" / IDS[2] / f"{IDS[2]}_seg.nii.gz", mask((1, 3)), AFFINE)
    out = convert(module, root, supervision="masks", label_code="brats2015")
    label = next(out.glob(f"labelsT?/{IDS[2]}.nii.gz"))
    assert np.array_equal(read(label), mask((1, 1)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modalities": "T1,T3"}, "unknown modality 'T3'"),
        ({"modalities": "T1,t1"}, "two or more different"),
        ({"modalities": "T1"}, "two or more different"),
        ({"val": 0.6, "test": 0.4}, "leave no patient"),
        ({"exclude": ("BraTS19_CBICA_AAP_2",)}, "did you mean 'BraTS19_CBICA_AAP_1'"),
    ],
)
def test_options_that_make_no_sense_are_refused(root: Path, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        convert(module, root, **options)


def test_a_folder_without_grades_is_refused(tmp_path: Path, nnunet_folders: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither HGG nor LGG"):
        convert(module, tmp_path / "empty")


def link(target: Path, source: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)


def test_real_brains_of_two_kinds_keep_their_voxels_and_get_the_tags_of_their_slices(
    tmp_path: Path, sample_data: Path, nnunet_folders: Path
) -> None:
    """FLAIR and T1c, common to all four: three of BraTS 2015 (values 0 to 4), one with negative voxels (0 1 2 4)."""
    root, seen = tmp_path / "in", {}
    for folder in sorted((sample_data / "brats" / "brats2015TrainingData").glob("*/brats_2013_*")):
        place = root / "HGG" / folder.name / folder.name
        seen[folder.name] = folder / "OTMultiClass.nii.gz"
        link(Path(f"{place}_seg.nii.gz"), seen[folder.name])
        for suffix, name in (("flair", "Flair"), ("t1ce", "T1c")):
            link(Path(f"{place}_{suffix}.nii.gz"), folder / f"{name}_subtrMeanDivStd.nii.gz")
    tcga = sample_data / "brats" / "tcga_lgg_brats_space" / "OtherEXampleFromTCIA_brainles"
    place = root / "LGG" / "TCGA-FG-6692" / "TCGA-FG-6692"
    seen["TCGA-FG-6692"] = tcga / "fusion" / "simple.nii.gz"
    link(Path(f"{place}_seg.nii.gz"), seen["TCGA-FG-6692"])
    for suffix, name in (("flair", "fla"), ("t1ce", "t1c"), ("t1", "t1"), ("t2", "t2")):
        link(Path(f"{place}_{suffix}.nii.gz"), tcga / "raw_bet" / f"OtherEXampleFromTCIA_{name}_bet.nii.gz")
    out = convert(module, root, modalities="Flair,T1c", label_code="brats2015", link=True)
    (fold,) = json.loads((out / "splits_final.json").read_text())
    assert (len(fold["train"]), len(fold["val"]), len(names(out / "labelsTs"))) == (2, 1, 1)
    cases = table(out).cases
    for name, source in seen.items():
        truth = read(source) > 0.5
        test = name in names(out / "labelsTs")
        flair = out / f"images{'Ts' if test else 'Tr'}" / f"{name}_0000.nii.gz"
        assert np.array_equal(nibabel.load(flair).affine, nibabel.load(source).affine)
        if name in fold["val"] or test:
            assert np.array_equal(read(out / ("labelsTs" if test else "labelsVal") / f"{name}.nii.gz"), truth)
        if not test:
            assert cases[name].tags == truth.any(axis=(0, 1)).astype(int).tolist()
            assert set(cases[name].tags or []) == {0, 1}
    assert read(next(out.glob("images*/TCGA-FG-6692_0000.nii.gz"))).min() < 0
