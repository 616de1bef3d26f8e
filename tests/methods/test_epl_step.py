"""One iteration in the published order and in batches: the same numbers, the stated number of forwards, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_dgplugins.methods.epl.cutmix import sample_masks
from nnunet_dgplugins.methods.epl.losses import cross_pseudo_supervision, supervised_dice
from nnunet_dgplugins.methods.epl.step import UnlabelledImages, batched_passes, full_resolution, published_passes

FORMS = (published_passes, batched_passes)


class Network(nn.Module):
    """A small network with the normalisation asked for; a list of outputs under deep supervision."""

    def __init__(self, norm: type[nn.Module], dimensions: int, deep: bool):
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.body = nn.Sequential(convolution(1, 4, 3, padding=1), norm(4), nn.LeakyReLU())
        self.head, self.deep, self.calls = convolution(4, 3, 1), deep, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        self.calls += 1
        logits = self.head(self.body(x))
        return [logits, logits[..., ::2, ::2]] if self.deep else logits


def networks(norm: type[nn.Module] = nn.BatchNorm2d, dimensions: int = 2, deep: bool = False) -> list[Network]:
    torch.manual_seed(0)
    found = [Network(norm, dimensions, deep).double() for _ in range(2)]
    for network in found:  # running statistics that are not those of a fresh layer
        with torch.no_grad():
            network(torch.randn(4, 1, *[8] * dimensions, dtype=torch.float64) + 1)
        network.calls = 0
    return found


def unlabelled(*size: int, dtype: torch.dtype = torch.float64) -> UnlabelledImages:
    generator = torch.Generator().manual_seed(1)
    four = [torch.randn(2, 1, *size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    return UnlabelledImages(*four, sample_masks(2, size, generator))


def labelled(*size: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 1, *size, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (count, *size), generator=generator)


def step(form, nets, images, batch, target) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the total loss and all gradients."""
    passes = form(nets, images, batch)
    loss = cross_pseudo_supervision(passes.plain, passes.styled, passes.labels)["total"]
    loss = loss + sum(supervised_dice(full_resolution(output), target) for output in passes.labelled)
    parameters = [parameter for network in nets for parameter in network.parameters()]
    return loss, list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("norm", "size", "training"),
    [
        (nn.BatchNorm2d, (12, 14), False),
        (nn.InstanceNorm2d, (12, 14), True),
        (nn.InstanceNorm3d, (4, 8, 10), True),
        (nn.BatchNorm3d, (4, 8, 10), False),
    ],
)
def test_both_forms_give_the_same_loss_gradients_and_labels(norm, size, training, deep):
    nets = networks(norm, len(size), deep)
    for network in nets:
        network.train(training)
    images, (batch, target) = unlabelled(*size), labelled(*size)
    one, other = (step(form, nets, images, batch, target) for form in FORMS)
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=0)
    for found, expected in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    passes = [form(nets, images, batch) for form in FORMS]
    for name in ("plain", "styled", "labels"):
        for found, expected in zip(getattr(passes[0], name), getattr(passes[1], name), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for found, expected in zip(passes[0].labelled, passes[1].labelled, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert isinstance(found, list) == isinstance(expected, list) == deep


def test_the_published_order_takes_fourteen_forwards_and_the_batched_form_four():
    images, (batch, _) = unlabelled(12, 14), labelled(12, 14)
    counts = []
    for form in FORMS:
        for given in (None, batch):
            nets = networks()
            passes = form(nets, images, given)
            counts.append(sum(network.calls for network in nets))
            assert (passes.labelled is None) == (given is None)
    assert counts == [12, 14, 4, 4]


def test_batch_statistics_in_training_mode_differ_as_stated():
    nets, again = networks(), networks()
    images, (batch, _) = unlabelled(12, 14), labelled(12, 14)
    before = int(nets[0].body[1].num_batches_tracked)
    published_passes(nets, images, batch)
    batched_passes(again, images, batch)
    assert int(nets[0].body[1].num_batches_tracked) - before == 7
    assert int(again[0].body[1].num_batches_tracked) - before == 2


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_gets_no_gradient_and_each_student_image_does(form):
    nets = networks(nn.InstanceNorm2d)
    images = unlabelled(12, 14)
    passes = form(nets, images)
    assert not any(labels.requires_grad for labels in passes.labels)
    assert all(labels.dtype == torch.int64 for labels in passes.labels)
    for logits in (*passes.plain, *passes.styled):
        assert logits.shape == (2, 3, 12, 14)
        assert logits.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_those_of_the_mixed_mean_logits(form):
    nets = networks(nn.InstanceNorm2d)
    images = unlabelled(12, 14)
    passes = form(nets, images)
    for network, found in zip(nets, passes.labels, strict=True):
        with torch.no_grad():
            halves = [
                (network(plain) + network(styled)) / 2
                for plain, styled in (
                    (images.first, images.first_styled), (images.second, images.second_styled)
                )
            ]  # fmt: skip
        masks = images.masks.double()
        assert torch.equal(found, (halves[0] * (1 - masks) + halves[1] * masks).argmax(1))


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_pass_under_autocast_does_not_cut_the_students_gradients(form):
    nets = [network.float() for network in networks(nn.InstanceNorm2d)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        passes = form(nets, unlabelled(12, 14, dtype=torch.float32))
        loss = cross_pseudo_supervision(passes.plain, passes.styled, passes.labels)["total"]
    loss.backward()
    for network in nets:
        assert all(parameter.grad is not None for parameter in network.parameters())
        assert network.head.weight.grad.any()


def test_labelled_images_of_any_number_join_the_students_batch():
    nets = networks(nn.InstanceNorm2d)
    for count in (1, 5):
        batch, _ = labelled(12, 14, count=count)
        passes = batched_passes(nets, unlabelled(12, 14), batch)
        for network, found in zip(nets, passes.labelled, strict=True):
            torch.testing.assert_close(found, network(batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_step_in_both_forms_and_trains_with_mixed_precision():
    nets = [network.cuda().eval() for network in networks()]
    images = unlabelled(12, 14)
    images = UnlabelledImages(*(getattr(images, name).cuda() for name in UnlabelledImages.__dataclass_fields__))
    batch, target = (x.cuda() for x in labelled(12, 14))
    one, other = (step(form, nets, images, batch, target) for form in FORMS)
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=0)
    for network in nets:
        network.float()
    half = UnlabelledImages(*(getattr(images, name).float() for name in UnlabelledImages.__dataclass_fields__))
    with torch.autocast("cuda", dtype=torch.float16):
        loss, gradients = step(batched_passes, nets, half, batch.float(), target)
    assert loss.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients)
