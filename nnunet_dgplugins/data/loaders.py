"""Loader of whole slices with precomputed features: one pass per epoch, same draws for the same seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

#: keys -> stacked features, one tensor per feature level
ReadBatch = Callable[[Sequence[Any]], list[torch.Tensor]]


class SliceLoader(Iterator[dict[str, Any]]):
    """Yields batches ``{features, labels, keys}`` and reads the next one while the current one is used.

    The order of an epoch depends on (seed, epoch) alone, so a resumed run sees what an uninterrupted one would.

    Args:
        keys: one key per slice.
        labels: (N, m, m) label map of each slice.
        read: reads the features of a batch.
        batch_size: slices per batch; the last batch of a pass is filled from the next pass.
        seed: seed of the order; None keeps the order of ``keys`` and lets the last batch be smaller.
        steps: batches per epoch; None: one pass over the slices.
    """

    def __init__(
        self,
        keys: Sequence[Any],
        labels: torch.Tensor,
        read: ReadBatch,
        batch_size: int,
        seed: int | None = None,
        steps: int | None = None,
    ):
        self._keys, self._labels, self._read, self._seed = keys, labels, read, seed
        self._batch_size = min(batch_size, max(1, len(keys)))
        self.steps = steps or -(-len(keys) // self._batch_size)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="slices")
        self._pending: Future[dict[str, Any]] | None = None
        self._batches: Iterator[np.ndarray] = iter(())
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Begin the pass of ``epoch``; batches read ahead for another epoch are dropped."""
        self._drop_pending()
        self._batches = self._order(epoch)

    def __next__(self) -> dict[str, Any]:
        current = self._pending or self._submit()
        if current is None:
            raise StopIteration
        self._pending = self._submit()
        return current.result()

    def close(self) -> None:
        """Stop reading ahead."""
        self._drop_pending()
        self._pool.shutdown(wait=True)

    def _drop_pending(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
        self._pending = None

    def _submit(self) -> Future[dict[str, Any]] | None:
        chosen = next(self._batches, None)
        return None if chosen is None else self._pool.submit(self._load, chosen)

    def _load(self, chosen: np.ndarray) -> dict[str, Any]:
        keys = [self._keys[int(index)] for index in chosen]
        return {"features": self._read(keys), "labels": self._labels[torch.from_numpy(chosen)], "keys": keys}

    def _order(self, epoch: int) -> Iterator[np.ndarray]:
        count = len(self._keys)
        if self._seed is None:
            order = np.arange(count)
            yield from (order[start : start + self._batch_size] for start in range(0, count, self._batch_size))
            return
        generator = np.random.default_rng([self._seed, epoch])
        order = np.empty(0, np.int64)
        for _ in range(self.steps):
            while len(order) < self._batch_size:
                order = np.concatenate([order, generator.permutation(count)])
            yield order[: self._batch_size]
            order = order[self._batch_size :]
