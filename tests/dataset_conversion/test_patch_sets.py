"""The converters of LUAD-HistoSeg, BCSS-WSSS and WSSS4LUAD on tiny trees in the true layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from patch_trees import bands, bcss, bytes_of, cases, content, convert, fold, luad, names, picture, read, refused, wsss
from patch_trees import mask as save_mask
from PIL import Image
from trees import verify

from dataset_conversion import Dataset509_LUADHistoSeg as luad_module
from dataset_conversion import Dataset510_BCSSWSSS as bcss_module
from dataset_conversion import Dataset511_WSSS4LUAD as wsss_module
from dataset_conversion._command import planned_name
from dataset_conversion._patch_tree import split_name
from nnunet_dgplugins.data import splits
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.tags import image_tags
from nnunet_dgplugins.errors import UserError

SETS = {"luad": (luad_module, luad), "bcss": (bcss_module, bcss), "wsss": (wsss_module, wsss)}
SEEN = ("imagesTr", "imagesTs", "labelsTr", "dataset.json", "splits_final.json")
NEC_ONLY = "LUAD_1031281-2300-27921"  # necrosis alone


@pytest.fixture(params=SETS)
def source(request: pytest.FixtureRequest, nnunet_folders: Path) -> tuple[ModuleType, Callable[..., Path]]:
    return SETS[request.param]


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return luad(tmp_path / "LUAD-HistoSeg")


def table(folder: Path) -> CaseTable:
    found = CaseTable.from_dataset_json(content(folder))
    assert found is not None
    return found


# ---------------------------------------------------------------- what is written


def test_nnunet_finds_nothing_wrong_and_training_labels_hold_the_ignore_value_alone(
    source: tuple[ModuleType, Callable[..., Path]], tmp_path: Path
) -> None:
    module, make = source
    out = convert(module, make(tmp_path / "in"))
    verify(out)
    described = content(out)
    labels = described["labels"]
    ignore = len(module.FACTS.tissues) + 1
    assert (labels["background"], labels["ignore"]) == (0, ignore)
    assert described["channel_names"] == {"0": "rgb_to_0_1", "1": "rgb_to_0_1", "2": "rgb_to_0_1"}
    assert described["overwrite_image_reader_writer"] == "NaturalImage2DIO"
    assert described["numTraining"] == 8 == len(names(out / "imagesTr"))
    for name in names(out / "labelsTr"):
        assert set(np.unique(read(out / "labelsTr" / f"{name}.png"))) == {ignore}
    split = fold(out)
    assert sorted(split["train"] + split["val"]) == names(out / "imagesTr") == names(out / "labelsTr")
    assert names(out / "labelsVal") == split["val"]
    assert names(out / "labelsTs") == names(out / "imagesTs")
    for path in [*(out / "labelsVal").iterdir(), *out.glob("labelsTs/*")]:
        assert set(np.unique(read(path))) == set(range(1, ignore + 1))


def test_the_case_table_has_tags_patient_site_and_the_original_name(root: Path) -> None:
    out = convert(luad_module, root)
    assert out.name == "Dataset509_LUADHistoSeg_4classes_tags"
    assert cases(out)["LUAD_1031280-2300-27920"] == {
        "site": "LUAD",
        "patient": "1031280",
        "labelled": False,
        "tags": [[1, 0, 0, 1]],
        "original": "training/1031280-2300-27920-[1 0 0 1].png",
    }
    assert cases(out)["LUAD_387709-9108-71176"]["tags"] == [[1, 1, 1, 1]]  # of its mask
    test = cases(out)["LUAD_400000-1-2"]
    assert (test["labelled"], test.get("tags")) == (True, None)
    assert table(out).source == "LUAD"
    assert image_tags(table(out), NEC_ONLY, 4).tolist() == [0, 1, 0, 0]
    protocol = content(out)["dgplugins"]["protocol"]
    assert (protocol["supervision"], protocol["background"]) == ("tags", False)


def test_slides_of_one_patient_are_one_patient_and_an_index_may_be_missing(
    tmp_path: Path, nnunet_folders: Path
) -> None:
    out = convert(bcss_module, bcss(tmp_path / "in"))
    stem = "TCGA-A1-A0S1-DX1_xmin45749_ymin25055_MPP-0.2500+"
    found = cases(out)["BCSS_TCGA-A1-A0S1-DX1_xmin45749_ymin25055_MPP-0-2500"]
    assert (found["patient"], found["original"]) == ("TCGA-A1-A0S1", f"train/{stem}[0100].png")
    assert found["tags"] == [[0, 1, 0, 0]]


def test_names_of_numbers_tell_no_patient(
    tmp_path: Path, nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(wsss_module, wsss(tmp_path / "in"))
    assert "patient" not in cases(out)["WSSS4LUAD_00"]
    assert cases(out)["WSSS4LUAD_436219-7159-48057"]["tags"] == [[1, 0, 0]]
    said = capsys.readouterr().err
    assert "2 names tell no patient" in said
    assert "no folder mask, left out" in said
    assert not (out / "imagesTs").exists()


@pytest.mark.parametrize(
    ("stem", "tissues", "expected"),
    [
        ("1031280-2300-27920-[1 0 0 1]", 4, ("1031280-2300-27920", (1, 0, 0, 1))),
        ("1031280-2300-27920[1 0 0 1]", 4, ("1031280-2300-27920", (1, 0, 0, 1))),
        ("436219-7159-48057-[1, 0, 0]", 3, ("436219-7159-48057", (1, 0, 0))),
        ("a_MPP-0.2500+0[1101]", 4, ("a_MPP-0.2500+0", (1, 1, 0, 1))),
        ("a_MPP-0.2500+[1101]", 4, ("a_MPP-0.2500+", (1, 1, 0, 1))),
        ("a[2]-[1101]", 4, ("a[2]", (1, 1, 0, 1))),
        ("a-[1 0 0]", 4, ("a", None)),
        ("a-[1 0 0 2]", 4, ("a", None)),
        ("387709-9108-71176", 4, ("387709-9108-71176", None)),
    ],
)
def test_flags_are_the_digits_of_the_last_brackets(stem: str, tissues: int, expected: tuple) -> None:
    assert split_name(stem, tissues) == expected


def test_plain_pictures_are_copied_byte_for_byte_or_linked(root: Path) -> None:
    source = root / "training" / "1031280-2300-27920-[1 0 0 1].png"
    written = Path("imagesTr") / "LUAD_1031280-2300-27920_0000.png"
    out = convert(luad_module, root)
    assert (out / written).read_bytes() == source.read_bytes()
    assert not (out / written).is_symlink()
    linked = convert(luad_module, root, dataset_id=600, link=True)
    assert (linked / written).resolve() == source.resolve()
    assert bytes_of(linked, "imagesTr", "labelsTr", "labelsVal") == bytes_of(out, "imagesTr", "labelsTr", "labelsVal")


# ---------------------------------------------------------------- classes


def test_values_of_the_masks_become_labels_in_the_published_order_or_the_common_one(root: Path) -> None:
    expected = {"published": [1, 2, 3, 4, 5], "common": [1, 4, 3, 2, 5]}  # of TE, NEC, LYM, TAS and excluded
    for number, (order, values) in enumerate(expected.items()):
        out = convert(luad_module, root, order=order, dataset_id=600 + number)
        for place in ("labelsVal/LUAD_387709-9108-71176.png", "labelsTs/LUAD_400000-1-2.png"):
            assert np.array_equal(read(out / place), bands(values)), (order, place)
        names = list(content(out)["labels"])
        assert (
            names
            == {
                "published": ["background", "tumour", "necrosis", "lymphocyte", "stroma", "ignore"],
                "common": ["background", "tumour", "stroma", "lymphocyte", "necrosis", "ignore"],
            }[order]
        )
        assert cases(out)[NEC_ONLY]["tags"] == [[0, 1, 0, 0] if order == "published" else [0, 0, 0, 1]]


def test_the_common_order_is_that_of_bcss(tmp_path: Path, root: Path) -> None:
    out = convert(bcss_module, bcss(tmp_path / "bcss"))
    assert content(out)["labels"] == content(convert(luad_module, root, order="common"))["labels"]
    assert np.array_equal(
        read(out / "labelsVal/BCSS_TCGA-A2-A0CM-DX1_xmin1_ymin2_MPP-0-2500-5.png"), bands([1, 2, 3, 4, 5])
    )


@pytest.mark.parametrize(
    ("kind", "values", "tags"),
    [
        # necrosis of LUAD's test masks is excluded and stroma is stroma: the released code has both wrong
        ("luad", [1, 3, 3, 2, 3], [[1, 1], [0, 0], [1, 1], [0, 0]]),
        ("bcss", [1, 2, 3, 3, 3], [[1, 0], [0, 1], [1, 1], [0, 0]]),
        ("wsss", [1, 2, 3, 3], [[1, 0], [0, 1], [1, 1], [0, 0]]),
    ],
)
def test_two_classes_are_tumour_and_stroma_in_validation_and_test_alike(
    kind: str, values: list[int], tags: list[list[int]], tmp_path: Path, nnunet_folders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    module, make = SETS[kind]
    out = convert(module, make(tmp_path / "in"), classes=2)
    assert content(out)["labels"] == {"background": 0, "tumour": 1, "stroma": 2, "ignore": 3}
    for path in [*(out / "labelsVal").iterdir(), *out.glob("labelsTs/*")]:
        assert np.array_equal(read(path), bands(values))
    by_original = {case["original"]: case for case in cases(out).values()}
    training = [by_original[key] for key in sorted(by_original) if "[" in key]
    assert sorted(case["tags"][0] for case in training) == sorted([tags[number % 4] for number in range(6)])
    empty = sum(tags[number % 4] == [0, 0] for number in range(6))
    assert f"{empty} training patches show none of these classes; they are kept, with empty tags." in (
        capsys.readouterr().out
    )
    verify(out)


# ---------------------------------------------------------------- trees that are not as they should be


def test_both_names_of_the_training_folder_and_the_folder_above_will_do(tmp_path: Path, root: Path) -> None:
    one = bytes_of(convert(luad_module, root), "imagesTr", "labelsTr", "labelsTs")
    other = convert(luad_module, luad(tmp_path / "other" / "LUAD", folder="train").parent, dataset_id=600)
    assert bytes_of(other, "imagesTr", "labelsTr", "labelsTs") == one
    shutil.copytree(root / "training", root / "train")
    with pytest.raises(UserError, match="train and training: which one"):
        convert(luad_module, root, dataset_id=601)


def test_another_set_is_never_taken_for_the_one_asked_for(tmp_path: Path, root: Path) -> None:
    one = bytes_of(convert(luad_module, root), "imagesTr", "labelsTr")
    bcss(root.parent / "BCSS-WSSS")  # comes first by name
    assert bytes_of(convert(luad_module, root.parent, dataset_id=600), "imagesTr", "labelsTr") == one
    with pytest.raises(UserError, match="several sets: BCSS-WSSS, downloaded"):
        convert(luad_module, root.rename(root.with_name("downloaded")).parent, dataset_id=601)
    assert "no file is called as LUADHistoSeg's are" in refused(luad_module, root.parent / "BCSS-WSSS", dataset_id=601)


def test_a_picture_that_is_a_link_to_nowhere_is_named(root: Path) -> None:
    path = next((root / "training").iterdir())
    path.unlink()
    path.symlink_to("annex-object-not-fetched")
    assert path.name in refused(luad_module, root)


def test_a_folder_without_validation_patches_is_refused(root: Path) -> None:
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match="no folder val; luad-histoseg needs it"):
        convert(luad_module, root)


def test_one_picture_without_mask_is_left_out_and_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(root / "test" / "img" / "999-1-1.png", 1)
    out = convert(luad_module, root)
    assert "no mask for 1 of 3 patches, left out: 999-1-1" in capsys.readouterr().err
    assert len(names(out / "imagesTs")) == 2


def test_many_pictures_without_mask_are_one_problem_that_lists_all(root: Path) -> None:
    for number in range(8):
        picture(root / "test" / "img" / f"999-1-{number}.png", number)
    text = refused(luad_module, root)
    assert "1 problem, nothing was written" in text
    assert "no mask for 8 of 10 patches: " + ", ".join(f"999-1-{number}" for number in range(8)) in text


def test_pictures_and_masks_are_paired_whether_or_not_names_carry_flags(root: Path) -> None:
    path = root / "val" / "img" / "387709-9108-71176.png"
    path.rename(path.with_name("387709-9108-71176-[1 1 1 1].png"))
    assert fold(convert(luad_module, root))["val"] == ["LUAD_387709-9108-71176", "LUAD_387709-9108-71177"]


def test_the_index_counts_where_the_palette_is_wrong_and_a_note_says_so(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [(20 * value, 0, 0) for value in range(5)]
    save_mask(root / "test" / "mask" / "400000-1-2.png", bands(range(5)), wrong)
    out = convert(luad_module, root)
    assert np.array_equal(read(out / "labelsTs" / "LUAD_400000-1-2.png"), bands([1, 2, 3, 4, 5]))
    text = "1 masks have other colours in their palette than published; their indices count: test/img/400000-1-2"
    assert text in capsys.readouterr().err


def test_rgb_masks_are_looked_up_by_colour(root: Path) -> None:
    labels = bytes_of(convert(luad_module, root), "labelsVal", "labelsTs")
    for path in root.glob("*/mask/*.png"):
        Image.open(path).convert("RGB").save(path)
    assert bytes_of(convert(luad_module, root, dataset_id=600), "labelsVal", "labelsTs") == labels


def test_unknown_colours_and_values_are_listed_together_by_file(root: Path) -> None:
    save_mask(root / "val" / "mask" / "387709-9108-71176.png", bands([0, 7]), [])
    odd = np.full((24, 20, 3), (12, 34, 56), np.uint8)
    Image.fromarray(odd).save(root / "test" / "mask" / "400000-1-3.png")
    text = refused(luad_module, root)
    assert "2 problems" in text
    assert "387709-9108-71176.png: unknown value 7 (240 pixels); known are 0, 1, 2, 3, 4" in text
    assert "400000-1-3.png: unknown value (12, 34, 56) (480 pixels)" in text


def test_bad_flags_damaged_files_and_other_sizes_are_listed_at_once_and_can_be_left_out(
    root: Path, nnunet_folders: Path
) -> None:
    picture(root / "training" / "7-1-1-[1 0 1].png", 1)
    (root / "training" / "8-1-1-[1 0 1 0].png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    picture(root / "val" / "img" / "387709-9108-71177.png", 2, (30, 20))
    text = refused(luad_module, root)
    assert "3 problems" in text
    assert "[1 0 1].png: its name has no such flags; expected 4 of 0 and 1" in text
    assert "[1 0 1 0].png: a damaged picture, or none" in text
    assert "71177.png: 20 x 24 pixels; expected 20 x 30 pixels as its image" in text
    assert not list((nnunet_folders / "nnUNet_raw").iterdir())
    out = convert(luad_module, root, exclude=("LUAD_7-1-1", "LUAD_8-1-1", "LUAD_387709-9108-71177"))
    assert len(names(out / "imagesTr")) == 7
    with pytest.raises(UserError, match="no such patch; did you mean 'LUAD_7-1-1'"):
        convert(luad_module, root, exclude=("LUAD_7-1-11",))


def test_two_sets_of_flags_for_one_patch_are_a_problem(root: Path) -> None:
    picture(root / "training" / "1031280-2300-27920-[1 1 1 1].png", 5)
    assert "the same patch as 1031280-2300-27920-[1 0 0 1].png" in refused(luad_module, root)


def test_pictures_of_other_kinds_are_put_right_or_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "training"
    original = Image.open(picture(folder / "1-1-1-[1 0 0 0].png", 1))
    alpha = original.convert("RGBA")
    alpha.save(folder / "1-1-2-[1 0 0 0].png")
    original.quantize(7).save(folder / "1-1-3-[1 0 0 0].png")
    out = convert(luad_module, root)
    said = capsys.readouterr().err
    assert "1 pictures have an alpha channel, opaque everywhere; written without: training/1-1-2" in said
    assert "1 images are palette pictures; written as RGB: training/1-1-3" in said
    written = Image.open(out / "imagesTr" / "LUAD_1-1-2_0000.png")
    assert written.mode == "RGB"
    assert np.array_equal(np.asarray(written), np.asarray(original))
    assert Image.open(out / "imagesTr" / "LUAD_1-1-3_0000.png").mode == "RGB"
    alpha.putalpha(100)
    alpha.save(folder / "1-1-4-[1 0 0 0].png")
    original.convert("L").save(folder / "1-1-5-[1 0 0 0].png")
    Image.fromarray(np.full((24, 20), 999, np.uint16)).save(folder / "1-1-6-[1 0 0 0].png")
    text = refused(luad_module, root, dataset_id=600)
    assert "3 problems" in text
    for line in ("1-1-4-[1 0 0 0].png: transparent pixels", "1-1-5-[1 0 0 0].png: a grey picture", "16 bits per"):
        assert line in text


def test_names_that_become_the_same_keep_ids_of_their_own(root: Path) -> None:
    picture(root / "training" / "a+1[1001].png", 50)
    before = convert(luad_module, root)
    picture(root / "training" / "a 1[1001].png", 51)
    out = convert(luad_module, root, dataset_id=600)
    assert "LUAD_a-1" in cases(before)
    both = [name for name in cases(out) if name.startswith("LUAD_a-1-")]
    assert len(both) == 2
    assert {cases(out)[name]["original"] for name in both} == {"training/a+1[1001].png", "training/a 1[1001].png"}


def test_patients_on_both_sides_are_kept_as_published_and_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(root / "training" / "387709-1-1-[1 0 0 1].png", 60)
    out = convert(luad_module, root)
    assert "1 patients are in train and val, kept as published: 387709" in capsys.readouterr().err
    split = fold(out)
    assert splits.check([split], table(out), names(out / "imagesTr"), supervision=splits.TAGS) == []
    del split["patients"]
    assert splits.check([split], table(out), names(out / "imagesTr"), supervision=splits.TAGS)


def test_patients_of_training_that_a_target_has_as_well_are_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = wsss(tmp_path / "wsss")
    for folder in ("img", "mask"):
        path = other / "2.validation" / folder / "00.png"
        path.rename(path.with_name("1031280-1-1.png"))
    convert(luad_module, root, targets=(f"wsss4luad={other}",), classes=2)
    assert "1 patient names of training occur at a test site, too: 1031280" in capsys.readouterr().err


def test_a_picture_that_is_in_two_parts_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(root / "test" / "img" / "400000-1-2.png", root / "training" / "5-5-5-[1 0 0 0].png")
    convert(luad_module, root)
    said = capsys.readouterr().err
    assert "1 pictures are in two of train, val and test: LUAD_400000-1-2 = LUAD_5-5-5" in said


def test_sizes_may_vary_and_resize_makes_them_equal(tmp_path: Path, nnunet_folders: Path) -> None:
    root = wsss(tmp_path / "in")
    own = convert(wsss_module, root)
    assert len({Image.open(path).size for path in (own / "imagesTr").iterdir()}) > 3
    verify(own)
    out = convert(wsss_module, root, resize=32, dataset_id=600)
    verify(out)
    for part in ("imagesTr", "labelsTr", "labelsVal"):
        assert {Image.open(path).size for path in (out / part).iterdir()} == {(32, 32)}
    assert set(np.unique(read(out / "labelsVal" / "WSSS4LUAD_00.png"))) == {1, 2, 3, 4}
    original = Image.open(root / "2.validation" / "img" / "00.png")
    expected = np.asarray(original.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(np.asarray(Image.open(out / "imagesTr" / "WSSS4LUAD_00_0000.png")), expected)


# ---------------------------------------------------------------- weakness


def test_trees_with_equal_tags_and_other_masks_give_the_same_bytes(
    source: tuple[ModuleType, Callable[..., Path]], tmp_path: Path
) -> None:
    module, make = source
    first = convert(module, make(tmp_path / "a" / "in"))
    one, truth = bytes_of(first, *SEEN), bytes_of(first, "labelsVal", "labelsTs")
    shutil.rmtree(first)
    second = convert(module, make(tmp_path / "b" / "in", shift=3))
    assert bytes_of(second, *SEEN) == one
    other = bytes_of(second, "labelsVal", "labelsTs")
    assert other.keys() == truth.keys()
    assert all(other[name] != truth[name] for name in truth)


def test_the_twin_has_masks_of_training_patches_where_somebody_has_them(root: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    for path in (root / "training").iterdir():
        save_mask(masks / f"{split_name(path.stem, 4)[0]}.png", bands([0, 3]), [])
    weak = convert(luad_module, root)
    twin = convert(luad_module, root, supervision="masks", train_masks=masks, dataset_id=600)
    assert twin.name == "Dataset600_LUADHistoSeg_4classes_masks"
    assert fold(twin) == fold(weak)
    assert bytes_of(twin, "imagesTr", "imagesTs", "labelsTs") == bytes_of(weak, "imagesTr", "imagesTs", "labelsTs")
    assert np.array_equal(read(twin / "labelsTr" / "LUAD_1031280-2300-27920.png"), bands([1, 4]))
    assert not (twin / "labelsVal").exists()
    assert all(case["labelled"] and "tags" not in case for case in cases(twin).values())
    verify(twin)
    (masks / "1031280-2300-27920.png").unlink()
    text = refused(luad_module, root, supervision="masks", train_masks=masks, dataset_id=600)
    assert "no mask 1031280-2300-27920.png" in text
    with pytest.raises(UserError, match="go together"):
        convert(luad_module, root, supervision="masks")


# ---------------------------------------------------------------- another hospital


def test_the_target_is_seen_at_test_only(root: Path, tmp_path: Path) -> None:
    target = bcss(tmp_path / "BCSS-WSSS")
    out = convert(luad_module, root, targets=(f"bcss-wsss={target}",))
    assert out.name == "Dataset509_LUADHistoSeg_4classes_to-BCSS_tags"
    assert not any(name.startswith("BCSS") for name in names(out / "imagesTr"))
    tests = names(out / "imagesTs")
    assert tests == names(out / "labelsTs")
    assert [name[:4] for name in tests] == ["BCSS"] * 3 + ["LUAD"] * 2
    # TUM, STR, LYM, NEC and excluded in the source's order: tumour, necrosis, lymphocyte, stroma
    assert np.array_equal(read(out / "labelsTs" / f"{tests[0]}.png"), bands([1, 4, 3, 2, 5]))
    assert {case["site"] for case in cases(out).values()} == {"LUAD", "BCSS"}
    assert (table(out).sources, content(out)["dgplugins"]["protocol"]["targets"]) == (["LUAD"], ["BCSS"])
    verify(out)
    before = bytes_of(out)
    shutil.rmtree(target / "train")
    shutil.rmtree(out)
    assert bytes_of(convert(luad_module, root, targets=(f"bcss-wsss={target}",))) == before


def test_released_protocol_brings_the_tagged_patches_of_the_target_along(root: Path, tmp_path: Path) -> None:
    target = f"bcss-wsss={bcss(tmp_path / 'BCSS-WSSS')}"
    out = convert(luad_module, root, targets=(target,), protocol="release", classes=2)
    assert out.name == "Dataset509_LUADHistoSeg_2classes_to-BCSS-release_tags"
    theirs = [name for name in names(out / "imagesTr") if name.startswith("BCSS")]
    assert len(theirs) == 6
    split = fold(out)
    assert not set(theirs) & {*split["train"], *split["val"]}
    for name in theirs:
        case = cases(out)[name]
        assert (case["site"], case["labelled"], len(case["tags"][0])) == ("BCSS", False, 2)
        assert set(np.unique(read(out / "labelsTr" / f"{name}.png"))) == {3}
    assert sum(name.startswith("BCSS") for name in names(out / "labelsTs")) == 3
    verify(out)


def test_targets_that_make_no_sense_are_refused(root: Path, tmp_path: Path) -> None:
    other = wsss(tmp_path / "wsss")
    with pytest.raises(UserError, match=r"wsss4luad has no necrosis and no lymphocyte, only .* Use --classes 2"):
        convert(luad_module, root, targets=(f"wsss4luad={other}",))
    for text, words in (
        ("bcss-wsss", "expected NAME=ROOT"),
        ("bcss=x", "no other set 'bcss'; did you mean 'bcss-wsss'"),
        (f"luad-histoseg={root}", "no other set 'luad-histoseg'"),
    ):
        with pytest.raises(UserError, match=words):
            convert(luad_module, root, targets=(text,))
    with pytest.raises(UserError, match="name it with --target"):
        convert(luad_module, root, protocol="release")
    out = convert(luad_module, root, targets=(f"wsss4luad={other}",), classes=2)
    assert [name for name in names(out / "labelsTs") if name.startswith("WSSS")] == ["WSSS4LUAD_00", "WSSS4LUAD_01"]


def test_the_name_of_the_dataset_is_known_without_opening_a_file() -> None:
    words = ["nowhere", "--id", "620", "--classes", "2", "--target", "bcss-wsss=there", "--protocol", "release"]
    assert planned_name(luad_module, words) == "Dataset620_LUADHistoSeg_2classes_to-BCSS-release_tags"
    assert planned_name(wsss_module, ["nowhere"]) == "Dataset511_WSSS4LUAD_3classes_tags"


def test_two_processes_write_the_same_bytes_as_one_and_say_how_many_per_second(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = convert(luad_module, root)
    before = bytes_of(one)
    shutil.rmtree(one)
    capsys.readouterr()
    assert bytes_of(convert(luad_module, root, jobs=2)) == before
    said = capsys.readouterr()
    assert "10 patches in" in said.out
    assert "per second" in said.out
    assert "Writing: 10/10" in said.err
    assert json.loads((one / "dataset.json").read_text())["numTraining"] == 8
