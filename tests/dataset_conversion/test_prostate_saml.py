from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from trees import AFFINE, convert, image, label, read, refused, saml, save, verify

from dataset_conversion import Dataset501_ProstateSAML as module
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UserError

pytestmark = pytest.mark.usefixtures("nnunet_folders")


def table_of(folder: Path) -> CaseTable:
    table = CaseTable.from_dataset_json(json.loads((folder / "dataset.json").read_text()))
    assert table is not None
    return table


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_source_site_is_trained_on_and_every_other_site_is_a_test_site(tmp_path: Path) -> None:
    out = convert(module, saml(tmp_path / "Processed_data_nii"))
    assert out.name == "Dataset501_ProstateSAML_RUNMC"
    assert names(out / "imagesTr") == ["RUNMC_Case00_0000.nii.gz", "RUNMC_Case01_0000.nii.gz"]
    assert names(out / "labelsTr") == ["RUNMC_Case00.nii.gz", "RUNMC_Case01.nii.gz"]
    assert len(names(out / "imagesTs")) == len(names(out / "labelsTs")) == 10
    table = table_of(out)
    assert table.sources == ["RUNMC"]
    assert table.sites() == ["BIDMC", "BMC", "HK", "I2CVB", "RUNMC", "UCL"]
    assert table.cases["BMC_Case01"].site == "BMC"
    assert table.cases["BMC_Case01"].original == "BMC/Case01.nii.gz"


def test_the_folder_above_the_site_folders_will_do(tmp_path: Path) -> None:
    saml(tmp_path / "downloads" / "Processed_data_nii")
    assert (convert(module, tmp_path / "downloads") / "dataset.json").is_file()


def test_a_capital_segmentation_is_a_label_too(tmp_path: Path) -> None:
    out = convert(module, saml(tmp_path / "in"), sources=("BMC",))
    assert names(out / "labelsTr") == ["BMC_Case00.nii.gz", "BMC_Case01.nii.gz"]


def test_gaps_in_the_numbers_are_kept(tmp_path: Path) -> None:
    out = convert(module, saml(tmp_path / "in"), sources=("BIDMC",))
    assert names(out / "labelsTr") == ["BIDMC_Case00.nii.gz", "BIDMC_Case02.nii.gz"]


def test_zones_are_merged_into_one_prostate(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    out = convert(module, root)
    written = read(out / "labelsTr" / "RUNMC_Case00.nii.gz")
    assert written.dtype == np.uint8
    assert np.array_equal(written, read(root / "RUNMC" / "Case00_segmentation.nii.gz") > 0)
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "prostate": 1}


