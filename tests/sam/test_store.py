"""Stored features: small, close, quick to check, and never taken for something else."""

from __future__ import annotations

import errno
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sam_helpers import TINY

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import replacing
from nnunet_dgplugins.sam import store as store_module
from nnunet_dgplugins.sam.codec import BITS, pack, unpack
from nnunet_dgplugins.sam.embed import LOGITS_BOUND, SIZE_BOUND
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.sam.models import MODELS
from nnunet_dgplugins.sam.preprocess import to_canvas
from nnunet_dgplugins.sam.probe import change, fixed_probe
from nnunet_dgplugins.sam.store import DamagedEntry, EmbeddingStore, Key, slice_hash, store_folder

KEY = Key("case_a", 7)
HASH = "ab" * 32


@pytest.fixture
def features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in TINY.feature_shapes]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", TINY, "compact", HASH)


def _other(store: EmbeddingStore, **changed: Any) -> EmbeddingStore:
    from dataclasses import replace

    return replace(store, **changed)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize(
    "shape", [(3, 16, 16), (70, 8, 24), (1, 1, 1), (2, 5, 7), (2, 12, 4)], ids=lambda shape: "x".join(map(str, shape))
)
def test_every_value_is_within_half_a_step(bits: int, shape: tuple[int, int, int]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 5
    packed = pack(x, bits)
    block = packed.block
    groups = x.view(shape[0], shape[1] // block, block, shape[2] // block, block)
    spread = groups.amax((2, 4), keepdim=True) - groups.amin((2, 4), keepdim=True)
    # offset and step are half-precision numbers rounded outwards, so a step can be a little wider than the spread asks
    step = (spread * (1 + 2**-9) + groups.abs().amax((2, 4), keepdim=True) * 2**-9) / (2**bits - 1)
    error = (unpack(packed) - x).abs().view(groups.shape)
    assert (error <= 0.51 * step + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e5, 1e30])
def test_any_magnitude_is_kept(bits: int, scale: float):
    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)) * scale
    assert (unpack(pack(x, bits)) - x).abs().max() < 4 * scale / 2**bits


def test_constant_and_zero_maps_come_back():
    for value in (0.0, 1.0, -273.15, 1e-20):
        x = torch.full((2, 16, 16), value)
        torch.testing.assert_close(unpack(pack(x, 12)), x, rtol=1e-3, atol=0)


def test_an_outlier_costs_only_its_own_channel_and_block():
    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[2] *= 100
    y[1, 3, 3] = 1000
    plain, found = unpack(pack(x, 8)), unpack(pack(y, 8))
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1, 8:], plain[1, 8:])


def test_the_same_numbers_give_the_same_bytes_whatever_the_threads(features: list[torch.Tensor]):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([pack(x, bits) for x in features for bits in (8, 12)])
        assert found[0] == found[1]
    finally:
        torch.set_num_threads(before)


def test_features_that_are_not_finite_are_refused(features: list[torch.Tensor]):
    features[1][0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        pack(features[1], 8)


def test_a_small_file_cannot_promise_a_large_array():
    packed = pack(torch.ones(2, 8, 8), 8)
    assert unpack(packed).shape == (2, 8, 8)
    assert len(packed.values) + len(packed.scales) < 400


# ---------------------------------------------------------------- the issue's bounds, on vit_tiny's own features


def _vit_tiny_features(outliers: bool) -> list[torch.Tensor]:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 120), torch.linspace(-1, 1, 140), indexing="ij")
    noise = torch.randn(120, 140, generator=torch.Generator().manual_seed(0))
    image = torch.exp(-3 * (rows**2 + columns**2)) + 0.1 * noise + (rows.abs() < 0.3) * 0.4
    found = FrozenEncoder("vit_tiny")(to_canvas(image[None], TINY, (0,))[None])
    if outliers:  # as real encoders have: one channel in a hundred is a hundred times larger
        for x in found:
            x[:, :: max(1, min(100, x.shape[1] - 1))] *= 100
    return found


@pytest.mark.parametrize("outliers", [False, True], ids=["as they are", "outlier channels"])
@pytest.mark.parametrize(("mode", "logits"), [("half", 0.001), ("compact", LOGITS_BOUND)])
def test_size_and_change_of_the_logits_keep_their_bounds(mode: str, logits: float, outliers: bool):
    exact = _vit_tiny_features(outliers)
    packed = [pack(x[0], BITS[mode]) for x in exact]
    size = sum(len(part.values) + len(part.scales) for part in packed)
    assert size <= SIZE_BOUND[mode] * TINY.raw_bytes
    found = change(fixed_probe(TINY), exact, [unpack(part)[None] for part in packed])
    assert 0 < found.logits < logits


