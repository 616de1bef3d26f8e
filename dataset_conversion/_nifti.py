"""Reads one NIfTI volume, or one time point of a series, whatever its ending says."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHEAR_TOLERANCE = 1e-4  # ITK, which nnU-Net reads with, refuses axes that are further from a right angle


@dataclass
class Volume:
    """A volume in memory: NIfTI image object, 3D array in file units (scaled), affine and what was put right."""

    image: Any
    array: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    sha256: str
    squeezed: bool
    straightened: bool
    notes: tuple[str, ...] = ()


class Unreadable(Exception):
    """The file is no volume we can use; the text says why."""


def read_volume(path: Path, frame: int | None = None) -> Volume:
    """Read a volume.

    Args:
        path: the file.
        frame: which time point of a series to take, from 0; None for a file that holds one volume.

    Raises:
        Unreadable: missing, empty, truncated, no NIfTI, no such frame, or not a 3D volume of real numbers.
    """
    if frame is None:
        image, sha256 = _load(path)
    else:  # a series is read once for all its frames
        try:
            state = path.stat()
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror or error})") from error
        image, sha256 = _load_series(path, state.st_size, state.st_mtime_ns)
    try:
        array = _frame(image, frame)
    except Unreadable:
        raise
    except Exception as error:  # a header that promises more voxels than there are, in nibabel's many ways
        raise Unreadable(f"not a readable NIfTI volume ({error})") from error
    if array.dtype.kind not in "iufb":
        raise Unreadable(f"voxels of type {array.dtype}, expected real numbers")
    squeezed = array.ndim > 3 and all(size == 1 for size in array.shape[3:])
    if squeezed:
        array = array.reshape(array.shape[:3])
    if array.ndim != 3:
        raise Unreadable(f"shape {sizes(array.shape)}, expected one 3D volume")
    if array.size == 0:
        raise Unreadable(f"shape {sizes(array.shape)}, expected voxels")
    affine, straightened = straight(np.asarray(image.affine, float))
    return Volume(image, array, affine, sha256, squeezed, straightened)


def count_frames(path: Path) -> int:
    """Return the number of time points of a series, 1 for a 3D file; only the header is read.

    Raises:
        Unreadable: no NIfTI header.
    """
    import nibabel

    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            header = nibabel.Nifti2Header if _is_second(start) else nibabel.Nifti1Header
            shape = header.from_fileobj(stream).get_data_shape()
    except Exception as error:  # nibabel and gzip raise many kinds for files that are no NIfTI
        raise Unreadable(f"no readable NIfTI header ({error})") from error
    return int(shape[3]) if len(shape) > 3 else 1


def _load(path: Path) -> tuple[Any, str]:
    """Return the image object and the SHA-256 of the file."""
    import nibabel

    try:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Unreadable(f"truncated or damaged gzip ({error})") from error
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from error
    try:
        return (nibabel.Nifti2Image if _is_second(content) else nibabel.Nifti1Image).from_bytes(content), sha256
    except Exception as error:  # nibabel raises many kinds for files that are no NIfTI
        raise Unreadable(f"not a readable NIfTI volume ({error})") from error


def _is_second(start: bytes) -> bool:
    """Return whether a file that starts so is NIfTI-2; its header's size comes first, in either byte order."""
    return len(start) >= 4 and 540 in (int.from_bytes(start[:4], order) for order in ("little", "big"))


@lru_cache(maxsize=2)  # an image and its mask; size and time tell a file that was replaced
def _load_series(path: Path, size: int, time: int) -> tuple[Any, str]:
    return _load(path)


def _frame(image: Any, frame: int | None) -> npt.NDArray[Any]:
    if frame is None or len(image.shape) < 4:
        if frame:
            raise Unreadable(f"frame {frame} is wanted, but it holds a single volume")
        return np.asanyarray(image.dataobj)
    if frame >= image.shape[3]:
        raise Unreadable(f"frame {frame} is wanted, but it holds {image.shape[3]}, counted from 0")
    return np.asanyarray(image.dataobj[:, :, :, frame])


def straight(affine: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], bool]:
    """Return the affine with axes at right angles, and whether that took a change.

    Raises:
        Unreadable: the affine is no geometry at all.
    """
    if not np.isfinite(affine).all() or np.any(np.linalg.norm(affine[:3, :3], axis=0) <= 0):
        raise Unreadable("the header's geometry has a voxel size that is zero or not a number")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() <= SHEAR_TOLERANCE:
        return affine, False
    left, _, right = np.linalg.svd(axes)
    straightened = affine.copy()
    straightened[:3, :3] = (left @ right) * spacing  # the nearest rotation
    return straightened, True


def disagreement(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return the largest distance in mm between where two affines place the volume's corners."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())


def sizes(shape: tuple[int, ...]) -> str:
    """Return a shape for messages."""
    return "x".join(map(str, shape)) or "none"
