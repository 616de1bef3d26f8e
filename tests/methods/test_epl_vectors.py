"""EPL against the outputs of the released code, stored in ``tests/vectors/epl``.

Everything is read from the files, so the same tests hold for files made with another seed.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_dgplugins.methods import spectral
from nnunet_dgplugins.methods.epl import cutmix, losses, raters
from nnunet_dgplugins.methods.epl.deeplab import ASPP
from nnunet_dgplugins.methods.epl.step import Passes, UnlabelledImages, batched_passes, published_passes

FOLDER = Path(os.environ.get("DGPLUGINS_VECTORS") or Path(__file__).parents[1] / "vectors") / "epl"
SCALAR = {"rtol": 1e-5, "atol": 0}
GRADIENT = {"rtol": 0, "atol": 1e-6}
NUMBERS = (1, 2)


@lru_cache
def vector(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensor(name: str, key: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.asarray(vector(name)[key])).to(dtype)


def cases(name: str, prefix: str) -> list[str]:
    found = sorted({key.split("_")[1] for key in vector(name) if key.startswith(f"{prefix}_")})
    assert found
    return found


def image(key: str) -> torch.Tensor:
    """(H, W, C) of the file as (1, C, H, W)."""
    return tensor("fourier_mix", key).permute(2, 0, 1)[None]


def assert_image(found: torch.Tensor, key: str, atol: float) -> None:
    expected = vector("fourier_mix")[key]
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=atol, rtol=0, err_msg=key)


@pytest.mark.parametrize(("own", "other"), [("src", "ref"), ("ref", "src")])
def test_the_window_swap_matches_the_released_code(own, other):
    for case in cases("fourier_mix", "as"):
        fraction, strength, half = (vector("fourier_mix")[f"as_{case}_{key}"].item() for key in ("L", "lam", "half"))
        images, partners = image(f"as_{case}_{own}"), image(f"as_{case}_{other}")
        assert spectral.half_width(*images.shape[-2:], fraction) == half
        found = spectral.window_swap(images, partners, fraction, strength)
        assert found.dtype == torch.float32
        assert_image(found, f"as_{case}_out_{own}", 2e-6)


@pytest.mark.parametrize(("own", "other"), [("src", "ref"), ("ref", "src")])
def test_the_full_mix_matches_the_released_code(own, other):
    for case in cases("fourier_mix", "am"):
        strength, ratio = (vector("fourier_mix")[f"am_{case}_{key}"].item() for key in ("lam", "ratio"))
        found = spectral.full_mix(image(f"am_{case}_{own}"), image(f"am_{case}_{other}"), strength, ratio)
        assert found.dtype == torch.float32
        assert_image(found, f"am_{case}_out_{own}", 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_disagreement_confidence_and_their_gradients_match_the_released_code(dtype):
    name = "confidence_variance"
    plain = tensor(name, "logits_orig", dtype).requires_grad_()
    styled = tensor(name, "logits_aug", dtype).requires_grad_()
    variance = losses.disagreement(plain, styled)
    confidence = torch.exp(-variance)
    found = {"variance": variance, "confidence": confidence}
    for key, value in (("meanvar", variance), ("meanconf", confidence)):
        gradients = torch.autograd.grad(value.mean(), (plain, styled), retain_graph=True)
        found |= {f"grad_{key}_orig": gradients[0], f"grad_{key}_aug": gradients[1]}
    for key, value in found.items():
        np.testing.assert_allclose(value.detach().numpy(), vector(name)[key], atol=5e-6, rtol=1e-4, err_msg=key)


class Stored:
    """A network that answers with stored logits, in the order in which it is asked."""

    def __init__(self, name: str, number: int, batched: bool, dtype: torch.dtype):
        def logits(key: str) -> torch.Tensor:
            return tensor(name, f"model{number}_{key}", dtype)

        teacher = [logits(key) for key in ("u0", "a0", "u1", "a1")]
        self.leaves = {key: logits(key).requires_grad_() for key in ("mix", "amix", "lab")}
        student = list(self.leaves.values())
        answers = [torch.cat(teacher), torch.cat(student)] if batched else [*teacher, *student]
        self.answers = iter(answers)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        answer = next(self.answers)
        assert len(x) == len(answer)
        return answer


def run(name: str, batched: bool, dtype: torch.dtype) -> tuple[list[Stored], Passes]:
    networks = [Stored(name, number, batched, dtype) for number in NUMBERS]
    masks = tensor(name, "cutmix_mask")
    blank = torch.zeros_like(masks)
    images = UnlabelledImages(blank, blank, blank, blank, masks)
    return networks, (batched_passes if batched else published_passes)(networks, images, blank)


def assert_gradients(loss: torch.Tensor, networks: list[Stored], name: str, prefix: str) -> None:
    """Compare with every stored gradient that starts with ``prefix``; there must be one."""
    wanted = [key for key in vector(name) if key.startswith(prefix)]
    assert wanted
    leaves = [(n, key, leaf) for n, net in zip(NUMBERS, networks, strict=True) for key, leaf in net.leaves.items()]
    found = torch.autograd.grad(loss, [leaf for *_, leaf in leaves], allow_unused=True, retain_graph=True)
    gradients = {f"{prefix}{n}_{key}": gradient for (n, key, _), gradient in zip(leaves, found, strict=True)}
    for key in wanted:
        np.testing.assert_allclose(gradients[key].numpy(), vector(name)[key], **GRADIENT, err_msg=key)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_step_matches_the_released_code(batched, dtype):
    name, expected = "cacps_step", vector("cacps_step")
    networks, passes = run(name, batched, dtype)
    weight, target = expected["cps_weight"].item(), tensor(name, "label_onehot")
    for number in NUMBERS:
        np.testing.assert_array_equal(passes.labels[number - 1].numpy(), expected[f"pseudo_label_{number}"])

    terms = {
        confidence: losses.cross_pseudo_supervision(
            passes.plain, passes.styled, passes.labels, cps_weight=weight, confidence=confidence
        )
        for confidence in losses.CONFIDENCES
    }
    supervised = [losses.supervised_dice(logits, target) for logits in passes.labelled]
    total = sum(supervised) + terms["batch"]["total"]
    found = {
        "ce_model1_on_pl2": terms["batch"]["ce_1"],
        "ce_model2_on_pl1": terms["batch"]["ce_2"],
        "cps_weighted": terms["batch"]["total"],
        "pixelwise_cps_weighted": terms["pixel"]["total"],
        "sup_model1": supervised[0],
        "sup_model2": supervised[1],
        "total": total,
    }
    for key, value in found.items():
        np.testing.assert_allclose(value.item(), expected[key], **SCALAR, err_msg=key)
    assert_gradients(total, networks, name, "grad_model")
    assert_gradients(terms["pixel"]["total"], networks, name, "pixelwise_grad_model")


@pytest.mark.parametrize("batched", [False, True])
def test_the_scgm_schedule_leaves_the_unlabelled_loss_out_until_it_starts(batched):
    name, expected = "cacps_step_scgm", vector("cacps_step_scgm")
    networks, passes = run(name, batched, torch.float32)
    target = tensor(name, "label_onehot")
    supervised = [losses.supervised_dice(logits, target, channel=0) for logits in passes.labelled]
    epochs = sorted({int(match[1]) for key in expected if (match := re.match(r"epoch(\d+)_", key))})
    assert epochs
    for epoch in epochs:
        unlabelled = {
            weight: losses.cross_pseudo_supervision(
                passes.plain, passes.styled, passes.labels, cps_weight=weight, confidence="batch"
            )["total"]
            for weight in (losses.CPS_WEIGHT, losses.cps_weight_at(epoch, start_epoch=4))
        }
        total = sum(supervised) + unlabelled[losses.cps_weight_at(epoch, start_epoch=4)]
        found = {"cps_weighted": unlabelled[losses.CPS_WEIGHT], "sup1": supervised[0], "sup2": supervised[1]}
        for key, value in {**found, "total": total}.items():
            np.testing.assert_allclose(
                value.item(), expected[f"epoch{epoch}_{key}"], **SCALAR, err_msg=f"{epoch} {key}"
            )
        assert_gradients(total, networks, name, f"epoch{epoch}_grad_model")


@pytest.mark.parametrize("as_labels", [False, True])
def test_supervised_dice_losses_match_the_released_code(as_labels):
    name, expected = "supervised_dice", vector("supervised_dice")

    def target(key: str) -> torch.Tensor:
        one_hot = tensor(name, key)
        return one_hot.argmax(1) if as_labels else one_hot

    logits = tensor(name, "logits").requires_grad_()
    scgm = tensor(name, "scgm_logits").requires_grad_()
    total = losses.supervised_dice(logits, target("target_onehot"))
    grey = losses.supervised_dice(scgm, target("scgm_target_onehot"), channel=0)
    per_class = losses.dice_losses(logits, target("target_onehot"))
    np.testing.assert_allclose(per_class.detach().numpy(), expected["per_class"], rtol=1e-5)
    np.testing.assert_allclose(total.item(), expected["total"], **SCALAR)
    np.testing.assert_allclose(grey.item(), expected["scgm_loss"], **SCALAR)
    for loss, leaf, key in ((total, logits, "grad_logits"), (grey, scgm, "scgm_grad_logits")):
        (gradient,) = torch.autograd.grad(loss, leaf)
        np.testing.assert_allclose(gradient.numpy(), expected[key], **GRADIENT, err_msg=key)


def test_an_empty_prediction_of_an_empty_target_costs_nothing():
    logits = torch.tensor([-200.0, 0.0]).view(1, 2, 1, 1).expand(2, 2, 5, 5)
    found = losses.supervised_dice(logits, torch.ones(2, 5, 5, dtype=torch.long), channel=0)
    np.testing.assert_allclose(found.item(), vector("supervised_dice")["empty_both"], atol=1e-7)


def test_cutmix_masks_are_painted_exactly_as_in_the_released_code():
    expected = vector("cutmix_boxes")
    draws = np.concatenate(
        [expected["draw_area"][..., None], expected["draw_aspect"][..., None], expected["draw_position"]], axis=-1
    )
    masks = cutmix.paint_boxes(torch.from_numpy(draws), [int(side) for side in expected["shape"]])
    np.testing.assert_array_equal(masks.numpy(), expected["masks"])


def test_the_stored_draws_are_areas_then_aspects_then_positions_as_ours_are():
    expected = vector("cutmix_boxes")
    numbers, (count, boxes) = np.random.RandomState(int(expected["seed"])), expected["draw_area"].shape
    np.testing.assert_allclose(numbers.uniform(*cutmix.AREA, (count, boxes)), expected["draw_area"])
    np.testing.assert_allclose(numbers.uniform(0, 1, (count, boxes)), expected["draw_aspect"])
    np.testing.assert_allclose(numbers.uniform(0, 1, (count, boxes, 2)), expected["draw_position"])
    drawn = cutmix.sample_boxes(count, torch.Generator().manual_seed(5), boxes)
    stream = torch.rand(count * boxes * 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    low, high = cutmix.AREA
    torch.testing.assert_close(drawn[..., 0].flatten(), low + (high - low) * stream[: count * boxes])
    torch.testing.assert_close(drawn[..., 1].flatten(), stream[count * boxes : 2 * count * boxes])
    torch.testing.assert_close(drawn[..., 2:].flatten(), stream[2 * count * boxes :])


def test_evaluation_matches_the_released_inference():
    expected = vector("eval_dice")
    mean = losses.mean_probability(tensor("eval_dice", "logits_1"), tensor("eval_dice", "logits_2"))
    prediction, truth = mean > 0.5, tensor("eval_dice", "gt_onehot")
    np.testing.assert_allclose(mean.numpy(), expected["mean_prob"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(prediction.numpy(), expected["pred"])
    foreground = range(truth.shape[1] - 1)
    for joint, key in ((True, "dice_joint_per_slice"), (False, "dice_per_class_per_slice")):
        found = losses.slice_dice(prediction, truth, foreground, joint)
        np.testing.assert_allclose(found.numpy(), expected[key], rtol=1e-6, err_msg=key)


@torch.no_grad()
def test_the_aspp_block_matches_the_released_code():
    expected = vector("aspp")
    state = {
        key.removeprefix("param/"): torch.from_numpy(np.asarray(value))
        for key, value in expected.items()
        if key.startswith("param/")
    }
    found = {"train": run_aspp(state, training=True)}
    if state["map_bn.num_batches_tracked"] == 1:
        # the file's running statistics were saved behind its training pass, before which its evaluation pass ran
        found["eval"] = run_aspp(before_one_update(state, found["train"][1]), training=False)
    else:
        found["eval"] = run_aspp(state, training=False)
    for mode, (output, _) in found.items():
        np.testing.assert_allclose(output.numpy(), expected[f"out_{mode}"], atol=2e-5, rtol=0, err_msg=mode)


def run_aspp(state: dict[str, torch.Tensor], training: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output and the state behind it."""
    hidden, channels = state["global_pooling_conv.weight"].shape[:2]
    block = ASPP(channels, out_channels=len(state["red_bn.weight"]), hidden_channels=hidden)
    block.load_state_dict(state, strict=True)  # official names, all of them and nothing else
    return block.train(training)(tensor("aspp", "x")), block.state_dict()


def before_one_update(state: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the update by 0.1 that leads to ``state``, given the state that the same batch leads to from there."""
    undone = {key: (1.9 * value - after[key]) / 0.9 for key, value in state.items() if "running" in key}
    return {**state, **undone}


def test_raters_are_fused_and_slices_scaled_as_in_the_released_preparation():
    expected = vector("scgm_rater_fusion")
    fused = raters.fuse_raters(expected["raters"])
    np.testing.assert_array_equal(fused.cord, expected["spinal_cord"])
    np.testing.assert_array_equal(fused.grey, expected["gray_matter"])
    found = raters.divide_by_slice_maximum(expected["image"])
    np.testing.assert_allclose(found, expected["image_norm"], atol=1e-6)
