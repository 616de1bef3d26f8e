"""Finds the volumes behind ``.npy`` slices that bring their neighbours along, where file names do not tell."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset_conversion._nifti import Unreadable
from dataset_conversion._slices import load_array


def chained(files: Sequence[Path]) -> list[list[Path]]:
    """Return the volumes that slices belong to, each in order from below.

    A slice (rows, columns, 3) lies below another if its upper neighbour is the other's middle, or, with one slice left
    out between them, the other's lower neighbour.

    Args:
        files: arrays in any order; those that cannot be read so are volumes of their own, which their check reports.
    """
    channels = {path: _channels(path) for path in files}
    by_middle, by_lower = {}, {}
    for path, (lower, middle, _) in channels.items():
        by_middle[middle], by_lower[lower] = path, path
    above: dict[Path, Path] = {}
    not_first: set[Path] = set()
    for path, (_, _, upper) in channels.items():
        following = by_middle.get(upper) or by_lower.get(upper)
        if following is not None and following != path and following not in not_first:
            above[path] = following
            not_first.add(following)
    chains: list[list[Path]] = []
    placed: set[Path] = set()
    # slices that follow each other in a circle (blank ones) have no first; the second round takes them one by one
    for path in [*(path for path in files if path not in not_first), *files]:
        if path in placed:
            continue
        chain = [path]
        while (following := above.get(chain[-1])) is not None and following not in placed and following not in chain:
            chain.append(following)
        placed.update(chain)
        chains.append(chain)
    return chains


def _channels(path: Path) -> tuple[str, str, str]:
    """Return a hash of each channel; of a file that is none of these arrays, something that nothing else has."""
    try:
        array, _ = load_array(path)
    except Unreadable:
        array = np.zeros(0)
    if array.ndim != 3 or array.shape[2] != 3:
        return f"{path} 0", f"{path} 1", f"{path} 2"
    first, second, third = (hashlib.sha256(array[:, :, index].tobytes()).hexdigest() for index in range(3))
    return first, second, third
