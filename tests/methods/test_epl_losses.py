"""EPL's losses beyond the stored vectors: where gradients go, extremes, precision, volumes."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_dgplugins.methods.epl.losses import (
    CONFIDENCES,
    cps_weight_at,
    cross_pseudo_supervision,
    dice_losses,
    disagreement,
    mean_probability,
    pseudo_labels,
    slice_dice,
    supervised_dice,
)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 6, 7), generator=torch.Generator().manual_seed(seed)).requires_grad_()


def students() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    plain, styled = [logits(0), logits(1)], [logits(2), logits(3)]
    return plain, styled, [logits(4).argmax(1), logits(5).argmax(1)]


def reaches(loss: torch.Tensor, *tensors: torch.Tensor) -> list[bool]:
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    return [gradient is not None and bool(gradient.any()) for gradient in gradients]


def test_pseudo_labels_follow_the_mean_of_both_logits():
    plain, styled = torch.tensor([[3.0, 0.0]]).view(1, 2, 1, 1), torch.tensor([[0.0, 4.0]]).view(1, 2, 1, 1)
    assert pseudo_labels(plain, styled).tolist() == [[[1]]]
    assert pseudo_labels(2 * plain, styled).tolist() == [[[0]]]


def test_disagreement_is_the_divergence_of_the_fourier_version_from_the_image():
    plain, styled = torch.tensor([0.0, 0.0]).view(1, 2, 1), torch.tensor([math.log(3), 0.0]).view(1, 2, 1)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert disagreement(plain, styled).item() == pytest.approx(expected)
    other_way = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert disagreement(styled, plain).item() == pytest.approx(other_way)


def test_agreement_is_zero_and_shifted_logits_agree():
    plain = logits(0)
    torch.testing.assert_close(disagreement(plain, plain + 5), torch.zeros(2, 6, 7), atol=1e-6, rtol=0)


def test_a_hand_computed_pixel_gives_the_loss():
    flat, sure = torch.zeros(1, 2, 1), torch.tensor([math.log(3), 0.0]).view(1, 2, 1)
    labels = [torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)]
    terms = cross_pseudo_supervision([flat, flat], [flat, sure], labels, cps_weight=2.0)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    trust = math.exp(-divergence)
    assert terms["supervision_1"].item() == pytest.approx(trust * math.log(2))  # labels and trust of network 2
    assert terms["supervision_2"].item() == pytest.approx(math.log(2))
    assert terms["disagreement_1"].item() == 0
    assert terms["confidence_2"].item() == pytest.approx(trust)
    assert terms["total"].item() == pytest.approx(2 * (trust * math.log(2) + math.log(2) + divergence))


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_gradients_go_through_confidence_and_disagreement_into_both_versions(confidence):
    plain, styled, labels = students()
    terms = cross_pseudo_supervision(plain, styled, labels, confidence=confidence)
    # network 1 learns from network 2's labels, weighted by network 2's confidence
    assert reaches(terms["supervision_1"], *plain, *styled) == [True, True, False, True]
    assert reaches(terms["supervision_2"], *plain, *styled) == [True, True, True, False]
    assert reaches(terms["disagreement_1"], *plain, *styled) == [True, False, True, False]
    assert reaches(terms["disagreement_2"], *plain, *styled) == [False, True, False, True]
    for name in ("ce_1", "ce_2", "confidence_1", "confidence_2"):
        assert not terms[name].requires_grad


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_detached_confidence_leaves_the_loss_and_cuts_its_gradient_alone(confidence):
    plain, styled, labels = students()
    kept = cross_pseudo_supervision(plain, styled, labels, confidence=confidence)
    cut = cross_pseudo_supervision(plain, styled, labels, confidence=confidence, detach_confidence=True)
    for name, value in kept.items():
        torch.testing.assert_close(cut[name], value)
    assert reaches(cut["supervision_1"], *plain, *styled) == [True, False, False, False]
    assert reaches(cut["supervision_2"], *plain, *styled) == [False, True, False, False]
    assert reaches(cut["disagreement_1"], *plain, *styled) == [True, False, True, False]


def test_doubt_at_one_pixel_counts_there_in_pixel_mode_and_everywhere_in_batch_mode():
    flat, labels = torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long)
    learns = torch.tensor([[[0.0, 50.0], [0.0, 0.0]]])  # wrong by chance at pixel 0, certain and right at pixel 1
    doubt = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]])  # network 2 is in doubt at pixel 0
    found = {
        confidence: cross_pseudo_supervision([learns, flat], [learns, doubt], [labels, labels], confidence=confidence)[
            "supervision_1"
        ].item()
        for confidence in CONFIDENCES
    }
    trust = math.exp(-disagreement(flat, doubt)[0, 0].item())
    assert found["pixel"] == pytest.approx(trust * math.log(2) / 2)
    assert found["batch"] == pytest.approx((trust + 1) / 2 * math.log(2) / 2)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(size):
    plain, styled, labels = students()
    terms = cross_pseudo_supervision([size * x for x in plain], [size * x for x in styled], labels)
    loss = terms["total"] + supervised_dice(size * plain[0], labels[0])
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (*plain, *styled))


def test_half_precision_logits_are_raised_to_float32():
    plain, styled, labels = students()
    half = [[x.detach().bfloat16() for x in pair] for pair in (plain, styled)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_pseudo_supervision(*half, labels)
        assert disagreement(half[0][0], half[1][0]).dtype == torch.float32
        assert dice_losses(half[0][0], labels[0]).dtype == torch.float32
        assert mean_probability(*half[0]).dtype == torch.float32
    expected = cross_pseudo_supervision(*[[x.float() for x in pair] for pair in half], labels)
    assert found["total"].dtype == torch.float32
    torch.testing.assert_close(found["total"], expected["total"])


def test_volumes_and_a_batch_of_one_are_served():
    shape = (1, 3, 4, 5, 6)
    plain, styled = [logits(0, *shape), logits(1, *shape)], [logits(2, *shape), logits(3, *shape)]
    labels = [pseudo_labels(a, b) for a, b in zip(plain, styled, strict=True)]
    flat = [[x.flatten(3) for x in pair] for pair in (plain, styled)]
    found = cross_pseudo_supervision(plain, styled, labels)["total"]
    torch.testing.assert_close(found, cross_pseudo_supervision(*flat, [x.flatten(2) for x in labels])["total"])
    assert dice_losses(plain[0], labels[0]).shape == (3,)


def test_an_unknown_confidence_is_refused():
    with pytest.raises(ValueError, match="pixel"):
        cross_pseudo_supervision(*students(), confidence="image")


@pytest.mark.parametrize(("start", "expected"), [(0, [3, 3, 3, 3, 3, 3]), (4, [0, 0, 0, 0, 3, 3])])
def test_the_unlabelled_loss_starts_at_its_epoch_without_a_ramp(start, expected):
    assert [cps_weight_at(epoch, start) for epoch in range(6)] == expected


def test_dice_is_taken_over_the_whole_batch():
    sure = torch.full((2, 2, 4), -50.0)
    sure[0, 1], sure[1, 0] = 50.0, 50.0
    target = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    # class 1: 4 found of 6; class 0: 4 predicted, 2 of them right
    expected = [1 - (2 * 2 + 0.1) / (4 + 2 + 0.1), 1 - (2 * 4 + 0.1) / (4 + 6 + 0.1)]
    assert dice_losses(sure, target).tolist() == pytest.approx(expected)
    assert supervised_dice(sure, target).item() == pytest.approx(sum(expected))
    assert supervised_dice(sure, target, channel=1).item() == pytest.approx(expected[1])


def test_pixels_with_an_ignore_label_count_nowhere_and_get_no_gradient():
    values, target = logits(0), logits(1).argmax(1)
    target[:, :2] = 3
    loss = supervised_dice(values, target)
    torch.testing.assert_close(loss, supervised_dice(values[:, :, 2:], target[:, 2:]))
    (gradient,) = torch.autograd.grad(loss, values)
    assert not gradient[:, :, :2].any()
    assert gradient[:, :, 2:].any()
    everywhere = supervised_dice(values, torch.full_like(target, 3))
    assert everywhere.item() == 0
    assert not torch.autograd.grad(everywhere, values)[0].any()


def test_the_losses_can_train_two_networks_to_agree_on_one_image():
    torch.manual_seed(0)
    values = [torch.randn(1, 3, 5, 5, requires_grad=True) for _ in range(4)]
    optimizer = torch.optim.Adam(values, 0.1)
    labels = [torch.arange(25).view(1, 5, 5) % 3] * 2
    for _ in range(150):
        terms = cross_pseudo_supervision(values[:2], values[2:], labels)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
    assert terms["total"].item() < 0.1
    assert all(torch.equal(x.argmax(1), labels[0]) for x in values)


def test_slice_dice_counts_empty_slices_as_right_and_joins_classes_on_request():
    prediction, target = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    prediction[1, 0, 0], target[1, 0] = 1, 1  # two of four pixels of the first class
    joint = slice_dice(prediction, target, (0, 1))
    apart = slice_dice(prediction, target, (0, 1), joint=False)
    assert joint.tolist() == pytest.approx([1, 4 / 6], abs=1e-4)
    assert apart.flatten().tolist() == pytest.approx([1, 1, 4 / 6, 1], abs=1e-4)
