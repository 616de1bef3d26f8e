"""Reads a volume that lies in one grey PNG per slice."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_conversion._facts import Stack
from dataset_conversion._nifti import Unreadable, Volume, sizes

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# x to the right, y down, slices upwards as SimpleITK has it without a header: what nnU-Net would make of the pixels
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_stack(stack: Stack) -> Volume:
    """Read slices as one volume (x, y, slice); pixels carry no spacing, so it is 1 mm.

    Raises:
        Unreadable: a file is missing, no grey picture, or of another size than the first.
    """
    import nibabel
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
    array = np.stack(slices, axis=-1)
    return Volume(
        nibabel.Nifti1Image(array, AFFINE, dtype=array.dtype), array, AFFINE, digest.hexdigest(), False, False
    )
