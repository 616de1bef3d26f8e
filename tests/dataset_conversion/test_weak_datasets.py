"""What every weak dataset has in common: tags are all that training can see of a mask."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from trees import AFFINE, read, save, verify
from weak_trees import TAGS, brats, convert, decathlon, mask, names, refused, slice_roots

from dataset_conversion import Dataset505_BraTS2019 as brats_module
from dataset_conversion import Dataset506_ProstateDecathlon as decathlon_module
from dataset_conversion import Dataset516_SliceTree as slices_module
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.staging import STAMP
from nnunet_dgplugins.errors import UserError

SEEN = ("imagesTr", "imagesTs", "labelsTr", "dataset.json", "image_tags.json", "splits_final.json")


def slice_tree(root: Path, shift: int = 0) -> Path:
    slice_roots(root, shift=shift)
    return root


SOURCES = {
    "brats": (brats_module, brats),
    "prostate-decathlon": (decathlon_module, decathlon),
    "slice-tree": (slices_module, slice_tree),
}
Source = tuple[ModuleType, Callable[..., Path]]


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, nnunet_folders: Path) -> Source:
    return SOURCES[request.param]


def bytes_of(folder: Path, *parts: str) -> dict[str, str]:
    """Hash of every file below the parts of a dataset, of all of it without parts."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in parts or [""]
        for path in sorted([folder / part, *(folder / part).rglob("*")])
        if path.is_file()
    }


