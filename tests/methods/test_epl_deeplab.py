"""DeepLabV3+ and its checkpoints: official layout, sizes, start weights, released models, refusals."""

from __future__ import annotations

import argparse

import pytest
import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.epl import checkpoint
from nnunet_dgplugins.methods.epl.deeplab import DeepLabV3Plus


@pytest.fixture(scope="module")
def network() -> DeepLabV3Plus:
    torch.manual_seed(0)
    return DeepLabV3Plus(in_channels=1, num_classes=4)


def fresh(**sizes: int) -> DeepLabV3Plus:
    """A network whose tensors are all zero, so that what was loaded shows."""
    found = DeepLabV3Plus(**{"in_channels": 1, "num_classes": 4, **sizes})
    for value in found.state_dict().values():
        value.zero_()
    return found


def imagenet(network: DeepLabV3Plus, channels: int = 3) -> dict[str, torch.Tensor]:
    """A state dict laid out as the published resnet50_v1c.pth."""
    start = "backbone."
    state = {k.removeprefix(start): v.clone() for k, v in network.state_dict().items() if k.startswith(start)}
    state["conv1.0.weight"] = torch.randn(64, channels, 3, 3)
    return {**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


def test_the_layout_is_the_released_one(network):
    state = network.state_dict()
    assert sum(parameter.numel() for parameter in network.parameters()) == 40_470_436
    assert len(state) == 372
    assert {key.split(".")[0] for key in state} == {"backbone", "head", "classifier"}
    shapes = {
        "backbone.conv1.0.weight": (64, 1, 3, 3),
        "backbone.conv1.6.weight": (128, 64, 3, 3),
        "backbone.bn1.weight": (128,),
        "backbone.layer1.0.conv1.weight": (64, 128, 1, 1),
        "backbone.layer1.0.downsample.0.weight": (256, 128, 1, 1),
        "backbone.layer4.2.conv2.weight": (512, 512, 3, 3),
        "head.aspp.map_convs.3.weight": (256, 2048, 3, 3),
        "head.aspp.pool_red_conv.weight": (256, 256, 1, 1),
        "head.reduce.0.weight": (48, 256, 1, 1),
        "head.last_conv.0.weight": (256, 304, 3, 3),
        "head.last_conv.5.running_var": (256,),
        "classifier.bias": (4,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_the_last_stage_is_dilated_instead_of_strided(network):
    blocks = [block.conv2 for block in network.backbone.layer4]
    assert [conv.dilation for conv in blocks] == [conv.padding for conv in blocks] == [(2, 2), (4, 4), (8, 8)]
    assert all(conv.stride == (1, 1) for conv in blocks)
    assert network.backbone.layer4[0].downsample[0].stride == (1, 1)
    sizes = []
    hook = network.head.aspp.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        network.eval()(torch.zeros(1, 1, 64, 96))
    hook.remove()
    assert sizes == [(1, 2048, 4, 6)]


@pytest.mark.parametrize("size", [(64, 64), (45, 70)])
def test_logits_have_the_size_of_the_input_whatever_it_is(network, size):
    with torch.no_grad():
        assert network.eval()(torch.randn(1, 1, *size)).shape == (1, 4, *size)


def test_any_number_of_channels_and_classes_trains():
    network = DeepLabV3Plus(in_channels=2, num_classes=3)
    logits = network(torch.randn(2, 2, 32, 40))
    assert logits.shape == (2, 3, 32, 40)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_start_weights_fill_the_backbone_and_say_what_was_skipped(network, tmp_path):
    torch.save(imagenet(network), tmp_path / "resnet50_v1c.pth")
    found = fresh()
    loaded = checkpoint.load_start_weights(found, tmp_path / "resnet50_v1c.pth")
    expected = network.state_dict()
    backbone = {key for key in expected if key.startswith("backbone.")}
    assert set(loaded.matched) == backbone - {"backbone.conv1.0.weight"}
    for key, value in found.state_dict().items():
        assert torch.equal(value, expected[key] if key in loaded.matched else torch.zeros_like(value)), key
    assert loaded.reshaped == ("backbone.conv1.0.weight (64, 3, 3, 3) instead of (64, 1, 3, 3)",)
    assert set(loaded.unknown) == {"backbone.fc.weight", "backbone.fc.bias"}
    assert set(loaded.missing) == set(expected) - backbone
    assert not loaded.complete
    text = str(loaded)
    assert text.startswith(f"{len(backbone) - 1} tensors loaded; 1 of another shape, skipped (backbone.conv1.0.weight")
    assert "2 unknown to the network" in text


def test_three_input_channels_take_the_first_convolution_too(network, tmp_path):
    state = imagenet(network)
    torch.save({"model": state}, tmp_path / "resnet50_v1c.pth")
    found = fresh(in_channels=3)
    loaded = checkpoint.load_start_weights(found, tmp_path / "resnet50_v1c.pth")
    assert loaded.reshaped == ()
    assert torch.equal(found.backbone.conv1[0].weight, state["conv1.0.weight"])


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"encoder.weight": torch.zeros(2), "bn1.num_batches_tracked": torch.tensor(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: nothing fits.*encoder\.weight"):
        checkpoint.load_start_weights(fresh(), tmp_path / "other.pth")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_model_as_a_state_dict_is_loaded_whole(network, tmp_path, prefix):
    torch.save({prefix + key: value for key, value in network.state_dict().items()}, tmp_path / "model.pth")
    state = checkpoint.read_released(tmp_path / "model.pth")
    assert (checkpoint.in_channels(state), checkpoint.num_classes(state)) == (1, 4)
    found = fresh()
    loaded = checkpoint.load_matching(found, state)
    assert loaded.complete
    assert str(loaded) == "372 tensors loaded."
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x), network.eval()(x))


@pytest.mark.parametrize(
    ("labels", "order"),
    [({"LV": 1, "MYO": 2, "RV": 3}, [3, 0, 1, 2]), ({"rv": 1, "myo": 2, "lv": 3}, [3, 2, 1, 0])],
    ids=["M&Ms", "ACDC"],
)
def test_classes_move_to_the_datasets_values_and_the_background_from_last_to_first(network, labels, order):
    found = fresh()
    checkpoint.load_matching(found, checkpoint.in_label_order(network.state_dict(), labels))
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x), network.eval()(x)[:, order])


