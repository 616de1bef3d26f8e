"""Losses and gate beyond the stored vectors: hand-computed cases, white and unknown pixels, closed gates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nnunet_dgplugins.methods.dcam import gate
from nnunet_dgplugins.methods.dcam.losses import (
    IGNORE,
    LAYER_WEIGHTS,
    easy_example_weights,
    layered_loss,
    tag_agreement,
    tag_loss,
)
from nnunet_dgplugins.methods.dcam.masks import present_classes

PUBLISHED = {"dummy_logit": True, "count_white": True, "divide_by_batch": True}


def made(classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 6, 6, generator=generator).requires_grad_()
    return logits, {layer: torch.randint(0, classes, (2, 6, 6), generator=generator) for layer in LAYER_WEIGHTS}


def published(logits: torch.Tensor, masks: dict[str, torch.Tensor]) -> torch.Tensor:
    """The released arithmetic: a further channel of 100 on white pixels, means over all pixels, divided by N."""
    white = logits.shape[1]
    extra = 100.0 * (masks["bn7"] == white).unsqueeze(1)
    scores = torch.cat([logits, extra], 1)
    return sum(weight * F.cross_entropy(scores, masks[layer]) / len(logits) for layer, weight in LAYER_WEIGHTS.items())


def test_the_loss_is_the_weighted_cross_entropy_of_the_three_masks():
    logits, masks = made()
    found = layered_loss(logits, masks)
    for layer in LAYER_WEIGHTS:
        torch.testing.assert_close(found[layer], F.cross_entropy(logits, masks[layer]))
    torch.testing.assert_close(found["total"], 0.6 * found["bn7"] + 0.2 * found["b5_2"] + 0.2 * found["b4_5"])


@pytest.mark.parametrize("classes", [2, 4])
def test_the_published_form_equals_the_released_arithmetic_for_any_number_of_classes(classes):
    logits, masks = made(classes)
    for mask in masks.values():
        mask[0, :2] = classes
    found = layered_loss(logits, masks, **PUBLISHED)["total"]
    expected = published(logits, masks)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_white_and_unknown_pixels_cost_nothing_and_do_not_count():
    logits, masks = made()
    expected = {layer: F.cross_entropy(logits[:1], masks[layer][:1]) for layer in masks}
    for mask in masks.values():
        mask[1, :3], mask[1, 3:] = 3, IGNORE
    found = layered_loss(logits, masks)
    for layer, value in expected.items():
        torch.testing.assert_close(found[layer], value)
    (gradient,) = torch.autograd.grad(found["total"], logits)
    assert float(gradient[1].abs().max()) == 0
    counted = layered_loss(logits, masks, count_white=True)
    for layer, value in expected.items():  # 36 tissue and 18 white pixels
        torch.testing.assert_close(counted[layer], value * 36 / 54)


@pytest.mark.parametrize("value", [3, IGNORE])
def test_a_batch_without_a_known_pixel_has_the_loss_zero_and_trains_on(value):
    logits, masks = made()
    for mask in masks.values():
        mask[:] = value
    total = layered_loss(logits, masks)["total"]
    assert total.item() == 0
    total.backward()
    assert float(logits.grad.abs().max()) == 0


def test_the_dummy_logit_pulls_all_logits_up():
    logits, masks = made()
    found = layered_loss(logits, masks, dummy_logit=True)["bn7"]
    chosen = logits.gather(1, masks["bn7"].unsqueeze(1))[:, 0]
    torch.testing.assert_close(found, ((1 + logits.exp().sum(1)).log() - chosen).mean())
    torch.testing.assert_close(layered_loss(logits + 1, masks)["bn7"], layered_loss(logits, masks)["bn7"])
    assert layered_loss(logits + 1, masks, dummy_logit=True)["bn7"] < found


def test_one_layer_alone_and_other_weights_can_be_asked_for():
    logits, masks = made()
    found = layered_loss(logits, masks, weights={"b5_2": 2.0})
    assert set(found) == {"b5_2", "total"}
    torch.testing.assert_close(found["total"], 2 * F.cross_entropy(logits, masks["b5_2"]))


def test_the_focal_option_shrinks_small_losses_most():
    logits, masks = made()
    mean = layered_loss(logits, masks)["bn7"]
    expected = 0.5 * (1 - torch.exp(-mean)) ** 2 * mean
    torch.testing.assert_close(layered_loss(logits, masks, focal=True)["bn7"], expected)


def test_half_precision_logits_give_a_float32_loss():
    logits, masks = made()
    found = layered_loss(logits.detach().half(), {layer: mask.to(torch.uint8) for layer, mask in masks.items()})
    assert found["total"].dtype == torch.float32
    torch.testing.assert_close(found["total"], layered_loss(logits.detach(), masks)["total"], rtol=1e-3, atol=1e-3)
    assert tag_loss(logits.detach().half().mean((2, 3)), torch.ones(2, 3)).dtype == torch.float32


def test_easy_pixels_weigh_more_except_where_an_image_has_a_single_label():
    losses = torch.tensor([[[0.1, 2.0], [0.1, 0.0]], [[0.1, 2.0], [0.1, 0.0]]])
    labels = torch.tensor([[[0, 1], [1, IGNORE]], [[2, 2], [2, IGNORE]]])
    weights = easy_example_weights(losses, labels)
    assert float(weights[0].mean()) == pytest.approx(1)
    assert weights[0, 0, 0] > 1 > weights[0, 0, 1]
    assert torch.equal(weights[1], torch.ones(2, 2))
    assert not easy_example_weights(losses.requires_grad_(), labels).requires_grad


def test_easy_example_mining_lowers_the_loss_of_a_hard_pixel():
    logits, masks = made()
    plain, mined = (layered_loss(logits, masks, easy_examples=on)["total"] for on in (False, True))
    assert mined < plain


def test_the_tag_loss_is_the_mean_binary_cross_entropy():
    logits = torch.tensor([[0.0, 2.0]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert float(tag_loss(logits, torch.tensor([[1, 0]]))) == pytest.approx(expected)


def test_agreement_of_equal_overlapping_disjoint_and_empty_sets():
    logits = torch.tensor([[5.0, -5.0, -5.0], [5.0, 5.0, -5.0], [5.0, -5.0, -5.0], [-5.0, -5.0, -5.0]])
    exact, jaccard = tag_agreement(logits, torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0]]))
    assert exact.tolist() == [True, False, False, True]
    assert jaccard.tolist() == pytest.approx([1, 1 / 3, 0, 1])


def test_closed_classes_never_win_and_a_gate_without_an_open_class_is_ignored():
    probabilities = torch.tensor([[0.05, 0.9, 0.5], [0.01, 0.02, 0.1]])
    opened = gate.open_classes(probabilities)
    assert opened.tolist() == [[False, True, True], [True, True, True]]
    logits = torch.tensor([[3.0, -1.0, -2.0], [3.0, 1.0, 2.0]]).view(2, 3, 1, 1).expand(2, 3, 4, 4)
    for closed in (-math.inf, gate.DEPLOYED_CLOSED):
        found = gate.close(logits, opened, closed)
        assert found.argmax(1)[:, 0, 0].tolist() == [1, 0]
        assert float(found[0, 0, 0, 0]) == closed
        assert torch.equal(found[:, 1:], logits[:, 1:])
    assert gate.close(logits, opened, gate.DEPLOYED_CLOSED).half().isfinite().all()


def test_where_background_is_a_class_nothing_at_all_may_be_open_or_take_part():
    probabilities = torch.tensor([[0.05], [0.2], [0.9]])
    assert gate.open_classes(probabilities, background=True)[:, 0].tolist() == [False, True, True]
    assert present_classes(probabilities, background=True)[:, 0].tolist() == [False, False, True]
    assert present_classes(probabilities)[:, 0].tolist() == [True, True, True]


def test_the_published_gate_lets_a_closed_class_win_over_negative_logits():
    logits = torch.tensor([[3.0, -1.0, -2.0]]).view(1, 3, 1, 1)
    probabilities = torch.tensor([[0.05, 0.9, 0.5]])
    assert int(gate.published_gate(logits, probabilities).argmax(1)) == 0
    assert int(gate.close(logits, gate.open_classes(probabilities)).argmax(1)) == 1
