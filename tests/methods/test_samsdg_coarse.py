"""The coarse network and its start weights."""

from __future__ import annotations

import urllib.request

import pytest
import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.samsdg.coarse import CoarseNetwork, load_start_weights


@pytest.fixture(scope="module")
def network() -> CoarseNetwork:
    torch.manual_seed(0)
    return CoarseNetwork(2).eval()


def test_the_network_has_the_published_size_and_dropout():
    found = CoarseNetwork(1)
    assert sum(p.numel() for p in found.parameters()) == 39_633_729
    assert found.classifier[0].project[3].p == 0.1


def test_logits_have_the_images_size_at_a_stride_of_8(network):
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert network(images).shape == (1, 2, 64, 96)
        assert network.backbone(images)["out"].shape == (1, 2048, 8, 12)


def test_building_never_opens_a_connection(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    CoarseNetwork(1)


def test_imagenet_weights_are_counted_and_their_classifier_left_out(network, tmp_path):
    state = {"conv1.weight": torch.full_like(network.backbone["conv1"].weight, 0.5), "fc.weight": torch.zeros(3, 4)}
    state["layer1.0.conv1.weight"] = torch.zeros(7, 7)
    torch.save(state, tmp_path / "resnet50.pth")
    loaded = load_start_weights(network, tmp_path / "resnet50.pth")
    assert loaded.matched == ("backbone.conv1.weight",)
    assert loaded.unknown == ("backbone.fc.weight",)
    assert len(loaded.reshaped) == 1
    assert len(loaded.missing) == len(network.state_dict()) - 2
    assert (network.backbone["conv1"].weight == 0.5).all()


def test_tensors_of_a_released_network_are_known_by_their_names(network, tmp_path):
    released = {"backbone.conv1.weight": torch.zeros_like(network.backbone["conv1"].weight)}
    released["classifier.classifier.4.weight"] = torch.full_like(network.classifier[4].weight, 2.0)
    torch.save(released, tmp_path / "best_0.pth")
    assert len(load_start_weights(network, tmp_path / "best_0.pth").matched) == 2
    assert (network.classifier[4].weight == 2).all()


def test_a_pickled_module_is_refused(network, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "best_0.pth")
    with pytest.raises(UserError, match="more than tensors"):
        load_start_weights(network, tmp_path / "best_0.pth")


def test_a_file_of_which_nothing_fits_is_refused(network, tmp_path):
    torch.save({"blocks.0.weight": torch.zeros(3)}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"nothing fits the coarse network.*blocks\.0\.weight"):
        load_start_weights(network, tmp_path / "vit.pth")
