"""The frozen encoder in checkpoints: hash only, always inside, carried, loaded late, never confused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sam_helpers import TINY
from torch import nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam import frozen
from nnunet_dgplugins.sam.frozen import FrozenEncoder, encoder_hash
from nnunet_dgplugins.sam.models import SamModel
from nnunet_dgplugins.sam.weights import load_parts

WeightFile = Callable[..., SamModel]


class _Network(nn.Module):
    """A network with a frozen encoder and something that trains."""

    def __init__(self, model: SamModel):
        super().__init__()
        self.image_encoder = FrozenEncoder(model)
        self.decoder = nn.Linear(2, 2)


@pytest.fixture
def canvas() -> torch.Tensor:
    return torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of models whose weights were loaded from their file."""
    seen: list[str] = []

    def counted(model: SamModel, *rest: Any) -> Any:
        seen.append(model.name)
        return load_parts(model, *rest)

    monkeypatch.setattr(frozen, "load_parts", counted)
    return seen


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_building_needs_no_weight_file():
    network = _Network(TINY)
    assert not network.image_encoder.loaded
    assert list(dict(network.named_parameters())) == ["decoder.weight", "decoder.bias"]
    FrozenEncoder("vit_h")


def test_a_checkpoint_of_a_file_model_holds_only_the_hash(weight_file: WeightFile, canvas: torch.Tensor):
    network = _Network(weight_file())
    network.image_encoder(canvas)
    assert set(network.state_dict()) == {"image_encoder.weights_hash", "decoder.weight", "decoder.bias"}
    assert network.image_encoder.hash == load_parts("vit_tiny").weights_hash


def test_vit_tiny_is_always_inside_under_sams_names(canvas: torch.Tensor):
    network = _Network(TINY)
    state = network.state_dict()
    expected = {f"image_encoder.{key}" for key in load_parts("vit_tiny").image_encoder.state_dict()}
    assert expected <= set(state)
    other = _Network(TINY)
    other.load_state_dict(state)
    assert _same(other.image_encoder(canvas), network.image_encoder(canvas))


def test_weights_inside_a_checkpoint_win_over_the_packages(canvas: torch.Tensor):
    network = _Network(TINY)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    state["image_encoder.neck.2.weight"] *= 1.5
    other = _Network(TINY)
    other.load_state_dict(state)
    assert not _same(other.image_encoder(canvas), network.image_encoder(canvas))
    assert torch.equal(other.state_dict()["image_encoder.neck.2.weight"], state["image_encoder.neck.2.weight"])


def test_the_file_is_loaded_at_first_use_only(weight_file: WeightFile, canvas: torch.Tensor, loads: list[str]):
    model = weight_file()
    trained = _Network(model)
    trained.image_encoder.load()
    state = trained.state_dict()
    loads.clear()
    network = _Network(model)
    for _ in range(3):  # as nnU-Net does, per fold and case
        network.load_state_dict(state)
    assert loads == []
    reference = trained.image_encoder(canvas)
    for _ in range(3):
        network.load_state_dict(state)
        assert _same(network.image_encoder(canvas), reference)
    assert len(loads) == 1


def test_other_weights_than_those_trained_with_are_refused(weight_file: WeightFile, canvas: torch.Tensor):
    model = weight_file()
    trained = _Network(model)
    trained.image_encoder.load()
    state = trained.state_dict()
    weight_file(change=0.01)  # the same place, another encoder
    network = _Network(model)
    network.load_state_dict(state)
    with pytest.raises(UserError) as caught:
        network.image_encoder(canvas)
    other = load_parts(model).weights_hash
    assert trained.image_encoder.hash in str(caught.value)
    assert other in str(caught.value)
    with pytest.raises(UserError, match="trained with"):
        network.image_encoder.adopt(load_parts(model))


def test_a_missing_file_is_an_error_at_first_use_not_before(weight_file: WeightFile, canvas: torch.Tensor):
    model = weight_file()
    trained = _Network(model)
    trained.image_encoder.load()
    Path(model.file or "").unlink()
    network = _Network(model)
    network.load_state_dict(trained.state_dict())
    with pytest.raises(UserError, match="not found"):
        network.image_encoder(canvas)


