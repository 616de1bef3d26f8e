"""vit_tiny's weights ship with the package: small, complete, never confused with those of another version."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sam_helpers import TINY, encoder_of, full_state, seeded_state
from torch import nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam import hash_cache, models
from nnunet_dgplugins.sam.embed import prepare_store
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.sam.models import SamModel, get_model
from nnunet_dgplugins.sam.weights import find_weights, hash_state, load_parts, weight_layout, weights_hash

MOST_BYTES = 8 * 10**6


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Return a function that installs a version of the package whose vit_tiny has other weights."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(models, "_PACKAGE", folder)
    monkeypatch.setattr(hash_cache, "_SETTLED_SECONDS", -1.0)  # as if each version had been there for long

    def install(seed: int) -> Path:
        path = folder / TINY.file
        save_file({key: value.half() for key, value in seeded_state(seed).items()}, path)
        return path

    return install


def _canvas() -> torch.Tensor:
    return torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))


def test_the_file_is_small_in_half_precision_and_complete():
    path = find_weights("vit_tiny")
    state = load_file(path)
    assert path.stat().st_size <= MOST_BYTES
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in weight_layout(TINY).items()
    }
    assert all(value.isfinite().all() for value in state.values())


def test_it_is_loaded_as_any_other_file():
    parts, state = load_parts("vit_tiny"), load_file(find_weights("vit_tiny"))
    for key, value in full_state().items():
        assert torch.equal(value, state[key].float()), key
    exact = {key: value.float() for key, value in encoder_of(state).items()}
    assert parts.weights_hash == hash_state(exact) == weights_hash("vit_tiny")


def test_a_damaged_file_is_refused_with_its_name(package: Callable[[int], Path]):
    path = package(0)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{path}: cannot be read as weights"):
        load_parts("vit_tiny")


def test_a_file_of_another_layout_is_refused_with_every_key(package: Callable[[int], Path]):
    path = package(0)
    state = load_file(path)
    del state["mask_decoder.iou_token.weight"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"missing: mask_decoder\.iou_token\.weight"):
        load_parts("vit_tiny")


def test_an_installation_without_the_file_says_so(package: Callable[[int], Path]):
    package(0).unlink()
    with pytest.raises(UserError, match=r"vit_tiny\.safetensors .* missing from the installed .* Install it again"):
        load_parts("vit_tiny")


def test_other_weights_have_another_hash_even_where_size_and_time_of_the_file_are_the_same(
    package: Callable[[int], Path],
):
    path = package(1)
    times, size = path.stat(), path.stat().st_size
    first = weights_hash("vit_tiny"), weights_hash(get_model(f"vit_tiny:{path}"))
    assert first[0] == first[1] == load_parts("vit_tiny").weights_hash
    package(2)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == size
    second = weights_hash("vit_tiny"), weights_hash(get_model(f"vit_tiny:{path}"))
    assert second[0] == second[1] == load_parts("vit_tiny").weights_hash
    assert first[0] != second[0]


def test_other_weights_make_another_store(package: Callable[[int], Path], preprocessed: Path):
    cases, silent = ["case_a", "case_b"], lambda text: None
    package(1)
    first = prepare_store(preprocessed, cases, mode="half", say=silent)
    before = {path: path.read_bytes() for path in first.folder.rglob("*.emb")}
    package(2)
    said: list[str] = []
    second = prepare_store(preprocessed, cases, mode="half", say=said.append)
    assert second.folder != first.folder
    assert second.weights_hash != first.weights_hash
    assert "Embedding 5 of 5 slices with vit_tiny (shipped)" in said[0]
    assert len(before) == 5
    assert all(path.read_bytes() == content for path, content in before.items())
    package(1)
    assert prepare_store(preprocessed, cases, mode="half", say=said.append).folder == first.folder
    assert "complete" in said[-1]


# ---------------------------------------------------------------- inside checkpoints


class _Network(nn.Module):
    def __init__(self, model: SamModel | str = "vit_tiny"):
        super().__init__()
        self.image_encoder = FrozenEncoder(model)


def test_a_checkpoint_holds_them_in_half_precision_to_the_bit():
    network = _Network()
    reference = network.image_encoder(_canvas())
    state = network.state_dict()
    own = {key: value for key, value in state.items() if not key.endswith("weights_hash")}
    assert set(own) == set(encoder_of(weight_layout(TINY)))
    assert {value.dtype for value in own.values()} == {torch.float16}
    assert hash_state({key: value.float() for key, value in own.items()}) == network.image_encoder.hash
    other = _Network()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.image_encoder(_canvas()), reference, strict=True))


def test_values_beyond_half_precision_stay_in_the_checkpoint_as_they_are():
    network = _Network()
    state = {key: value.float() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    state["image_encoder.neck.2.weight"] = state["image_encoder.neck.2.weight"] / 3
    other = _Network()
    other.load_state_dict(state)
    again = other.state_dict()
    assert again["image_encoder.neck.2.weight"].dtype == torch.float32
    assert again["image_encoder.neck.0.weight"].dtype == torch.float16
    assert all(torch.equal(again[key].to(value.dtype), value) for key, value in state.items())


def test_a_model_keeps_its_own_weights_when_the_package_ships_others(package: Callable[[int], Path]):
    package(1)
    trained = _Network()
    reference = trained.image_encoder(_canvas())
    state = trained.state_dict()
    package(2)
    newer = _Network()
    assert not torch.allclose(newer.image_encoder(_canvas())[-1], reference[-1])
    for network in (_Network(), newer):  # built for prediction; and one that has loaded the newer weights
        for _ in range(2):
            network.load_state_dict(state)
            found = network.image_encoder(_canvas())
            assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
        assert network.image_encoder.hash == trained.image_encoder.hash
        again = network.state_dict()
        assert all(torch.equal(again[key], value) for key, value in state.items())


def test_a_model_needs_no_shipped_file_to_predict(package: Callable[[int], Path]):
    path = package(1)
    state = _Network().state_dict()
    path.unlink()
    network = _Network()
    network.load_state_dict(state)
    network.image_encoder(_canvas())


def test_a_users_file_of_that_size_leaves_only_its_hash_in_a_checkpoint(tmp_path: Path):
    path = tmp_path / "own.safetensors"
    save_file(seeded_state(3), path)
    network = _Network(f"vit_tiny:{path}")
    network.image_encoder.load()
    assert set(network.state_dict()) == {"image_encoder.weights_hash"}
    assert network.image_encoder.hash == hash_state(encoder_of(seeded_state(3)))
    network.image_encoder.release()
    assert not network.image_encoder.loaded
