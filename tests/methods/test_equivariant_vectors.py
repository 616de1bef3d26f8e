"""Equivariant CAMs against the outputs of the released code, stored in ``tests/vectors/equivariant``.

Everything is read from the files, so the same tests hold for files made with another seed.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_dgplugins.methods import cam
from nnunet_dgplugins.methods.equivariant import losses, transforms
from nnunet_dgplugins.methods.equivariant.network import FULL_WIDTH, UNetCAM, grouped_pass, separate_pass
from nnunet_dgplugins.methods.equivariant.step import branches
from nnunet_dgplugins.methods.equivariant.volume import volume_dice

FOLDER = Path(os.environ.get("DGPLUGINS_VECTORS") or Path(__file__).parents[1] / "vectors") / "equivariant"
PASSES = pytest.mark.parametrize("run", [separate_pass, grouped_pass])


@lru_cache
def vector(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensor(name: str, key: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(vector(name)[key]))


def network(name: str, prefix: str = "param/") -> UNetCAM:
    state = {key.removeprefix(prefix): tensor(name, key) for key in vector(name) if key.startswith(prefix)}
    found = UNetCAM(FULL_WIDTH // len(state["inc.conv.conv.0.weight"]))
    found.load_state_dict(state)
    return found


def test_slices_are_standardised_as_released():
    found = cam.standardise(tensor("normalisation", "sw_x"))
    torch.testing.assert_close(found, tensor("normalisation", "sw_out"), atol=1e-5, rtol=0)


def test_maps_are_normalised_as_released_with_its_gradient():
    maps = tensor("normalisation", "mn_in").requires_grad_()
    found = cam.normalise(maps)
    torch.testing.assert_close(found, tensor("normalisation", "mn_out"), atol=1e-5, rtol=0)
    (found * tensor("normalisation", "mn_w")).sum().backward()
    torch.testing.assert_close(maps.grad, tensor("normalisation", "mn_grad"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["losses_m2", "losses_m4"])
def test_all_four_terms_and_their_gradients_match_the_released_code(name):
    names = ("logits", "logits_t", "cam", "cam_t")
    inputs = {key: tensor(name, key).clone().requires_grad_() for key in names}
    tags = tensor(name, "y")
    found = losses.terms(
        losses.Branch(inputs["logits"], inputs["cam"][:, :, 1]),
        losses.Branch(inputs["logits_t"], inputs["cam_t"][:, :, 1]),
        tags,
        temperature=tensor(name, "temp").item(),
    )
    for term, key in ((found.ce, "ce"), (found.er, "er"), (found.kd, "kl"), (found.cmer, "cmer")):
        torch.testing.assert_close(term, tensor(name, key), atol=1e-10, rtol=0)
    total = found.total(kd_weight=tensor(name, "lambda_kl").item())
    torch.testing.assert_close(total, tensor(name, "total"), atol=1e-10, rtol=0)
    total.sum().backward()  # what crosses modalities is detached, so the sum has each model's own gradient
    for key in names:
        expected = tensor(name, f"grad_{key}")
        torch.testing.assert_close(inputs[key].grad, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["losses_m2", "losses_m4"])
def test_no_term_reaches_another_modalitys_network(name):
    logits, maps = (tensor(name, key).clone().requires_grad_() for key in ("logits", "cam"))
    other_logits, other_maps = (tensor(name, key).clone().requires_grad_() for key in ("logits_t", "cam_t"))
    found = losses.terms(
        losses.Branch(logits, maps[:, :, 1]), losses.Branch(other_logits, other_maps[:, :, 1]), tensor(name, "y")
    )
    found.total()[0].backward()
    largest = max(float(x.grad[1:].abs().max()) for x in (logits, maps, other_logits, other_maps))
    assert largest == tensor(name, "max_gradient_into_other_models").item()


@pytest.mark.parametrize("name", ["losses_m2", "losses_m4"])
def test_the_distance_of_one_pair_matches(name):
    first, second = tensor(name, "cam")[0][:, 1], tensor(name, "cam_t")[1][:, 1]
    found = losses.distance(first, second, tensor(name, "pair_mask"))
    torch.testing.assert_close(found, tensor(name, "pair_value"), atol=1e-10, rtol=0)


@PASSES
def test_the_network_matches_in_evaluation_and_in_training(run):
    # the grouped pass needs two networks to have groups: the same one twice
    networks = [network("unetcam"), network("unetcam")]
    images = tensor("unetcam", "x").repeat(1, 2, 1, 1)
    for mode in ("eval", "train"):
        for one in networks:
            one.train(mode == "train")
        logits, maps = run(networks, images)
        for i in range(2):
            expected = tensor("unetcam", f"{mode}_logits").flatten(1)
            torch.testing.assert_close(logits[i], expected, atol=1e-5, rtol=0)
            # the released code's own float32 is 1e-5 off exact arithmetic where maps reach 4
            torch.testing.assert_close(maps[i], tensor("unetcam", f"{mode}_cam"), atol=1e-5, rtol=1e-5)
    for one in networks:
        for name in ("running_mean", "running_var"):
            expected = tensor("unetcam", f"after_train_{name}/backbone.1")
            torch.testing.assert_close(getattr(one.backbone[1], name), expected, atol=1e-5, rtol=0)


def test_maps_for_inference_match_cam_grad_cam_and_grad_cam_plus_plus():
    name = "cam_inference"
    found = network(name).eval()
    with torch.no_grad():
        result = cam_maps(found, tensor(name, "x_raw"))
    torch.testing.assert_close(result["logits"], tensor(name, "logits"), atol=1e-5, rtol=0)
    predicted = result["logits"].argmax(-1).view(-1, 1, 1)
    for kind in ("cam", "gradcam", "gradcampp"):
        torch.testing.assert_close(result[kind], tensor(name, kind), atol=1e-5, rtol=0)
        levels = cam.to_bytes(result[kind] * predicted)
        assert int((levels.int() - tensor(name, f"{kind}_u8").int()).abs().max()) <= 1
    gated = result["cam"] * predicted
    for threshold, expected in zip(vector(name)["thresholds"], tensor(name, "cam_mask_at_thresholds"), strict=True):
        clear = (gated - threshold).abs() > 1 / 255
        assert torch.equal((gated > threshold)[clear], expected[clear])


def cam_maps(found: UNetCAM, images: torch.Tensor) -> dict[str, torch.Tensor]:
    from nnunet_dgplugins.methods.equivariant.maps import KINDS, foreground_maps

    made = {kind: foreground_maps([found], images, kind) for kind in KINDS}
    maps = {kind: result.maps[:, 0] for kind, result in made.items()}
    return {"logits": made["cam"].logits[0], "cam": maps["cam"], "gradcam": maps["grad_cam"],
            "gradcampp": maps["grad_cam_plus_plus"]}  # fmt: skip


def test_transforms_match():
    images = tensor("transforms", "x")
    for key, axis in (("hflip", -1), ("vflip", -2)):
        assert torch.equal(transforms.Transform("flipping", flip_axis=axis)(images), tensor("transforms", key))
    for turns in (1, 2, 3):
        found = transforms.turn(images, torch.full((len(images),), turns))
        assert torch.equal(found, tensor("transforms", f"rot{90 * turns}_exact"))
    found = transforms.translate(images, tensor("transforms", "translate_shift_xy"))
    torch.testing.assert_close(found, tensor("transforms", "translate"), atol=1e-5, rtol=0)
    sizes = [int(key.removeprefix("resize")) for key in vector("transforms") if key.startswith("resize")]
    assert sizes
    for size in sizes:
        found = transforms.Transform("scaling", size=(size, size))(images)
        torch.testing.assert_close(found, tensor("transforms", f"resize{size}"), atol=1e-5, rtol=0)


@PASSES
def test_one_whole_training_step_matches(run):
    # oneDNN rounds grouped convolutions otherwise, and a ReLU whose input is 0 up to rounding lets a gradient jump;
    # with PyTorch's own kernels both passes compute the same
    with torch.backends.mkldnn.flags(enabled=run is separate_pass):
        check_training_step(run)


def check_training_step(run):
    name = "train_step"
    networks = [network(name, f"model{i}/param/").train() for i in range(2)]
    parameters = [parameter for one in networks for parameter in one.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, tensor(name, "lr").item(), weight_decay=tensor(name, "weight_decay").item()
    )
    flip = transforms.Transform("flipping", flip_axis=-1)
    plain, transformed = branches(networks, tensor(name, "x_raw"), flip, run, torch.contiguous_format)
    for branch, logits, maps in (
        (plain, "logits", "cam_norm_t_of_plain"),
        (transformed, "logits_t", "cam_norm_of_transformed"),
    ):
        torch.testing.assert_close(branch.logits, tensor(name, logits), atol=5e-5, rtol=0)
        torch.testing.assert_close(branch.maps, tensor(name, maps)[:, :, 1], atol=5e-5, rtol=0)
    found = losses.terms(plain, transformed, tensor(name, "y"), temperature=tensor(name, "temp").item())
    for term, key in ((found.ce, "ce"), (found.er, "er"), (found.kd, "kl"), (found.cmer, "cmer")):
        torch.testing.assert_close(term.double(), tensor(name, key).double(), atol=5e-5, rtol=0)
    total = found.total(kd_weight=tensor(name, "lambda_kl").item())
    torch.testing.assert_close(total.double(), tensor(name, "total").double(), atol=5e-5, rtol=0)
    total.sum().backward()
    optimizer.step()
    for i, one in enumerate(networks):
        own = dict(one.named_parameters())
        keys = [key.removeprefix(f"model{i}/grad/") for key in vector(name) if key.startswith(f"model{i}/grad/")]
        assert keys
        for key in keys:
            torch.testing.assert_close(own[key].grad, tensor(name, f"model{i}/grad/{key}"), atol=1e-3, rtol=0)
            torch.testing.assert_close(own[key].data, tensor(name, f"model{i}/after_step/{key}"), atol=1e-6, rtol=0)


def test_the_dice_of_a_volume_matches_at_every_threshold():
    maps, truth = tensor("dice3d", "prob"), tensor("dice3d", "gt")
    found = volume_dice(maps.numpy(), truth.numpy(), vector("dice3d")["thresholds"])
    np.testing.assert_allclose(found, vector("dice3d")["dice3d"], atol=1e-12, rtol=0)
