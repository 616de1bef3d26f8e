"""From finished runs to one tidy table, the source x target matrix, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion._registry import load_converter
from nnunet_dgplugins.data import splits
from nnunet_dgplugins.evaluation import dcam_protocol
from nnunet_dgplugins.files import read_json, write_bytes, write_json
from nnunet_dgplugins.study.beside import AVERAGES, published_rows
from nnunet_dgplugins.study.definition import Data, Study
from nnunet_dgplugins.study.tasks import Run, Task

if TYPE_CHECKING:
    import pandas

COLUMNS = ["method", "dataset", "source", "target", "ratio", "seed", "case", "patient", "class", "metric", "value"]
UNSEEN, VALIDATION, TRAINING = "unseen", "validation", "training"
_AVERAGES = ("mean unseen", "pooled unseen")
_RESAMPLES = 2000


def collect(tasks: Sequence[Task]) -> pandas.DataFrame:
    """Return every value of every finished run, one a line.

    Returns:
        Columns :data:`COLUMNS` and ``split``: ``validation`` for the source's held-out cases, ``training`` where there
        are so few labelled ones that they validate too, ``unseen`` for others.
    """
    import pandas

    runs = {task.run.folder: task.run for task in tasks if task.run}
    parts = [part for run in runs.values() for part in _values(run)]
    if not parts:
        return pandas.DataFrame(columns=[*COLUMNS, "split"])
    return pandas.concat(parts, ignore_index=True)[[*COLUMNS, "split"]]


def _values(run: Run) -> list[pandas.DataFrame]:
    import pandas

    found = []
    for file, split in (("source.csv", _own_split(run)), ("unseen.csv", UNSEEN)):
        if (run.folder / file).is_file():
            part = pandas.read_csv(run.folder / file, dtype={"case": str, "patient": str})
            labels = {"method": run.method, "dataset": run.dataset, "source": run.source, "seed": run.seed}
            found.append(part.rename(columns={"site": "target"}).assign(**labels, ratio=run.ratio, split=split))
    return found


def _own_split(run: Run) -> str:
    """Return what the source's evaluated cases are in the training."""
    folds = read_json(run.folds) if run.folds and run.folds.is_file() else []
    return TRAINING if folds and folds[0].get(splits.VALIDATES_ON) == splits.TRAINING else VALIDATION


def by_seed(table: pandas.DataFrame, metric: str = "dice") -> pandas.DataFrame:
    """Return one number per method, source, target and seed: the mean over cases of the mean over classes.

    The target ``mean unseen`` is the unweighted mean over the unseen sites, ``pooled unseen`` that over their cases.
    Numbers of protocol ``dcam`` are those of all pixels of a site, or of all unseen sites, instead of means of cases.
    """
    import pandas

    keys = ["dataset", "ratio", "source", "method", "seed", "split", "target"]
    if metric in dcam_protocol.METRICS:
        unseen = table[table["split"] == UNSEEN]
        sites, pooled = _over_pixels(table, keys, metric), _over_pixels(unseen, keys[:-1], metric)
        seen = sites[sites["split"] == UNSEEN].groupby(keys[:-1], dropna=False, sort=False)["value"].mean()
        named = [part.assign(target=name) for part, name in zip((seen.reset_index(), pooled), _AVERAGES, strict=True)]
        return pandas.concat([sites, *named], ignore_index=True)
    chosen = table[table["metric"] == metric]
    cases = chosen.groupby([*keys, "case"], dropna=False, sort=False)["value"].mean().reset_index()
    sites = cases.groupby(keys, dropna=False, sort=False)["value"].mean().reset_index()
    averages = [
        part[part["split"] == UNSEEN].groupby(keys[:-1], dropna=False, sort=False)["value"].mean().reset_index()
        for part in (sites, cases)
    ]
    named = [part.assign(target=name) for part, name in zip(averages, _AVERAGES, strict=True)]
    return pandas.concat([sites, *named], ignore_index=True)


def _over_pixels(table: pandas.DataFrame, keys: list[str], metric: str) -> pandas.DataFrame:
    """Return the number over all pixels of each group of cases."""
    import pandas

    counts = dcam_protocol.counts_of(table, [*keys, "class"])
    rows = [
        (*values, float(dcam_protocol.score(part.to_numpy(), metric)))
        for values, part in counts.groupby(level=keys, dropna=False, sort=False)
    ]
    return pandas.DataFrame(rows, columns=[*keys, "value"])


def matrix(table: pandas.DataFrame, metric: str = "dice") -> pandas.DataFrame:
    """Return mean, standard deviation over seeds and their number for each method, source and target."""
    keys = ["dataset", "ratio", "source", "method", "split", "target"]
    grouped = by_seed(table, metric).groupby(keys, dropna=False, sort=False)["value"]
    return grouped.agg(mean="mean", sd="std", seeds="count").reset_index()


