"""Walks through downloads: links are followed, the litter of archive programs is not seen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def hidden(name: str) -> bool:
    """Return whether a file or folder is none of the data by its name."""
    return name.startswith(".") or name == "__MACOSX"


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder, the folders and the files in it, in the order of names and links last, as ``os.walk`` does.

    Linked folders are entered, too, each folder once whatever leads to it. Folders taken out of the list are not.
    """
    seen = set()
    for place, inner, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        # a folder before links to it, so that it keeps its own place
        inner.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        inner[:] = [name for name in inner if not hidden(name)]
        yield Path(place), inner, sorted(name for name in files if not hidden(name))
