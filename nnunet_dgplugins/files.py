"""Files that are never half-written, hashes, and nnU-Net's three folders. Importable without torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_dgplugins.errors import UserError, nearest

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
#: beside ``labelsTr`` in a raw dataset of tags: real masks of validation cases
VALIDATION_MASKS = "labelsVal"
#: in a fold of a trainer of tags; not nnU-Net's "validation": find_best_configuration would score against labelsTr
CAM_VALIDATION = "validation_cam"
#: in a raw dataset of pseudo labels: a page of examples
PANELS = "pseudo_labels.png"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that takes its place when the block ends well.

    Same folder, fsync, then ``os.replace``: a reader sees the old file or the whole new one. The temporary name
    carries process and thread, so two of them writing the same file do no harm. On an error nothing is left behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # the suffix is kept last because writers such as SimpleITK choose the format by it
    temporary = target.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{target.name}")
    try:
        yield temporary
        with open(temporary, "r+b") as handle:  # Windows syncs only what may be written
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON in one step; key order is kept, text stays readable."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def take(source: Path, target: Path, link: bool) -> None:
    """Put a copy of a file in another place, in one step, or a relative link to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        os.symlink(os.path.relpath(source.resolve(), target.parent.resolve()), target)
        return
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def read_json(path: str | os.PathLike[str], as_object: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """Read JSON; its objects are made of their pairs by ``as_object``.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=as_object)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error


def content_hash(value: Any) -> str:
    """Return a short stable hash (16 hex digits) of anything JSON can say."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def human_bytes(count: float) -> str:
    """Return ``count`` bytes as text with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def require_disk(folder: str | os.PathLike[str], needed: float, what: str) -> None:
    """Refuse to start work that the disk cannot hold.

    Raises:
        UserError: fewer than ``needed`` bytes are free on the disk of ``folder``.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"Not enough disk for {what}: {human_bytes(needed)} needed, {human_bytes(free)} free at {existing}."
        )


def nnunet_folder(variable: str) -> Path:
    """Return the folder named by one of nnU-Net's three variables (``nnUNet_raw`` and so on).

    Raises:
        UserError: the variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(
            f"The environment variable {variable} is not set. nnU-Net needs its three folders: "
            f"export {RAW}=... {PREPROCESSED}=... {RESULTS}=..."
        )
    return Path(value)


def dataset_name(dataset: int | str, *, must_exist: bool = True) -> str:
    """Return ``DatasetXXX_Name`` for an id or a name, looked up in all three folders.

    Raises:
        UserError: no folder has it, or one id has two names.
    """
    text = str(dataset)
    folders = [Path(os.environ[v]) for v in (RAW, PREPROCESSED, RESULTS) if os.environ.get(v)]
    if not folders:
        nnunet_folder(RAW)
    names = {p.name for f in folders if f.is_dir() for p in f.iterdir() if p.is_dir() and p.name.startswith("Dataset")}
    if not text.isdigit():
        if text in names or not must_exist:
            return text
        raise UserError(f"No dataset called {text} in nnU-Net's folders{nearest(text, names)}")
    found = sorted(name for name in names if name.startswith(f"Dataset{int(text):03d}_"))
    if len(found) > 1:
        raise UserError(f"Dataset id {int(text):03d} has several names: {', '.join(found)}. Keep one of them.")
    if not found:
        raise UserError(
            f"No Dataset{int(text):03d}_* in {', '.join(map(str, folders))}. Make it with `dgplugins convert`."
        )
    return found[0]
