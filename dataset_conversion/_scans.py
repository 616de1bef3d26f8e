"""Reads DICOM series, MetaImage and NRRD files with SimpleITK, and puts masks on the grid of their image."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dataset_conversion._dicom import in_order
from dataset_conversion._nifti import Unreadable, Volume, disagreement, sizes, straight
from dataset_conversion._sources import Scan

TO_NIFTI = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM and ITK count x to the left and y to the back, NIfTI the other way
SAME_GRID = 0.05  # mm; headers that went through other programs are rounded, no pixel is as small as ten times that
MISPLACED = 0.05  # share of a mask outside its image from which on the two do not belong together


def read_scan(scan: Scan) -> Volume:
    """Read a volume (x, y, slice); its geometry is that of the headers, oblique directions included.

    Raises:
        Unreadable: missing, damaged, or no single volume; of a series see :func:`dataset_conversion._dicom.in_order`.
    """
    import SimpleITK

    digest = hashlib.sha256()
    for path in scan.files:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise Unreadable(f"{path.name} cannot be read ({error.strerror or error})") from error
    notes: list[str] = []
    try:
        if scan.is_series:
            files, affine, notes = in_order(scan.files)
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames([str(path) for path in files])
            image = reader.Execute()
        else:
            image = SimpleITK.ReadImage(str(scan.files[0]))
            affine = _affine(image)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise Unreadable(f"not readable by SimpleITK ({reason})") from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise Unreadable("colours or vectors in it, expected one number per voxel")
    array = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    if scan.mask:
        array = (array > 0).astype(np.uint8)
    affine, straightened = straight(TO_NIFTI @ affine)
    return _volume(array, affine, digest.hexdigest(), straightened, tuple(notes))


def put_on_grid(mask: Volume, image: Volume) -> tuple[Volume, list[str]]:
    """Return a mask on the grid of its image, by physical coordinates and nearest neighbour, and what there is to say.

    Raises:
        Unreadable: much of the mask lies outside the image.
    """
    shape = image.array.shape
    if mask.array.shape == shape and disagreement(mask.affine, image.affine, shape) <= SAME_GRID:
        return replace(mask, affine=image.affine), []
    lost = _share_outside(mask, image)
    if lost > MISPLACED:
        raise Unreadable(f"{lost:.0%} of the mask lies outside the image: the two do not belong together")
    import SimpleITK

    array = np.ascontiguousarray(mask.array.transpose(2, 1, 0))
    moving = SimpleITK.GetImageFromArray(array.astype(np.uint8) if array.dtype.kind == "b" else array)
    _set_grid(moving, mask.affine)
    grid = SimpleITK.Image([int(size) for size in shape], SimpleITK.sitkUInt8)
    _set_grid(grid, image.affine)
    nearest = SimpleITK.sitkNearestNeighbor
    moved = SimpleITK.Resample(moving, grid, SimpleITK.Transform(), nearest, 0, moving.GetPixelID())
    written = SimpleITK.GetArrayFromImage(moved).transpose(2, 1, 0)
    notes = [f"its grid ({_grid(mask)}) is not the image's ({_grid(image)}); resampled by physical coordinates, "
             "nearest neighbour"]  # fmt: skip
    if lost:
        notes.append(f"{lost:.2%} of the mask lies outside the image and is lost")
    uncovered = _slices_outside(mask, image)
    if uncovered:
        notes.append(f"it does not reach {uncovered} of the image's {shape[2]} slices, which become background")
    return _volume(written, image.affine, mask.sha256, False, mask.notes), notes


def _volume(
    array: npt.NDArray[Any], affine: npt.NDArray[np.float64], sha256: str, straightened: bool, notes: tuple[str, ...]
) -> Volume:
    import nibabel

    header = nibabel.Nifti1Image(array, affine, dtype=array.dtype)
    header.set_sform(affine, 1)  # scanner coordinates
    header.set_qform(affine, 1)
    return Volume(header, array, affine, sha256, False, straightened, notes)


def _affine(image: Any) -> npt.NDArray[np.float64]:
    """Return the map from voxels to mm in ITK's axes.

    Raises:
        Unreadable: not three axes.
    """
    if image.GetDimension() != 3:
        raise Unreadable(f"shape {sizes(image.GetSize())}, expected one 3D volume")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


def _set_grid(image: Any, affine: npt.NDArray[np.float64]) -> None:
    """Give a SimpleITK image the geometry of a NIfTI affine."""
    itk = TO_NIFTI @ affine
    spacing = np.linalg.norm(itk[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((itk[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(itk[:3, 3].tolist())


def _share_outside(mask: Volume, image: Volume) -> float:
    """Return the share of the mask's foreground voxels whose centres no voxel of the image covers."""
    marked = np.argwhere(mask.array > 0)
    if not marked.size:
        return 0.0
    return float(np.mean(_outside(marked, mask, image)))


def _slices_outside(mask: Volume, image: Volume) -> int:
    """Return how many slices of the image lie wholly outside the mask's grid, by their centre."""
    columns, rows, count = image.array.shape
    centres = np.array([[(columns - 1) / 2, (rows - 1) / 2, index] for index in range(count)])
    return int(_outside(centres, image, mask).sum())


def _outside(voxels: npt.NDArray[Any], of: Volume, other: Volume) -> npt.NDArray[np.bool_]:
    """Return which voxels (N, 3) of one grid have their centre outside another."""
    to_other = np.linalg.inv(other.affine) @ of.affine
    there = voxels @ to_other[:3, :3].T + to_other[:3, 3]
    beyond: npt.NDArray[np.bool_] = ((there < -0.5) | (there > np.array(other.array.shape) - 0.5)).any(axis=1)
    return beyond


def _grid(volume: Volume) -> str:
    spacing = " x ".join(f"{size:.3g}" for size in np.linalg.norm(volume.affine[:3, :3], axis=0))
    return f"{sizes(volume.array.shape)}, {spacing} mm"
