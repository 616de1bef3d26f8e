"""The constant mask: placed by relative position, never empty, on the target's grid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from made_dataset import bar, make, write

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.baselines import constant_mask, mean_masks, place


def _box(shape: tuple[int, ...], low: float, high: float, value: int = 1) -> np.ndarray:
    """Label the middle of a volume from the share ``low`` to ``high`` of each axis."""
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(round(low * size), round(high * size)) for size in shape)] = value
    return labels


def test_the_mask_lands_at_the_same_relative_position_on_another_grid():
    average = mean_masks([_box((16, 64, 64), 0.25, 0.75)])
    found = place(average, (8, 40, 80))
    expected = _box((8, 40, 80), 0.25, 0.75)
    assert (found != expected).mean() < 0.02
    assert found.dtype == np.uint8


def test_the_majority_decides():
    large, small = _box((16, 64, 64), 0.25, 0.75), _box((16, 64, 64), 0.4, 0.6)
    found = place(mean_masks([large, small, small]), (16, 64, 64))
    assert (found != small).mean() < 0.01


def test_without_a_majority_the_most_frequent_place_is_taken():
    apart = [np.zeros((8, 32, 32), np.uint8) for _ in range(4)]
    for number, labels in enumerate(apart):
        labels[2:6, 4:12, 8 * number : 8 * number + 8] = 1
    apart.append(np.roll(apart[0], 0))
    apart.append(np.zeros_like(apart[0]))
    found = place(mean_masks(apart), (8, 32, 32))  # 2 of 6 agree on the first place
    assert found.any()
    assert not found[:, :, 10:].any()


def test_classes_and_the_ignore_label_are_told_apart():
    labels = _box((16, 64, 64), 0.25, 0.75)
    labels[:, :, 32:] *= 2
    labels[0] = 9
    found = place(mean_masks([labels], ignore=9), (16, 64, 64))
    assert set(np.unique(found)) == {0, 1, 2}
    assert (found[1:] != labels[1:]).mean() < 0.01
    assert not found[0].any()


def test_no_foreground_anywhere_gives_an_empty_mask():
    assert not place(mean_masks([np.zeros((4, 8, 8), np.uint8)]), (4, 8, 8)).any()


def test_images_without_a_third_dimension_work():
    found = place(mean_masks([_box((64, 64), 0.25, 0.75)]), (40, 80))
    assert (found != _box((40, 80), 0.25, 0.75)).mean() < 0.02


def test_every_test_case_gets_a_mask_with_the_geometry_of_its_image(nnunet_folders: Path, tmp_path: Path):
    make(nnunet_folders)
    raw = nnunet_folders / "nnUNet_raw/Dataset501_Bars"
    write(bar(2), raw / "labelsTr" / "S_1.nii.gz")
    for case in ("U_1", "T_1"):
        write(np.full_like(bar(2), 1), raw / "labelsTr" / f"{case}.nii.gz")
    content = json.loads((raw / "dataset.json").read_text())
    content["dgplugins"]["cases"] |= {
        "S_1": {"site": "RUNMC", "labelled": True},
        "U_1": {"site": "RUNMC", "labelled": False},
        "T_1": {"site": "A", "labelled": True},
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    written = constant_mask(501, tmp_path / "constant")
    assert [path.name for path in written] == sorted(path.name for path in (raw / "labelsTs").iterdir())
    mask, image = SimpleITK.ReadImage(str(written[0])), SimpleITK.ReadImage(str(raw / "imagesTs/A_1_0000.nii.gz"))
    assert mask.GetSpacing() == image.GetSpacing()
    assert mask.GetSize() == image.GetSize()
    # neither the unlabelled case nor the one of another site, which fill the volume, is averaged
    assert 0 < SimpleITK.GetArrayFromImage(mask).mean() < 0.5


def test_a_dataset_without_training_labels_is_said(nnunet_folders: Path, tmp_path: Path):
    make(nnunet_folders)
    (nnunet_folders / "nnUNet_raw/Dataset501_Bars/labelsTr").mkdir()
    with pytest.raises(UserError, match="no labelled training case"):
        constant_mask(501, tmp_path / "constant")
