"""Filling the store: resumable to the byte, harmless in parallel, clear about cost and trouble."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sam_helpers import TINY, write_case

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam import embed
from nnunet_dgplugins.sam.embed import prepare_store, preprocessed_cases, remove_leftovers
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.sam.models import SamModel
from nnunet_dgplugins.sam.preprocess import to_canvas
from nnunet_dgplugins.sam.store import EmbeddingStore, Key
from nnunet_dgplugins.sam.weights import load_parts

CASES = ["case_a", "case_b"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the encoder's calls."""
    seen: list[int] = []
    forward = FrozenEncoder.forward

    def counted(self: FrozenEncoder, canvas: torch.Tensor) -> list[torch.Tensor]:
        seen.append(len(canvas))
        return forward(self, canvas)

    monkeypatch.setattr(FrozenEncoder, "forward", counted)
    return seen


def _silent(_: str) -> None:
    pass


def _prepare(folder: Path, **options: Any) -> EmbeddingStore:
    return prepare_store(folder, options.pop("cases", CASES), **{"mode": "compact", "say": _silent, **options})


def _bytes(store: EmbeddingStore) -> dict[str, bytes]:
    return {str(p.relative_to(store.folder)): p.read_bytes() for p in store.folder.rglob("*") if p.is_file()}


def _data(folder: Path, case: str) -> np.ndarray:
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    return np.asarray(infer_dataset_class(str(folder))(str(folder)).load_case(case)[0][:])


def test_the_store_holds_the_encoders_features_of_every_slice(preprocessed: Path):
    store = _prepare(preprocessed, mode="half")
    assert preprocessed_cases(preprocessed) == CASES
    assert sorted(_bytes(store)) == [f"case_a/000{z}.emb" for z in range(3)] + [f"case_b/000{z}.emb" for z in range(2)]
    x = torch.from_numpy(_data(preprocessed, "case_b")[:, 1])
    exact = FrozenEncoder("vit_tiny")(to_canvas(x, TINY, (0,))[None])
    for found, wanted in zip(store.read(Key("case_b", 1)), exact, strict=True):
        assert (found - wanted[0]).abs().max() / wanted.abs().max() < 1e-3


def test_nothing_is_put_into_nnunets_data_folder(preprocessed: Path):
    before = sorted(preprocessed.iterdir())
    _prepare(preprocessed)
    assert sorted(preprocessed.iterdir()) == before


def test_a_second_run_computes_nothing(preprocessed: Path, encoded: list[int]):
    store = _prepare(preprocessed)
    assert len(encoded) == 5
    before = _bytes(store)
    said: list[str] = []
    assert _bytes(_prepare(preprocessed, say=said.append)) == before
    assert len(encoded) == 5
    assert "complete" in said[-1]


def test_a_complete_store_needs_no_weights_in_memory(preprocessed: Path, weight_file: Callable[..., SamModel]):
    model = weight_file()
    encoder = FrozenEncoder(model)
    encoder.adopt(load_parts(model))
    _prepare(preprocessed, sam=model, encoder=encoder)
    encoder.release()
    _prepare(preprocessed, sam=model, encoder=encoder)
    assert not encoder.loaded


