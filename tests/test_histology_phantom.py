"""The made tissue patches: what tells tissues apart, what hospitals change, and that the converters take the trees."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dataset_conversion import Dataset509_LUADHistoSeg, Dataset510_BCSSWSSS, Dataset511_WSSS4LUAD
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.histology_phantom import LAYOUTS, main, make_histology_phantom
from nnunet_dgplugins.histology_tissue import HOSPITALS, draw_patch

FOUR = ("tumour", "stroma", "lymphocyte", "necrosis")
PATCHES = [draw_patch([0, number], FOUR, HOSPITALS["A"], (128, 128), number) for number in range(60)]
MODULES = {"luad": Dataset509_LUADHistoSeg, "bcss": Dataset510_BCSSWSSS, "wsss": Dataset511_WSSS4LUAD}


def regions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tissue, mean colour, and fine and coarse structure of each region of some size."""
    from scipy.ndimage import gaussian_filter

    kinds, colours, structures = [], [], []
    for patch in PATCHES:
        grey = np.log(patch.image.mean(-1) + 1)
        levels = [gaussian_filter(grey, sigma) for sigma in (0, 1, 2, 4, 8)]
        details = np.stack([np.abs(one - two) for one, two in itertools.pairwise(levels)])
        for kind in range(len(FOUR)):
            inside = patch.mask == kind
            if inside.mean() > 0.1:
                kinds.append(kind)
                colours.append(patch.image[inside].mean(0))
                structures.append(np.log(details[:, inside].mean(1)))
    return np.array(kinds), np.array(colours), np.array(structures)


def accuracy(kinds: np.ndarray, features: np.ndarray) -> float:
    """Share of regions that are nearest to their own tissue's mean, the region itself left out of it."""
    features = (features - features.mean(0)) / features.std(0)
    right = 0
    for index, kind in enumerate(kinds):
        others = np.arange(len(kinds)) != index
        means = np.stack([features[others & (kinds == other)].mean(0) for other in range(len(FOUR))])
        right += int(np.argmin(((means - features[index]) ** 2).sum(1)) == kind)
    return right / len(kinds)


def test_structure_tells_the_tissues_apart_and_mean_colour_does_not() -> None:
    kinds, colours, structures = regions()
    assert set(kinds) == set(range(len(FOUR)))
    assert accuracy(kinds, structures) > 0.85
    assert accuracy(kinds, colours) < 0.75


def test_patches_show_one_to_three_tissues_of_some_size() -> None:
    counts, white = [], 0
    for patch in PATCHES:
        present = set(np.unique(patch.mask))
        white += len(FOUR) in present
        counts.append(len(present - {len(FOUR)}))
        assert all((patch.mask == value).mean() > 0.02 for value in present)
    assert {1, 2, 3} >= set(counts) - {0}
    assert 1 in counts
    assert 2 in counts
    assert 0 < white < len(PATCHES) / 2


def test_hospitals_change_the_colours_and_never_the_mask() -> None:
    shown = {name: draw_patch([5, 5], FOUR, hospital, (96, 96)) for name, hospital in HOSPITALS.items()}
    assert all(np.array_equal(one.mask, shown["A"].mask) for one in shown.values())
    means = {name: one.image.reshape(-1, 3).mean(0) for name, one in shown.items()}
    for one in means:
        for other in means:
            assert one == other or np.abs(means[one] - means[other]).max() > 10


def test_empty_slide_is_nearly_white() -> None:
    bright = [patch.image[patch.mask == len(FOUR)] for patch in PATCHES]
    assert np.concatenate(bright).mean() > 225


def test_patches_of_one_patient_share_a_stain() -> None:
    one, same, other = (draw_patch([3, 1], FOUR, HOSPITALS["A"], (64, 64), patient) for patient in (1, 1, 2))
    assert np.array_equal(one.image, same.image)
    assert not np.array_equal(one.image, other.image)
    assert np.array_equal(one.mask, other.mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_converter_takes_each_layout_and_reads_the_drawn_tags(
    layout: str, tmp_path: Path, nnunet_folders: Path
) -> None:
    folder = make_histology_phantom(tmp_path / "in", layout, 6, 2, 2, size=48)
    masks = folder.with_name(folder.name + "_train_masks")
    words = [str(folder), "--id", "650", "--jobs", "1"]
    for extra in ([], ["--supervision", "masks", "--train-masks", str(masks), "--id", "651"]):
        done = CliRunner().invoke(MODULES[layout].command, [*words, *extra], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    raw = nnunet_folders / "nnUNet_raw"
    weak, twin = next(raw.glob("Dataset650_*_tags")), next(raw.glob("Dataset651_*_masks"))
    found = read_json(weak / "dataset.json")["dgplugins"]["cases"]
    assert len(found) == 10
    for name, case in found.items():
        if "tags" in case:
            label = np.asarray(Image.open(twin / "labelsTr" / f"{name}.png"))
            assert case["tags"] == [[int((label == value).any()) for value in range(1, len(case["tags"][0]) + 1)]]
    assert (len({case.get("patient") for case in found.values()}) == 3) == (layout != "wsss")


def test_the_same_seed_writes_the_same_bytes_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(tmp_path / "a"), "--patches", "3", "--size", "48", "--jobs", "1"])
    assert done.exit_code == 0, done.output
    assert "Next: dgplugins convert luad-histoseg" in done.output
    first = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.png")}
    assert len(first) == 2 * (3 + 4 + 4)
    missing = next(path for path in first if "_train_masks" in path.parts[0])
    (tmp_path / "a" / missing).unlink()
    make_histology_phantom(tmp_path / "a", patches=3, size=48)
    assert (tmp_path / "a" / missing).read_bytes() == first[missing]
    make_histology_phantom(tmp_path / "b", patches=5, val=4, test=4, size=48)
    assert all((tmp_path / "b" / name).read_bytes() == content for name, content in first.items())


def test_unknown_layouts_and_hospitals_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Layouts are luad, bcss, wsss"):
        make_histology_phantom(tmp_path, "x")
    with pytest.raises(UserError, match="hospitals A, B, C"):
        make_histology_phantom(tmp_path, hospital="Z")
