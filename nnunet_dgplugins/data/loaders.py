"""Loader of whole slices: one pass per epoch, the same draws for the same seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


def read_slice(dataset: Any, case: str, z: int) -> np.ndarray:
    """Return one slice (C, H, W) float32 of a preprocessed case; its label file is not opened.

    Args:
        dataset: nnU-Net's, of either of its formats.
        case: case identifier.
        z: along the first spatial axis.
    """
    return np.asarray(_image(dataset, case)[:, z], np.float32)


def read_image(dataset: Any, case: str) -> np.ndarray:
    """Return a preprocessed case's image (C, Z, Y, X) float32; its label file is not opened."""
    return np.asarray(_image(dataset, case)[:], np.float32)


def image_shape(dataset: Any, case: str) -> tuple[int, ...]:
    """Return the shape (C, Z, Y, X) of a preprocessed case; nothing but its header is read."""
    return tuple(int(size) for size in _image(dataset, case).shape)


def read_properties(dataset: Any, case: str) -> dict[str, Any]:
    """Return what nnU-Net keeps of a preprocessed case, such as its crop box."""
    from batchgenerators.utilities.file_and_folder_operations import load_pickle

    found: dict[str, Any] = load_pickle(str(Path(dataset.source_folder) / f"{case}.pkl"))
    return found


def _image(dataset: Any, case: str) -> Any:
    path = Path(dataset.source_folder) / f"{case}.b2nd"
    if not path.is_file():  # nnU-Net's older format keeps image and label in one file
        return dataset.load_case(case)[0]
    import blosc2

    return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **dataset.mmap_kwargs)


#: (indices of the slices, epoch) -> batch
LoadBatch = Callable[[np.ndarray, int], dict[str, Any]]


class SliceLoader(Iterator[dict[str, Any]]):
    """Yields batches and loads the next one while the current one is used.

    The order of an epoch depends on (seed, epoch) alone, so a resumed run sees what an uninterrupted one would.

    Args:
        count: number of slices.
        load: makes a batch of some slices.
        batch_size: slices per batch; the last batch of a pass is filled from the next pass.
        seed: seed of the order; None keeps the order and lets the last batch be smaller.
        steps: batches per epoch; None: one pass over the slices.
    """

    def __init__(self, count: int, load: LoadBatch, batch_size: int, seed: int | None = None, steps: int | None = None):
        self._count, self._load, self._seed = count, load, seed
        self._batch_size = min(batch_size, max(1, count))
        self.steps = steps or -(-count // self._batch_size)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="slices")
        self._pending: Future[dict[str, Any]] | None = None
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Begin the pass of ``epoch``; a batch loaded ahead for another epoch is dropped."""
        self._drop_pending()
        self._epoch = epoch
        self._batches = self._order(epoch)

    def __next__(self) -> dict[str, Any]:
        current = self._pending or self._submit()
        if current is None:
            raise StopIteration
        self._pending = self._submit()
        return current.result()

    def close(self) -> None:
        """Stop loading ahead."""
        self._drop_pending()
        self._pool.shutdown(wait=True)

    def _drop_pending(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
        self._pending = None

    def _submit(self) -> Future[dict[str, Any]] | None:
        chosen = next(self._batches, None)
        return None if chosen is None else self._pool.submit(self._load, chosen, self._epoch)

    def _order(self, epoch: int) -> Iterator[np.ndarray]:
        if self._seed is None:
            order = np.arange(self._count)
            yield from (order[start : start + self._batch_size] for start in range(0, self._count, self._batch_size))
            return
        generator = np.random.default_rng([self._seed, epoch])
        order = np.empty(0, np.int64)
        for _ in range(self.steps):
            while len(order) < self._batch_size:
                order = np.concatenate([order, generator.permutation(self._count)])
            yield order[: self._batch_size]
            order = order[self._batch_size :]
