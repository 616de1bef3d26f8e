"""One page of slices: images, map, pseudo label, and truth where it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.evaluation.overlay import PREDICTION_COLOUR, REFERENCE_COLOUR
from nnunet_dgplugins.files import replacing

_INCHES, _DPI = 1.9, 110


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


def panels_png(panels: Iterable[Panel], path: Path) -> None:
    """Draw the rows into one PNG, written in one step; the same rows give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(panels)
    columns = max(len(row.images) for row in rows) + 2
    figure = Figure(figsize=(columns * _INCHES, len(rows) * (_INCHES + 0.25) + 0.35), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, axes in zip(rows, grid, strict=True):
        for cell in axes:
            cell.set_axis_off()
        for cell, (name, image) in zip(axes, row.images.items(), strict=False):
            _grey(cell, image)
            cell.set_title(name, fontsize=8)
        first = next(iter(row.images.values()))
        axes[-2].imshow(row.map, cmap="magma", vmin=0, vmax=1)
        axes[-2].set_title("map, 0 to 1", fontsize=8)
        _grey(axes[-1], first)
        if row.truth is not None and row.truth.any():
            axes[-1].contour(row.truth, levels=[0.5], colors=[REFERENCE_COLOUR], linewidths=1.2)
        if row.mask.any():
            axes[-1].contour(row.mask, levels=[0.5], colors=[PREDICTION_COLOUR], linewidths=1.2, linestyles="dashed")
        known = "truth blue" if row.truth is not None else "truth unknown"
        axes[-1].set_title(f"pseudo label orange, {known}", fontsize=7)
        axes[0].text(0, -0.04, row.title, transform=axes[0].transAxes, fontsize=8, va="top")
    figure.subplots_adjust(0.01, 0.02, 0.99, 1 - 0.3 / figure.get_figheight(), wspace=0.04, hspace=0.22)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _grey(cell: Any, image: npt.NDArray[Any]) -> None:
    low, high = np.percentile(image, (0.5, 99.5))
    cell.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
