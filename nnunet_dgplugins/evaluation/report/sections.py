"""The report's numbers: means per site, differences to the baseline, classes, costs, settings, definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nnunet_dgplugins.evaluation import comparison, dcam_protocol
from nnunet_dgplugins.evaluation.comparison import TRAINING, UNSEEN, UNSEEN_AVERAGES
from nnunet_dgplugins.evaluation.evaluate import PROTOCOLS
from nnunet_dgplugins.evaluation.metrics import Metric
from nnunet_dgplugins.evaluation.report import figures
from nnunet_dgplugins.evaluation.report.content import Report
from nnunet_dgplugins.evaluation.report.parts import Block, Picture, Section, Table, embedded
from nnunet_dgplugins.files import human_bytes

if TYPE_CHECKING:
    import pandas

_MEAN, _POOLED = UNSEEN_AVERAGES
_INTERVALS = "Intervals are 95 %: patients are drawn with replacement within each site, 2000 times."
_PER_SITE = "; per site: cases ahead/level/behind"
_SEEDS = "± is the standard deviation over seeds."


def metric_of(report: Report) -> Metric:
    """Return how the report's metric is to be read."""
    return PROTOCOLS[report.protocol][report.metric]


def lead(report: Report) -> str:
    """Return the page's first sentences: what was compared, and who is ahead where."""
    table, title = report.table, metric_of(report).title
    sites = sorted(table.loc[table["split"] == UNSEEN, "target"].unique())
    sources = sorted(table["source"].unique())
    parts = [
        f"{_count(len(report.methods), 'method')}, {_count(len(sources), 'source')}, "
        f"{_count(table['seed'].nunique(), 'seed')}; "
        + (f"{_count(len(sites), 'unseen site')}: {', '.join(sites)}." if sites else "no unseen site.")
    ]
    if report.budget:
        parts.append(f"Budget of each method: {report.budget}.")
    means = comparison.matrix(table[~table["method"].isin(report.bounds)], report.metric)
    for dataset, ratio, part in _collections(report, means[means["target"] == _MEAN]):
        wide = part.pivot(index="method", columns="source", values="mean").dropna()  # methods that have every source
        if len(wide):
            average = wide.mean(axis=1)
            best = average.idxmin() if metric_of(report).better == "lower" else average.idxmax()
            where = _title(report, dataset, ratio)
            parts.append(f"{where}: best mean on unseen sites {average[best]:.3f} ({best}, {title}).")
    if report.bounds:
        parts.append(f"Bounds, given what no user has, are left out of this: {', '.join(report.bounds)}.")
    return " ".join(parts)


def results(report: Report) -> list[Section]:
    """Return the sections that say who is ahead."""
    return [_results(report), _differences(report), _sites(report)]


def background(report: Report) -> list[Section]:
    """Return the sections to look things up in."""
    return [_classes(report), _costs(report), _settings(report), _definitions(report)]


# ---------------------------------------------------------------- means


def _results(report: Report) -> Section:
    lines = comparison.matrix(report.table, report.metric)
    spread = comparison.intervals(report.table, report.metric).set_index(["dataset", "source", "method", "target"])
    better = metric_of(report).better != "lower"
    blocks = []
    for dataset, ratio, part in _collections(report, lines):
        own = spread[_same_ratio(spread["ratio"], ratio)] if len(spread) else spread
        title = _title(report, dataset, ratio)
        svg = embedded(figures.heat_maps(part, better), "svg+xml")
        alt = f"Heat maps of {metric_of(report).title}, one per method, sources x sites: the numbers of the table."
        caption = "Dark is better; in italics the source's own cases."
        blocks.append(Block(title, [_matrix(report, dataset, ratio, part, own)], [Picture(svg, alt, caption)]))
    texts = [f"{_INTERVALS} {_SEEDS}" if len(spread) else _SEEDS, *report.notes]
    if report.kind != UNSEEN:
        texts.append("No case is unseen: everything on this page is of the source's own cases.")
    return Section("results", "Results by site", texts, blocks)


