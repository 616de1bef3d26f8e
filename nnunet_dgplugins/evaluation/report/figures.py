"""The report's charts, as SVG: heat maps source x target, points and boxes per site, learning curves.

Methods keep one colour and one marker on the whole page (Okabe and Ito's palette, told apart by every kind of colour
vision, markers without colour).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_dgplugins.evaluation.comparison import UNSEEN, UNSEEN_AVERAGES

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5C00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BOXES_FROM = 10  # cases of a site; fewer are shown as points alone
_WIDTH = 7.2  # inches, of every chart: the page's column
_TEXT = 8
_SPREAD = 0.28  # of points around a method's line


def heat_maps(lines: pandas.DataFrame, higher_is_better: bool = True) -> bytes:
    """Draw one panel per method, sources as rows and targets as columns.

    Args:
        lines: of :func:`~nnunet_dgplugins.evaluation.comparison.matrix`, of one dataset and ratio.
        higher_is_better: the better end of the scale is dark.

    Returns:
        SVG. The source's own cases are in italics.
    """
    shown = lines[~lines["target"].isin(UNSEEN_AVERAGES)]
    methods, sources = list(shown["method"].unique()), list(shown["source"].unique())
    targets = sorted(shown["target"].unique())
    columns = max(1, min(len(methods), int(_WIDTH / (0.62 * len(targets) + 1.1))))
    rows = -(-len(methods) // columns)
    height = 0.34 * len(sources) + 1.0
    figure = _figure(rows * height)
    axes = figure.subplots(rows, columns, squeeze=False)
    low, high = float(shown["mean"].min()), float(shown["mean"].max())
    for place, cell in enumerate(axes.flat):
        if place >= len(methods):
            cell.set_axis_off()
            continue
        own = shown[shown["method"] == methods[place]].set_index(["source", "target"])
        values = np.array([[own["mean"].get((s, t), np.nan) for t in targets] for s in sources], dtype=float)
        scale = "YlGnBu" if higher_is_better else "YlGnBu_r"
        cell.imshow(values, cmap=scale, vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = ((value - low) / max(high - low, 1e-6) > 0.55) == higher_is_better
                seen = own["split"].get((sources[row], targets[column])) != UNSEEN
                cell.text(column, row, _short(value), ha="center", va="center", fontsize=_TEXT - 1,
                          color="white" if dark else "black", style="italic" if seen else "normal")  # fmt: skip
        cell.set_title(methods[place], fontsize=_TEXT, loc="left", parse_math=False)
        cell.set_xticks(range(len(targets)), targets, fontsize=_TEXT - 1, rotation=35, ha="right", parse_math=False)
        names = sources if place % columns == 0 else [""] * len(sources)
        cell.set_yticks(range(len(sources)), names, fontsize=_TEXT - 1, parse_math=False)
        cell.tick_params(length=0)
    return _svg(figure)


def boxes(cases: pandas.DataFrame, methods: Sequence[str], metric: str) -> bytes:
    """Draw one panel per site: each case a point, and a box where there are :data:`BOXES_FROM` cases.

    Args:
        cases: columns ``method``, ``target``, ``value``: one line per case, of one source.
        methods: all of the report, in order.
        metric: title of the axis.
    """
    sites = sorted(cases["target"].unique())
    here = [name for name in methods if name in set(cases["method"])]
    columns = min(2, len(sites))
    rows = -(-len(sites) // columns)
    figure = _figure(rows * (0.24 * len(here) + 0.75))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    random = np.random.default_rng(0)
    for cell, site in zip(axes.flat, sites, strict=False):
        own = cases[cases["target"] == site]
        for line, name in enumerate(here):
            values = own.loc[own["method"] == name, "value"].dropna().to_numpy()
            colour, marker = style_of(name, methods)
            if len(values) >= BOXES_FROM:
                cell.boxplot(
                    values, positions=[line], widths=0.62, showfliers=False, manage_ticks=False,
                    medianprops={"color": colour, "linewidth": 1.6}, boxprops={"color": "#666666"},
                    whiskerprops={"color": "#666666"}, capprops={"color": "#666666"}, **_flat(cell),
                )  # fmt: skip
            places = line + random.uniform(-_SPREAD, _SPREAD, len(values))
            cell.scatter(values, places, s=9, color=colour, marker=marker, alpha=0.65, linewidths=0)
        cell.set_title(f"{site}, {own['case'].nunique()} cases", fontsize=_TEXT, loc="left", parse_math=False)
        cell.set_yticks(range(len(here)), here, fontsize=_TEXT - 1, parse_math=False)
        cell.set_ylim(len(here) - 0.5, -0.5)
        cell.tick_params(labelsize=_TEXT - 1)
        cell.grid(axis="x", color="#dddddd", linewidth=0.6)
        cell.set_axisbelow(True)
    for cell in axes.flat[len(sites) :]:
        cell.set_axis_off()
    for cell in axes[-1]:
        cell.set_xlabel(metric, fontsize=_TEXT)
    return _svg(figure)


def curves(entries: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], methods: Sequence[str]) -> bytes:
    """Draw one row per method: losses on the left, nnU-Net's smoothed pseudo Dice on the right, a line per training.

    Args:
        entries: method -> curves of each of its trainings.
        methods: all of the report, in order.
    """
    here = [name for name in methods if entries.get(name)]
    figure = _figure(1.25 * len(here) + 0.3)
    axes = figure.subplots(len(here), 2, squeeze=False)
    for (left, right), name in zip(axes, here, strict=True):
        colour, _ = style_of(name, methods)
        for training in entries[name]:
            for key, line in (("train_losses", "solid"), ("val_losses", (0, (3, 2)))):
                _line(left, training.get(key, ()), colour, line)
            _line(right, training.get("ema_fg_dice", ()), colour, "solid")
        left.set_title(f"{name}: loss", fontsize=_TEXT, loc="left", parse_math=False)
        right.set_title("score while training", fontsize=_TEXT, loc="left", parse_math=False)
        for cell in (left, right):
            cell.tick_params(labelsize=_TEXT - 1)
            cell.grid(color="#e5e5e5", linewidth=0.6)
    for cell in axes[-1]:
        cell.set_xlabel("epoch", fontsize=_TEXT)
    return _svg(figure)


def style_of(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """Return a method's colour and marker."""
    place = list(methods).index(method)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def _line(cell: Any, values: Sequence[float], colour: str, line: Any) -> None:
    if len(values) == 1:  # one epoch is a point
        cell.plot([1], values, color=colour, marker="o", markersize=3)
    else:
        cell.plot(range(1, len(values) + 1), values, color=colour, linestyle=line, linewidth=1.1)


def _flat(cell: Any) -> dict[str, Any]:
    """Return what makes a box plot lie: matplotlib 3.10 renamed the option."""
    import inspect

    known = inspect.signature(cell.boxplot).parameters
    return {"orientation": "horizontal"} if "orientation" in known else {"vert": False}


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _figure(height: float) -> Figure:
    # the object-oriented interface: no global state, no window system, whatever the user's backend is
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, max(height, 1.2)), facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Figure) -> bytes:
    """Return the figure as SVG; the same figure gives the same bytes."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dgplugins", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
