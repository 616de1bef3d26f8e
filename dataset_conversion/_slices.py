"""Reads a volume that lies in one file per slice without a header: grey PNGs, or ``.npy`` arrays."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_conversion._nifti import Unreadable, Volume, sizes
from dataset_conversion._sources import Arrays, Stack

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# x to the right, y down, slices upwards as SimpleITK has it without a header: what nnU-Net would make of the pixels
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_stack(stack: Stack) -> Volume:
    """Read slices as one volume (x, y, slice); pixels carry no spacing, so it is 1 mm.

    Raises:
        Unreadable: a file is missing, no grey picture, or of another size than the first.
    """
    from skimage import io as pictures

    digest = hashlib.sha256()
    slices: list[npt.NDArray[Any]] = []
    for path in stack.files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Unreadable(f"{path.name} cannot be read ({error.strerror or error})") from error
        if not content.startswith(SIGNATURE):
            raise Unreadable(f"{path.name} is no PNG file")
        try:
            pixels = np.asarray(pictures.imread(io.BytesIO(content)))
        except Exception as error:  # the readers behind scikit-image raise many kinds
            raise Unreadable(f"{path.name} is a damaged PNG file ({error})") from error
        if pixels.ndim != 2:
            raise Unreadable(f"{path.name} is a colour picture, expected grey")
        if slices and pixels.shape != slices[0].shape[::-1]:
            found, first = sizes(pixels.shape[::-1]), sizes(slices[0].shape)
            raise Unreadable(f"{path.name} has {found} pixels, the first slice has {first}")
        digest.update(hashlib.sha256(content).digest())
        slices.append(((pixels != 0).astype(np.uint8) if stack.mask else pixels).T)
    return _volume(slices, digest.hexdigest())


def read_arrays(arrays: Arrays) -> Volume:
    """Read ``.npy`` slices as one volume (x, y, slice); rows of an array are y, and the spacing is 1 mm as above.

    Raises:
        Unreadable: a file is missing, no plain array, or of another shape than wanted or than the first.
    """
    digest = hashlib.sha256()
    slices: list[npt.NDArray[Any]] = []
    for path in arrays.files:
        array, sha256 = load_array(path)
        digest.update(bytes.fromhex(sha256))
        if arrays.channel is None and array.ndim != 2:
            raise Unreadable(f"{path.name} has shape {sizes(array.shape)}, expected rows x columns")
        if arrays.channel is not None and (array.ndim != 3 or array.shape[2] != 3):
            raise Unreadable(f"{path.name} has shape {sizes(array.shape)}, expected rows x columns x 3 slices")
        pixels = array if arrays.channel is None else array[:, :, arrays.channel]
        if slices and pixels.shape != slices[0].shape[::-1]:
            found, first = sizes(pixels.shape[::-1]), sizes(slices[0].shape)
            raise Unreadable(f"{path.name} has {found} pixels, the first slice has {first}")
        slices.append(((pixels != 0).astype(np.uint8) if arrays.mask else pixels).T)
    return _volume(slices, digest.hexdigest())


def load_array(path: Path) -> tuple[npt.NDArray[Any], str]:
    """Return a ``.npy`` file's array, in a type that NIfTI knows, and the file's SHA-256.

    Raises:
        Unreadable: missing, damaged, or no array of real numbers; pickled objects are never loaded.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror or error})") from error
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # EOFError, ValueError and the tokenizer's errors, for files that are no arrays
        raise Unreadable(f"{path.name} is no readable .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iufb":
        raise Unreadable(f"{path.name} is no .npy array of real numbers")
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    elif array.dtype.kind == "b":
        array = array.astype(np.uint8)
    return array.astype(array.dtype.newbyteorder("="), copy=False), hashlib.sha256(content).hexdigest()


def _volume(slices: list[npt.NDArray[Any]], sha256: str) -> Volume:
    import nibabel

    array = np.stack(slices, axis=-1)
    return Volume(nibabel.Nifti1Image(array, AFFINE, dtype=array.dtype), array, AFFINE, sha256, False, False)
