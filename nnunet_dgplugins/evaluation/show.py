"""Prints an evaluation in the terminal: names of the sites above the numbers, definitions below them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnunet_dgplugins.evaluation.doubt import Correlation, Doubt
from nnunet_dgplugins.evaluation.evaluate import PROTOCOLS, Evaluation
from nnunet_dgplugins.evaluation.tables import MEAN_OF_SITES, POOLED, matrix, sites_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 132  # of output that does not go to a terminal
FEW_ROWS, WORST_ROWS = 24, 8
_ALWAYS_HIDDEN = ("reference_ml", "prediction_ml")  # they describe the case; CSV and JSON have them


def console() -> Console:
    """Return a console as wide as the terminal; a file or pipe gets a fixed width, so that tables do not fold."""
    from rich.console import Console

    wide = Console(highlight=False, emoji=False, markup=False)
    return wide if wide.is_terminal else Console(width=WIDTH, highlight=False, emoji=False, markup=False)


def show(result: Evaluation, *, all_cases: bool = False) -> None:
    """Print the source x target table, all metrics by site, cases, definitions and notes."""
    screen = console()
    screen.print(
        f"{result.dataset.name}: {result.predictions} against {result.labels}, protocol {result.protocol}",
        soft_wrap=True,
    )
    rows = matrix(result)
    screen.print(_source_target(result, rows))
    if len(PROTOCOLS[result.protocol]) > 1:
        screen.print(_by_site(result, rows))
    cases = _cases(result, all_cases)
    if cases is not None:
        screen.print(cases)
    for line in _definitions(result):
        screen.print(line)


def show_doubt(doubts: list[Doubt], correlation: Correlation | None) -> None:
    """Print the cases, most doubtful first, and how well that order agrees with Dice."""
    screen = console()
    table = _table("Look at these first: the method's own doubt (0 sure, 1 in doubt)")
    table.add_column("rank", justify="right")
    table.add_column("case", overflow="fold")
    table.add_column("doubt", justify="right")
    classes = list(dict.fromkeys(name for item in doubts for name in item.per_class))
    classes = classes if len(classes) > 1 else []
    for name in classes:
        table.add_column(name, justify="right")
    table.add_column("most doubtful slice (from 0)", justify="right")
    for rank, item in enumerate(doubts, 1):
        by_class = [f"{item.per_class[name]:.3f}" if name in item.per_class else "-" for name in classes]
        worst = "-" if item.worst_slice is None else str(item.worst_slice)
        table.add_row(str(rank), item.case, f"{item.doubt:.3f}", *by_class, worst)
    screen.print(table)
    if correlation is not None:
        screen.print(correlation_line(correlation), soft_wrap=True)


def show_equivariance(found: Mapping[str, Any]) -> None:
    """Print how far maps fail to move with their images, per family of transforms."""
    table = _table("Mean difference of map of transformed slice and transformed map (share of the maps' mean)")
    for heading in ("transform", "before training", "after training"):
        table.add_column(heading, justify="left" if heading == "transform" else "right")
    for family, moments in found.items():
        if family != "slices":
            cells = []
            for value in (moments["before"], moments["after"]):
                share = "empty maps" if value["relative"] is None else f"{value['relative']:.2f}"
                cells.append(f"{value['difference']:.4f} ({share})")
            table.add_row(family, *cells)
    console().print(table)
    console().print(f"{found['slices']} positive validation slices, mean over modalities; 0 moves perfectly.")


def correlation_line(correlation: Correlation) -> str:
    """Return the rank correlation in one sentence."""
    if correlation.rho is None:
        return f"Rank correlation of doubt with Dice: not defined (n = {correlation.n})."
    return (
        f"Rank correlation of doubt with Dice (Spearman): {correlation.rho:+.2f}, n = {correlation.n} cases, "
        f"p = {correlation.p_value:.2g}. -1: the doubt orders the cases perfectly; 0: it says nothing."
    )


def _source_target(result: Evaluation, rows: list[dict[str, Any]]) -> Table:
    """The first metric of the protocol, one row per source and class, one column per unseen site."""
    first = next(iter(PROTOCOLS[result.protocol]))
    unit = {"samsdg": "canvases", "dcam": "patches"}.get(result.protocol, "cases")
    chosen = [row for row in rows if row["metric"] == first]
    how = "all pixels of a site's patches" if result.protocol == "dcam" else "mean ± std"
    table = _table(
        f"{PROTOCOLS[result.protocol][first].title}, {how}: trained on the row's site, tested on the column's"
    )
    table.add_column("source")
    table.add_column("class", overflow="fold")
    for site in chosen[0]["sites"] if chosen else ():
        count = max(row["sites"][site]["n"] for row in chosen)
        table.add_column(f"{site}\n{count} {unit}", justify="right")
    table.add_column(f"{MEAN_OF_SITES}\n{len(chosen[0]['sites']) if chosen else 0} sites", justify="right")
    table.add_column(f"{POOLED}\n{max((row['pooled']['n'] for row in chosen), default=0)} {unit}", justify="right")
    for row in chosen:
        sites = [_cell(item) for item in row["sites"].values()]
        table.add_row(row["source"], row["class"], *sites, _value(row["mean_of_sites"]), _cell(row["pooled"]))
    return table


def _by_site(result: Evaluation, rows: list[dict[str, Any]]) -> Table:
    """All metrics, one row per class and site, the two means last."""
    shown = {key: metric for key, metric in PROTOCOLS[result.protocol].items() if key not in _ALWAYS_HIDDEN}
    over = "over all pixels of n patches" if result.protocol == "dcam" else "mean ± std over n"
    table = _table(f"By class and site, {over}")
    table.add_column("class", overflow="fold")
    table.add_column("site")
    table.add_column("n", justify="right")
    for metric in shown.values():
        table.add_column(metric.title + (f"\n{metric.unit}" if metric.unit else ""), justify="right")
    items = sites_table(result)
    by_key = {(item["class"], item["site"], item["metric"]): item for item in items}
    names = list(dict.fromkeys(row["class"] for row in rows))
    for name in names:
        sites = list(dict.fromkeys((item["site"], item["role"]) for item in items))
        for site, role in sorted(sites, key=lambda pair: (pair[1] == "target", pair[0])):
            found = [by_key.get((name, site, metric)) for metric in shown]
            count = max((item["n"] for item in found if item), default=0)
            label = f"{site} (source)" if role == "source" else site
            table.add_row(name, label, str(count), *(_cell(item) if item else "-" for item in found))
        own = {row["metric"]: row for row in rows if row["class"] == name}
        pooled = max((row["pooled"]["n"] for row in own.values()), default=0)
        means = [_value(own[metric]["mean_of_sites"]) if metric in own else "-" for metric in shown]
        table.add_row(name, MEAN_OF_SITES, "", *means, style="bold")
        cells = [_cell(own[metric]["pooled"]) if metric in own else "-" for metric in shown]
        table.add_row(name, POOLED, str(pooled), *cells, style="bold", end_section=True)
    return table


def _cases(result: Evaluation, all_cases: bool) -> Table | None:
    """Every case if they are few or asked for, else those with the lowest Dice."""
    if result.protocol in ("samsdg", "dcam"):  # the unit is no case that could be looked up, or only a sum of cases
        return None
    shown = {key: metric for key, metric in PROTOCOLS[result.protocol].items() if key not in _ALWAYS_HIDDEN}
    wide = result.table.pivot_table(
        index=["case", "site", "class"], columns="metric", values="value", sort=False, dropna=False, observed=True
    ).reset_index()
    wide = wide.dropna(how="all", subset=[key for key in shown if key in wide])
    everything = all_cases or len(wide) <= FEW_ROWS
    if not everything:
        wide = wide.sort_values(next(iter(shown)), kind="stable").head(WORST_ROWS)
    table = _table("Cases" if everything else f"The {WORST_ROWS} lowest (--per-case shows all, --csv FILE keeps them)")
    for title in ("case", "site", "class"):
        table.add_column(title, overflow="fold")
    for metric in shown.values():
        table.add_column(metric.title + (f"\n{metric.unit}" if metric.unit else ""), justify="right")
    for row in wide.to_dict("records"):
        table.add_row(row["case"], row["site"], row["class"], *(_value(row.get(key)) for key in shown))
    return table


def _definitions(result: Evaluation) -> list[str]:
    lines = []
    for name, metric in PROTOCOLS[result.protocol].items():
        if name not in _ALWAYS_HIDDEN:
            unit = f", {metric.unit}" if metric.unit else ""
            lines += textwrap.wrap(f"{metric.title}{unit}: {metric.definition}", WIDTH, subsequent_indent="    ")
    general = ["P prediction, R reference. ± is the standard deviation over cases (n - 1)."]
    if result.protocol == "dcam":
        general = ["P prediction, R reference. Not averages over patches; background counts where it is a class."]
    if result.protocol == "standard":
        general.append(
            "Empty masks: only one of P, R empty = Dice 0, NSD 0, distances = the image's diagonal; both empty = not "
            "defined (-), left out of means and n."
        )
    general.append("mean of sites: unweighted mean of the unseen sites' means; pooled: all their cases as one group.")
    for sentence in (*general, *(f"Note: {note}" for note in result.notes)):
        lines += textwrap.wrap(sentence, WIDTH, subsequent_indent="    ")
    return lines


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _cell(numbers: Mapping[str, Any]) -> str:
    mean, std = numbers["mean"], numbers["std"]
    return _value(mean) if std is None else f"{_value(mean)} ± {_digits(std, mean)}"


def _value(value: float | None) -> str:
    return "-" if value is None or value != value else _digits(value, value)


def _digits(value: float, scale: float | None) -> str:
    """Three decimals below 10, fewer above, so that columns stay narrow; ``scale`` sets the number of decimals."""
    size = abs(scale or 0.0)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"
