"""The tag classifier, PCNorm and the dropout attention beyond the stored vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnunet_dgplugins.methods.dcam import attention, optimisation, pcnorm
from nnunet_dgplugins.methods.dcam.losses import tag_loss
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38

THIN = 32


def thin(mode: str = "instance", classes: int = 3, seed: int = 0, **options) -> ResNet38:
    torch.manual_seed(seed)
    return ResNet38(classes, width_divisor=THIN, pcnorm=mode, **options)


def pictures(count: int = 2, side: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_published_tower_has_the_published_size_and_names():
    with torch.device("meta"):
        plain, active = ResNet38(4, pcnorm="off"), ResNet38(4)
    assert parameters(plain) == 105_070_912 + 4 * 4096
    assert parameters(active) - parameters(plain) == 2 * (128 + 256 + 512)
    shapes = {
        "conv1a.weight": (64, 3, 3, 3),
        "b2.conv_branch1.weight": (128, 64, 1, 1),
        "b4_5.conv_branch2b1.weight": (512, 512, 3, 3),
        "b5.conv_branch2a.weight": (512, 512, 3, 3),
        "b5_2.conv_branch2b1.weight": (1024, 512, 3, 3),
        "b6.conv_branch2b1.weight": (1024, 512, 3, 3),
        "b7.conv_branch2b2.weight": (4096, 2048, 1, 1),
        "bn7.running_var": (4096,),
        "fc8.weight": (4, 4096, 1, 1),
    }
    state = plain.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert "b2_1.conv_branch1.weight" not in state
    assert set(active.state_dict()) - set(state) == {f"bn{i}.{name}" for i in (2, 3, 4) for name in ("weight", "bias")}


def test_the_three_taps_lie_at_an_eighth_of_the_image():
    with torch.no_grad():
        taps = thin().eval().taps(pictures(1, 72))
    assert [tuple(tap.shape) for tap in taps] == [(1, 16, 9, 9), (1, 32, 9, 9), (1, 128, 9, 9)]
    assert float(taps.bn7.min()) == 0


@pytest.mark.parametrize("mode", pcnorm.ACTIVE_MODES)
def test_active_pcnorm_changes_the_output_in_training_and_at_test(mode):
    plain, active = thin("off"), thin(mode)
    active.load_state_dict(plain.state_dict(), strict=False)
    for training in (True, False):
        for network in (plain, active):
            network.train(training)
            for module in network.modules():
                if isinstance(module, nn.Dropout2d):
                    module.eval()
        if not training and mode == "batch":  # running statistics of one training pass
            assert float(active.bn2.running_var.sub(1).abs().max()) > 0.01
        with torch.no_grad():
            expected, found = plain.taps(pictures()).b5_2, active.taps(pictures()).b5_2
        assert float((found - expected).abs().max()) > 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("mode", ["official", "off"])
def test_inert_pcnorm_is_skipped_and_not_computed(mode, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a spectrum was computed")

    network, expected = thin(mode).eval(), thin("off").eval()
    monkeypatch.setattr(torch.fft, "rfft2", refuse)
    monkeypatch.setattr(torch.fft, "irfft2", refuse)
    assert torch.equal(network(pictures()), expected(pictures()))
    with pytest.raises(AssertionError, match="a spectrum"):
        thin("instance").eval()(pictures())


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"instance.*batch.*official.*off.*got 'group'"):
        thin("group")


@pytest.mark.parametrize("divisor", [0, 3, 128])
def test_a_width_that_leaves_no_whole_channels_is_refused(divisor):
    with pytest.raises(ValueError, match=f"divisor of 64, got {divisor}"):
        ResNet38(2, width_divisor=divisor)


def test_instance_pcnorm_takes_brightness_and_contrast_away_and_nothing_else():
    x = torch.randn(2, 5, 12, 15, generator=torch.Generator().manual_seed(0))
    norm = pcnorm.PCNorm(5)
    torch.testing.assert_close(norm(3 * x + 2), norm(x), atol=1e-4, rtol=0)
    # the phase is the image's own: where the amplitude is above its floor, the result is the normalised image
    normalised = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(norm(x), normalised, atol=1e-3, rtol=0)


def test_instance_pcnorm_does_not_depend_on_the_other_images():
    x = torch.randn(3, 4, 10, 10, generator=torch.Generator().manual_seed(0))
    norm = pcnorm.PCNorm(4).train()
    torch.testing.assert_close(norm(x)[1:2], norm(x[1:2]))


def test_a_map_of_zeros_becomes_the_impulse_of_the_amplitudes_floor():
    found = pcnorm.PCNorm(1)(torch.zeros(1, 1, 8, 6))
    expected = torch.zeros(1, 1, 8, 6)
    expected[..., 0, 0] = 1e-5**0.5
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


def test_content_and_style_come_from_the_two_maps_they_are_taken_of():
    first, second = torch.randn(2, 1, 1, 9, 8, generator=torch.Generator().manual_seed(0)).double()
    found = torch.fft.rfft2(pcnorm.compose(pcnorm.phase(first), pcnorm.amplitude(second), (9, 8)))
    torch.testing.assert_close(found.abs(), torch.fft.rfft2(second).abs())
    directions = [torch.polar(torch.ones_like(z.real), z.angle()) for z in (found, torch.fft.rfft2(first))]
    torch.testing.assert_close(*directions)


@pytest.mark.parametrize("mode", pcnorm.ACTIVE_MODES)
def test_the_gradient_of_pcnorm_is_that_of_finite_differences(mode):
    norm = pcnorm.PCNorm(2, mode).double().train()
    x = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))


def test_half_precision_and_autocast_run_pcnorm_in_float32():
    x = torch.randn(1, 3, 11, 13, generator=torch.Generator().manual_seed(0))
    norm = pcnorm.PCNorm(3)
    expected = norm(x.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16())


def test_nothing_is_frozen_unless_asked():
    network = thin().train()
    assert all(parameter.requires_grad for parameter in network.parameters())
    before = copy.deepcopy(network.state_dict())
    tag_loss(network(pictures(), gamma=0.9), torch.tensor([[1, 0, 1], [0, 1, 0]])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    after = network.state_dict()
    moved = [key for key in after if "running_mean" in key and not torch.equal(before[key], after[key])]
    assert len(moved) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_freezing_holds_the_early_blocks_and_every_normalisation_also_through_train():
    network = thin("off")
    network.freeze()
    before = copy.deepcopy(network.state_dict())
    network.train()
    groups = optimisation.classifier_groups(network, 0.01)
    optimizer = torch.optim.SGD(groups, momentum=optimisation.MOMENTUM)
    tag_loss(network(pictures()), torch.tensor([[1, 0, 1], [0, 1, 0]])).backward()
    optimizer.step()
    after = network.state_dict()
    held = {key for key in after if torch.equal(before[key], after[key])}
    expected = {key for key in after if key.split(".")[0] in ("conv1a", "b2", "b2_1", "b2_2") or "bn" in key}
    assert held == expected
    assert network.training
    assert not network.b7.bn_branch2b1.training


@pytest.mark.parametrize(("mode", "adapt", "held"), [("instance", None, 6), ("instance", False, -1), ("off", True, 6)])
def test_where_pcnorm_is_active_later_normalisations_adapt_unless_told_otherwise(mode, adapt, held):
    network = thin(mode)
    network.freeze(adapt)
    network.train()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    still = [norm for norm in norms if not norm.training]
    assert len(still) == (held if held >= 0 else len(norms))
    assert [norm.weight.requires_grad for norm in norms] == [norm.training for norm in norms]
    if mode == "instance":
        assert network.bn3.weight.requires_grad


def test_frozen_statistics_stay_frozen_in_a_copy():
    network = thin("off")
    network.freeze()
    assert not copy.deepcopy(network).train().bn7.training


def test_the_parameter_groups_hold_every_trainable_parameter_once():
    network = thin()
    network.freeze()
    body, head = optimisation.classifier_groups(network, 0.01)
    assert head["params"] == [network.fc8.weight]
    assert (body["lr"], head["lr"]) == (0.01, pytest.approx(0.1))
    assert body["weight_decay"] == head["weight_decay"] == 5e-4
    found = [id(parameter) for group in (body, head) for parameter in group["params"]]
    trainable = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(trainable)


@pytest.mark.parametrize(("step", "factor"), [(0, 1.0), (50, 0.5**0.9), (100, 0.0), (120, 0.0)])
def test_the_learning_rate_falls_to_zero_at_the_last_step(step, factor):
    assert optimisation.poly(step, 100) == pytest.approx(factor)


def test_attention_keeps_what_does_not_exceed_gamma_of_the_maximum():
    features = torch.tensor([[[[1.0, 2.0], [4.0, -1.0]]]])
    weight = torch.tensor([[[[1.0]]], [[[-1.0]]]])
    # class 0: 1, 2, 4, 0, of which 4 exceeds half of 4; class 1: 0, 0, 0, 1, of which 1 exceeds half of 1
    expected = features * torch.tensor([[[[1.0, 2.0], [0.0, 0.0]]]]) / 2
    torch.testing.assert_close(attention.dropped_attention(features, weight, 0.5), expected)
    published = attention.dropped_attention(features, weight, 0.5, attention.PUBLISHED_DIVISOR)
    torch.testing.assert_close(published, expected / 2)


def test_gamma_of_one_drops_nothing():
    features, weight = torch.rand(2, 5, 4, 4), torch.randn(3, 5, 1, 1)
    maps = torch.nn.functional.conv2d(features, weight).relu()
    expected = features * maps.mean(1, keepdim=True)
    torch.testing.assert_close(attention.dropped_attention(features, weight, 1.0), expected)


def test_the_networks_attention_divides_by_its_own_classes_or_as_told():
    with torch.no_grad():
        ours, told = thin(classes=2).eval(), thin(classes=2, attention_divisor=4).eval()
        torch.testing.assert_close(ours(pictures(), gamma=0.9), 2 * told(pictures(), gamma=0.9))
        assert not torch.allclose(ours(pictures()), ours(pictures(), gamma=0.9))


def test_gamma_falls_to_its_floor_and_stays():
    assert [attention.gamma_at(epoch) for epoch in (0, 1, 3)] == pytest.approx([1, 0.98, 0.98**3])
    assert attention.gamma_at(22) == attention.gamma_at(300) == pytest.approx(0.98**22)
    assert [attention.attention_used(epoch) for epoch in (0, 2, 3, 20)] == [False, False, True, True]


def test_the_classifier_can_learn_the_tags_of_four_patches():
    torch.manual_seed(0)
    network = ResNet38(2, width_divisor=THIN)
    images = pictures(4, 32)
    tags = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0]])
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    optimizer = torch.optim.SGD(optimisation.classifier_groups(network, 0.02), momentum=optimisation.MOMENTUM)
    losses = []
    for _ in range(25):
        loss = tag_loss(network(images), tags)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_thin_tower_learns_the_same_in_channels_last_layout():
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network = thin("off").double().to(memory_format=layout).eval()
        images = pictures().double().to(memory_format=layout)
        tag_loss(network(images), torch.tensor([[1, 0, 1], [0, 1, 0]])).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
