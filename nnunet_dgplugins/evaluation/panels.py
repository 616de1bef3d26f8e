"""One page of slices or patches: images, maps, pseudo labels, and truth where it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.evaluation.overlay import PREDICTION_COLOUR, REFERENCE_COLOUR
from nnunet_dgplugins.files import replacing

_INCHES, _DPI = 1.9, 110
_TISSUES = ("#d1495b", "#2a9d8f", "#3a6ea5", "#edae49", "#8e5ea2", "#66a61e", "#a6761d", "#e7298a")
_BACKGROUND, _IGNORED = "#222222", "#dddddd"
_LETTER = 0.032  # width of one in a class name, in cells


class Row(Protocol):
    """A row of the page."""

    @property
    def columns(self) -> int:
        """How many cells it needs."""

    def draw(self, axes: Any) -> None:
        """Draw into its cells."""


@dataclass(frozen=True)
class Panel:
    """One row of the page.

    Args:
        title: case and slice.
        images: name of each modality and its slice (Y, X).
        map: the class activation map (Y, X), 0 to 1.
        mask: the pseudo label (Y, X).
        truth: the real mask (Y, X); None where none is known.
    """

    title: str
    images: Mapping[str, npt.NDArray[Any]]
    map: npt.NDArray[np.floating]
    mask: npt.NDArray[np.bool_]
    truth: npt.NDArray[np.bool_] | None

    @property
    def columns(self) -> int:
        """One per modality, the map, the masks."""
        return len(self.images) + 2

    def draw(self, axes: Any) -> None:
        """Draw into the cells."""
        for cell, (name, image) in zip(axes, self.images.items(), strict=False):
            _grey(cell, image)
            cell.set_title(name, fontsize=8)
        axes[-2].imshow(self.map, cmap="magma", vmin=0, vmax=1)
        axes[-2].set_title("map, 0 to 1", fontsize=8)
        _grey(axes[-1], next(iter(self.images.values())))
        if self.truth is not None and self.truth.any():
            axes[-1].contour(self.truth, levels=[0.5], colors=[REFERENCE_COLOUR], linewidths=1.2)
        if self.mask.any():
            axes[-1].contour(self.mask, levels=[0.5], colors=[PREDICTION_COLOUR], linewidths=1.2, linestyles="dashed")
        known = "truth blue" if self.truth is not None else "truth unknown"
        axes[-1].set_title(f"pseudo label orange, {known}", fontsize=7)
        axes[0].text(0, -0.04, self.title, transform=axes[0].transAxes, fontsize=8, va="top")


@dataclass(frozen=True)
class PatchPanel:
    """One row of the page: a colour patch and label maps of it.

    Args:
        title: the case.
        image: (H, W, 3), 8-bit levels.
        masks: title of each label map and its values (H, W).
        names: of the label values.
    """

    title: str
    image: npt.NDArray[Any]
    masks: Mapping[str, npt.NDArray[np.integer]]
    names: Mapping[int, str]

    @property
    def columns(self) -> int:
        """The patch, and one per label map."""
        return 1 + len(self.masks)

    def draw(self, axes: Any) -> None:
        """Draw into the cells."""
        from matplotlib.colors import to_rgb

        axes[0].imshow(np.clip(self.image, 0, 255).astype(np.uint8))
        colours = np.full((max(self.names) + 1, 3), to_rgb(_IGNORED))
        tissues = [value for value in sorted(self.names) if self.names[value] not in ("background", "ignore")]
        colours[0] = to_rgb(_BACKGROUND)
        for place, value in enumerate(tissues):
            colours[value] = to_rgb(_TISSUES[place % len(_TISSUES)])
        for cell, (title, mask) in zip(axes[1:], self.masks.items(), strict=False):
            cell.imshow(colours[mask], interpolation="nearest")
            cell.set_title(title, fontsize=8)
        shown = [value for value in tissues if any((mask == value).any() for mask in self.masks.values())]
        left = 0.0
        for value in shown:
            name = self.names[value]
            axes[0].text(left, 1.02, name, transform=axes[0].transAxes, fontsize=6, color=colours[value])
            left += _LETTER * (len(name) + 1)
        axes[0].text(0, -0.04, self.title, transform=axes[0].transAxes, fontsize=7, va="top")


def panels_png(panels: Iterable[Row], path: Path) -> None:
    """Draw the rows into one PNG, written in one step; the same rows give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(panels)
    columns = max(row.columns for row in rows)
    figure = Figure(figsize=(columns * _INCHES, len(rows) * (_INCHES + 0.25) + 0.35), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, axes in zip(rows, grid, strict=True):
        for cell in axes:
            cell.set_axis_off()
        row.draw(axes)
    figure.subplots_adjust(0.01, 0.02, 0.99, 1 - 0.3 / figure.get_figheight(), wspace=0.04, hspace=0.22)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _grey(cell: Any, image: npt.NDArray[Any]) -> None:
    low, high = np.percentile(image, (0.5, 99.5))
    cell.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
