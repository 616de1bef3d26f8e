"""Scores of a whole set from one confusion matrix: hand-counted cases."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_dgplugins.evaluation.confusion import confusion, dataset_scores


def test_pixels_are_counted_by_truth_and_prediction():
    truth, prediction = np.array([[1, 1, 2], [2, 2, 1]]), np.array([[1, 2, 2], [2, 1, 1]])
    assert confusion(truth, prediction, (1, 2)).tolist() == [[2, 1, 0], [1, 2, 0]]


def test_truth_outside_the_classes_does_not_count_and_a_prediction_outside_is_wrong():
    truth, prediction = np.array([0, 1, 1, 3, 255], np.uint8), np.array([1, 1, 9, 1, 1], np.uint8)
    matrix = confusion(truth, prediction, (1, 2))
    assert matrix.tolist() == [[1, 0, 1], [0, 0, 0]]
    found = dataset_scores(matrix)
    assert found.ious[0] == found.accuracy == 0.5


def test_scores_are_those_counted_by_hand():
    found = dataset_scores(np.array([[6, 2], [1, 3]]))
    assert found.ious.tolist() == pytest.approx([6 / 9, 3 / 6])
    assert found.miou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert found.fwiou == pytest.approx(8 / 12 * 6 / 9 + 4 / 12 * 3 / 6)
    assert found.accuracy == pytest.approx(9 / 12)
    assert found.class_accuracy == pytest.approx((6 / 8 + 3 / 4) / 2)


def test_a_class_that_nobody_has_is_left_out_of_the_means():
    found = dataset_scores(np.array([[4, 0, 0], [0, 0, 0], [2, 0, 2]]))
    assert np.isnan(found.ious[1])
    assert found.miou == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert found.class_accuracy == pytest.approx((1 + 0.5) / 2)


def test_a_class_only_predicted_has_no_accuracy_but_an_iou_of_zero():
    found = dataset_scores(np.array([[3, 1], [0, 0]]))
    assert found.ious.tolist() == [0.75, 0.0]
    assert found.class_accuracy == 0.75
    assert found.fwiou == 0.75


def test_matrices_of_cases_add_up_to_that_of_the_set():
    generator = np.random.default_rng(0)
    truth, prediction = generator.integers(0, 5, (2, 3, 8, 8))
    parts = sum(confusion(t, p, range(4)) for t, p in zip(truth, prediction, strict=True))
    np.testing.assert_array_equal(parts, confusion(truth, prediction, range(4)))


def test_an_empty_set_has_no_scores():
    found = dataset_scores(confusion(np.full(4, 9), np.zeros(4, int), (0, 1)))
    assert all(np.isnan(value) for value in (found.miou, found.fwiou, found.accuracy, found.class_accuracy))


def test_maps_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"truth \(2,\), prediction \(3,\)"):
        confusion(np.zeros(2, int), np.zeros(3, int), (0,))
