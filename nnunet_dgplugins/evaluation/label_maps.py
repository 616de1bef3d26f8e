"""Reads label maps as nnU-Net does: volumes by SimpleITK, PNG, BMP and TIFF by nnU-Net's own readers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.errors import UserError

_NATURAL = (".png", ".bmp", ".tif", ".tiff")
_SPACING_MM, _ORIGIN_MM, _DIRECTION = 1e-3, 1e-2, 1e-3  # what rounding in headers may change


@dataclass(frozen=True)
class LabelMap:
    """Labels on a grid.

    Args:
        values: whole numbers, (z, y, x); (y, x) for formats without a third dimension.
        spacing: voxel size in mm in the order of the axes; 1 for PNG and BMP, which carry none.
        origin: position of the first voxel in mm, (x, y, z); empty where the format has none.
        direction: direction cosines, row by row; empty where the format has none.
    """

    values: npt.NDArray[np.integer]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()

    def geometry_difference(self, other: LabelMap) -> str:
        """Return in words where the grid of ``other`` differs from this one, or an empty text."""
        if self.values.shape != other.values.shape:
            return f"shape {self.values.shape} against {other.values.shape}"
        for name, mine, its, limit in (
            ("spacing", self.spacing, other.spacing, _SPACING_MM),
            ("origin", self.origin, other.origin, _ORIGIN_MM),
            ("direction", self.direction, other.direction, _DIRECTION),
        ):
            if len(mine) != len(its) or not np.allclose(mine, its, rtol=0, atol=limit):
                return f"{name} {_numbers(mine)} against {_numbers(its)}"
        return ""


def read_label_map(path: Path) -> LabelMap:
    """Read one label map.

    Raises:
        UserError: the file cannot be read, has more than one channel, or holds values that are not whole numbers.
    """
    # what a broken file makes a reader raise differs from reader to reader, hence the wide nets
    if path.name.lower().endswith(_NATURAL):
        values, spacing = _read_natural(path)
        return LabelMap(_whole_numbers(values, path), spacing)
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({str(error).strip().splitlines()[-1]})") from error
    values = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: {image.GetNumberOfComponentsPerPixel()} channels; a label map has one")
    if values.ndim == 4 and values.shape[0] == 1:  # a fourth dimension of length 1
        return read_4d(image, values[0], path)
    if values.ndim > 3:
        raise UserError(f"{path}: {values.ndim} dimensions {values.shape}; a label map has two or three")
    return LabelMap(_whole_numbers(values, path), image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())


def read_4d(image: Any, values: npt.NDArray[Any], path: Path) -> LabelMap:
    """Return the only volume of a 4-D image with the geometry of its first three axes."""
    cosines = np.array(image.GetDirection()).reshape(4, 4)[:3, :3]
    return LabelMap(
        _whole_numbers(values, path), image.GetSpacing()[2::-1], image.GetOrigin()[:3], tuple(cosines.ravel().tolist())
    )


def _read_natural(path: Path) -> tuple[npt.NDArray[Any], tuple[float, ...]]:
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    try:
        reader = Tiff3DIO() if path.suffix.lower() in (".tif", ".tiff") and _is_volume(path) else NaturalImage2DIO()
        values, properties = reader.read_seg(str(path))
    except (AssertionError, OSError, RuntimeError, SyntaxError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if values.shape[0] != 1:
        raise UserError(f"{path}: {values.shape[0]} channels; a label map is a grey image of label values")
    spacing = tuple(float(step) for step in properties["spacing"])
    return (values[0], spacing) if values.shape[1] > 1 else (values[0, 0], spacing[1:])


def _is_volume(path: Path) -> bool:
    import tifffile

    with tifffile.TiffFile(path) as file:
        return len(file.series[0].shape) == 3 and file.series[0].shape[-1] not in (3, 4)


def _whole_numbers(values: npt.NDArray[Any], path: Path) -> npt.NDArray[np.integer]:
    """Return the values as integers, if that is what they are."""
    if np.issubdtype(values.dtype, np.integer):
        return values
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int32)
    if not np.array_equal(whole, values):
        bad = values[whole != values]
        raise UserError(f"{path}: {bad.size} values are not whole numbers, such as {bad.flat[0]:g}")
    return whole


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