def test_the_probe_is_fixed_and_sees_every_feature():
    exact = _vit_tiny_features(False)
    logits = fixed_probe(TINY)(exact)
    assert logits.shape == (1, 1, TINY.mask_size, TINY.mask_size)
    assert torch.equal(logits, fixed_probe(TINY)(exact))
    for index in range(len(exact)):
        other = [x + 0.5 * torch.randn_like(x) if place == index else x for place, x in enumerate(exact)]
        assert change(fixed_probe(TINY), exact, other).logits > 0.02


# ---------------------------------------------------------------- entries


def test_what_is_written_is_read(store: EmbeddingStore, features: list[torch.Tensor]):
    store.write(KEY, features, "content")
    found = store.read(KEY)
    assert [x.shape for x in found] == [x.shape for x in features]
    assert all((a - b).abs().max() < 0.03 for a, b in zip(found, features, strict=True))
    assert store.verify(KEY, "content") == ""


def test_a_batch_is_its_slices_stacked(store: EmbeddingStore, features: list[torch.Tensor]):
    keys = [Key("case_a", 0), Key("case_b", 3), Key("case_a", 0, 2)]
    for index, key in enumerate(keys):
        store.write(key, [x * (index + 1) for x in features], "content")
    for threads in (1, 3):
        batch = store.read_batch(keys, threads=threads)
        for index, key in enumerate(keys):
            assert all(torch.equal(x[index], y) for x, y in zip(batch, store.read(key), strict=True))


def test_files_tell_case_slice_and_view(store: EmbeddingStore):
    assert store.path(KEY).relative_to(store.folder) == Path("case_a/0007.emb")
    assert store.path(Key("case_a", 7, 2)).name == "0007_v2.emb"


def test_an_entry_of_another_image_does_not_count(store: EmbeddingStore, features: list[torch.Tensor]):
    store.write(KEY, features, "content")
    assert store.has(KEY, "content")
    assert not store.has(KEY, "changed")
    assert not store.has(Key("case_a", 8), "content")
    assert "another image" in store.verify(KEY, "changed")


@pytest.mark.parametrize(
    "changed",
    [{"weights_hash": "cd" * 32}, {"mode": "half"}, {"channels": (1,)}],
    ids=lambda changed: next(iter(changed)),
)
def test_an_entry_of_another_encoder_or_setting_does_not_count(
    store: EmbeddingStore, features: list[torch.Tensor], changed: dict[str, Any]
):
    store.write(KEY, features, "content")
    other = _other(store, **changed)
    assert not other.has(KEY, "content")
    assert other.verify(KEY)
    with pytest.raises(DamagedEntry, match="instead of"):
        other.read(KEY)


def test_another_preprocessing_does_not_count(
    store: EmbeddingStore, features: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    store.write(KEY, features, "content")
    monkeypatch.setattr(store_module, "PREPROCESSING_VERSION", 2)
    assert not store.has(KEY, "content")


def test_another_augmentation_makes_views_stale_and_leaves_plain_entries(
    store: EmbeddingStore, features: list[torch.Tensor]
):
    first = _other(store, transform="gamma 1")
    view = Key("case_a", 7, 1)
    for key in (KEY, view):
        first.write(key, features, "content")
    second = _other(store, transform="gamma 2")
    assert second.has(KEY, "content")
    assert not second.has(view, "content")


def test_an_entry_under_another_name_does_not_count(store: EmbeddingStore, features: list[torch.Tensor]):
    store.write(KEY, features, "content")
    wrong = store.path(Key("case_a", 8))
    wrong.write_bytes(store.path(KEY).read_bytes())
    assert not store.has(Key("case_a", 8), "content")


def test_every_flipped_byte_is_noticed(store: EmbeddingStore, features: list[torch.Tensor]):
    store.write(KEY, features, "content")
    path = store.path(KEY)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in [0, 5, 8, 12, 20, len(whole) - 1, *random.integers(0, len(whole), 40)]:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(broken)
        assert store.verify(KEY, "content"), place
        with pytest.raises(DamagedEntry):
            store.read(KEY)


@pytest.mark.parametrize("keep", [0, 7, 16, 300, -1])
def test_a_truncated_entry_is_noticed_by_its_size(store: EmbeddingStore, features: list[torch.Tensor], keep: int):
    store.write(KEY, features, "content")
    path = store.path(KEY)
    path.write_bytes(path.read_bytes()[:keep])
    assert not store.has(KEY, "content")
    with pytest.raises(DamagedEntry, match=str(path)):
        store.read(KEY)


def test_a_damaged_entry_is_repaired_while_reading(store: EmbeddingStore, features: list[torch.Tensor]):
    asked: list[Key] = []

    def repair(key: Key) -> None:
        asked.append(key)
        store.write(key, features, "content")

    store.repair = repair
    store.read(KEY)
    store.path(KEY).write_bytes(b"nonsense")
    store.read_batch([KEY, KEY])
    assert set(asked) == {KEY}
    assert store.verify(KEY, "content") == ""


def test_two_threads_may_write_the_same_entry_at_once(store: EmbeddingStore):
    both_wrote = threading.Barrier(2, timeout=30)

    def write(number: int) -> None:
        with replacing(store.path(KEY)) as temporary:
            temporary.write_bytes(bytes([number]))
            both_wrote.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (1, 2)))
    assert store.path(KEY).read_bytes() in (bytes([1]), bytes([2]))
    assert [path.name for path in store.path(KEY).parent.iterdir()] == [store.path(KEY).name]


