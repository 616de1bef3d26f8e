"""What one image or mask is read from, where that is not a single NIfTI file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

HEADERS = (".mhd", ".mha", ".nrrd", ".nhdr")  # a header with its voxels behind it or in a file of its own


@dataclass(frozen=True)
class Stack:
    """A volume that lies in one picture per slice.

    Args:
        files: the slices in order.
        mask: any pixel but 0 is foreground (files hold 0/255, 0/1 or 0/1/2), read as 1.
    """

    files: tuple[Path, ...]
    mask: bool = False
    has_spacing: ClassVar[bool] = False  # whether the files say where a voxel lies

    @property
    def name(self) -> str:
        """Names of the first and the last slice."""
        return f"{self.files[0].name} to {self.files[-1].name}"

    def __str__(self) -> str:
        return f"{self.files[0]} to {self.files[-1].name}"


@dataclass(frozen=True)
class Arrays(Stack):
    """A volume that lies in one ``.npy`` array per slice.

    Args:
        files: the slices in order.
        mask: see :class:`Stack`.
        channel: which of an array's three channels (H, W, 3) is meant; None for arrays (H, W).
    """

    channel: int | None = None


@dataclass(frozen=True)
class Scan(Stack):
    """A volume that SimpleITK reads.

    Args:
        files: the slices of one DICOM series in any order, or a header file (MetaImage, NRRD) and its voxels.
        mask: see :class:`Stack`.
    """

    has_spacing: ClassVar[bool] = True

    @property
    def is_series(self) -> bool:
        """Whether it is a DICOM series."""
        return self.files[0].suffix.lower() not in HEADERS

    @property
    def name(self) -> str:
        """Name of the series' folder, or of the header file."""
        return self.files[0].parent.name if self.is_series else self.files[0].name

    def __str__(self) -> str:
        return str(self.files[0].parent if self.is_series else self.files[0])


Source = Path | Stack
