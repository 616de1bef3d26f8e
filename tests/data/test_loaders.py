"""The loader of whole slices: its order depends on seed and epoch alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest

from nnunet_dgplugins.data.loaders import SliceLoader


def load(chosen: np.ndarray, epoch: int) -> dict[str, Any]:
    return {"slices": chosen.tolist(), "epoch": epoch}


@pytest.fixture
def make() -> Iterator[Any]:
    loaders = []

    def made(count: int, batch: int, function: Any = load, **options: Any) -> SliceLoader:
        loaders.append(SliceLoader(count, function, batch, **options))
        return loaders[-1]

    yield made
    for loader in loaders:
        loader.close()


def epoch(loader: SliceLoader, number: int) -> list[list[int]]:
    loader.start_epoch(number)
    return [next(loader)["slices"] for _ in range(loader.steps)]


def test_the_same_epoch_has_the_same_order_and_another_epoch_another(make: Any):
    first, second = make(20, 4, seed=1), make(20, 4, seed=1)
    third = epoch(first, 3)
    epoch(second, 0)
    assert epoch(second, 3) == third
    assert epoch(second, 4) != third


def test_another_seed_has_another_order(make: Any):
    assert epoch(make(20, 4, seed=1), 0) != epoch(make(20, 4, seed=2), 0)


def test_one_pass_shows_every_slice_once(make: Any):
    batches = epoch(make(20, 4, seed=1), 0)
    assert sorted(chain(*batches)) == list(range(20))


def test_the_last_batch_of_a_pass_is_filled(make: Any):
    batches = epoch(make(10, 4, seed=1), 0)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    counts = Counter(chain(*batches))
    assert set(counts) == set(range(10))
    assert sorted(counts.values()) == [1] * 8 + [2] * 2


def test_more_steps_than_a_pass_go_through_the_slices_evenly(make: Any):
    batches = epoch(make(6, 4, seed=1, steps=9), 0)
    assert set(Counter(chain(*batches)).values()) == {6}


def test_a_batch_is_never_larger_than_the_data(make: Any):
    loader = make(3, 8, seed=1)
    assert loader.steps == 1
    assert sorted(epoch(loader, 0)[0]) == [0, 1, 2]


def test_validation_keeps_the_order_and_lets_the_last_batch_be_smaller(make: Any):
    loader = make(5, 2)
    expected = [[0, 1], [2, 3], [4]]
    assert epoch(loader, 0) == epoch(loader, 7) == expected


def test_a_pass_that_is_over_stops(make: Any):
    loader = make(4, 2, seed=1)
    epoch(loader, 0)
    with pytest.raises(StopIteration):
        next(loader)


def test_nothing_loaded_ahead_for_another_epoch_is_given_out(make: Any):
    loader = make(20, 4, seed=1)
    next(loader)
    loader.start_epoch(5)
    assert [next(loader)["epoch"] for _ in range(loader.steps)] == [5] * 5


def test_the_next_batch_is_loaded_while_the_present_one_is_used(make: Any):
    loaded = []
    reached = threading.Event()

    def watched(chosen: np.ndarray, number: int) -> dict[str, Any]:
        loaded.append(chosen.tolist())
        if len(loaded) == 2:
            reached.set()
        return load(chosen, number)

    loader = make(4, 2, watched)
    next(loader)
    assert reached.wait(10)
    assert loaded == [[0, 1], [2, 3]]


def test_an_error_while_loading_reaches_the_caller(make: Any):
    def broken(chosen: np.ndarray, number: int) -> dict[str, Any]:
        raise OSError(f"slice {chosen[0]}")

    with pytest.raises(OSError, match="slice 0"):
        next(make(4, 2, broken))