def differences(table: pandas.DataFrame, baseline: str, metric: str = "dice") -> pandas.DataFrame:
    """Compare every method with the baseline on the same unseen cases.

    A case's gain is its mean over classes and over the seeds that both methods have. Patients are drawn with
    replacement within each site, 2000 times; the interval is the middle 95 % of the mean difference over sites.
    Numbers of protocol ``dcam`` are taken over all pixels of the patients drawn, then over seeds and sites.

    Returns:
        Per dataset, ratio, source and method: ``difference``, ``low``, ``high``, ``cases``.
    """
    import pandas

    keys = ["dataset", "ratio", "source"]
    rows: list[dict[str, Any]] = []
    chosen = table[table["split"] == UNSEEN]
    gains = _pixel_gains if metric in dcam_protocol.METRICS else _case_gains
    for values, part in chosen.groupby(keys, dropna=False, sort=False):
        where = dict(zip(keys, values, strict=True))
        for method in part["method"].unique():
            if method != baseline and (found := gains(part, str(method), baseline, metric)):
                rows.append({**where, "method": method, **found})
    return pandas.DataFrame(rows, columns=[*keys, "method", "difference", "low", "high", "cases"])


def _case_gains(table: pandas.DataFrame, method: str, baseline: str, metric: str) -> dict[str, float]:
    """Return a method's mean gain on the cases that both have, its interval, and their number; nothing without any."""
    one = ["target", "patient", "case"]
    both = table[(table["metric"] == metric) & table["method"].isin([method, baseline])]
    wide = both.groupby([*one, "seed", "method"], dropna=False, sort=False)["value"].mean().unstack("method")
    if not {method, baseline} <= set(wide.columns):
        return {}
    gain = (wide[method] - wide[baseline]).dropna().groupby(level=one, dropna=False, sort=False).mean()
    return {**_interval(gain), "cases": len(gain)} if len(gain) else {}


def _pixel_gains(table: pandas.DataFrame, method: str, baseline: str, metric: str) -> dict[str, float]:
    """Return the same of numbers over all pixels; seeds that one of the two lacks do not count."""
    import numpy as np

    pair = [method, baseline]
    seeds = set.intersection(*(set(table.loc[table["method"] == name, "seed"]) for name in pair))
    both = table[table["method"].isin(pair) & table["seed"].isin(seeds) & table["metric"].isin(dcam_protocol.COUNTS)]
    if both.empty:
        return {}
    random = np.random.default_rng(0)
    middle: list[Any] = []
    drawn: list[Any] = []
    for _, part in both.groupby("target", sort=False):
        names = [part[key].unique() for key in ("patient", "seed", "class")]
        sums = dcam_protocol.counts_of(part, ["patient", "method", "seed", "class"])
        order = [(p, m, s, c) for p in names[0] for m in pair for s in names[1] for c in names[2]]
        counts = sums.reindex(order, fill_value=0.0).to_numpy().reshape(len(names[0]), 2, *map(len, names[1:]), 3)
        count = len(counts)
        weights = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
        for kept, times in ((middle, np.ones((1, count))), (drawn, weights)):
            scores = dcam_protocol.score(np.tensordot(times, counts, 1), metric).mean(-1)  # over seeds
            kept.append(scores[:, 0] - scores[:, 1])
    low, high = np.quantile(np.mean(drawn, 0), [0.025, 0.975])
    ends = {"low": float(low), "high": float(high)}
    return {"difference": float(np.mean(middle)), **ends, "cases": both["case"].nunique()}


