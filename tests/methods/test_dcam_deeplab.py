"""Stage 2's DeepLabV3+: published layout, sizes, start weights, parameter groups."""

from __future__ import annotations

import pytest
import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.dcam import optimisation
from nnunet_dgplugins.methods.dcam.checkpoint import load_deeplab_weights
from nnunet_dgplugins.methods.dcam.deeplab import DeepLab


@pytest.fixture(scope="module")
def network() -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(num_classes=4)


def test_the_layout_is_the_published_one(network):
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert sizes == {"backbone": 42_500_160, "aspp": 15_535_104, "decoder": 1_304_676}
    state = network.state_dict()
    shapes = {
        "backbone.conv1.weight": (64, 3, 7, 7),
        "backbone.bn1.running_mean": (64,),
        "backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "backbone.layer3.22.conv3.weight": (1024, 256, 1, 1),
        "backbone.layer4.2.conv2.weight": (512, 512, 3, 3),
        "aspp.aspp1.atrous_conv.weight": (256, 2048, 1, 1),
        "aspp.aspp4.bn.weight": (256,),
        "aspp.global_avg_pool.1.weight": (256, 2048, 1, 1),
        "aspp.global_avg_pool.2.bias": (256,),
        "aspp.conv1.weight": (256, 1280, 1, 1),
        "aspp.bn1.weight": (256,),
        "decoder.conv1.weight": (48, 256, 1, 1),
        "decoder.bn1.weight": (48,),
        "decoder.last_conv.0.weight": (256, 304, 3, 3),
        "decoder.last_conv.1.weight": (256,),
        "decoder.last_conv.4.weight": (256, 256, 3, 3),
        "decoder.last_conv.5.weight": (256,),
        "decoder.last_conv.8.bias": (4,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_dilations_are_the_published_ones(network):
    assert [block.conv2.dilation for block in network.backbone.layer4] == [(2, 2), (4, 4), (8, 8)]
    assert all(block.conv2.stride == (1, 1) for block in network.backbone.layer4)
    branches = [network.aspp.aspp2, network.aspp.aspp3, network.aspp.aspp4]
    assert [branch.atrous_conv.dilation for branch in branches] == [(6, 6), (12, 12), (18, 18)]


@pytest.mark.parametrize("size", [(64, 64), (45, 70)])
def test_logits_have_the_size_of_the_patch_whatever_it_is(network, size):
    seen = []
    hook = network.aspp.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape[1:])))
    with torch.no_grad():
        assert network.eval()(torch.rand(1, 3, *size)).shape == (1, 4, *size)
    hook.remove()
    assert seen == [(2048, -(-size[0] // 16), -(-size[1] // 16))]


def test_the_groups_train_the_head_ten_times_faster(network):
    backbone, head = optimisation.deeplab_groups(network, 0.01)
    assert (backbone["lr"], head["lr"]) == (0.01, pytest.approx(0.1))
    assert sum(p.numel() for p in backbone["params"]) == 42_500_160
    assert sum(p.numel() for p in head["params"]) == 15_535_104 + 1_304_676


def test_start_weights_are_loaded_without_the_last_layer(network, tmp_path):
    stem, last = torch.randn(64, 3, 7, 7), torch.randn(4, 256, 1, 1)
    state = {
        "backbone.conv1.weight": stem,
        "aspp.bn1.bias": torch.full((256,), 2.0),
        "decoder.last_conv.8.weight": last,
        "decoder.last_conv.8.bias": torch.ones(4),
        "decoder.foreign": torch.ones(1),
    }
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "deeplab-resnet.pth.tar")
    before = network.decoder.last_conv[8].weight.clone()
    loaded = load_deeplab_weights(network, tmp_path / "deeplab-resnet.pth.tar")
    assert set(loaded.matched) == {"backbone.conv1.weight", "aspp.bn1.bias"}
    assert loaded.unknown == ("decoder.foreign",)
    assert "decoder.last_conv.8.weight" in loaded.missing
    assert not any(name.endswith("num_batches_tracked") for name in loaded.missing)
    assert torch.equal(network.backbone.conv1.weight, stem)
    assert torch.equal(network.aspp.bn1.bias, torch.full((256,), 2.0))
    assert torch.equal(network.decoder.last_conv[8].weight, before)


def test_a_file_with_nothing_but_the_last_layer_is_refused(network, tmp_path):
    torch.save({"decoder.last_conv.8.bias": torch.ones(4), "other": torch.ones(2)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"wrong\.pth: nothing fits DeepLabV3\+; found for example other"):
        load_deeplab_weights(network, tmp_path / "wrong.pth")