def test_the_same_features_make_the_same_file(store: EmbeddingStore, features: list[torch.Tensor]):
    store.write(KEY, features, "content")
    first = store.path(KEY).read_bytes()
    store.write(KEY, features, "content")
    assert store.path(KEY).read_bytes() == first


def test_features_of_another_shape_are_refused(store: EmbeddingStore, features: list[torch.Tensor]):
    with pytest.raises(UserError, match="shapes"):
        store.write(KEY, features[:-1], "content")


def test_a_full_disk_is_a_clean_stop(
    store: EmbeddingStore, features: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    def full(self: Path, content: bytes) -> int:
        with open(self, "wb") as handle:
            handle.write(content[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="disk is full"):
        store.write(KEY, features, "content")
    assert list(store.folder.rglob("*.emb")) == []


def test_a_temporary_file_taken_away_is_written_again(
    store: EmbeddingStore, features: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    import os

    replace, calls = os.replace, []

    def once_missing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 1:
            os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", once_missing)
    store.write(KEY, features, "content")
    assert store.verify(KEY, "content") == ""
    assert len(calls) == 2


def test_readers_never_see_half_an_entry(store: EmbeddingStore, features: list[torch.Tensor]):
    store.write(KEY, features, "content")
    stop = threading.Event()
    failures: list[str] = []

    def read() -> None:
        while not stop.is_set():
            if problem := store.verify(KEY, "content"):
                failures.append(problem)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        store.write(KEY, features, "content")
    stop.set()
    reader.join()
    assert failures == []


def test_a_store_without_repair_can_be_pickled(store: EmbeddingStore, features: list[torch.Tensor]):
    store.write(KEY, features, "content")
    assert torch.equal(pickle.loads(pickle.dumps(store)).read(KEY)[0], store.read(KEY)[0])


def test_the_folder_lies_beside_the_data_and_names_what_matters(tmp_path: Path):
    data = tmp_path / "Dataset501_X" / "nnUNetPlans_2d"
    folder = store_folder(data, MODELS["vit_b"], HASH, "compact", (0,))
    assert folder.parent == tmp_path / "Dataset501_X" / "dgplugins_embeddings"
    assert folder.name == "nnUNetPlans_2d__vit_b-abababababab__v1__c0__compact"
    others = [
        store_folder(data, MODELS["vit_b"], "cd" * 32, "compact", (0,)),
        store_folder(data, MODELS["vit_b"], HASH, "half", (0,)),
        store_folder(data, MODELS["vit_b"], HASH, "compact", (0, 1, 2)),
        store_folder(data.with_name("other_2d"), MODELS["vit_b"], HASH, "compact", (0,)),
    ]
    assert len({folder, *others}) == 5


def test_the_content_hash_sees_every_pixel_shown_and_no_other():
    x = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[0, 4, 5] += 1e-3
    assert slice_hash(x, (0,)) != slice_hash(y, (0,))
    assert slice_hash(x, (1,)) == slice_hash(y, (1,))
    assert slice_hash(x, (0,)) != slice_hash(x.transpose(1, 2), (0,))
