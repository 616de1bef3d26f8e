"""The converter of the Spinal Cord Grey Matter Challenge on tiny trees in its layout."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from few_label_trees import TEST, TRAIN, rater, scgm
from trees import AFFINE, read, refused, save, verify
from trees import convert as convert_any

from dataset_conversion import Dataset508_SCGM as module
from dataset_conversion._facts import Raters, SourceCase
from dataset_conversion._volumes import Recipe, check_case, write_case
from dataset_conversion.Dataset508_SCGM import fuse
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UserError

OPTIONS = {"sources": (), "targets": ("4",)}


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return scgm(tmp_path / "in")


def convert(root: Path, **options: object) -> Path:
    return convert_any(module, root, **{**OPTIONS, **options})


def description(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name[: -len(".nii.gz")] for path in folder.iterdir())


def test_more_than_half_of_the_raters_decide_and_a_tie_is_background() -> None:
    fused = fuse([rater(index) for index in range(1, 5)])[..., 0]
    assert fused[9, 5:9].tolist() == [1, 1, 2, 2]  # grey by 4, 3, 2, 1; the cord is agreed on
    assert fused[3, 3:7].tolist() == [0, 0, 0, 2]  # cord by 0, 1, 2, 3
    assert not fused[12].any()
    assert (fused[5:9, 5:9] == 1).all()


def test_grey_and_white_votes_make_cord_together() -> None:
    votes = [np.array([value]) for value in (1, 1, 2, 0)]
    assert fuse(votes).tolist() == [2]


@pytest.mark.parametrize(("votes", "expected"), [((1, 1, 0), 1), ((1, 0, 0), 0), ((1, 0), 0), ((1, 1), 1), ((1,), 1)])
def test_fewer_raters_decide_by_strict_majority_too(votes: tuple[int, ...], expected: int) -> None:
    assert fuse([np.array([vote]) for vote in votes]).tolist() == [expected]


def test_the_converter_says_how_its_masks_are_fused_and_worker_processes_follow(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{n}.nii.gz", np.full((4, 4, 2), n, np.uint8), AFFINE) for n in range(4)]
    case = SourceCase("a", (paths[0],), paths[1], "site", "p", "a", raters=(paths[3],))
    recipe = Recipe({0: 0, 3: 7, 1: 1}, raters=Raters(2, np.maximum.reduce))
    write_case(case, recipe, check_case(case, recipe), tmp_path / "out", "Tr")
    assert (read(tmp_path / "out" / "labelsTr" / "a.nii.gz") == 7).all()
    assert pickle.loads(pickle.dumps(module.FACTS.raters)) == module.FACTS.raters


def test_three_sites_are_trained_on_and_labels_are_grey_matter_alone(root: Path) -> None:
    out = convert(root)
    assert out.name == "Dataset508_SCGM_without_site4"
    assert names(out / "labelsTs") == ["site4_sc01", "site4_sc02", "site4_sc03"]
    assert len(names(out / "labelsTr")) == 9
    assert description(out)["labels"] == {"background": 0, "GM": 1}
    expected = fuse([rater(index) for index in range(1, 5)]) == 1
    assert np.array_equal(read(out / "labelsTr" / "site1_sc01.nii.gz"), expected)
    verify(out)


def test_white_matter_is_a_label_of_its_own_on_request(root: Path) -> None:
    out = convert(root, zones="keep", labelled=1)
    assert description(out)["labels"] == {"background": 0, "GM": 1, "WM": 2, "ignore": 3}
    assert np.array_equal(read(out / "labelsTr" / "site2_sc01.nii.gz"), fuse([rater(n) for n in range(1, 5)]))
    assert set(np.unique(read(out / "labelsTr" / "site2_sc02.nii.gz"))) == {3}


def test_the_first_subjects_of_each_source_site_are_labelled_and_the_test_folder_is_a_pool_on_request(
    root: Path,
) -> None:
    out = convert(root, ratio=0.2, unannotated=True)
    table = CaseTable.from_dataset_json(description(out))
    assert table is not None
    labelled = [f"site{site}_sc01" for site in (1, 2, 3)]  # ceil(3 * 0.2)
    assert [name for name in names(out / "labelsTr") if table.cases[name].labelled] == labelled
    assert "site1_sc11" in names(out / "labelsTr")
    assert "site4_sc11" not in table.cases
    for name in set(names(out / "labelsTr")) - set(labelled):
        assert set(np.unique(read(out / "labelsTr" / f"{name}.nii.gz"))) == {2}
    assert json.loads((out / "splits_final.json").read_text())[0]["train"] == labelled


def test_a_missing_rater_is_noted_where_the_subject_is_labelled(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for subject in (1, 2):
        (root / TRAIN / f"site1-sc0{subject}-mask-r3.nii.gz").unlink()
    out = convert(root, labelled=1)
    said = capsys.readouterr().err
    assert "site1-sc01-mask-r1.nii.gz: 3 of 4 raters" in said
    assert "site1-sc02" not in said
    expected = fuse([rater(1), rater(2), rater(4)]) == 1
    assert np.array_equal(read(out / "labelsTr" / "site1_sc01.nii.gz"), expected)


def test_slices_without_grey_matter_are_dropped_by_what_is_written(root: Path) -> None:
    for index in range(1, 5):
        mask = rater(index)
        mask[:, :, 0] = np.where(mask[:, :, 0] > 0, 2, 0)  # white matter only in the first slice
        save(root / TRAIN / f"site1-sc01-mask-r{index}.nii.gz", mask, AFFINE)
    out = convert(root, drop_empty_slices=True)
    assert read(out / "labelsTr" / "site1_sc01.nii.gz").shape[2] == 2
    assert read(out / "imagesTr" / "site1_sc01_0000.nii.gz").shape[2] == 2
    assert read(out / "imagesTr" / "site1_sc02_0000.nii.gz").shape[2] == 3


def test_files_may_lie_in_one_folder(root: Path) -> None:
    for path in [*(root / TRAIN).iterdir(), *(root / TEST).iterdir()]:
        path.rename(root / path.name)
    assert len(names(convert(root) / "imagesTr")) == 9


def test_all_problems_are_listed_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / TRAIN
    (folder / "site1-sc01-image.nii.gz").unlink()
    for index in range(1, 5):
        (folder / f"site2-sc01-mask-r{index}.nii.gz").unlink()
    save(folder / "site3-sc01-mask-r2.nii.gz", rater(2)[:, :-1], AFFINE)
    save(folder / "site3-sc02-mask-r2.nii.gz", rater(2) * 3, AFFINE)
    save(folder / "site4-sc01-image.nii", np.zeros((14, 15, 3), np.int16), AFFINE)
    (folder / "notes.txt").write_text("x")
    text = str(refused(module, root, **OPTIONS))
    for part in (
        "site1-sc01: no image",
        "site2-sc01: no rater's mask",
        "site3-sc01-mask-r2.nii.gz: shape 14x14x3",
        "site3-sc02-mask-r2.nii.gz: unknown label value 3",
        "site4-sc01-image.nii.gz: the same as",
    ):
        assert part in text, text
    assert "notes.txt" in capsys.readouterr().err


def test_a_folder_without_the_challenges_files_is_refused(tmp_path: Path, nnunet_folders: Path) -> None:
    with pytest.raises(UserError, match="site1-sc01-image"):
        convert(tmp_path)