@pytest.mark.parametrize("labels", [{"LV": 1, "MYO": 2}, {"LV": 1, "MYO": 2, "aorta": 3}, {"LV": 1, "MYO": 2, "RV": 4}])
def test_other_classes_than_the_released_ones_are_refused(network, labels):
    with pytest.raises(ValueError, match="instead of LV, MYO, RV"):
        checkpoint.in_label_order(network.state_dict(), labels)


def test_another_number_of_classes_leaves_the_classifier_and_names_it(network):
    loaded = checkpoint.load_matching(fresh(num_classes=2), network.state_dict())
    assert len(loaded.matched) == 370
    assert [text.split()[0] for text in loaded.reshaped] == ["classifier.weight", "classifier.bias"]
    assert not loaded.complete


def test_a_pickled_module_is_refused_with_the_line_that_saves_it_anew(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), tmp_path / "model.pth")
    torch.save({"state_dict": {}, "options": argparse.Namespace(lr=1)}, tmp_path / "start.pth")
    with pytest.raises(UserError, match=r"model\.pth.*refused.*state_dict\(\)"):
        checkpoint.read_released(tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"start\.pth.*refused.*state_dict\(\)"):
        checkpoint.load_start_weights(fresh(), tmp_path / "start.pth")


def test_other_files_say_what_they_lack(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.read_released(tmp_path / "nowhere.pth")
    torch.save({"backbone.conv1.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"not an EPL model: classifier\.weight is missing"):
        checkpoint.read_released(tmp_path / "half.pth")