def _matrix(report: Report, dataset: str, ratio: Any, part: pandas.DataFrame, spread: pandas.DataFrame) -> Table:
    sites = sorted(part.loc[~part["target"].isin(UNSEEN_AVERAGES), "target"].unique())
    averages = [_POOLED] if report.protocol == "desam" else []  # where its paper prints the number
    rows = []
    for source, own in part.groupby("source", sort=False):
        for method, values in own.groupby("method", sort=False):
            at = values.set_index("target")
            cells = [comparison.cell(at, target) for target in (*averages, *sites)]
            mean = comparison.cell(at, _MEAN)
            if (dataset, source, method, _MEAN) in spread.index:
                ends = spread.loc[(dataset, source, method, _MEAN)]
                ends = ends.iloc[0] if ends.ndim > 1 else ends
                mean += f" [{ends['low']:.3f}, {ends['high']:.3f}]"
            rows.append([str(source), str(method), mean, *cells])
        for line in report.published:
            if (line.dataset, line.source) == (dataset, source):
                cells = [f"{line.targets[to]:.3f}" if to in line.targets else "-" for to in (_MEAN, *averages, *sites)]
                rows.append([str(source), line.title, *cells])
    notes = _caveats(report, dataset)
    if own_cases := set(part["split"]) - {UNSEEN}:
        notes = [f"In brackets: the source's {TRAINING if TRAINING in own_cases else 'held-out'} cases.", *notes]
    whole = report.table[(report.table["dataset"] == dataset) & _same_ratio(report.table["ratio"], ratio)]
    if lone := comparison.sites_of_one(whole):
        sites_of_one = f"{_count(len(lone), 'unseen site')} with one patient ({', '.join(lone)})"
        notes = [*notes, f"{sites_of_one}: how patients differ there is in no interval."]
    how = "over all pixels of a site" if report.metric in dcam_protocol.METRICS else "mean over cases and classes"
    heading = ["source", "method", _MEAN, *averages, *sites]
    return Table(f"{metric_of(report).title}, {how}", heading, rows, 2, notes)


def _caveats(report: Report, dataset: str) -> list[str]:
    return list(dict.fromkeys(note for line in report.published if line.dataset == dataset for note in line.notes))


# ---------------------------------------------------------------- comparison


