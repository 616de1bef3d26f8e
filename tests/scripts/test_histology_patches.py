"""Real or made stained pictures become tagged patches that the converter of your own patches takes."""

from __future__ import annotations

import csv
from pathlib import Path

import histology_patches as script
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dataset_conversion.Dataset519_PatchFolder import command as convert
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.files import read_json


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six pictures of three stains, 70 x 40 pixels; nuclei at the upper left, in the third patch too few."""
    root = tmp_path / "histology"
    lines = ["image_id,stain_group,nuclei"]
    for number in range(6):
        name = f"picture{number}"
        image = np.random.default_rng(number).integers(0, 256, (40, 70, 3)).astype(np.uint8)
        mask = np.zeros((40, 70), np.uint8)
        mask[2:8, 2:8] = 1
        mask[0, 40] = 1  # one pixel of 400 is less than half a percent
        for folder, array in (("images", image), ("mask", mask)):
            path = root / "stage1" / name / folder / f"{name}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(array).save(path)
        lines.append(f"{name},{('violet', 'white', 'green stain')[number % 3]},1")
    (root / "domains.csv").write_text("\n".join(lines) + "\n")
    return root


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "tags.csv").read_text().splitlines()))


def test_patches_are_tagged_by_their_own_nuclei_and_share_their_picture_as_patient(root: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(script.main, [str(root), str(tmp_path / "out"), "--patch", "20", "--size", "40"])
    assert done.exit_code == 0, done.output
    assert "green stain: 12 patches of 2 pictures, 2 with nuclei" in done.output
    rows = table(tmp_path / "out")
    assert len(rows) == 6 * 2 * 3
    own = [row for row in rows if row["patient"] == "picture1"]
    assert {row["site"] for row in own} == {"white"}
    assert {row["file"] for row in own if row["nuclei"] == "1"} == {"images/picture1_r0c0.png"}
    picture = Image.open(tmp_path / "out" / "images" / "picture1_r1c2.png")
    source = Image.open(root / "stage1" / "picture1" / "images" / "picture1.png")
    expected = source.crop((40, 20, 60, 40)).resize((40, 40), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "picture1_r0c0.png"))
    assert mask.sum() == 4 * 36
    assert set(np.unique(mask)) == {0, 1}


def test_a_second_run_writes_the_same_bytes_and_what_was_lost(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script.write_patches(root, out, 20, 40)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")}
    (out / "tags.csv").unlink()
    (out / "masks" / "picture0_r0c0.png").unlink()
    script.write_patches(root, out, 20, 40)
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")} == before


def test_the_converter_trains_on_one_stain_and_tests_on_the_others(
    root: Path, tmp_path: Path, nnunet_folders: Path
) -> None:
    out = tmp_path / "out"
    script.write_patches(root, out, 20, 40)
    words = ["--masks", str(out / "masks"), "--classes-file", str(out / "classes.csv"), "--source", "violet"]
    done = CliRunner().invoke(convert, [str(out), *words, "--val", "0.5", "--jobs", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    folder = nnunet_folders / "nnUNet_raw" / "Dataset519_Patches_violet_tags"
    described = read_json(folder / "dataset.json")
    assert described["labels"] == {"background": 0, "nuclei": 1, "ignore": 2}
    assert described["dgplugins"]["protocol"]["targets"] == ["green stain", "white"]
    assert len(list((folder / "imagesTs").iterdir())) == 24 == len(list((folder / "labelsTs").iterdir()))
    (split,) = read_json(folder / "splits_final.json")
    assert {name.split("_r")[0] for name in split["train"]} != {name.split("_r")[0] for name in split["val"]}
    assert len(split["train"]) == len(split["val"]) == 6


def test_pictures_that_are_listed_and_not_there_are_named(root: Path, tmp_path: Path) -> None:
    (root / "stage1" / "picture2" / "mask" / "picture2.png").unlink()
    (root / "stage1" / "picture4" / "images" / "picture4.png").unlink()
    with pytest.raises(BadInput, match="2 problems"):
        script.write_patches(root, tmp_path / "out", 20, 40)
    with pytest.raises(UserError, match=r"domains.csv: no such file"):
        script.find_sources(tmp_path)
    done = CliRunner().invoke(script.main, [str(root), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_the_real_stained_pictures_make_patches_of_two_stains(sample_data: Path, tmp_path: Path) -> None:
    sources = script.find_sources(sample_data / "histology")
    assert {source.site for source in sources} == {"violet_tissue", "white_background"}
    lines = [line for source in sources[:3] for line in script.cut(source, tmp_path / "out", 64, 224)]
    assert len(lines) == 3 * 4 * 5
    assert 0 < sum(line[3] == "1" for line in lines) < len(lines)
    assert Image.open(tmp_path / "out" / lines[0][0]).size == (224, 224)
