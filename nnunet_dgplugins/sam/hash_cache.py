"""Remembers the hash of a big weight file, so that vit_h is not hashed at every start. Importable without torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from nnunet_dgplugins.files import write_json

_FORMAT = 1
_SETTLED_SECONDS = 5.0  # a file changed this recently could change again within its time stamp's resolution


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "nnunet_dgplugins" / "sam_hashes.json"


def _identity(path: Path) -> list[int]:
    """Size, times and inode: ``st_ctime`` moves even where a copy keeps the modification time."""
    status = path.stat()
    return [_FORMAT, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _entries() -> dict[str, list[object]]:
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # no cache, or a broken one: hashing again is always right
    return content if isinstance(content, dict) else {}


def cached_hash(path: Path, compute: Callable[[], str]) -> str:
    """Return the hash remembered for ``path``, or compute and remember it.

    An entry counts only while size, modification time, change time and inode of the file are the same. A cache that
    cannot be read or written is ignored.
    """
    path = path.resolve()
    before = _identity(path)
    entry = _entries().get(str(path))
    if isinstance(entry, list) and len(entry) == 2 and entry[0] == before and isinstance(entry[1], str):
        return entry[1]
    value = compute()
    settled = time.time() - max(before[2], before[3]) / 1e9 > _SETTLED_SECONDS
    if settled and _identity(path) == before:
        try:
            write_json(_cache_file(), {**_entries(), str(path): [before, value]})
        except OSError:
            return value  # a home that cannot be written to costs time, nothing else
    return value
