"""Class maps and pseudo masks by the quick order of work: equal to the published one, with few passes."""

from __future__ import annotations

import pytest
import torch

from nnunet_dgplugins.methods.dcam import masks
from nnunet_dgplugins.methods.dcam.maps import LAYERS, cams, enlarge, grad_cams, published_grad_cam
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38

CLASSES, SIDE = 3, 48
TAGS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]])


def network(mode: str = "instance", dtype: torch.dtype = torch.float64) -> ResNet38:
    """A random thin tower in evaluation mode, whose normalisations do something."""
    torch.manual_seed(0)
    found = ResNet38(CLASSES, width_divisor=32, pcnorm=mode)
    generator = torch.Generator().manual_seed(1)
    for name, value in found.state_dict().items():
        if name.endswith(("running_var", "weight")) and value.ndim == 1:
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif name.endswith(("running_mean", "bias")):
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return found.to(dtype).eval()


def pictures(count: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    levels = torch.randint(0, 180, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(2))
    levels[:, :, :10, :8] = 250
    return levels.to(dtype) / 255


@pytest.mark.parametrize("mode", ["instance", "batch", "official"])
def test_maps_and_masks_equal_those_of_the_published_order_of_work(mode):
    tower, images = network(mode), pictures()
    found = grad_cams(tower, images)
    made = masks.pseudo_masks(tower, images, TAGS, white=True, batch_size=2)
    torch.testing.assert_close(found.logits, tower(images))
    for layer in LAYERS:
        for number, image in enumerate(images):
            published = [published_grad_cam(tower, image[None], layer, target) for target in range(CLASSES)]
            torch.testing.assert_close(found.layers[layer][number], torch.stack(published), atol=1e-12, rtol=1e-9)
            expected = masks.tagged_mask(enlarge(torch.stack(published)[None], (SIDE, SIDE)), TAGS[number : number + 1])
            expected[masks.white_pixels(image[None])] = CLASSES
            assert torch.equal(made[layer][number], expected[0])
            assert int((expected == CLASSES).sum()) == 80


def test_an_active_pcnorm_is_part_of_the_gradient():
    inert, active = network("off"), network("instance")
    images = pictures(1)
    for layer in LAYERS:
        first, second = (grad_cams(tower, images).layers[layer] for tower in (inert, active))
        assert float((first - second).abs().max()) > 1e-3 * float(first.abs().max())


def test_the_first_tap_lies_behind_pcnorm_because_before_it_every_weight_would_vanish():
    tower, images = network("instance"), pictures(1)
    outputs = []
    hook = tower.b4_5.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    logits = tower(images)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, 0], outputs)
    assert float(gradient.mean((2, 3)).abs().max()) < 1e-9 * float(gradient.abs().max())
    found = grad_cams(tower, images).layers
    assert float(found["b4_5"].abs().max()) > 1e-3 * float(found["b5_2"].abs().max())


def test_one_forward_and_at_most_one_partial_backward_per_class_whatever_the_batch(monkeypatch):
    tower = network(dtype=torch.float32)
    forwards, backwards, calls = [], [], []
    for name, module in tower.named_modules():
        if name:
            module.register_forward_hook(lambda _m, _i, _o, name=name: forwards.append(name))
    for name in ("conv1a", "b4_5", "b5", "b6", "b7"):
        module = tower.get_submodule(name)
        module.register_full_backward_hook(lambda _m, _i, _o, name=name: backwards.append(name))
    whole = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), whole(*a, **k))[1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_a, **_k: pytest.fail("a whole backward pass"))
    found = grad_cams(tower, pictures(3, torch.float32))
    assert set(found.layers) == set(LAYERS)
    assert len(calls) == CLASSES
    assert max(forwards.count(name) for name in ("conv1a", "b2", "b4_5", "b5", "b7", "bn7", "fc8")) == 1
    assert [backwards.count(name) for name in ("conv1a", "b4_5", "b5", "b6", "b7")] == [0, 0, 3, 3, 3]
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert not any(value.requires_grad for value in (found.logits, *found.layers.values()))


def test_nothing_below_the_first_tap_is_tracked():
    tower = network(dtype=torch.float32)
    tracked = {}
    for name in ("b2", "b4_5", "b5"):
        tower.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: tracked.update({name: out.grad_fn is not None})
        )
    grad_cams(tower, pictures(1, torch.float32))
    assert tracked == {"b2": False, "b4_5": False, "b5": True}


def test_masks_do_not_depend_on_the_batch_they_are_made_in():
    tower, images = network(), pictures()
    whole, single = (masks.pseudo_masks(tower, images, TAGS, batch_size=size) for size in (3, 1))
    for layer in LAYERS:
        assert whole[layer].shape == (3, SIDE, SIDE)
        assert whole[layer].dtype == torch.uint8
        assert torch.equal(whole[layer], single[layer])


def test_the_deepest_map_is_the_cam_before_its_relu_over_the_number_of_places():
    tower, images = network(), pictures()
    places = (SIDE // 8) ** 2
    found = grad_cams(tower, images).layers["bn7"]
    torch.testing.assert_close(found.relu() * places, cams(tower, images).layers["bn7"])
    assert float(found.min()) < 0


def test_weights_that_need_no_gradient_give_the_same_maps():
    tower, images = network(), pictures(1)
    expected = grad_cams(tower, images).layers
    tower.requires_grad_(False)
    for layer, found in grad_cams(tower, images).layers.items():
        torch.testing.assert_close(found, expected[layer])


@pytest.mark.parametrize("make", [grad_cams, cams])
def test_a_network_in_training_mode_is_refused(make):
    with pytest.raises(ValueError, match=r"network\.eval\(\)"):
        make(network().train(), pictures())


def test_images_of_other_sizes_than_multiples_of_eight_have_masks_of_their_size():
    images = torch.rand(1, 3, 45, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = masks.pseudo_masks(network(), images, TAGS[:1])
    assert {tuple(mask.shape) for mask in made.values()} == {(1, 45, 60)}
    assert masks.cam_masks(network(), images).shape == (1, 45, 60)


def test_real_stained_patches_have_the_published_masks_also_in_single_precision(sample_data):
    from skimage.io import imread

    files = sorted((sample_data / "histology").glob("*/*/images/*.png"))[:2]
    patches = torch.stack([torch.from_numpy(imread(file)[:96, :96, :3].copy()).permute(2, 0, 1) for file in files])
    images, tags = patches.float() / 255, TAGS[:2]
    tower = network(dtype=torch.float32)
    made = masks.pseudo_masks(tower, images, tags, white=True)
    for number, image in enumerate(images):
        for layer in LAYERS:
            published = [published_grad_cam(tower, image[None], layer, target) for target in range(CLASSES)]
            expected = masks.tagged_mask(enlarge(torch.stack(published)[None], (96, 96)), tags[number : number + 1])
            expected[masks.white_pixels(image[None])] = CLASSES
            assert int((made[layer][number] != expected[0]).sum()) <= 5  # ties up to rounding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_makes_the_masks_of_the_cpu(monkeypatch: pytest.MonkeyPatch):
    tower, images = network(), pictures()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = masks.pseudo_masks(tower, images, TAGS, white=True)
    for layer, found in masks.pseudo_masks(tower.cuda(), images, TAGS, white=True).items():
        assert found.device.type == "cpu"
        assert torch.equal(found, expected[layer])