def _differences(report: Report) -> Section:
    baseline, metric = report.baseline, report.metric
    if baseline is None or len(report.methods) < 2:
        return Section("comparison", "Comparison")
    keys = ["dataset", "source", "method"]
    gains = comparison.differences(report.compared, baseline, metric)
    tests = comparison.paired_tests(report.compared, baseline, metric)
    counts = comparison.wins(report.compared, baseline, metric)
    blocks = []
    for dataset, ratio, part in _collections(report, gains):
        own = tests[(tests["dataset"] == dataset) & _same_ratio(tests["ratio"], ratio)].set_index(keys)
        here = counts[(counts["dataset"] == dataset) & _same_ratio(counts["ratio"], ratio)]
        sites = sorted(here["target"].unique())
        won = here.set_index(["source", "method", "target"])
        rows = []
        for row in part.to_dict("records"):
            key = (dataset, row["source"], row["method"])
            found = own.loc[key] if key in own.index else None
            shown = ["-", "-"] if found is None else [str(int(found["patients"])), _p(found["p_holm"])]
            cells = [comparison.gain_text(row), *shown]
            for site in sites:
                one = (row["source"], row["method"], site)
                cells.append(
                    "/".join(str(won.loc[one][name]) for name in ("ahead", "level", "behind"))
                    if one in won.index
                    else "-"
                )
            rows.append([str(row["source"]), str(row["method"]), *cells])
        heading = ["source", "method", "difference [95 %]", "patients", "p (Holm)", *sites]
        caption = f"Difference to {baseline} on the same cases" + (_PER_SITE if sites else "")
        blocks.append(Block(_title(report, dataset, ratio), [Table(caption, heading, rows, 2)]))
    texts = [f"Every method against {baseline}, on the same cases and seeds."]
    if len(tests):
        texts[0] += (
            " p: Wilcoxon's signed-rank test over patients, two-sided, corrected by Holm over the methods of one "
            "source; below six patients it cannot fall under 0.05. Level: closer than "
            f"{comparison.TIE}. Intervals and tests speak of patients, the spread of seeds is in the table above; "
            "seeds of one method share cases."
        )
    elif gains.empty:
        texts[0] += " No other method shares a case and seed with it yet."
    else:
        texts[0] += " The numbers are of pixels or canvases in which patients meet, so patients cannot be tested."
    return Section("comparison", f"Against {baseline}", texts, blocks)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _sites(report: Report) -> Section:
    """Points and boxes: a case's mean over classes and seeds."""
    table = report.compared
    chosen = table[(table["split"] == UNSEEN) & (table["metric"] == report.metric)]
    blocks = []
    for dataset, ratio, part in _collections(report, chosen):
        for source, own in part.groupby("source", sort=False):
            cases = own.groupby(["method", "target", "case"], sort=False)["value"].mean().reset_index()
            svg = embedded(figures.boxes(cases, report.methods, metric_of(report).title), "svg+xml")
            counts = ", ".join(f"{site} {n}" for site, n in cases.groupby("target")["case"].nunique().items())
            alt = f"Each case of each {report.kind} site as a point, by method, trained on {source}. Cases: {counts}."
            title = f"{_title(report, dataset, ratio)}, trained on {source}"
            blocks.append(
                Block(title, figures=[Picture(svg, alt, "A point is a case, its mean over classes and seeds.")])
            )
    texts = [
        f"A box (quartiles, whiskers to 1.5 times their distance) from {figures.BOXES_FROM} cases on; smaller sites "
        "show their points alone."
    ]
    return Section("sites", "Cases by site", texts if blocks else [], blocks)


def _classes(report: Report) -> Section:
    """Every metric by class, over all unseen cases, and folded by site."""
    table, metrics = report.compared, class_metrics(report)
    lines, whole = (comparison.by_class(one, metrics) for one in (table, table.assign(target="all sites")))
    what = "IoU over all" if report.protocol == "dcam" else "Mean over"
    things = "pixels" if report.protocol == "dcam" else "cases"
    caption = f"{what} {report.kind} {things}, ± over seeds"
    keys = ["source", "method", "class"]
    blocks = []
    for dataset, ratio, part in _collections(report, whole):
        here = lines[(lines["dataset"] == dataset) & _same_ratio(lines["ratio"], ratio)]
        title = _title(report, dataset, ratio)
        blocks.append(Block(title, [_class_table(report, caption, part, keys)]))
        at_sites = _class_table(report, f"{caption}, by site", here, [*keys[:2], "target", keys[2]])
        blocks.append(Block(tables=[at_sites], folded=f"{title}: by site, {_count(here['target'].nunique(), 'site')}"))
    return Section("classes", "Classes", [], blocks)


def class_metrics(report: Report) -> list[str]:
    """Return what is shown of each class."""
    if report.protocol == "dcam":
        return ["iou"]
    present = set(report.table["metric"])
    return [name for name, metric in PROTOCOLS[report.protocol].items() if metric.better and name in present]


def _class_table(report: Report, caption: str, lines: pandas.DataFrame, keys: list[str]) -> Table:
    metrics = {name: PROTOCOLS[report.protocol][name] for name in class_metrics(report)}
    rows = []
    for key, own in lines.groupby(keys, sort=False):
        found = own.set_index("metric")
        cells = [_spread(found.loc[name]) if name in found.index else "-" for name in metrics]
        rows.append([*map(str, key), *cells])
    titles = [metric.title + (f", {metric.unit}" if metric.unit else "") for metric in metrics.values()]
    return Table(caption, [*("site" if key == "target" else key for key in keys), *titles], rows, len(keys))