def test_cost_comes_first_and_progress_follows(preprocessed: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    store = _prepare(preprocessed, say=said.append)
    assert said[0].startswith("Embedding 5 of 5 slices with vit_tiny (shipped), mode compact, on cpu: at most 2.4 MiB")
    assert "1 of 5 slices" in said[1]
    assert "to go" in said[1]
    assert "5 of 5 slices" in said[-1]
    assert sum(map(len, _bytes(store).values())) <= 2.4 * 2**20


def test_a_changed_image_is_noticed(preprocessed: Path, encoded: list[int]):
    store = _prepare(preprocessed)
    before = _bytes(store)
    data = _data(preprocessed, "case_a")
    data[0, 1, 5, 5] += 1e-3
    write_case(preprocessed, "case_a", data)
    encoded.clear()
    after = _bytes(_prepare(preprocessed))
    assert len(encoded) == 1
    assert [name for name in before if before[name] != after[name]] == ["case_a/0001.emb"]


def test_a_channel_that_is_not_shown_does_not_matter(preprocessed: Path, encoded: list[int]):
    _prepare(preprocessed)
    data = _data(preprocessed, "case_a")
    data[1] = -data[1]
    write_case(preprocessed, "case_a", data)
    encoded.clear()
    _prepare(preprocessed)
    assert encoded == []


def test_another_encoder_gets_its_own_entries(preprocessed: Path, weight_file: Callable[..., SamModel]):
    first = _prepare(preprocessed, sam=weight_file("a.pth"))
    second = _prepare(preprocessed, sam=weight_file("b.pth", change=0.01))
    assert first.folder != second.folder
    assert not torch.equal(first.read(Key("case_a", 0))[-1], second.read(Key("case_a", 0))[-1])


def test_renamed_plans_recompute_nothing(preprocessed: Path, encoded: list[int]):
    _prepare(preprocessed)
    (preprocessed.parent / "nnUNetPlansOther.json").write_text("{}")  # plans share the data by its identifier
    encoded.clear()
    _prepare(preprocessed)
    assert encoded == []


def test_a_flipped_byte_is_found_by_verify_and_by_reading(preprocessed: Path):
    store = _prepare(preprocessed)
    before = _bytes(store)
    path = store.path(Key("case_a", 2))
    for use in (lambda: _prepare(preprocessed, verify=True), lambda: store.read(Key("case_a", 2))):
        broken = bytearray(before["case_a/0002.emb"])
        broken[-100] ^= 4
        path.write_bytes(broken)
        use()
        assert _bytes(store) == before


def test_verify_says_what_it_found(preprocessed: Path):
    store = _prepare(preprocessed)
    store.path(Key("case_a", 0)).unlink()
    store.path(Key("case_b", 0)).write_bytes(store.path(Key("case_b", 0)).read_bytes()[:-3] + b"abc")
    said: list[str] = []
    _prepare(preprocessed, verify=True, say=said.append)
    assert said[0] == "Read 4 entries: 1 damaged, 1 missing or of other content."
    assert said[1].startswith("Embedding 2 of 5 slices")


def test_shares_add_up_to_the_whole(preprocessed: Path, tmp_path: Path):
    whole = _bytes(_prepare(preprocessed))
    shutil.rmtree(preprocessed.parent / "dgplugins_embeddings")
    first = _bytes(_prepare(preprocessed, part=0, num_parts=2))
    assert 0 < len(first) < len(whole)
    assert _bytes(_prepare(preprocessed, part=1, num_parts=2)) == whole


def test_groups_of_slices_do_not_depend_on_what_is_there(
    preprocessed: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(embed._Work, "batch", 2)
    store = _prepare(preprocessed)
    assert encoded == [2, 1, 2]
    before = _bytes(store)
    store.path(Key("case_a", 1)).unlink()
    encoded.clear()
    assert _bytes(_prepare(preprocessed)) == before
    assert encoded == [2]  # its group again, because the group's size can matter to the last bit


def test_slices_that_show_nothing_are_left_out(preprocessed: Path):
    data = _data(preprocessed, "case_a")
    data[:, 1] = 0
    write_case(preprocessed, "case_a", data)
    assert "case_a/0001.emb" not in _bytes(_prepare(preprocessed))


class _Flip:
    """Deterministic augmentation for tests."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, image: torch.Tensor, key: Key) -> torch.Tensor:
        return image.flip(1) * key.view


def test_views_are_stored_beside_the_plain_slices(preprocessed: Path, encoded: list[int]):
    plain = _bytes(_prepare(preprocessed))
    store = _prepare(preprocessed, views=2, transform=_Flip("flip"))
    found = _bytes(store)
    assert len(found) == 15
    assert {name: found[name] for name in plain} == plain
    x = torch.from_numpy(_data(preprocessed, "case_a")[:, 0]).flip(1) * 2
    exact = FrozenEncoder("vit_tiny")(to_canvas(x, TINY, (0,))[None])
    neck = store.read(Key("case_a", 0, 2))[-1]
    assert (neck - exact[-1][0]).abs().max() / exact[-1].abs().max() < 0.02
    encoded.clear()
    _prepare(preprocessed, views=2, transform=_Flip("flip"))
    assert encoded == []
    _prepare(preprocessed, views=2, transform=_Flip("another"))
    assert len(encoded) == 10


def test_three_channels_are_their_own_store(preprocessed: Path):
    one, three = _prepare(preprocessed), _prepare(preprocessed, channels=(0, 1, 0))
    assert one.folder != three.folder
    with pytest.raises(UserError, match="cannot be shown"):
        _prepare(preprocessed, channels=(0, 1, 2))


# ---------------------------------------------------------------- auto


def test_auto_measures_once_and_says_which(preprocessed: Path, encoded: list[int]):
    said: list[str] = []
    store = _prepare(preprocessed, mode="auto", say=said.append)
    assert store.mode == "compact"
    assert "auto: compact" in said[1]
    assert "bounds 0.27 and 1.5 %" in said[1]
    encoded.clear()
    assert _prepare(preprocessed, mode="auto", cases=["case_b"]).mode == "compact"
    assert encoded == []


def test_auto_takes_half_where_compact_would_show(preprocessed: Path):
    def nervous(features: Any) -> torch.Tensor:
        return torch.where(features[-1][:, :1] * 1e4 % 2 > 1, 1.0, -1.0)

    said: list[str] = []
    store = _prepare(preprocessed, mode="auto", probe=nervous, say=said.append)
    assert store.mode == "half"
    assert "auto: half" in said[1]


# ---------------------------------------------------------------- trouble


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiny"}, "expected one of auto, half, compact"),
        ({"part": 2, "num_parts": 2}, "count from 0 to 1"),
        ({"cases": ["case_a", "nobody"]}, "1 cases are not preprocessed.*nobody"),
        ({"cases": []}, "No cases"),
        ({"views": 1}, "need an augmentation"),
        ({"sam": "vit_c"}, "did you mean"),
        ({"sam": "vit_b"}, "sam_vit_b_01ec64.pth"),
    ],
)
def test_bad_requests_are_refused(preprocessed: Path, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"(?s){message}"):
        _prepare(preprocessed, **options)
    assert not (preprocessed.parent / "dgplugins_embeddings").exists()


def test_a_dataset_that_is_not_preprocessed_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="nnUNetv2_"):
        _prepare(tmp_path / "absent")
    with pytest.raises(UserError, match="nnUNetv2_"):
        preprocessed_cases(tmp_path / "absent")


def test_a_disk_too_small_is_seen_before_work_starts(
    preprocessed: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(preprocessed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(UserError, match="Not enough disk for the embeddings"):
        _prepare(preprocessed)
    assert encoded == []


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(preprocessed: Path):
    store = _prepare(preprocessed)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    folder = store.folder / "case_a"
    for name in (f".tmp-{dead.stdout.strip()}-0000.emb", f".tmp-{os.getppid()}-0001.emb"):
        (folder / name).write_bytes(b"half")
    remove_leftovers(store.folder, alone=False)  # other machines may be at work
    assert len(list(folder.glob(".tmp-*"))) == 2
    _prepare(preprocessed)
    assert [path.name for path in folder.glob(".tmp-*")] == [f".tmp-{os.getppid()}-0001.emb"]
    old = folder / ".tmp-1-0002.emb"
    old.write_bytes(b"half")
    os.utime(old, (1, 1))
    remove_leftovers(store.folder, alone=False)
    assert not old.exists()


_SCRIPT = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
from nnunet_dgplugins.sam.embed import prepare_store
prepare_store(sys.argv[1], ["case_a", "case_b"], mode="compact")
"""


def _start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _SCRIPT, str(folder), str(torch.get_num_threads())]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _wait_for_entries(folder: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(12000):
        if any((folder.parent / "dgplugins_embeddings").rglob("*.emb")) or process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError("no entry after two minutes")


def test_a_killed_run_started_again_gives_the_same_bytes(preprocessed: Path):
    for case, depth in (("case_a", 8), ("case_b", 8)):
        write_case(preprocessed, case, np.random.default_rng(depth).normal(size=(1, depth, 24, 30)))
    process = _start(preprocessed)
    _wait_for_entries(preprocessed, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed,) = (preprocessed.parent / "dgplugins_embeddings").iterdir()
    assert len(list(killed.rglob("[!.]*.emb"))) < 16
    resumed = _bytes(_prepare(preprocessed))
    shutil.rmtree(preprocessed.parent / "dgplugins_embeddings")
    assert _bytes(_prepare(preprocessed)) == resumed
    assert len(resumed) == 16


@pytest.mark.slow
def test_two_processes_at_once_do_no_harm(preprocessed: Path):
    write_case(preprocessed, "case_a", np.random.default_rng(1).normal(size=(1, 8, 24, 30)))
    process = _start(preprocessed)
    _wait_for_entries(preprocessed, process)
    here = _prepare(preprocessed)
    assert process.wait() == 0
    together = _bytes(here)
    shutil.rmtree(preprocessed.parent / "dgplugins_embeddings")
    assert _bytes(_prepare(preprocessed)) == together
