"""The embedding store: features of every slice, each in one file that is whole, checked, and says what it is of."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nnunet_dgplugins.content import Field, content_box, crop
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import write_bytes
from nnunet_dgplugins.sam.codec import BITS, Packed, pack, unpack
from nnunet_dgplugins.sam.models import SamModel
from nnunet_dgplugins.sam.preprocess import PREPROCESSING_VERSION

FOLDER = "dgplugins_embeddings"
_MAGIC = b"DGEMBED1"
_PREFIX = struct.Struct("<8sII")  # magic, length of the header, CRC-32 of the header
_FORMAT = 1


class Key(NamedTuple):
    """Which slice: case, z of the preprocessed volume, and view (0: as it is, 1..k: augmented)."""

    case: str
    z: int
    view: int = 0


class DamagedEntry(UserError):
    """An entry that is missing, broken, or belongs to other weights or settings."""


def slice_hash(x: torch.Tensor, channels: Sequence[int]) -> str:
    """Return the hash (32 hex digits) of what the encoder will see of a slice (C, H, W); padding does not change it."""
    part = crop(x[list(channels)].float(), content_box(x)).cpu()
    digest = hashlib.sha256(f"{tuple(part.shape)}".encode())
    digest.update(part.numpy().data)
    return digest.hexdigest()[:32]


def store_folder(
    data_folder: Path,
    model: SamModel,
    weights_hash: str,
    mode: str,
    channels: Sequence[int],
    field: Field | None = None,
) -> Path:
    """Return where the embeddings of a preprocessed data folder lie: beside it, never inside.

    nnU-Net refuses a data folder that holds foreign files.
    """
    name = f"{data_folder.name}__{model.label}-{weights_hash[:12]}__v{PREPROCESSING_VERSION}"
    name += f"__c{'-'.join(map(str, channels))}__{mode}"
    if field:
        name += f"__f{field[0]}x{field[1]}"
    return data_folder.parent / FOLDER / name


@dataclass
class EmbeddingStore:
    """Features of slices in a folder, one file per slice: ``<case>/<z>.emb`` or ``<case>/<z>_v<view>.emb``.

    Args:
        folder: where the entries lie.
        model: sizes of the encoder.
        mode: ``half`` (12 bits) or ``compact`` (8 bits).
        weights_hash: hash of the encoder's weights.
        channels: input channels that were shown to SAM.
        transform: name of the augmentation behind views 1..k; "" without views.
        field: what the canvas shows at least, see :func:`nnunet_dgplugins.sam.preprocess.to_canvas`.
        repair: called with a key whose entry is damaged; writes it anew. None: reading raises instead.

    Example:
        >>> taps_and_neck = store.read_batch([Key("prostate_000", 7), Key("prostate_001", 3)])  # doctest: +SKIP
    """

    folder: Path
    model: SamModel
    mode: str
    weights_hash: str
    channels: tuple[int, ...] = (0,)
    transform: str = ""
    field: Field | None = None
    repair: Callable[[Key], None] | None = dataclasses.field(default=None, repr=False)

    def path(self, key: Key) -> Path:
        """Return the file of an entry."""
        return self.folder / key.case / (f"{key.z:04d}.emb" if not key.view else f"{key.z:04d}_v{key.view}.emb")

    def has(self, key: Key, content: str) -> bool:
        """Whether there is an entry of this slice content made by this encoder and preprocessing.

        Only the header is read; whether the payload is whole is seen by :meth:`read` and :meth:`verify`.
        """
        try:
            with open(self.path(key), "rb") as handle:
                header, size = _read_header(handle.read(_PREFIX.size), handle.read)
                handle.seek(0, 2)
                whole = handle.tell() == size + header["payload_bytes"]
        except (OSError, DamagedEntry):
            return False
        return whole and header["content"] == content and self._mismatch(header, key) == ""

    def write(self, key: Key, features: Sequence[torch.Tensor], content: str) -> None:
        """Write the features of one slice in one step.

        Args:
            key: which slice.
            features: taps and neck, each (C, g, g).
            content: :func:`slice_hash` of the slice.

        Raises:
            UserError: the disk is full, or features are not finite or of the wrong shape.
        """
        shapes = tuple(tuple(x.shape) for x in features)
        if shapes != self.model.feature_shapes:
            raise UserError(f"Features of {self.model.name} have shapes {self.model.feature_shapes}, got {shapes}.")
        entry = self._encode(key, features, content)
        for attempt in (0, 1):
            try:
                write_bytes(self.path(key), entry)
                return
            except FileNotFoundError:
                # another process took our temporary file for a dead one's (see embed.remove_leftovers)
                if attempt:
                    raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(
                        f"The disk is full: {self.folder}. Entries written so far are whole; "
                        "free some space and run the same command again."
                    ) from error
                raise

    def read(
        self, key: Key, device: torch.device | str = "cpu", out: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Return taps and neck of one slice, each (C, g, g) float32.

        Args:
            key: which slice.
            device: where the features are wanted; the packed bytes travel, the arithmetic happens there.
            out: tensors to fill instead of new ones.

        Raises:
            DamagedEntry: the entry is missing or broken and cannot be repaired.
        """
        try:
            parts = self._load(key)
        except DamagedEntry:
            if self.repair is None:
                raise
            self.repair(key)
            parts = self._load(key)
        return [unpack(part, device, out[index] if out else None) for index, part in enumerate(parts)]

    def read_batch(
        self, keys: Sequence[Key], threads: int = 2, device: torch.device | str = "cpu"
    ) -> list[torch.Tensor]:
        """Return taps and neck of several slices, each (B, C, g, g) float32."""
        batch = [torch.empty((len(keys), *shape), device=device) for shape in self.model.feature_shapes]

        def fill(index: int) -> None:
            self.read(keys[index], device, [x[index] for x in batch])

        if threads <= 1 or len(keys) == 1:
            for index in range(len(keys)):
                fill(index)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, range(len(keys))))
        return batch

    def verify(self, key: Key, content: str | None = None) -> str:
        """Read one entry completely.

        Returns:
            "" if it is whole and of this content (if given), encoder and preprocessing; else what is wrong.
        """
        try:
            header, payload = self._open(key)
            _check_payload(header, payload, self.path(key))
        except DamagedEntry as error:
            return str(error)
        if content is not None and header["content"] != content:
            return f"{self.path(key)}: made from another image"
        return self._mismatch(header, key)

    def _identity(self, key: Key) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "mode": self.mode,
            "weights": self.weights_hash,
            "preprocessing": PREPROCESSING_VERSION,
            "channels": list(self.channels),
            "transform": self.transform if key.view else "",
            **({"field": list(self.field)} if self.field else {}),
            "key": list(key),
        }

    def _mismatch(self, header: dict[str, Any], key: Key) -> str:
        wanted = self._identity(key)
        wrong = [
            f"{name} {header.get(name)} instead of {value}"
            for name, value in wanted.items()
            if header.get(name) != value
        ]
        return f"{self.path(key)}: {', '.join(wrong)}" if wrong else ""

    def _encode(self, key: Key, features: Sequence[torch.Tensor], content: str) -> bytes:
        packed = [pack(x, BITS[self.mode]) for x in features]
        parts = []
        for item in packed:
            described = asdict(item)
            described.update(values=len(item.values), scales=len(item.scales), shape=list(item.shape))
            parts.append(described)
        payload = b"".join(piece for item in packed for piece in (item.values, item.scales))
        header = {
            **self._identity(key),
            "content": content,
            "parts": parts,
            "payload_bytes": len(payload),
            "payload_crc": zlib.crc32(payload),
        }
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        return _PREFIX.pack(_MAGIC, len(text), zlib.crc32(text)) + text + payload

    def _open(self, key: Key) -> tuple[dict[str, Any], memoryview]:
        path = self.path(key)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DamagedEntry(f"{path}: cannot be read ({error.strerror}). Run `dgplugins embed` again.") from error
        view = memoryview(content)
        try:
            header, size = _read_header(
                bytes(view[: _PREFIX.size]), lambda n: bytes(view[_PREFIX.size : _PREFIX.size + n])
            )
        except DamagedEntry as error:
            raise DamagedEntry(f"{path}: {error}") from error
        return header, view[size:]

    def _load(self, key: Key) -> list[Packed]:
        header, payload = self._open(key)
        _check_payload(header, payload, self.path(key))
        if wrong := self._mismatch(header, key):
            raise DamagedEntry(f"{wrong}. Run `dgplugins embed` again.")
        found, place = [], 0
        for part in header["parts"]:
            values = bytes(payload[place : place + part["values"]])
            place += part["values"]
            scales = bytes(payload[place : place + part["scales"]])
            place += part["scales"]
            found.append(Packed(tuple(part["shape"]), part["bits"], part["block"], part["exponent"], values, scales))
        return found


def _read_header(prefix: bytes, more: Callable[[int], bytes]) -> tuple[dict[str, Any], int]:
    """Return the header and the number of bytes before the payload."""
    if len(prefix) != _PREFIX.size:
        raise DamagedEntry("too short")
    magic, length, crc = _PREFIX.unpack(prefix)
    if magic != _MAGIC or length > 1 << 20:
        raise DamagedEntry("not an embedding")
    text = more(length)
    if len(text) != length or zlib.crc32(text) != crc:
        raise DamagedEntry("its header is damaged")
    header: dict[str, Any] = json.loads(text)
    return header, _PREFIX.size + length


def _check_payload(header: dict[str, Any], payload: memoryview, path: Path) -> None:
    if len(payload) != header["payload_bytes"] or zlib.crc32(payload) != header["payload_crc"]:
        raise DamagedEntry(f"{path}: its payload is damaged. Run `dgplugins embed --verify`.")