def _spread(line: pandas.Series) -> str:
    if not line["seeds"]:
        return "-"
    digits = 3 if abs(line["mean"]) < 10 else 1
    return f"{line['mean']:.{digits}f}" + (f" ± {line['sd']:.{digits}f}" if line["seeds"] > 1 else "")


# ---------------------------------------------------------------- costs, settings, definitions


def _costs(report: Report) -> Section:
    import statistics

    rows = []
    for method in report.methods:
        own = [entry.costs for entry in report.entries if entry.method == method]
        cells = []
        for name, text in (
            ("minutes", "{:.1f} min"), ("prediction_seconds", "{:.0f} s"), ("memory", ""), ("gpu_memory", ""),
            ("disk", ""),
        ):  # fmt: skip
            known = [getattr(cost, name) for cost in own if getattr(cost, name) is not None]
            middle = statistics.median(known) if known else None
            cells.append("-" if middle is None else text.format(middle) if text else human_bytes(middle))
        rows.append([method, str(len(own)), *cells])
    if all(cell == "-" for row in rows for cell in row[2:]):
        return Section("costs", "Costs")
    heading = ["method", "trainings", "training", "prediction", "memory", "GPU memory", "disk"]
    caption = "Median over trainings: time of training and of predicting the unseen cases, highest memory, size on disk"
    notes = ["Conversion, planning, embedding of images and the making of pseudo labels are not in these numbers."]
    return Section("costs", "Costs", [], [Block("", [Table(caption, heading, rows, 1, notes)])])


def _settings(report: Report) -> Section:
    blocks = []
    for method in report.methods:
        first = next((entry.settings for entry in report.entries if entry.method == method and entry.settings), None)
        if first:
            terms = [(str(key), str(value)) for key, value in first.items()]
            blocks.append(Block(terms=terms, folded=f"{method}: {_count(len(terms), 'setting')}"))
    texts = ["As resolved for the first training; stock trainers have none."] if blocks else []
    return Section("settings", "Settings", texts, blocks)


def _definitions(report: Report) -> Section:
    found = set(report.table["metric"]) | {report.metric}
    terms = [
        (metric.title + (f" ({metric.unit})" if metric.unit else ""), metric.definition)
        for name, metric in PROTOCOLS[report.protocol].items()
        if name in found
    ]
    mean = "unweighted mean of the unseen sites' numbers"
    if report.metric not in dcam_protocol.METRICS:
        mean += "; a site's is the mean over its cases, a case's the mean over its classes"
    terms.append((_MEAN, mean))
    if report.protocol == "desam":
        terms.append((_POOLED, "mean over all unseen cases as one group"))
    terms.append(("patients", "cases that share a patient are drawn and tested together"))
    texts = ["P prediction, R reference, d distance in mm to the other one's surface."]
    return Section("definitions", "Definitions", texts, [Block(terms=terms)])


# ---------------------------------------------------------------- help


def _collections(report: Report, table: pandas.DataFrame) -> Iterator[tuple[str, Any, pandas.DataFrame]]:
    """Yield each dataset and labelled share of a table with its rows."""
    for (dataset, ratio), part in table.groupby(["dataset", "ratio"], dropna=False, sort=False):
        yield str(dataset), None if ratio != ratio else ratio, part


def _same_ratio(column: pandas.Series, ratio: Any) -> pandas.Series:
    return column.isna() if ratio is None else column == ratio


def _title(report: Report, dataset: str, ratio: Any) -> str:
    name = report.collections.get(dataset, dataset)
    return name if ratio is None else f"{name}, {ratio:g} of the labels"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