def _interval(gain: pandas.Series) -> dict[str, float]:
    """Return the mean over sites of the mean gain, with its interval; ``gain`` is indexed by target, patient, case."""
    import numpy as np

    random = np.random.default_rng(0)
    drawn = np.zeros(_RESAMPLES)
    middle = []
    sites = list(gain.groupby(level="target"))
    for _, part in sites:
        patients = part.groupby(level="patient")
        total, count = patients.sum().to_numpy(), patients.count().to_numpy()
        chosen = random.integers(len(total), size=(_RESAMPLES, len(total)))
        drawn += total[chosen].sum(1) / count[chosen].sum(1) / len(sites)
        middle.append(total.sum() / count.sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"difference": float(np.mean(middle)), "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Printed:
    """One table as text: a collection and ratio.

    Args:
        title: collection, ratio, and whether its sites are simulated or made.
        heading: of the columns.
        rows: as long as the heading; published rows stand behind ours of the same source.
        notes: caveats of the published rows.
        brackets: what the cases behind numbers in brackets are.
    """

    title: str
    heading: list[str]
    rows: list[list[str]]
    notes: list[str]
    brackets: str


def printed(table: pandas.DataFrame, study: Study, metric: str | None = None) -> list[Printed]:
    """Return the tables as text, of the protocol's metric or another; brackets mark the source's own cases."""
    metric = metric or study.metric
    gains = differences(table, study.baseline, metric) if study.baseline else None
    lines = matrix(table, metric)
    collections = {data.name: data for data in study.datasets}
    found = []
    for (dataset, ratio), part in lines.groupby(["dataset", "ratio"], dropna=False, sort=False):
        data = collections[str(dataset)]
        sites = sorted(part.loc[~part["target"].isin(_AVERAGES), "target"].unique())
        # the pooled mean stands where a paper prints it
        targets = [*sites, *_AVERAGES[: 1 + (AVERAGES.get(study.protocol) == _AVERAGES[1])]]
        heading = ["source", "method", *targets]
        if gains is not None:
            heading.append(f"difference to {study.baseline} [95 %]")
        seen = TRAINING in set(part["split"])
        brackets = "the source's labelled training cases" if seen else "the source's held-out cases"
        shown = Printed(_title(data, ratio), heading, [], [], brackets)
        for source, own in part.groupby("source", sort=False):
            for method, values in own.groupby("method", sort=False):
                row = [str(source), str(method), *(_cell(values.set_index("target"), target) for target in targets)]
                shown.rows.append(row + ([_gain(gains, dataset, ratio, source, method)] if gains is not None else []))
            rows, notes = published_rows(study, data, str(source)) if metric == study.metric else ({}, [])
            for title, numbers in rows.items():
                row = [str(source), title, *(f"{numbers[to]:.3f}" if to in numbers else "-" for to in targets)]
                shown.rows.append(row + (["-"] if gains is not None else []))
            shown.notes.extend(note for note in notes if note not in shown.notes)
        found.append(shown)
    return found


def _title(data: Data, ratio: Any) -> str:
    parts = [data.name]
    if ratio is not None and ratio == ratio:
        parts.append(f"{ratio:g} of the labels")
    if load_converter(data.convert).FACTS.simulated:
        parts.append("SIMULATED sites")
    elif data.prepare:
        parts.append("made images")
    return ", ".join(parts)


def _cell(values: pandas.DataFrame, target: str) -> str:
    if target not in values.index:
        return "-"
    row = values.loc[target]
    text = f"{row['mean']:.3f}" + (f" ± {row['sd']:.3f}" if row["seeds"] > 1 else "")
    return text if row["split"] == UNSEEN else f"({text})"


def _gain(gains: pandas.DataFrame, dataset: str, ratio: Any, source: str, method: str) -> str:
    own = gains[(gains["dataset"] == dataset) & (gains["source"] == source) & (gains["method"] == method)]
    own = own[own["ratio"].isna() if ratio is None or ratio != ratio else own["ratio"] == ratio]
    if own.empty:
        return "-"
    row = own.iloc[0]
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def markdown(table: pandas.DataFrame, study: Study, metric: str | None = None) -> str:
    """Return the matrix as markdown; brackets mark the source's own cases."""
    parts = []
    for one in printed(table, study, metric):
        lines = [one.heading, ["---", "---", *["---:"] * (len(one.heading) - 2)], *one.rows]
        text = f"### {one.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
        text += f"\nIn brackets: {one.brackets}.\n"
        parts.append(text + "".join(f"\n- {note}" for note in one.notes) + ("\n" if one.notes else ""))
    return "\n".join(parts)


def write_results(tasks: Sequence[Task], study: Study, out: Path) -> pandas.DataFrame:
    """Write ``results.csv``, ``results.json`` and ``results.md`` from what is finished; return the tidy table."""
    table = collect(tasks)
    write_bytes(out / "results.csv", table.to_csv(index=False, lineterminator="\n").encode())
    if len(table):
        content = {
            "format": 1,
            "study": study.name,
            "budget": study.budget.words(),
            "protocol": study.protocol,
            "datasets": {data.name: _title(data, None) for data in study.datasets},
            "matrix": _records(matrix(table, study.metric)),
            "differences": _records(differences(table, study.baseline, study.metric)) if study.baseline else [],
            "values": _records(table),
        }
        write_json(out / "results.json", content)
        write_bytes(out / "results.md", markdown(table, study).encode())
    return table


def _records(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return rows as plain JSON values; what is not defined is null."""
    clean = table.astype(object).where(table.notna(), None)
    return [dict(row) for row in clean.to_dict("records")]
