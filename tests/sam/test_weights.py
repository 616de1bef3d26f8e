"""Weights: safe reading, complete reports, hashes, weights from a seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sam_helpers import encoder_of, full_state, seeded_state
from torch import nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam import weights
from nnunet_dgplugins.sam.hash_cache import cached_hash
from nnunet_dgplugins.sam.models import MODELS, SamModel
from nnunet_dgplugins.sam.weights import build_parts, find_weights, hash_state, load_parts, read_state, weights_hash

# where a training of vit_tiny starts: another start is another training, so only on purpose
SEEDED_HASH = "2876384084f66c82e8ad3f2491f99c766a097b202f7c1b0d4f2293f1eb937be8"


def test_weights_from_a_seed_are_the_same_on_every_machine():
    assert hash_state(encoder_of(seeded_state(0))) == SEEDED_HASH
    assert hash_state(encoder_of(seeded_state(1))) != SEEDED_HASH


def test_weights_from_a_seed_do_not_touch_the_global_random_state():
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    seeded_state()
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])


def test_weights_from_a_seed_are_not_degenerate():
    parts = load_parts("vit_tiny")
    state = encoder_of(seeded_state())
    parts.image_encoder.load_state_dict({key.removeprefix("image_encoder."): value for key, value in state.items()})
    for name, value in parts.image_encoder.state_dict().items():
        assert torch.isfinite(value).all()
        assert name.endswith("bias") or value.abs().max() > 0.01, name
    x = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    first, second = parts.image_encoder(x)
    assert (first - second).abs().mean() > 0.1  # it sees the image
    assert first.std(dim=(1, 2)).mean() > 0.1  # and tells places apart


def test_parts_are_sams_own_classes_and_frozen():
    from segment_anything.modeling import ImageEncoderViT, PromptEncoder

    parts = load_parts("vit_tiny")
    assert isinstance(parts.image_encoder, ImageEncoderViT)
    assert isinstance(parts.prompt_encoder, PromptEncoder)
    assert not parts.image_encoder.training
    assert not any(p.requires_grad for p in [*parts.image_encoder.parameters(), *parts.prompt_encoder.parameters()])
    assert set(parts.transformer_kwargs) == {"depth", "embedding_dim", "num_heads", "mlp_dim"}
    assert all(key.startswith("mask_decoder.") for key in parts.mask_decoder_state)


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_the_layout_is_that_of_segment_anything(size: str):
    import segment_anything

    with torch.device("meta"):
        theirs = segment_anything.sam_model_registry[size]().state_dict()
    parts = build_parts(MODELS[size])
    ours = {f"image_encoder.{k}": v.shape for k, v in parts.image_encoder.state_dict().items()}
    ours |= {f"prompt_encoder.{k}": v.shape for k, v in parts.prompt_encoder.state_dict().items()}
    decoder = weights.build_mask_decoder(parts).state_dict()
    ours |= {f"mask_decoder.{k}": v.shape for k, v in decoder.items()}
    assert ours == {key: value.shape for key, value in theirs.items()}


def test_a_missing_file_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError) as caught:
        find_weights("vit_b")
    text = str(caught.value)
    for part in ("sam_vit_b_01ec64.pth", "https://", "DGPLUGINS_SAM_DIR is not set", "357.7 MiB", "ec2df627"):
        assert part in text
    monkeypatch.setenv("DGPLUGINS_SAM_DIR", str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path)):
        find_weights("vit_b")
    (tmp_path / "sam_vit_b_01ec64.pth").touch()
    assert find_weights("vit_b") == tmp_path / "sam_vit_b_01ec64.pth"


def test_a_moved_file_is_found_by_its_name(weight_file: Callable[..., SamModel], tmp_path: Path, monkeypatch):
    model = weight_file("medsam.pth")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path(model.file or "").rename(elsewhere / "medsam.pth")
    monkeypatch.setenv("DGPLUGINS_SAM_DIR", str(elsewhere))
    assert find_weights(model) == elsewhere / "medsam.pth"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.sam.{key}": value for key, value in state.items()}},
        lambda state: {key.removeprefix("image_encoder."): value for key, value in state.items()},
        lambda state: {key: value.half() for key, value in state.items()},
    ],
    ids=["plain", "module", "wrapped", "wrapped twice", "encoder without prefix", "half"],
)
def test_wrappers_and_prefixes_are_taken_off(wrap: Callable, tmp_path: Path, weight_file: Callable[..., SamModel]):
    model = weight_file()
    torch.save(wrap(full_state()), model.file or "")
    parts = load_parts(model)
    reference = load_parts("vit_tiny").image_encoder.state_dict()
    for key, value in parts.image_encoder.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference[key], atol=2e-3, rtol=2e-3)


def test_safetensors_are_read(weight_file: Callable[..., SamModel]):
    from dataclasses import replace

    from safetensors.torch import save_file

    model = weight_file()
    path = str(Path(model.file or "").with_suffix(".safetensors"))
    save_file(full_state(), path)
    assert load_parts(replace(model, file=path)).weights_hash == load_parts("vit_tiny").weights_hash


def test_an_official_desam_checkpoint_gives_its_sam_parts(weight_file: Callable[..., SamModel]):
    model = weight_file(**{"mask_decoder.pimm.seg_outputs.0.weight": torch.zeros(1, 2, 1, 1)})
    assert load_parts(model).weights_hash == load_parts("vit_tiny").weights_hash


def test_every_wrong_key_is_reported(weight_file: Callable[..., SamModel]):
    model = weight_file(**{"image_encoder.extra": torch.zeros(1), "image_encoder.neck.1.weight": torch.zeros(3)})
    state = torch.load(model.file or "", weights_only=True)
    del state["image_encoder.blocks.0.norm1.bias"], state["prompt_encoder.no_mask_embed.weight"]
    torch.save(state, model.file or "")
    with pytest.raises(UserError) as caught:
        load_parts(model)
    text = str(caught.value)
    assert "missing: image_encoder.blocks.0.norm1.bias" in text
    assert "missing: prompt_encoder.no_mask_embed.weight" in text
    assert "unknown: image_encoder.extra" in text
    assert "image_encoder.neck.1.weight (3,) instead of (64,)" in text


def test_a_file_without_any_of_sams_tensors_is_refused(weight_file: Callable[..., SamModel]):
    model = weight_file()
    torch.save({"conv.weight": torch.zeros(1)}, model.file or "")
    with pytest.raises(UserError, match="no tensor has a name of SAM's"):
        load_parts(model)


def test_a_pickled_module_is_refused(tmp_path: Path):
    path = tmp_path / "module.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=r"pickled Python objects.*refused.*state_dict\(\)"):
        read_state(path)


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_a_truncated_file_is_refused(keep: int, weight_file: Callable[..., SamModel]):
    path = Path(weight_file().file or "")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=str(path)):
        read_state(path)


def test_the_hash_sees_names_types_shapes_and_bytes():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    changed = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"c": torch.zeros(2, 3), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.float64)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0000001])},
    ]
    assert hash_state(base) == hash_state(dict(reversed(base.items())))
    assert len({hash_state(state) for state in [base, *changed]}) == 5


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    calls: list[int] = []

    def compute() -> str:
        calls.append(1)
        return path.read_bytes().hex()

    _age(path)
    assert cached_hash(path, compute) == cached_hash(path, compute) == b"one".hex()
    assert len(calls) == 1
    times = path.stat()
    path.write_bytes(b"two")  # same size, and its time set back
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cached_hash(path, compute) == b"two".hex()


def _age(path: Path) -> None:
    """Make the cache believe that the file is long settled."""
    from nnunet_dgplugins.sam import hash_cache

    hash_cache._SETTLED_SECONDS = -1.0


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_dgplugins.sam import hash_cache

    monkeypatch.setattr(hash_cache, "_SETTLED_SECONDS", hash_cache._SETTLED_SECONDS)


def test_a_file_just_written_is_not_remembered(tmp_path: Path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"one")
    values = iter(["first", "second"])
    assert [cached_hash(path, lambda: next(values)) for _ in range(2)] == ["first", "second"]


def test_a_broken_or_unwritable_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"one")
    _age(path)
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "nnunet_dgplugins" / "sam_hashes.json"
    cache.parent.mkdir(parents=True)
    cache.write_text("{broken")
    assert cached_hash(path, lambda: "value") == "value"
    assert cached_hash(path, lambda: "not asked") == "value"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file, so that no folder can be made in it
    assert cached_hash(path, lambda: "computed") == "computed"


def test_another_encoder_has_another_hash(weight_file: Callable[..., SamModel]):
    shipped = load_parts("vit_tiny").weights_hash
    assert weights_hash("vit_tiny") == shipped
    assert weights_hash(weight_file("a.pth")) == shipped
    assert weights_hash(weight_file("b.pth", change=1e-3)) != shipped
