"""From finished runs to one tidy table, and the source x target matrix as text, CSV and JSON."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion._registry import load_converter
from nnunet_dgplugins.data import splits
from nnunet_dgplugins.evaluation.comparison import (
    COLUMNS,
    TRAINING,
    UNSEEN,
    UNSEEN_AVERAGES,
    VALIDATION,
    cell,
    differences,
    gain_text,
    matrix,
    records,
    told_apart,
)
from nnunet_dgplugins.files import read_json, write_bytes, write_json
from nnunet_dgplugins.study.beside import AVERAGES, published_rows
from nnunet_dgplugins.study.definition import Data, Study
from nnunet_dgplugins.study.state import State
from nnunet_dgplugins.study.tasks import Run, Task

if TYPE_CHECKING:
    import pandas

FILE, FORMAT = "results.json", 2


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
    return told_apart(pandas.concat(parts, ignore_index=True)[[*COLUMNS, "split"]])


def _values(run: Run) -> list[pandas.DataFrame]:
    import pandas

    found = []
    for file, split in (("source.csv", _own_split(run)), ("unseen.csv", UNSEEN)):
        if (run.folder / file).is_file():
            # a site may be called NA: what is missing is an empty cell, and only of these columns
            part = pandas.read_csv(
                run.folder / file, dtype=dict.fromkeys(("case", "patient", "site", "class"), str),
                keep_default_na=False, na_values={"case": [""], "patient": [""], "value": ["", "nan"]},
            )  # fmt: skip
            labels = {"method": run.method, "dataset": run.dataset, "source": run.source, "seed": run.seed}
            part = part[part["case"].notna()]  # under dcam numbers of sites follow those of the cases
            found.append(part.rename(columns={"site": "target"}).assign(**labels, ratio=run.ratio, split=split))
    return found


def _own_split(run: Run) -> str:
    """Return what the source's evaluated cases are in the training."""
    folds = read_json(run.folds) if run.folds and run.folds.is_file() else []
    return TRAINING if folds and folds[0].get(splits.VALIDATES_ON) == splits.TRAINING else VALIDATION


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
        sites = sorted(part.loc[~part["target"].isin(UNSEEN_AVERAGES), "target"].unique())
        # the pooled mean stands where a paper prints it
        targets = [*sites, *UNSEEN_AVERAGES[: 1 + (AVERAGES.get(study.protocol) == UNSEEN_AVERAGES[1])]]
        heading = ["source", "method", *targets]
        if gains is not None:
            heading.append(f"difference to {study.baseline} [95 %]")
        seen = TRAINING in set(part["split"])
        brackets = "the source's labelled training cases" if seen else "the source's held-out cases"
        shown = Printed(_title(data, ratio), heading, [], [], brackets)
        for source, own in part.groupby("source", sort=False):
            for method, values in own.groupby("method", sort=False):
                row = [str(source), str(method), *(cell(values.set_index("target"), target) for target in targets)]
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
    elif data.prepare and data.made:
        parts.append("made images")
    return ", ".join(parts)


def _gain(gains: pandas.DataFrame, dataset: str, ratio: Any, source: str, method: str) -> str:
    own = gains[(gains["dataset"] == dataset) & (gains["source"] == source) & (gains["method"] == method)]
    own = own[own["ratio"].isna() if ratio is None or ratio != ratio else own["ratio"] == ratio]
    if own.empty:
        return "-"
    return gain_text(own.iloc[0].to_dict())


def markdown(table: pandas.DataFrame, study: Study, metric: str | None = None) -> str:
    """Return the matrix as markdown; brackets mark the source's own cases."""
    parts = []
    for one in printed(table, study, metric):
        lines = [one.heading, ["---", "---", *["---:"] * (len(one.heading) - 2)], *one.rows]
        text = f"### {one.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
        text += f"\nIn brackets: {one.brackets}.\n"
        parts.append(text + "".join(f"\n- {note}" for note in one.notes) + ("\n" if one.notes else ""))
    return "\n".join(parts)


def seldom(tasks: Sequence[Task], study: Study, out: Path, seconds: float = 60.0) -> Callable[[Task], None]:
    """Return what writes results behind an evaluation, unless it has done so a short time ago: many take seconds."""
    due = 0.0

    def write(task: Task) -> None:
        nonlocal due
        if task.kind == "evaluate" and time.monotonic() >= due:
            write_results(tasks, study, out)
            due = time.monotonic() + seconds

    return write


def write_results(tasks: Sequence[Task], study: Study, out: Path) -> pandas.DataFrame:
    """Write ``results.csv``, ``results.json`` and ``results.md`` from what is finished; return the tidy table."""
    table = collect(tasks)
    write_bytes(out / "results.csv", table.to_csv(index=False, lineterminator="\n").encode())
    if len(table):
        content = {
            "format": FORMAT,
            "study": study.name,
            "budget": study.budget.words(),
            "protocol": study.protocol,
            "metric": study.metric,
            "baseline": study.baseline,
            "datasets": {data.name: _title(data, None) for data in study.datasets},
            "matrix": records(matrix(table, study.metric)),
            "differences": records(differences(table, study.baseline, study.metric)) if study.baseline else [],
            "published": [entry for data in study.datasets for entry in _published(study, data)],
            "runs": _runs(tasks, out),
            "values": records(table),
        }
        write_json(out / FILE, content)
        write_bytes(out / "results.md", markdown(table, study).encode())
    return table


def _published(study: Study, data: Data) -> Iterator[dict[str, Any]]:
    """Yield what papers report for the sources of a collection, where that compares with ours."""
    for source in data.sources:
        rows, notes = published_rows(study, data, source)
        for title, targets in rows.items():
            yield {"dataset": data.name, "source": source, "title": title, "targets": targets, "notes": notes}


def _runs(tasks: Sequence[Task], out: Path) -> list[dict[str, Any]]:
    """Return where each finished run's files lie, relative to the study's folder, and its tasks' seconds by kind."""
    state = State(out)
    seconds: dict[Path, dict[str, float]] = {}
    for task in tasks:
        if task.run and (spent := state.seconds(task)) is not None:
            kinds = seconds.setdefault(task.run.folder, {})
            kind = task.kind.split()[0]
            kinds[kind] = kinds.get(kind, 0.0) + spent
    found = []
    for run in {task.run.folder: task.run for task in tasks if task.run and task.run.folder in seconds}.values():
        places = {"predictions": run.predictions, "raw": run.raw}
        paths: dict[str, Any] = {name: os.path.relpath(path, out) for name, path in places.items() if path}
        paths["folds"] = [os.path.relpath(path, out) for path in run.stages]
        named = {"method": run.method, "dataset": run.dataset, "source": run.source, "ratio": run.ratio}
        found.append({**named, "seed": run.seed, "bound": run.bound, **paths, "seconds": seconds[run.folder]})
    return found
