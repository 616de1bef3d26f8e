"""The converter of your own tagged patches."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from patch_trees import bands, bytes_of, cases, content, fold, mask, names, picture, read
from PIL import Image
from trees import verify

from dataset_conversion import Dataset519_PatchFolder as module
from dataset_conversion._command import planned_name
from dataset_conversion._patch_dataset import convert_patches
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import BadInput, UserError

CLASSES = ("gland", "muscle", "fat")


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    """Twelve patches of six patients in two hospitals, with masks of 0 (nothing) and 1 to 3."""
    root = tmp_path / "own"
    lines = ["file,gland,muscle,fat,patient,site"]
    for number in range(12):
        picture(root / "pictures" / f"patch {number}.png", number)
        mask(root / "masks" / f"patch {number}.png", bands([0, 1, 1 + number % 3]), [])
        tags = [1, int(number % 3 == 1), int(number % 3 == 2)]
        site = "North" if number < 8 else "South"
        lines.append(f"pictures/patch {number}.png,{','.join(map(str, tags))},p{number // 2},{site}")
    (root / "tags.csv").write_text("\n".join(lines) + "\n")
    return root


def convert(root: Path, **options: object) -> Path:
    request = module.FolderRequest(root, **{"dataset_id": 519, "jobs": 1, "tags": root / "tags.csv", **options})
    return convert_patches(module.collect(request), request)


def refused(root: Path, **options: object) -> str:
    with pytest.raises(BadInput) as caught:
        convert(root, **options)
    return str(caught.value)


def rewrite(root: Path, change: dict[str, str]) -> None:
    text = (root / "tags.csv").read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    (root / "tags.csv").write_text(text)


def test_a_column_per_class_gives_labels_in_the_order_of_the_columns(root: Path) -> None:
    out = convert(root)
    assert out.name == "Dataset519_Patches_tags"
    assert content(out)["labels"] == {"background": 0, "gland": 1, "muscle": 2, "fat": 3, "ignore": 4}
    assert cases(out)["North_patch-1"] == {
        "site": "North",
        "patient": "p0",
        "labelled": False,
        "tags": [[1, 1, 0]],
        "original": "pictures/patch 1.png",
    }
    assert len(names(out / "imagesTr")) == 12
    assert not (out / "labelsVal").exists()  # no masks were named
    verify(out)


def test_one_column_of_names_says_the_same(root: Path) -> None:
    out = convert(root)
    before = bytes_of(out, "imagesTr", "labelsTr", "splits_final.json"), cases(out)
    lines = ["patient;file;tags;site"]
    for number in range(12):
        tags = ["gland", *(["muscle"] if number % 3 == 1 else []), *(["fat"] if number % 3 == 2 else [])]
        site = "North" if number < 8 else "South"
        lines.append(f'p{number // 2};pictures/patch {number}.png;"{"; ".join(tags)}";{site}')
    (root / "tags.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    (root / "classes.csv").write_text("class,value\ngland,1\nmuscle,2\nfat,3\nignore,0\n")
    again = convert(root, classes_file=root / "classes.csv", dataset_id=600)
    assert (bytes_of(again, "imagesTr", "labelsTr", "splits_final.json"), cases(again)) == before
    assert list(content(convert(root, dataset_id=601))["labels"])[1:4] == ["fat", "gland", "muscle"]  # sorted


def test_validation_is_drawn_by_patient_and_masks_of_it_alone_are_written(root: Path) -> None:
    out = convert(root, masks=root / "masks", val=0.3, test=0.2)
    split, table = fold(out), cases(out)
    patients = {side: {table[name]["patient"] for name in split[side]} for side in ("train", "val")}
    assert not patients["train"] & patients["val"]
    assert len(patients["val"]) == 2
    assert names(out / "labelsVal") == split["val"]
    assert len(names(out / "labelsTs")) == 2
    assert "tags" not in table[names(out / "labelsTs")[0]]
    for path in (out / "labelsVal").iterdir():
        number = int(path.stem.rsplit("-", 1)[1])
        assert np.array_equal(read(path), bands([4, 1, 1 + number % 3]))  # 0 is excluded unless a class says more


def test_a_table_of_classes_names_values_colours_and_a_background_that_counts(root: Path) -> None:
    (root / "classes.csv").write_text(
        "class,value,colour\nbackground,0,#000000\nmuscle,2,#00FF00\ngland,1,#ff0000\nfat,3,0000FF\nfat,9,#000009\n"
        "ignore,7,#FFFFFF\n"
    )
    options = {"masks": root / "masks", "classes_file": root / "classes.csv", "val": 0.2}
    out = convert(root, **options)
    assert content(out)["labels"] == {"background": 0, "muscle": 1, "gland": 2, "fat": 3, "ignore": 4}
    assert content(out)["dgplugins"]["protocol"]["background"] is True
    labels = bytes_of(out, "labelsVal")
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
    for path in (root / "masks").iterdir():
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)
    assert bytes_of(convert(root, dataset_id=600, **options), "labelsVal") == labels
    path = next((out / "labelsVal").iterdir())
    wanted = [0, 2, {1: 2, 2: 1, 3: 3}[1 + int(path.stem.rsplit("-", 1)[1]) % 3]]
    assert np.array_equal(read(path), bands(wanted))


def test_one_site_trains_and_the_others_are_tested_on(root: Path) -> None:
    out = convert(root, masks=root / "masks", sources=("North",))
    assert out.name == "Dataset519_Patches_North_tags"
    assert {name[:5] for name in names(out / "imagesTr")} == {"North"}
    assert {name[:5] for name in names(out / "labelsTs")} == {"South"}
    found = CaseTable.from_dataset_json(content(out))
    assert found is not None
    assert (found.sources, len(names(out / "imagesTs"))) == (["North"], 4)
    verify(out)
    with pytest.raises(UserError, match="no patch of that site; did you mean 'North'"):
        convert(root, sources=("Noth",))
    rewrite(root, {"p5,South": "p5,"})
    assert "no site, and --source chooses by site" in refused(root, sources=("North",))


def test_a_column_part_says_who_does_what(root: Path) -> None:
    lines = (root / "tags.csv").read_text().splitlines()
    parts = ["part", *["train"] * 4, *["val"] * 2, *["test"] * 2, *["train"] * 2, *["test"] * 2]
    (root / "tags.csv").write_text("\n".join(f"{line},{part}" for line, part in zip(lines, parts, strict=True)))
    out = convert(root, sources=("North",))
    assert fold(out)["val"] == ["North_patch-4", "North_patch-5"]
    assert names(out / "imagesTs") == ["North_patch-6", "North_patch-7", "South_patch-10", "South_patch-11"]
    assert not any(name.startswith("South") for name in names(out / "imagesTr"))
    release = convert(root, sources=("North",), protocol="release", dataset_id=600)
    theirs = [name for name in names(release / "imagesTr") if name.startswith("South")]
    assert theirs == ["South_patch-8", "South_patch-9"]
    assert cases(release)[theirs[0]]["tags"] == [[1, 0, 1]]
    assert fold(release) == fold(out)


def test_the_twin_has_every_mask(root: Path) -> None:
    weak = convert(root, masks=root / "masks")
    twin = convert(root, masks=root / "masks", supervision="masks", dataset_id=600)
    assert fold(twin) == fold(weak)
    assert np.array_equal(read(twin / "labelsTr" / "North_patch-1.png"), bands([4, 1, 2]))
    assert all(case["labelled"] for case in cases(twin).values())
    (root / "masks" / "patch 3.png").unlink()
    assert "patch 3.png: no mask in" in refused(root, masks=root / "masks", supervision="masks", dataset_id=600)
    with pytest.raises(UserError, match="needs --masks"):
        convert(root, supervision="masks", dataset_id=600)


def test_masks_of_training_patches_are_never_opened(root: Path) -> None:
    before = bytes_of(convert(root, masks=root / "masks"))
    validating = {Path(name).stem.split("_")[1].replace("-", " ") for name in before if name.startswith("labelsVal")}
    assert validating
    for path in (root / "masks").iterdir():
        if path.stem not in validating:
            path.write_bytes(b"poison")
    shutil.rmtree(root.parent / "nnUNet_raw" / "Dataset519_Patches_tags")
    assert bytes_of(convert(root, masks=root / "masks")) == before


def test_other_kinds_of_picture_become_png(root: Path) -> None:
    source = root / "pictures" / "patch 0.png"
    Image.open(source).save(source.with_suffix(".jpg"), quality=95)
    rewrite(root, {"patch 0.png": "patch 0.jpg"})
    out = convert(root)
    written = Image.open(out / "imagesTr" / "North_patch-0_0000.png")
    assert np.array_equal(np.asarray(written), np.asarray(Image.open(source.with_suffix(".jpg"))))


def test_everything_wrong_with_the_table_is_said_at_once(root: Path) -> None:
    rewrite(root, {"patch 1.png,1,1,0": "patch 1.png,1,2,0", "patch 2.png": "patch 3.png"})
    text = refused(root)
    assert "2 problems" in text
    assert "line 3: muscle is '2'; expected 0 or 1" in text
    assert "patch 3.png is listed twice" in text
    (root / "tags.csv").write_text("name,gland\nx,1\n")
    assert "no column file" in refused(root)
    (root / "tags.csv").write_text("file,tags\nx.png,gland;bone\ny.png,gland\n")
    (root / "classes.csv").write_text("class,value\ngland,1\n")
    text = refused(root, classes_file=root / "classes.csv")
    assert "line 2: unknown class 'bone'" in text
    text = refused(root)
    assert "x.png: no such file" in text
    assert "y.png: no such file" in text


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("file;tags\npictures/patch 0.png;gland;muscle\n", "line 2: 'muscle' stands in no column of the header"),
        ("\nfile;tags;\npictures/patch 0.png;gland;muscle\n", "line 3: 'muscle' stands in no column of the header"),
        ("file,gland,\npictures/patch 0.png,1,1\n", "line 2: '1' stands in no column of the header"),
        ("file,tags,patient\npictures/patch 0.png,gland,fat,p1\n", "line 2: 'p1' stands in no column"),
        ("file,gland,gland\npictures/patch 0.png,1,0\n", "several columns gland"),
        ("file,background,gland\npictures/patch 0.png,1,0\n", "a class called background"),
        ("file,tags\npictures/patch 0.png,Ignore;gland\n", "a class called Ignore"),
    ],
)  # fmt: skip
def test_a_table_that_can_be_read_in_two_ways_is_refused(root: Path, table: str, expected: str) -> None:
    (root / "tags.csv").write_text(table)
    assert expected in refused(root)


def test_a_class_of_the_table_of_classes_needs_its_column(root: Path) -> None:
    (root / "classes.csv").write_text("class,value\ngland,1\nmuscle,2\nfat,3\nfatt,4\n")
    assert "no column fatt; did you mean" in refused(root, classes_file=root / "classes.csv")


@pytest.mark.parametrize("text", ['file,tags\npictures/patch 0.png,"gland\npictures/patch 1.png,fat\n', 'file,"tags\n'])
def test_an_open_quotation_mark_swallows_no_rows(root: Path, text: str) -> None:
    (root / "tags.csv").write_text(text)
    with pytest.raises(UserError, match="a quotation mark has no pair"):
        convert(root)


@pytest.mark.parametrize("text", ["", "\n\n", "My patches\n\nfile,tags\na.png,gland\n"])
def test_a_table_without_its_header_is_one_problem(root: Path, text: str) -> None:
    (root / "tags.csv").write_text(text)
    assert "no column file" in refused(root)


def test_a_cell_too_many_hides_no_other_problem(root: Path) -> None:
    (root / "tags.csv").write_text("file,gland,part\npictures/patch 0.png,1,train,x\npictures/patch 1.png,7,train\n")
    said = refused(root)
    assert "'x' stands in no column" in said
    assert "gland is '7'" in said


def test_two_spellings_of_a_path_are_one_patch(root: Path) -> None:
    with (root / "tags.csv").open("a") as file:
        file.write("./pictures//patch 0.png,0,1,0,p0,North\n")
    assert "pictures/patch 0.png is listed twice" in refused(root)


def test_excluding_a_missing_patch_keeps_the_one_of_the_same_name(root: Path) -> None:
    picture(root / "a" / "patch 1.png", 50)
    with (root / "tags.csv").open("a") as file:
        file.write("a/patch 1.png,1,0,0,p9,North\nb/patch 1.png,1,0,0,p9,North\n")
    said = refused(root)
    (excluded,) = re.findall(r"--exclude (\S+)\.", said)
    out = convert(root, exclude=(excluded,))
    originals = {case["original"] for case in cases(out).values()}
    assert {"a/patch 1.png", "pictures/patch 1.png"} <= originals


def test_masks_without_any_class_are_refused(root: Path) -> None:
    for path in (root / "masks").iterdir():
        mask(path, bands([0, 255]), [])
    assert "no mask of" in refused(root, masks=root / "masks", val=0.2)


def test_pictures_lie_below_the_folder(root: Path) -> None:
    elsewhere = root.parent / "elsewhere.png"
    picture(elsewhere, 0)
    (root / "tags.csv").write_text(f"file,gland\n{elsewhere},1\n../elsewhere.png,1\npictures/patch 1.png,1\n")
    assert refused(root).count(f"not below {root}") == 2


@pytest.mark.parametrize(("old", "new"), [("gland,1\nmuscle,2", "gland,2\nmuscle,1"), ("ignore,0", "Background,0")])
def test_another_table_of_classes_is_another_dataset(root: Path, old: str, new: str) -> None:
    table = root / "classes.csv"
    table.write_text("class,value\ngland,1\nmuscle,2\nfat,3\nignore,0\n")
    options = {"masks": root / "masks", "classes_file": table, "val": 0.2}
    before = content(convert(root, **options))["dgplugins"]["protocol"]["input"]
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(UserError, match="--overwrite"):
        convert(root, **options)
    after = content(convert(root, **options, overwrite=True))["dgplugins"]["protocol"]["input"]
    # what training sees depends on how masks are read only where background becomes a class
    assert (after == before) == ("Background" not in new)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_one_mask_is_never_taken_for_two_pictures_of_one_name(root: Path, suffix: str) -> None:
    for name in ("north/same.png", f"south/same{suffix}"):
        picture(root / name, 0)
    mask(root / "masks" / "same.png", bands([0, 1, 2]), [])
    lines = ["file,gland,site,part", "pictures/patch 1.png,1,North,train", "north/same.png,1,North,val"]
    request = module.FolderRequest(root, 519, tags=root / "tags.csv", masks=root / "masks")
    for more, known in (([], [True]), ([f"south/same{suffix},1,South,test"], [False, False])):
        (root / "tags.csv").write_text("\n".join([*lines, *more]) + "\n")
        patches = module.collect(request).patches
        assert [patch.mask is not None for patch in patches if "same" in patch.name] == known


def test_the_name_of_the_dataset_is_known_without_opening_a_file() -> None:
    words = ["nowhere", "--id", "620", "--name", "Colon", "--source", "North", "--supervision", "masks"]
    assert planned_name(module, words) == "Dataset620_Colon_North_masks"


def with_parts(root: Path, part: dict[int, str]) -> None:
    """Add a column ``part``, empty where nothing is said of a patch."""
    head, *lines = (root / "tags.csv").read_text().splitlines()
    made = [f"{line},{part.get(number, '')}" for number, line in enumerate(lines)]
    (root / "tags.csv").write_text("\n".join([f"{head},part", *made]) + "\n")


def test_release_needs_a_source(root: Path) -> None:
    with pytest.raises(UserError, match="name the source"):
        convert(root, protocol="release")


def test_a_target_whose_parts_are_not_said_is_tested_on(root: Path) -> None:
    with_parts(root, {0: "train", 1: "train", 2: "val", 3: "val"})
    out = convert(root, sources=("North",), masks=root / "masks")
    assert len(names(out / "imagesTs")) == 4


def test_a_patient_on_both_sides_is_refused(root: Path) -> None:
    with_parts(root, {0: "train", 1: "val"})
    assert "patient North_p0 trains and validates" in refused(root)


def test_a_patient_can_be_left_out(root: Path) -> None:
    out = convert(root, exclude=("North_p0",))
    assert len(names(out / "imagesTr")) == 10
