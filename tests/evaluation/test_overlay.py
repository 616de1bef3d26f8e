"""Overlay pictures: which slice, which colours, whose file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_dataset import bar, evaluated, write

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.overlay import (
    PREDICTION_COLOUR,
    REFERENCE_COLOUR,
    overlay_folder,
    overlay_png,
    pick_slice,
)


def _pixels_near(path: Path, colour: str) -> int:
    from skimage import io

    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    picture = io.imread(path)[..., :3].astype(int)
    legend = int(picture.shape[0] * 0.93)  # the legend holds both colours always
    return int((np.abs(picture[:legend] - wanted).max(axis=-1) < 12).sum())


def test_the_slice_with_the_largest_reference_or_disagreement_is_drawn():
    truth, guess = np.zeros((5, 8, 8), int), np.zeros((5, 8, 8), int)
    truth[1, 2:4, 2:4], truth[2, 2:6, 2:6] = 1, 1
    guess[2] = truth[2]
    guess[3, :2] = 1
    assert pick_slice(truth, guess) == 2
    assert pick_slice(truth, guess, "disagreement") == 3
    assert pick_slice(np.zeros_like(truth), guess) == 2
    assert pick_slice(np.zeros_like(truth), np.zeros_like(truth)) == 2


def test_both_contours_are_in_the_picture(tmp_path: Path):
    image = write(np.random.default_rng(0).normal(size=(6, 4, 24)).astype(np.float32), tmp_path / "i.nii.gz")
    truth, guess = write(bar(2), tmp_path / "t.nii.gz"), write(bar(8), tmp_path / "p.nii.gz")
    out = overlay_png(image, truth, guess, tmp_path / "out" / "o.png", "case")
    assert _pixels_near(out, REFERENCE_COLOUR) > 50
    assert _pixels_near(out, PREDICTION_COLOUR) > 50
    alone = overlay_png(image, None, guess, tmp_path / "alone.png")
    assert _pixels_near(alone, REFERENCE_COLOUR) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["o.png"]


def test_what_is_not_annotated_is_neither_drawn_nor_chosen(tmp_path: Path):
    image = write(np.random.default_rng(0).normal(size=(6, 24, 24)).astype(np.float32), tmp_path / "i.nii.gz")
    values = np.zeros((6, 24, 24), np.uint8)
    values[4, 4:20, 4:20] = 2
    truth, guess = write(values, tmp_path / "t.nii.gz"), write(np.zeros_like(values), tmp_path / "p.nii.gz")
    assert _pixels_near(overlay_png(image, truth, guess, tmp_path / "a.png"), REFERENCE_COLOUR) > 50
    assert _pixels_near(overlay_png(image, truth, guess, tmp_path / "b.png", ignore=2), REFERENCE_COLOUR) == 0


def test_the_picture_has_the_aspect_of_the_slice_in_millimetres(tmp_path: Path):
    from skimage import io

    # an empty map shows half of each side: 20 rows of 3 mm by 30 columns of 1 mm
    image = write(np.zeros((1, 40, 60), np.float32), tmp_path / "i.nii.gz", (1.0, 3.0, 5.0))
    empty = write(np.zeros((1, 40, 60), np.uint8), tmp_path / "t.nii.gz", (1.0, 3.0, 5.0))
    height, width = io.imread(overlay_png(image, empty, empty, tmp_path / "o.png")).shape[:2]
    assert (height - 0.75 * 130) / width == pytest.approx(2.0, abs=0.02)


def test_png_cases_can_be_drawn(tmp_path: Path):
    from skimage import io

    labels = np.zeros((30, 40), np.uint8)
    labels[10:20, 10:20] = 1
    io.imsave(tmp_path / "i.png", np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8))
    io.imsave(tmp_path / "l.png", labels, check_contrast=False)
    out = overlay_png(tmp_path / "i.png", tmp_path / "l.png", tmp_path / "l.png", tmp_path / "o.png")
    assert _pixels_near(out, PREDICTION_COLOUR) > 50


def test_grids_that_differ_are_refused(tmp_path: Path):
    image = write(np.zeros((6, 4, 20), np.float32), tmp_path / "i.nii.gz")
    truth, guess = write(bar(2), tmp_path / "t.nii.gz"), write(bar(2), tmp_path / "p.nii.gz")
    with pytest.raises(UserError, match="shape"):
        overlay_png(image, truth, guess, tmp_path / "o.png")
    assert not (tmp_path / "o.png").exists()


def test_one_picture_per_case_named_by_site(nnunet_folders: Path, tmp_path: Path):
    result = evaluated(nnunet_folders)
    written = overlay_folder(result, tmp_path / "pictures")
    assert [path.name for path in written] == [f"{name[0]}_{name}.png" for name in sorted(set(result.table["case"]))]
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(UserError, match="--images"):
        overlay_folder(result, tmp_path / "pictures", tmp_path / "nowhere")


def test_real_masks_can_be_drawn(sample_data: Path, tmp_path: Path):
    case = sample_data / "prostate/ProstateX/ProstateX-0000/07-07-2011/ProstateX-0000_07-07-2011_t2w.nii.gz"
    masks = sample_data / "prostate/picai_labels/anatomical_delineations/whole_gland/AI"
    files = [masks / name / "11373_1001396.nii.gz" for name in ("Bosma22b", "Guerbet23")]
    out = overlay_png(case, files[0], files[1], tmp_path / "o.png", "ProstateX-0000")
    assert _pixels_near(out, REFERENCE_COLOUR) > 200
