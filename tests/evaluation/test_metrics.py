"""Metrics: hand-computed cases, empty masks, symmetry, spacing, and MONAI as an independent reference."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from nnunet_dgplugins.evaluation.label_maps import read_label_map
from nnunet_dgplugins.evaluation.metrics import (
    EMPTY_RULES,
    METRICS,
    class_metrics,
    joint_box,
    mask_metrics,
    surface_distances,
)


def _mask(shape: tuple[int, ...], *box: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[box] = True
    return mask


def _blobs(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng(seed)
    base = gaussian_filter(generator.normal(size=shape), 2)
    other = base + 0.5 * gaussian_filter(generator.normal(size=shape), 2)
    return base > 0.02, other > 0.04


def _monai(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    pair = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (prediction, reference)]
    common = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "hd95": float(compute_hausdorff_distance(*pair, percentile=95, **common)),
            "assd": float(compute_average_surface_distance(*pair, symmetric=True, **common)),
            "nsd": float(compute_surface_dice(*pair, class_thresholds=[1.0], **common)),
        }


def test_two_shifted_bars_give_the_numbers_computed_by_hand():
    # bars of 4 voxels in one row, shifted by one voxel of 2 mm: every voxel lies on the surface
    reference, prediction = _mask((1, 8), slice(0, 1), slice(1, 5)), _mask((1, 8), slice(0, 1), slice(2, 6))
    found = mask_metrics(reference, prediction, (1.0, 2.0))
    assert found["dice"] == pytest.approx(2 * 3 / 8)
    # a volume of one row is one-dimensional: its surface is the two ends; 1->2, 4->5, 2->1 and 5->4, each 2 mm
    assert found["assd"] == pytest.approx(2.0)
    assert found["hd95"] == pytest.approx(2.0)
    assert found["nsd"] == 0.0
    assert found["volume_error_relative"] == 0.0


def test_hd95_is_the_larger_of_the_two_directed_percentiles():
    # reference: one pixel; prediction: the same pixel and two more, 1 and 2 mm away
    reference, prediction = _mask((3, 5), slice(1, 2), slice(1, 2)), _mask((3, 5), slice(1, 2), slice(1, 4))
    found = mask_metrics(reference, prediction, (1.0, 1.0))
    # d(r, P) = [0]; d(p, R) = [0, 1, 2]: 95th percentile 1.9; mean of [0, 0, 1, 2]; three of four within 1 mm
    assert found["hd95"] == pytest.approx(1.9)
    assert found["assd"] == pytest.approx(0.75)
    assert found["nsd"] == pytest.approx(0.75)
    assert found["dice"] == pytest.approx(2 / 4)
    assert found["volume_error_relative"] == pytest.approx(2.0)


def test_volumes_are_in_millilitres():
    reference = _mask((4, 10, 10), slice(0, 2), slice(0, 10), slice(0, 10))  # 200 voxels of 0.5 * 0.5 * 4 = 1 mm3
    prediction = _mask((4, 10, 10), slice(0, 3), slice(0, 10), slice(0, 10))
    found = mask_metrics(reference, prediction, (4.0, 0.5, 0.5))
    assert found["reference_ml"] == pytest.approx(0.2)
    assert found["prediction_ml"] == pytest.approx(0.3)
    assert found["volume_error_ml"] == pytest.approx(0.1)
    assert found["volume_error_relative"] == pytest.approx(0.5)


def test_an_image_without_thickness_has_no_volume():
    mask = _mask((4, 4), slice(0, 2), slice(0, 2))
    found = mask_metrics(mask, mask, (1.0, 1.0))
    assert np.isnan([found["reference_ml"], found["volume_error_ml"]]).all()
    assert found["dice"] == 1.0


@pytest.mark.parametrize("shape", [(20, 24), (9, 20, 24), (1, 20, 24)])
def test_a_perfect_prediction_is_perfect(shape: tuple[int, ...]):
    mask = _blobs(0, shape)[0]
    found = mask_metrics(mask, mask, (3.0, 0.5, 0.7)[-len(shape) :])
    assert (found["dice"], found["nsd"], found["hd95"], found["assd"]) == (1.0, 1.0, 0.0, 0.0)
    assert found["volume_error_relative"] == 0.0


def test_overlap_and_distances_are_symmetric_and_the_volume_error_changes_sign():
    reference, prediction = _blobs(1, (8, 20, 22))
    forth = mask_metrics(reference, prediction, (3.0, 0.6, 0.6))
    back = mask_metrics(prediction, reference, (3.0, 0.6, 0.6))
    for name in ("dice", "hd95", "assd", "nsd", "volume_error_ml"):
        assert forth[name] == pytest.approx(back[name])
    assert forth["volume_error_relative"] * back["volume_error_relative"] < 0


def test_twice_the_spacing_gives_twice_the_distance_and_eight_times_the_volume():
    reference, prediction = _blobs(2, (8, 20, 22))
    small = mask_metrics(reference, prediction, (3.0, 0.6, 0.8))
    large = mask_metrics(reference, prediction, (6.0, 1.2, 1.6))
    assert large["hd95"] == pytest.approx(2 * small["hd95"])
    assert large["assd"] == pytest.approx(2 * small["assd"])
    assert large["volume_error_ml"] == pytest.approx(8 * small["volume_error_ml"])
    assert large["dice"] == small["dice"]
    assert large["nsd"] < small["nsd"]  # one millimetre is less of a large object


def test_the_spacing_belongs_to_its_axis():
    reference = _mask((6, 6, 6), slice(2, 3), slice(2, 3), slice(2, 3))
    for axis, spacing in enumerate((3.0, 0.5, 0.25)):
        prediction = np.roll(reference, 1, axis=axis)
        assert mask_metrics(reference, prediction, (3.0, 0.5, 0.25))["assd"] == pytest.approx(spacing)


def test_one_millimetre_from_a_rounded_header_is_within_the_tolerance():
    reference = _mask((3, 9), slice(1, 2), slice(1, 2))
    prediction = np.roll(reference, 5, axis=1)
    assert mask_metrics(reference, prediction, (0.2, 0.20000000298))["nsd"] == 1.0


def test_empty_masks_follow_the_table():
    empty, full = np.zeros((5, 8, 8), bool), _mask((5, 8, 8), slice(1, 3), slice(2, 4), slice(2, 4))
    spacing = (3.0, 0.5, 0.5)
    diagonal = np.sqrt(15.0**2 + 4.0**2 + 4.0**2)
    for (no_reference, no_prediction), rules in EMPTY_RULES.items():
        found = mask_metrics(empty if no_reference else full, empty if no_prediction else full, spacing)
        assert set(found) == set(METRICS)
        for name, value in rules.items():
            expected = diagonal if value == "diagonal" else value
            assert found[name] == pytest.approx(expected, nan_ok=True), (no_reference, no_prediction, name)
    volume = 2 * 2 * 2 * 0.75 / 1000
    assert mask_metrics(full, empty, spacing)["volume_error_ml"] == pytest.approx(volume)
    assert mask_metrics(empty, full, spacing)["volume_error_ml"] == pytest.approx(volume)
    assert mask_metrics(empty, empty, spacing)["volume_error_ml"] == 0.0


def test_a_missed_organ_is_never_better_than_any_prediction():
    reference, prediction = _mask((4, 9), slice(0, 1), slice(0, 1)), _mask((4, 9), slice(3, 4), slice(8, 9))
    missed = mask_metrics(reference, np.zeros_like(reference), (1.0, 1.0))
    assert missed["hd95"] > mask_metrics(reference, prediction, (1.0, 1.0))["hd95"]


def test_a_mask_at_the_edge_of_the_image_has_its_surface_there():
    # a filled 5 x 5 image against its inner 3 x 3: each edge pixel is surface, d = 1 or sqrt(2) at the corners
    reference, prediction = np.ones((5, 5), bool), _mask((5, 5), slice(1, 4), slice(1, 4))
    from_reference, from_prediction = surface_distances(reference, prediction, (1.0, 1.0))
    assert sorted(set(np.round(from_reference, 6))) == [1.0, round(2**0.5, 6)]
    assert len(from_reference) == 16
    np.testing.assert_allclose(from_prediction, 1.0)


def test_a_margin_around_the_object_changes_nothing():
    reference, prediction = (np.pad(mask, 1) for mask in _blobs(3, (6, 16, 16)))
    wide = [np.pad(mask, ((2, 1), (5, 0), (0, 7))) for mask in (reference, prediction)]
    inner, outer = (mask_metrics(*pair, (2.0, 1.0, 0.5)) for pair in ((reference, prediction), wide))
    assert inner == outer
    assert wide[0][joint_box(wide[0])].sum() == reference.sum()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("shape", "spacing"), [((10, 24, 22), (3.6, 0.6, 0.7)), ((40, 36), (0.8, 0.4))])
def test_distances_agree_with_monai_on_random_masks(seed: int, shape: tuple[int, ...], spacing: tuple[float, ...]):
    pytest.importorskip("monai")
    reference, prediction = _blobs(seed, shape)
    found = mask_metrics(reference, prediction, spacing)
    for name, value in _monai(reference, prediction, spacing).items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_distances_agree_with_monai_on_real_masks(sample_data: Path):
    pytest.importorskip("monai")
    folder = sample_data / "prostate/picai_labels/anatomical_delineations/whole_gland/AI"
    maps = [read_label_map(folder / name / "11373_1001396.nii.gz") for name in ("Bosma22b", "Guerbet23")]
    spacing = maps[0].spacing
    assert spacing == pytest.approx((3.0, 0.5, 0.5), abs=1e-3)
    masks = [labels.values > 0 for labels in maps]
    found = mask_metrics(*masks, spacing)
    assert 0.8 < found["dice"] < 1
    for name, value in _monai(*masks, spacing).items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_distances_agree_with_monai_on_three_real_classes(sample_data: Path):
    pytest.importorskip("monai")
    folder = sample_data / "cardiac/ACDC/training/patient041"
    truth, guess = (read_label_map(folder / f"patient041_frame{frame}_gt.nii.gz") for frame in ("01", "11"))
    found = class_metrics(truth.values, guess.values, truth.spacing, {"RV": (1,), "MYO": (2,), "LV": (3,)})
    for value, name in enumerate(("RV", "MYO", "LV"), 1):
        expected = _monai(truth.values == value, guess.values == value, truth.spacing)
        for metric, number in expected.items():
            assert found[name][metric] == pytest.approx(number, rel=1e-5, abs=1e-5), (name, metric)


def test_a_region_is_the_union_of_its_labels():
    truth, guess = np.array([[1, 2, 3, 0]]), np.array([[2, 1, 0, 0]])
    found = class_metrics(truth, guess, (1.0, 1.0), {"whole": (1, 2, 3), "core": (2, 3), "one": (1,)})
    assert found["whole"]["dice"] == pytest.approx(2 * 2 / 5)
    assert found["core"]["dice"] == 0.0
    assert found["one"]["dice"] == 0.0


def test_ignored_voxels_count_for_neither_side():
    truth, guess = np.array([[1, 1, 9, 9, 0, 0]]), np.array([[1, 1, 1, 0, 0, 0]])
    assert class_metrics(truth, guess, (1.0, 1.0), {"organ": (1,)}, ignore=9)["organ"]["dice"] == 1.0
    assert class_metrics(truth, guess, (1.0, 1.0), {"organ": (1,)})["organ"]["dice"] == pytest.approx(0.8)
    # a region that lists every label never swallows the ignore label
    assert class_metrics(truth, guess, (1.0, 1.0), {"all": (1, 9)}, ignore=9)["all"]["dice"] == 1.0


def test_masks_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="spacing"):
        mask_metrics(np.ones((2, 3), bool), np.ones((3, 2), bool), (1.0, 1.0))