def test_zones_are_kept_where_both_sites_have_them(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    out = convert(module, root, zones="keep", targets=("BMC",))
    assert np.array_equal(
        read(out / "labelsTr" / "RUNMC_Case00.nii.gz"), read(root / "RUNMC" / "Case00_segmentation.nii.gz")
    )
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    assert table_of(out).sites() == ["BMC", "RUNMC"]


def test_zones_are_refused_for_sites_that_have_the_whole_gland_only(tmp_path: Path) -> None:
    report = refused(module, saml(tmp_path / "in"), zones="keep")
    assert [problem.where for problem in report.problems] == ["I2CVB", "UCL", "BIDMC", "HK"]
    assert "--target BMC" in str(report)


def test_image_voxels_and_geometry_are_unchanged(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    out = convert(module, root)
    source = sitk.ReadImage(root / "UCL" / "Case01.nii.gz")
    written = sitk.ReadImage(out / "imagesTs" / "UCL_Case01_0000.nii.gz")
    mask = sitk.ReadImage(out / "labelsTs" / "UCL_Case01.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(source), sitk.GetArrayFromImage(written))
    for other in (written, mask):
        assert other.GetOrigin() == source.GetOrigin()
        assert other.GetSpacing() == source.GetSpacing()
        assert other.GetDirection() == source.GetDirection()


def test_a_label_header_that_disagrees_gets_the_image_s_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = saml(tmp_path / "in")
    save(root / "HK" / "Case00_segmentation.nii.gz", label(), np.diag([1, 1, 1, 1.0]))
    out = convert(module, root)
    assert "HK/Case00_segmentation.nii.gz: its header disagrees" in capsys.readouterr().err
    written = nibabel.load(out / "labelsTs" / "HK_Case00.nii.gz")
    assert np.allclose(written.affine, AFFINE, atol=1e-4)
    assert np.array_equal(np.asanyarray(written.dataobj), label())


def test_empty_slices_can_be_dropped_and_the_rest_stays_where_it_was(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    out = convert(module, root, drop_empty_slices=True)
    image_out = nibabel.load(out / "imagesTr" / "RUNMC_Case00_0000.nii.gz")
    source = nibabel.load(root / "RUNMC" / "Case00.nii.gz")
    assert image_out.shape == (12, 14, 2)
    assert np.array_equal(np.asanyarray(image_out.dataobj), np.asanyarray(source.dataobj)[:, :, 1:3])
    assert np.allclose(image_out.affine @ [2, 3, 0, 1], source.affine @ [2, 3, 1, 1])
    label_out = nibabel.load(out / "labelsTr" / "RUNMC_Case00.nii.gz")
    assert np.array_equal(label_out.affine, image_out.affine)
    assert np.asanyarray(label_out.dataobj).any(axis=(0, 1)).all()


def test_links_point_at_the_download_and_changed_labels_are_written(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    out = convert(module, root, link=True)
    linked = out / "imagesTr" / "RUNMC_Case00_0000.nii.gz"
    assert linked.is_symlink()
    assert linked.resolve() == (root / "RUNMC" / "Case00.nii.gz").resolve()
    assert not (out / "labelsTr" / "RUNMC_Case00.nii.gz").is_symlink()  # zones are merged
    assert (out / "labelsTs" / "UCL_Case00.nii.gz").is_symlink()  # 0 and 1 already
    assert not Path(linked.readlink()).is_absolute()


def test_case_numbers_and_files_of_archive_programs_do_no_harm(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    (root / "RUNMC" / "._Case00.nii.gz").write_bytes(b"litter")
    (root / "__MACOSX").mkdir()
    (root / "UCL" / ".DS_Store").write_bytes(b"litter")
    assert len(names(convert(module, root) / "imagesTr")) == 2


def test_upper_case_endings_and_plain_nii_are_read(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    save(root / "RUNMC" / "Case07.NII.GZ", image(7))
    save(root / "RUNMC" / "CASE07_SEGMENTATION.NII", label((1, 2)))
    out = convert(module, root)
    assert np.array_equal(read(out / "imagesTr" / "RUNMC_Case07_0000.nii.gz"), image(7))
    assert np.array_equal(read(out / "labelsTr" / "RUNMC_Case07.nii.gz"), label((1, 2)) > 0)


def test_a_site_may_be_called_by_any_name_the_papers_use(tmp_path: Path) -> None:
    root = saml(tmp_path / "in")
    for number, site in enumerate(("B", "b-isbi_1.5", "Domain2", "BMC"), 1):
        assert convert(module, root, sources=(site,), dataset_id=number).name == f"Dataset00{number}_ProstateSAML_BMC"


def test_an_unknown_site_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'BIDMC'"):
        convert(module, saml(tmp_path / "in"), sources=("BIDCM",))


def test_several_sources_are_trained_on_together(tmp_path: Path) -> None:
    out = convert(module, saml(tmp_path / "in"), sources=("RUNMC", "BMC"))
    assert out.name == "Dataset501_ProstateSAML_RUNMC-BMC"
    assert table_of(out).sources == ["RUNMC", "BMC"]
    assert len(names(out / "imagesTr")) == 4


def test_folds_cover_the_source_once_and_never_a_test_site(tmp_path: Path) -> None:
    out = convert(module, saml(tmp_path / "in", per_site=7))
    folds = json.loads((out / "splits_final.json").read_text())
    assert len(folds) == 5
    validated = [name for fold in folds for name in fold["val"]]
    assert sorted(validated) == [f"RUNMC_Case{n:02d}" for n in range(7)]
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(validated)


def test_the_published_desam_split_is_one_fold_of_the_last_tenth(tmp_path: Path) -> None:
    out = convert(module, saml(tmp_path / "in", per_site=11), split="desam")
    folds = json.loads((out / "splits_final.json").read_text())
    cases = [f"RUNMC_Case{n:02d}" for n in range(11)]
    assert folds == [{"train": cases[:9], "val": cases[9:]}]


def test_a_single_source_case_has_no_folds_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(module, saml(tmp_path / "in", per_site=1))
    assert not (out / "splits_final.json").exists()
    assert "fold 'all'" in capsys.readouterr().err


def test_a_split_that_cannot_be_made_is_refused_before_anything_is_written(
    tmp_path: Path, nnunet_folders: Path
) -> None:
    with pytest.raises(UserError, match="too few for a split"):
        convert(module, saml(tmp_path / "in", per_site=1), split="desam")
    assert not list((nnunet_folders / "nnUNet_raw").iterdir())


def test_nnunet_finds_nothing_wrong_with_the_result(tmp_path: Path) -> None:
    root = saml(tmp_path / "in", per_site=3)
    save(root / "RUNMC" / "Case01_segmentation.nii.gz", label().astype(np.float64), np.diag([1, 1, 1, 1.0]))
    verify(convert(module, root))