def content(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def table(folder: Path) -> CaseTable:
    found = CaseTable.from_dataset_json(content(folder))
    assert found is not None
    return found


def test_trees_with_equal_tags_and_other_masks_give_the_same_bytes(source: Source, tmp_path: Path) -> None:
    module, make = source
    first = convert(module, make(tmp_path / "a" / "in"))
    one, masks = bytes_of(first, *SEEN), bytes_of(first, "labelsVal", "labelsTs")
    stamp = (first / STAMP).read_text()
    shutil.rmtree(first)
    second = convert(module, make(tmp_path / "b" / "in", shift=1))
    assert bytes_of(second, *SEEN) == one
    other = bytes_of(second, "labelsVal", "labelsTs")
    assert other.keys() == masks.keys()
    assert all(other[name] != masks[name] for name in masks)
    assert json.loads((second / STAMP).read_text())["input"] != json.loads(stamp)["input"]


def test_labels_of_training_cases_are_slices_constant_at_their_tag(source: Source, tmp_path: Path) -> None:
    module, make = source
    out = convert(module, make(tmp_path / "in"))
    cases = table(out).cases
    tags = json.loads((out / "image_tags.json").read_text())
    assert sorted(tags) == names(out / "labelsTr")
    for name in tags:
        label = sitk.GetArrayFromImage(sitk.ReadImage(out / "labelsTr" / f"{name}.nii.gz"))
        assert cases[name].tags == TAGS == list(tags[name].values())
        assert not cases[name].labelled
        for index, slice_ in enumerate(label):  # the reader's order
            assert (slice_ == TAGS[index]).all()
    verify(out)


def test_masks_are_written_of_cases_that_validate_or_test_and_of_no_other(source: Source, tmp_path: Path) -> None:
    module, make = source
    out = convert(module, make(tmp_path / "in"))
    folds = json.loads((out / "splits_final.json").read_text())
    validating = {name for fold in folds for name in fold["val"]}
    assert names(out / "labelsVal") == sorted(validating)
    for path in [*(out / "labelsVal").iterdir(), *out.glob("labelsTs/*")]:
        assert set(np.unique(read(path))) == {0, 1}
        assert read(path).any(axis=(0, 1)).astype(int).tolist() == TAGS
    cases = table(out).cases
    for name in names(out / "labelsTs"):  # tags would tell of the test masks
        assert cases[name].labelled
        assert cases[name].tags is None
    tests = set(names(out / "labelsTs"))
    assert set(names(out / "labelsTr")) == {name for fold in folds for name in fold["train"] + fold["val"]} - tests


def test_the_twin_has_masks_real_names_and_the_same_folds(source: Source, tmp_path: Path) -> None:
    module, make = source
    root = make(tmp_path / "in")
    weak = convert(module, root)
    twin = convert(module, root, supervision="masks", dataset_id=620)
    assert twin.name[11:] == weak.name[11:].replace("_tags", "_masks")
    assert (twin / "splits_final.json").read_bytes() == (weak / "splits_final.json").read_bytes()
    assert bytes_of(twin, "imagesTr", "imagesTs") == bytes_of(weak, "imagesTr", "imagesTs")
    assert sorted(path.name for path in twin.iterdir() if not path.name.startswith("images")) == sorted(
        {STAMP, "dataset.json", "labelsTr", "splits_final.json"} | ({"labelsTs"} & {p.name for p in weak.iterdir()})
    )
    for name in names(weak / "labelsVal"):
        assert np.array_equal(read(twin / "labelsTr" / f"{name}.nii.gz"), read(weak / "labelsVal" / f"{name}.nii.gz"))
    assert list(content(twin)["channel_names"].values()) == content(weak)["dgplugins"]["protocol"]["modalities"]
    assert set(content(weak)["channel_names"].values()) == {"noNorm"}
    assert content(twin)["labels"] == content(weak)["labels"]
    assert all(case.labelled and case.tags is None for case in table(twin).cases.values())


def test_both_kinds_of_one_source_need_ids_of_their_own(source: Source, tmp_path: Path) -> None:
    module, make = source
    root = make(tmp_path / "in")
    convert(module, root)
    with pytest.raises(UserError, match=r"is taken by .*_tags"):
        convert(module, root, supervision="masks")


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return brats(tmp_path / "in")


def seg(root: Path, name: str) -> Path:
    return next(root.glob(f"*/{name}/{name}_seg.nii.gz"))


def test_a_slice_with_fewer_pixels_than_asked_for_is_negative(root: Path) -> None:
    thin = mask((1, 2, 4))
    thin[:, :, 3] = 0
    thin[5, 5, 3] = 1
    name = json.loads((convert(brats_module, root) / "splits_final.json").read_text())[0]["train"][0]
    save(seg(root, name), thin, AFFINE)
    assert table(convert(brats_module, root, overwrite=True)).cases[name].tags == [0, 1, 1, 1, 0]
    out = convert(brats_module, root, overwrite=True, min_pixels=2)
    assert table(out).cases[name].tags == TAGS
    assert content(out)["dgplugins"]["protocol"]["min_pixels"] == 2


def test_a_source_without_any_positive_slice_is_refused(root: Path) -> None:
    assert "no slice of 10 cases has 1000 foreground pixels" in refused(brats_module, root, min_pixels=1000)


def test_another_training_mask_of_the_same_tags_is_the_same_dataset(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(brats_module, root)
    (fold,) = json.loads((out / "splits_final.json").read_text())
    before = bytes_of(out)
    save(seg(root, fold["train"][0]), mask((4,), shift=2), AFFINE)
    capsys.readouterr()
    convert(brats_module, root)
    assert "nothing to do" in capsys.readouterr().out
    for name in (fold["val"][0], names(out / "labelsTs")[0]):
        save(seg(root, name), mask((4,), shift=2), AFFINE)
        with pytest.raises(UserError, match="--overwrite"):
            convert(brats_module, root)
        convert(brats_module, root, overwrite=True)
        after = bytes_of(out)
        part = "labelsVal" if name in fold["val"] else "labelsTs"
        assert {path for path in after if after[path] != before[path]} == {f"{part}/{name}.nii.gz", STAMP}
        before = after


def test_a_model_of_the_same_tags_does_not_bar_the_way_to_another_validation_mask(
    root: Path, nnunet_folders: Path
) -> None:
    """The hash beside a model knows no masks; preprocessed data of other tags are still refused."""
    out = convert(brats_module, root)
    (fold,) = json.loads((out / "splits_final.json").read_text())
    prepared = nnunet_folders / "nnUNet_preprocessed" / out.name
    prepared.mkdir()
    shutil.copy(out / "dataset.json", prepared)
    save(seg(root, fold["val"][0]), mask((4,), shift=2), AFFINE)
    shutil.rmtree(out)
    convert(brats_module, root)
    shutil.rmtree(out)
    with pytest.raises(UserError, match="belongs to other content"):
        convert(brats_module, root, min_pixels=8)


def test_lost_and_cut_files_of_a_weak_dataset_come_back(source: Source, tmp_path: Path) -> None:
    module, make = source
    root = make(tmp_path / "in")
    out = convert(module, root)
    before = bytes_of(out)
    for folder in ("imagesTr", "labelsTr", "labelsVal"):
        next((out / folder).iterdir()).unlink()
    (out / "image_tags.json").write_bytes(b"{")
    convert(module, root)
    assert bytes_of(out) == before


def test_files_that_need_no_change_are_links_and_come_back_as_links(root: Path) -> None:
    fold = json.loads((convert(brats_module, root) / "splits_final.json").read_text())[0]
    save(seg(root, fold["val"][0]), mask((1,)), AFFINE)
    out = convert(brats_module, root, link=True, overwrite=True)
    truth = out / "labelsVal" / f"{fold['val'][0]}.nii.gz"
    lost = out / "labelsTr" / truth.name
    assert truth.is_symlink()
    assert next((out / "imagesTr").iterdir()).is_symlink()
    assert not lost.is_symlink()
    for path in (truth, lost):
        path.unlink()
        convert(brats_module, root, link=True)
    assert truth.is_symlink()
    assert read(lost).any(axis=(0, 1)).astype(int).tolist() == TAGS


def test_several_processes_write_the_same_bytes_as_one(tmp_path: Path, nnunet_folders: Path) -> None:
    root = slice_tree(tmp_path / "in")
    out = convert(slices_module, root)
    before = bytes_of(out)
    shutil.rmtree(out)
    convert(slices_module, root, jobs=2)
    assert bytes_of(out) == before


@pytest.mark.parametrize("command", SOURCES)
def test_the_command_line_writes_tags_unless_masks_are_asked_for(
    command: str, tmp_path: Path, nnunet_folders: Path
) -> None:
    from nnunet_dgplugins.cli.convert import command as convert_command

    module, make = SOURCES[command]
    root = make(tmp_path / "in")
    for arguments, ending in (([], "_tags"), (["--supervision", "masks", "--id", "621"], "_masks")):
        result = CliRunner().invoke(convert_command, [command, str(root), "--jobs", "1", *arguments])
        assert result.exit_code == 0, result.output
        assert ("Tags: " in result.output) == (ending == "_tags")
        (out,) = (nnunet_folders / "nnUNet_raw").glob(f"Dataset*{ending}")
        assert out.name.startswith("Dataset621" if arguments else f"Dataset{module.FACTS.dataset_id}")