def test_another_checkpoint_brings_another_encoder(weight_file: WeightFile, canvas: torch.Tensor):
    first, second = weight_file("a.pth"), weight_file("b.pth", change=0.01)
    states = []
    for model in (first, second):
        network = _Network(model)
        network.image_encoder.load()
        states.append(network.state_dict())
    network = _Network(first)
    network.load_state_dict(states[0])
    network.image_encoder(canvas)
    network.load_state_dict(states[1])
    with pytest.raises(UserError, match="trained with"):  # and never the first one's features without a word
        network.image_encoder(canvas)
    network.load_state_dict(states[0])
    network.image_encoder(canvas)


def test_a_carried_encoder_needs_no_file(weight_file: WeightFile, canvas: torch.Tensor, loads: list[str]):
    model = weight_file(change=1e-4)  # beyond half precision, as real files are
    trained = _Network(model)
    trained.image_encoder.carry()
    state = trained.state_dict()
    assert state["image_encoder.neck.0.weight"].dtype == torch.float16
    Path(model.file or "").unlink()
    loads.clear()
    network = _Network(model)
    for _ in range(2):
        network.load_state_dict(state)
        found = network.image_encoder(canvas)
    assert loads == []
    for ours, theirs in zip(found, trained.image_encoder(canvas), strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() < 5e-3  # half precision of the weights
    assert network.image_encoder.hash == trained.image_encoder.hash
    again = network.state_dict()  # a bundle stays a bundle
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_the_same_bundle_again_copies_nothing(weight_file: WeightFile):
    network = _Network(weight_file())
    network.image_encoder.carry()
    state = network.state_dict()
    other = _Network(network.image_encoder.model)
    other.load_state_dict(state)
    held = other.image_encoder._held[0]
    other.load_state_dict(state)
    assert other.image_encoder._held[0] is held


def test_carrying_can_be_switched_off_again(weight_file: WeightFile):
    network = _Network(weight_file())
    network.image_encoder.carry()
    network.image_encoder.carry(False)
    assert len(network.state_dict()) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("image_encoder.neck.0.weight"), "Missing key.*neck.0.weight"),
        (lambda state: state.pop("image_encoder.weights_hash"), "Missing key.*weights_hash"),
        (lambda state: state.update({"image_encoder.odd": torch.zeros(1)}), "Unexpected key.*odd"),
        (lambda state: state.update({"image_encoder.neck.1.bias": torch.zeros(3)}), r"neck.1.bias: \(3,\) instead of"),
    ],
    ids=["a tensor lacks", "the hash lacks", "a tensor too many", "wrong shape"],
)
def test_loading_is_strict(spoil: Callable[[dict[str, Any]], Any], message: str):
    state = dict(_Network(TINY).state_dict())
    spoil(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        _Network(TINY).load_state_dict(state)


def test_it_is_never_trained(canvas: torch.Tensor):
    network = _Network(TINY)
    network.train()
    encoder = network.image_encoder
    found = encoder(canvas.requires_grad_())
    assert not encoder.training
    assert not encoder._held[0].image_encoder.training
    assert not any(x.requires_grad for x in found)
    assert not any(p.requires_grad for p in encoder._held[0].parameters())


def test_autocast_around_it_changes_nothing(canvas: torch.Tensor):
    encoder = FrozenEncoder("vit_tiny")
    plain = encoder(canvas)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _same(encoder(canvas), plain)


def test_released_weights_are_loaded_again(weight_file: WeightFile, canvas: torch.Tensor):
    encoder = FrozenEncoder(weight_file())
    first = encoder(canvas)
    encoder.release()
    assert not encoder.loaded
    assert encoder.hash
    assert _same(encoder(canvas), first)
    tiny = FrozenEncoder("vit_tiny")
    tiny.load()
    tiny.release()
    assert tiny.loaded  # carried weights have no other place


def test_it_can_be_copied_and_pickled(canvas: torch.Tensor):
    network = _Network(TINY)
    reference = network.image_encoder(canvas)
    assert _same(copy.deepcopy(network).image_encoder(canvas), reference)
    assert _same(pickle.loads(pickle.dumps(network)).image_encoder(canvas), reference)


def test_a_half_network_keeps_the_encoder_and_its_hash(canvas: torch.Tensor):
    network = _Network(TINY)
    reference, known = network.image_encoder(canvas), network.image_encoder.hash
    network.half()
    assert network.decoder.weight.dtype == torch.float16
    assert network.image_encoder.hash == known
    assert _same(network.image_encoder(canvas), reference)


def test_the_hash_of_an_encoder_is_that_of_its_parts():
    parts = load_parts("vit_tiny")
    assert encoder_hash(parts.image_encoder) == parts.weights_hash
