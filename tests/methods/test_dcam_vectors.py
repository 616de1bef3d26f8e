"""D-CAM against the outputs of the released code, stored in ``tests/vectors/dcam``.

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

from nnunet_dgplugins.evaluation.confusion import confusion, dataset_scores
from nnunet_dgplugins.methods.dcam import attention, gate, losses, masks, optimisation, pcnorm, white
from nnunet_dgplugins.methods.dcam.maps import LAYERS, cams, enlarge, grad_cams
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38

FOLDER = Path(os.environ.get("DGPLUGINS_VECTORS") or Path(__file__).parents[1] / "vectors") / "dcam"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TINY = {"rtol": 1e-4, "atol": 1e-6}
TOWER, PCNORM_TOWER = "thin_resnet38_gradcam", "thin_resnet38_pcnorm"


@lru_cache
def vector(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensor(name: str, key: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(vector(name)[key]))


def matching(name: str, pattern: str) -> list[tuple[str, ...]]:
    """The groups of each key that the pattern matches whole; there must be one."""
    found = [match.groups() for key in vector(name) if (match := re.fullmatch(pattern, key))]
    assert found
    return found


def assert_gradient(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Within a thousandth of the largest gradient."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def layer(statistics: str) -> pcnorm.PCNorm:
    """The layer with the stored affine values; statistics ``running`` are stored too, ``fresh`` are 0 and 1."""
    values = {key: tensor("pcnorm", key) for key in ("weight", "bias", "running_mean", "running_var")}
    found = pcnorm.PCNorm(len(values["weight"]), "batch")
    found.load_state_dict({k: v for k, v in values.items() if statistics == "running" or "running" not in k}, False)
    return found


def assert_output(found: torch.Tensor, key: str) -> None:
    torch.testing.assert_close(found, tensor("pcnorm", key), rtol=1e-4, atol=5e-5)


def test_phase_amplitude_and_their_composition_match_the_released_code():
    x = tensor("pcnorm", "x")
    columns = x.shape[-1] // 2 + 1
    phases, amplitudes = (tensor("pcnorm", key)[..., :columns] for key in ("phase", "amplitude"))
    torch.testing.assert_close(pcnorm.amplitude(x), amplitudes, rtol=1e-4, atol=5e-5)
    clear = amplitudes > 1e-3
    for wave in (torch.sin, torch.cos):
        torch.testing.assert_close(wave(pcnorm.phase(x))[clear], wave(phases)[clear], rtol=1e-4, atol=5e-5)
    assert_output(pcnorm.compose(pcnorm.phase(x), pcnorm.amplitude(x), x.shape[-2:]), "recomposed")


def test_pcnorm_with_untouched_statistics_does_nothing_but_scale():
    x = tensor("pcnorm", "x")
    assert_output(pcnorm.PCNorm(x.shape[1], "batch").eval()(x), "y_eval_default")
    assert_output(x / np.sqrt(1 + 1e-5), "y_eval_default")


def test_pcnorm_with_given_statistics_matches_with_its_gradient():
    x = tensor("pcnorm", "x").requires_grad_()
    found = layer("running").eval()(x)
    assert_output(found, "y_eval_random")
    (found * tensor("pcnorm", "cotangent")).sum().backward()
    assert_gradient(x.grad, tensor("pcnorm", "grad_x_eval_random"))


def test_pcnorm_with_batch_statistics_matches_with_all_gradients_and_running_statistics():
    x, norm = tensor("pcnorm", "x").requires_grad_(), layer("fresh").train()
    found = norm(x)
    assert_output(found, "y_train")
    (found * tensor("pcnorm", "cotangent")).sum().backward()
    for parameter, key in ((x, "x"), (norm.weight, "weight"), (norm.bias, "bias")):
        assert_gradient(parameter.grad, tensor("pcnorm", f"grad_{key}_train"))
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, key), tensor("pcnorm", f"{key}_after"), **CLOSE)


def test_pcnorm_matches_on_maps_of_odd_sides():
    x = tensor("pcnorm", "x_odd")
    assert_output(pcnorm.PCNorm(x.shape[1], "batch").train()(x), "y_odd_train")


def test_the_attention_and_its_gradients_match_for_every_gamma_and_number_of_classes():
    for classes, gamma in matching("pda", r"y_(c\d+)_g(\w+)"):
        x, weight = (tensor("pda", f"{key}_{classes}").clone().requires_grad_() for key in ("x", "fc_weight"))
        found = attention.dropped_attention(x, weight, float(gamma.replace("p", ".")), attention.PUBLISHED_DIVISOR)
        torch.testing.assert_close(found, tensor("pda", f"y_{classes}_g{gamma}"), **CLOSE)
        (found * tensor("pda", f"cotangent_{classes}")).sum().backward()
        for parameter, key in ((x, "x"), (weight, "fc")):
            torch.testing.assert_close(parameter.grad, tensor("pda", f"grad_{key}_{classes}_g{gamma}"), **CLOSE)


def test_the_attentions_schedule_matches():
    for epoch, (gamma, used) in enumerate(
        zip(vector("pda")["gamma_used_in_epoch"], vector("pda")["enabled_in_epoch"], strict=True)
    ):
        assert attention.gamma_at(epoch) == pytest.approx(gamma, rel=1e-12)
        assert attention.attention_used(epoch) == bool(used)


def test_the_tag_loss_its_gradient_and_the_agreement_match():
    name = "stage1_objective"
    logits, tags = tensor(name, "logits").clone().requires_grad_(), tensor(name, "tags")
    loss = losses.tag_loss(logits, tags)
    torch.testing.assert_close(loss, tensor(name, "loss"), **CLOSE)
    loss.backward()
    torch.testing.assert_close(logits.grad, tensor(name, "grad_logits"), **CLOSE)
    exact, jaccard = losses.tag_agreement(logits.detach(), tags)
    assert int(exact.sum()) == vector(name)["exact_match_count"]
    np.testing.assert_allclose(jaccard, vector(name)["jaccard_per_image"], atol=5.1e-5)  # rounded to four decimals


def test_the_published_optimiser_leaves_the_same_trace():
    name = "stage1_objective"
    parameters = [torch.nn.Parameter(tensor(name, key).clone()) for key in ("opt_p0", "opt_p1")]
    rates = vector(name)["opt_lr_trace"]
    momentum = float(vector(name)["opt_momentum"])
    assert momentum == optimisation.PUBLISHED_MOMENTUM
    groups = [{"params": [p], "lr": rate, "initial_lr": rate} for p, rate in zip(parameters, rates[0], strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=optimisation.WEIGHT_DECAY)
    for step, expected in enumerate(rates):
        optimisation.set_learning_rate(optimizer, optimisation.poly(step, len(rates)))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(list(expected), rel=1e-12)
        for number, parameter in enumerate(parameters):
            parameter.grad = tensor(name, f"opt_g{number}")[step].clone()
        optimizer.step()
        for number, parameter in enumerate(parameters):
            torch.testing.assert_close(parameter.data, tensor(name, f"opt_p{number}_trace")[step], rtol=1e-6, atol=1e-7)


def test_the_learning_rates_of_stage_2_match():
    rates = vector("stage1_objective")["stage2_lr_trace"]
    base = rates[0, 0]
    found = [[base * factor * optimisation.poly(step, len(rates)) for factor in (1, optimisation.HEAD_FACTOR)]
             for step in range(len(rates))]  # fmt: skip
    np.testing.assert_allclose(found, rates, rtol=1e-12)


def tower(mode: str = "off", name: str = TOWER) -> ResNet38:
    """The thin tower with the stored weights; PCNorm's own come from its file where it has them."""
    state = {key.removeprefix("sd."): tensor(TOWER, key) for key in vector(TOWER) if key.startswith("sd.")}
    if name == PCNORM_TOWER:
        state |= {key.removeprefix("sd."): tensor(name, key) for key in vector(name) if key.startswith("sd.")}
    found = ResNet38(len(state["fc8.weight"]), width_divisor=64 // len(state["conv1a.weight"]), pcnorm=mode)
    skipped = found.load_state_dict(state, strict=False)
    assert not skipped.unexpected_keys
    known = ("bn2.", "bn3.", "bn4.") if mode == "batch" and name == TOWER else ()
    assert all(key.endswith("num_batches_tracked") or key.startswith(known) for key in skipped.missing_keys)
    return found.eval()


def test_the_tower_gives_the_released_features_logits_and_cam():
    network, image = tower(), tensor(TOWER, "image")
    with torch.no_grad():
        taps = network.taps(image)
        logits = network(image)
    for found, key in ((taps.b4_5, "act_b4_5"), (taps.b5_2, "act_b5_2"), (taps.bn7, "conv6"), (logits, "logits"),
                       (logits.sigmoid(), "probs"), (cams(network, image).layers["bn7"], "cam")):  # fmt: skip
        torch.testing.assert_close(found, tensor(TOWER, key), **CLOSE)


@pytest.mark.parametrize("layer", LAYERS)
def test_grad_cam_and_its_joint_scaling_match_at_every_depth(layer):
    image = tensor(TOWER, "image")
    found = enlarge(grad_cams(tower(), image).layers[layer], image.shape[-2:])
    torch.testing.assert_close(found[0], tensor(TOWER, f"gradcam_{layer}"), **TINY)
    torch.testing.assert_close(masks.scale_jointly(found)[0], tensor(TOWER, f"normcam_{layer}"), rtol=1e-3, atol=1e-4)


def bits(text: str) -> torch.Tensor:
    return torch.tensor([[character == "1" for character in text]])


def test_pseudo_masks_of_the_tower_match_up_to_a_handful_of_ties():
    network, image = tower(), tensor(TOWER, "image")
    for layer, tags, rule in matching(TOWER, r"seg_(\w+?)_(\d+)_(luad|bcss)"):
        found = masks.pseudo_masks(network, image, bits(tags), white=rule == "luad", published_ties=True)[layer][0]
        expected = tensor(TOWER, f"seg_{layer}_{tags}_{rule}")
        assert int((found != expected).sum()) <= 5, (layer, tags, rule)
    np.testing.assert_array_equal(masks.white_pixels(image)[0], vector(TOWER)["bg_score"] > 0)


def test_a_mask_is_made_of_stored_maps_exactly():
    name = "pseudo_mask"
    maps = tensor(name, "gradcam")[None]
    torch.testing.assert_close(masks.scale_jointly(maps)[0], tensor(name, "normcam"), **TINY)
    background = torch.from_numpy(white.white_background(vector(name)["rgb"]))
    np.testing.assert_array_equal(white.grey(vector(name)["rgb"]), vector(name)["gray"])
    np.testing.assert_array_equal(background, vector(name)["bg_score"] > 0)
    for tags, rule in matching(name, r"seg_(\d+)_(luad|bcss)"):
        found = masks.tagged_mask(maps, bits(tags), published_ties=True)[0]
        if rule == "luad":
            found[background] = len(tags)
        np.testing.assert_array_equal(found, vector(name)[f"seg_{tags}_{rule}"], err_msg=f"{tags} {rule}")
        gated = masks.scale_jointly(maps)[0] * bits(tags)[0, :, None, None]
        np.testing.assert_allclose(gated, vector(name)[f"score_{tags}"], rtol=1e-4, atol=1e-6)


def test_the_segmentation_of_stage_1s_evaluation_matches():
    name = "pseudo_mask"
    probabilities = tensor(name, "plain_probs")
    np.testing.assert_array_equal((probabilities > masks.EVALUATION_THRESHOLD)[0], vector(name)["plain_tags"] > 0)
    size = vector(name)["plain_seg"].shape
    found = masks.cam_mask(tensor(name, "plain_cam"), probabilities, size, published_ties=True)
    np.testing.assert_array_equal(found[0], vector(name)["plain_seg"])


@pytest.mark.parametrize("statistics", ["default", "random"])
def test_the_tower_with_pcnorm_matches_in_evaluation(statistics):
    network = tower("batch", TOWER if statistics == "default" else PCNORM_TOWER)
    found = cams(network, tensor(PCNORM_TOWER, "image"))
    for value, key in ((found.logits, "logits"), (found.layers["bn7"], "cam")):
        torch.testing.assert_close(value, tensor(PCNORM_TOWER, f"{key}_{statistics}_stats"), rtol=1e-4, atol=1e-4)


def test_the_tower_with_pcnorm_matches_in_training_and_moves_its_statistics():
    network = tower("batch", PCNORM_TOWER)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, pcnorm.PCNorm)}
    assert [len(norm.weight) for norm in norms.values()] == list(vector(PCNORM_TOWER)["bn_channels"])
    for norm in norms.values():
        norm.train()
    found = cams(network, tensor(PCNORM_TOWER, "images3"))
    for value, key in ((found.logits, "logits"), (found.layers["bn7"], "cam")):
        torch.testing.assert_close(value, tensor(PCNORM_TOWER, f"{key}_train_stats"), rtol=1e-4, atol=1e-4)
    for name, key in matching(PCNORM_TOWER, r"after\.(\w+)\.(\w+)"):
        torch.testing.assert_close(getattr(norms[name], key), tensor(PCNORM_TOWER, f"after.{name}.{key}"), **CLOSE)


