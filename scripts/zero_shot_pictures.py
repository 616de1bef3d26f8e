"""Pictures of the zero-shot evaluation: per source four objects, chosen before any result is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from zero_shot_data import Mask, Slice, spread
from zero_shot_methods import dice

from nnunet_dgplugins.files import replacing

if TYPE_CHECKING:
    from evaluate_vit_tiny import Outcome

EXAMPLES = 4
# Okabe and Ito's palette; line styles tell the contours apart without colour
TRUTH_COLOUR, PROMPT_COLOUR = "#56B4E9", "#F0E442"
MODEL_STYLES: tuple[tuple[str, Any], ...] = (
    ("#E69F00", (0, (4, 1.5))),
    ("#CC79A7", (0, (1, 1.2))),
    ("#009E73", (0, (6, 1, 1, 1))),
    ("#D55E00", (0, (2, 2))),
)
_MARGIN = 0.6  # of the object's size, shown around it


def pick_examples(slices: Sequence[Slice]) -> set[tuple[int, int]]:
    """Return (slice, object) of four objects per source, evenly spread over its rows and volumes."""
    picked = set()
    for source in dict.fromkeys(place.source for place in slices):
        mine = [(i, j) for i, place in enumerate(slices) if place.source == source for j in range(len(place.objects))]
        mine.sort(key=lambda key: slices[key[0]].objects[key[1]].row)
        picked |= {mine[k] for k in spread(len(mine), EXAMPLES)}
    return picked


def write_pictures(kept: Sequence[Outcome], labels: Sequence[str], folder: Path) -> list[Path]:
    """Write ``<source>.png``: above from the point, below from the box, with the contours of truth and models.

    Args:
        kept: the outcomes to draw.
        labels: models whose contours are drawn.
        folder: made where it is missing.

    Returns:
        The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    written = []
    for source in dict.fromkeys(outcome.place.source for outcome in kept):
        mine = [outcome for outcome in kept if outcome.place.source == source]
        # titles of three lines are higher than the layout expects
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.96))
        figure = Figure(figsize=(3.2 * len(mine), 7.6), dpi=110, facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, len(mine), squeeze=False)
        for column, outcome in enumerate(mine):
            for line, prompt in enumerate(("point", "box")):
                _draw(grid[line, column], outcome, prompt, labels)
        entries = [Line2D([], [], color=TRUTH_COLOUR, label="truth"),
                   Line2D([], [], color=PROMPT_COLOUR, label="prompt")]  # fmt: skip
        for label, (colour, style) in zip(labels, MODEL_STYLES, strict=False):
            entries.append(Line2D([], [], color=colour, linestyle=style, label=label))
        figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=10)
        path = folder / f"{source.replace(' ', '_')}.png"
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
        written.append(path)
    return written


def _draw(axes: Any, outcome: Outcome, prompt: str, labels: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    image, truth = outcome.place.image, outcome.thing.mask
    top, bottom, left, right = outcome.box
    low, high = np.percentile(image, (0.5, 99.5))
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="bilinear")
    masks = outcome.by_point if prompt == "point" else outcome.by_box
    # an untrained model's mask is speckled: it is drawn thin, and under the others
    for i, (label, (colour, style)) in reversed(list(enumerate(zip(labels, MODEL_STYLES, strict=False)))):
        _contour(axes, masks[label], colour, style, width=0.7 if i else 1.8)
    _contour(axes, truth, TRUTH_COLOUR, "solid", width=1.8)
    if prompt == "point":
        axes.plot(outcome.point[1], outcome.point[0], "+", color=PROMPT_COLOUR, markersize=10, markeredgewidth=2)
    else:
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False,
                                 edgecolor=PROMPT_COLOUR, linewidth=1))  # fmt: skip
    half = max(max(bottom - top, right - left) * (0.5 + _MARGIN), min(image.shape) / 6)
    row, column = (top + bottom) / 2, (left + right) / 2
    axes.set_xlim(max(column - half, -0.5), min(column + half, image.shape[1] - 0.5))
    axes.set_ylim(min(row + half, image.shape[0] - 0.5), max(row - half, -0.5))
    numbers = ", ".join(f"{label} {dice(truth, masks[label]):.2f}" for label in labels)
    place = f"{outcome.place.scan}, slice {outcome.place.index}"
    axes.set_title(f"{outcome.thing.row}\n{place}\n{prompt}: {numbers}", fontsize=8)
    axes.set_axis_off()


def _contour(axes: Any, mask: Mask, colour: str, style: Any, width: float) -> None:
    if not mask.any():
        return
    # a ring of background lets contours close at the image's edge
    padded = np.pad(mask, 1).astype(float)
    grid = (np.arange(padded.shape[1]) - 1, np.arange(padded.shape[0]) - 1)
    axes.contour(*grid, padded, levels=[0.5], colors=[colour], linewidths=width, linestyles=[style])