@pytest.mark.parametrize("mode", ["official", "batch"])
@pytest.mark.parametrize("layer", LAYERS)
def test_grad_cam_of_the_released_pcnorm_matches_whether_it_is_skipped_or_run_inert(layer, mode):
    image = tensor(PCNORM_TOWER, "image")
    found = enlarge(grad_cams(tower(mode), image).layers[layer], image.shape[-2:])
    torch.testing.assert_close(found[0], tensor(PCNORM_TOWER, f"gradcam_official_{layer}"), rtol=1e-4, atol=1e-4)


PUBLISHED_LOSS = {"dummy_logit": True, "count_white": True, "divide_by_batch": True}


@pytest.mark.parametrize("prefix", ["", "nobg_"])
def test_the_published_loss_of_stage_2_and_its_gradient_match(prefix):
    name = "stage2_loss"
    logits = tensor(name, "logits").clone().requires_grad_()
    targets = {layer: tensor(name, f"{prefix}target_{layer}").long() for layer in LAYERS}
    found = losses.layered_loss(logits, targets, **PUBLISHED_LOSS)
    if prefix:
        expected = dict(zip(("bn7", "b5_2", "b4_5"), tensor(name, "nobg_losses"), strict=True))
    else:
        expected = {layer: tensor(name, f"loss_{layer}") for layer in LAYERS}
    expected["total"] = tensor(name, f"{prefix}loss_total")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **TINY)
    found["total"].backward()
    torch.testing.assert_close(logits.grad, tensor(name, f"{prefix}grad_logits"), **TINY)


def test_the_published_focal_option_matches():
    name = "stage2_loss"
    target = {"bn7": tensor(name, "nobg_target_bn7")}
    found = losses.layered_loss(tensor(name, "logits"), target, weights={"bn7": 1.0}, focal=True, **PUBLISHED_LOSS)
    torch.testing.assert_close(found["bn7"], tensor(name, "nobg_focal_bn7"), **TINY)


def test_easy_example_mining_and_its_gradient_match():
    name = "oeem_optional"
    logits, labels = tensor(name, "logits").clone().requires_grad_(), tensor(name, "labels")
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=losses.IGNORE)
    torch.testing.assert_close(plain.mean(), tensor(name, "loss_plain_ce_mean"), **TINY)
    weighted = plain * losses.easy_example_weights(plain, labels)
    torch.testing.assert_close(weighted, tensor(name, "weighted_loss_map"), **TINY)
    torch.testing.assert_close(weighted.mean(), tensor(name, "loss"), **TINY)
    weighted.mean().backward()
    torch.testing.assert_close(logits.grad, tensor(name, "grad_logits"), **TINY)


def test_the_gate_matches_as_released_and_in_our_form():
    name = "gate_metrics"
    logits, probabilities = tensor(name, "logits"), tensor(name, "stage1_probs")
    stored = tensor(name, "gate")
    assert torch.equal(probabilities > gate.GATE_THRESHOLD, stored)
    ours = gate.close(logits, gate.open_classes(probabilities)).argmax(1)
    some_open = stored.any(1)[:, None, None]
    expected = torch.where(some_open, tensor(name, "pred_inf_gate"), tensor(name, "pred_no_gate"))
    known = tensor(name, "gt") < logits.shape[1]  # predictions may be stored with the excluded pixels marked
    for found, wanted in (
        (gate.published_gate(logits, probabilities).argmax(1), tensor(name, "pred_official_gate")),
        (logits.argmax(1), tensor(name, "pred_no_gate")),
        (ours, expected),
    ):
        assert torch.equal(found[known], wanted[known].long())


@pytest.mark.parametrize(
    ("truth", "prediction", "prefix", "keys"),
    [
        ("gt", "pred_official_gate", "", {"accuracy": "pixel_acc", "class_accuracy": "mean_acc", "ious": "ious"}),
        ("gt", "pred_no_gate", "nogate_", {}),
        ("gt", "pred_official_gate", "s1_",
         {"accuracy": "pixel_acc", "class_accuracy": "mean_acc", "ious": "ious"}),
        ("dg_gt", "dg_pred", "dg_", {"accuracy": "acc"}),
    ],
    ids=["gate", "no gate", "stage 1's function", "two classes"],
)  # fmt: skip
def test_scores_of_the_whole_set_match(truth, prediction, prefix, keys):
    stored = vector("gate_metrics")
    classes = len(stored["dg_confusion" if prefix == "dg_" else "confusion"])
    matrix = confusion(stored[truth], stored[prediction], range(classes))
    if f"{prefix}confusion" in stored:
        np.testing.assert_array_equal(matrix[:, :classes], stored[f"{prefix}confusion"])
    found = dataset_scores(matrix)
    for ours, theirs in ({"miou": "miou", "fwiou": "fwiou"} | keys).items():
        np.testing.assert_allclose(getattr(found, ours), stored[prefix + theirs], rtol=1e-6, err_msg=theirs)
