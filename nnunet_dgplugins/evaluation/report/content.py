"""What a report is made of, whether it comes from a study or from folders of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_dgplugins.evaluation.comparison import TABLE_METRICS, TRAINING, UNSEEN, VALIDATION, told_apart
from nnunet_dgplugins.evaluation.doubt import FILE as DOUBT
from nnunet_dgplugins.evaluation.evaluate import Evaluation
from nnunet_dgplugins.evaluation.tables import source_name

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Costs:
    """What one training and its prediction took; None where it is not known.

    Args:
        minutes: of training steps and online validation.
        prediction_seconds: of the unseen cases, with loading and writing.
        memory: highest of the training process, bytes.
        gpu_memory: highest allocated, bytes.
        disk: of the trained fold, bytes.
    """

    minutes: float | None = None
    prediction_seconds: float | None = None
    memory: float | None = None
    gpu_memory: float | None = None
    disk: float | None = None


@dataclass(frozen=True)
class Entry:
    """One training, or one folder of predictions.

    Args:
        method: as the tables call it.
        dataset: collection.
        source: site trained on.
        ratio: labelled share, None for all.
        seed: of the training.
        predictions: label maps of the unseen cases.
        labels: their truth.
        images: folders to look for their images in.
        file_ending: of all three.
        ignore: value of the labels that means "not annotated".
        panels: page of maps and pseudo labels that the method learnt from, where there is one.
        drawn: the same of those that it drew for another method.
        curves: name -> a value per epoch.
        settings: of the trainer, where it is one of this package.
        costs: what it took.
    """

    method: str
    dataset: str
    source: str
    ratio: float | None
    seed: int
    predictions: Path | None = None
    labels: Path | None = None
    images: Sequence[Path] = ()
    file_ending: str = ""
    ignore: int | None = None
    panels: Path | None = None
    drawn: Path | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    costs: Costs = Costs()

    @property
    def doubt(self) -> Path | None:
        """The folder whose cases the method doubts to a known degree; None where it has not been asked."""
        return self.predictions if self.predictions and (self.predictions / DOUBT).is_file() else None


@dataclass(frozen=True)
class Published:
    """A row of a paper's table that compares with ours, for the table of one collection and source."""

    dataset: str
    source: str
    title: str
    targets: Mapping[str, float]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """Everything a page shows.

    Args:
        title: heading.
        table: tidy, columns of :mod:`~nnunet_dgplugins.evaluation.comparison`.
        protocol: of ``dgplugins evaluate``.
        entries: in the order in which methods are shown.
        metric: of the tables and figures.
        baseline: method that the others are compared with; None: no comparison.
        bounds: methods that were given what no user has; never called the best.
        collections: name of each dataset -> how it is titled, which says where images are made or simulated.
        budget: of each training, in words.
        published: rows of papers.
        notes: what a reader has to know, a sentence each.
    """

    title: str
    table: pandas.DataFrame
    protocol: str
    entries: Sequence[Entry]
    metric: str
    baseline: str | None = None
    bounds: Sequence[str] = ()
    collections: Mapping[str, str] = field(default_factory=dict)
    budget: str = ""
    published: Sequence[Published] = ()
    notes: Sequence[str] = ()

    @property
    def methods(self) -> list[str]:
        """Names in the order of the table."""
        return [str(name) for name in self.table["method"].unique()]

    @property
    def kind(self) -> str:
        """Which cases the page shows one by one: ``unseen``, or ``seen`` where none is unseen."""
        return UNSEEN if (self.table["split"] == UNSEEN).any() else "seen"

    @property
    def compared(self) -> pandas.DataFrame:
        """The table for what compares :data:`UNSEEN` cases; where none is unseen, all pass for it."""
        return self.table if self.kind == UNSEEN else self.table.assign(split=UNSEEN)


def from_evaluations(
    results: Mapping[str, Evaluation], baseline: str | None = None, images: Path | None = None
) -> Report:
    """Return the report of one or more folders of predictions of one dataset.

    Args:
        results: name of each method -> its evaluation, all by one protocol.
        baseline: one of the names.
        images: folder of the cases' images; None takes ``imagesTs`` and then ``imagesTr`` of the dataset.
    """
    import pandas

    first = next(iter(results.values()))
    data, source = first.dataset, source_name(first)
    tables = [_tidy(result, name, source) for name, result in results.items()]
    folders = [images] if images else [data.folder / "imagesTs", data.folder / "imagesTr"]
    entries = [
        Entry(
            name,
            data.name,
            source,
            None,
            0,
            result.predictions,
            result.labels,
            folders,
            data.file_ending,
            data.classes.ignore,
        )
        for name, result in results.items()
    ]
    notes = list(dict.fromkeys(note for result in results.values() for note in result.notes))
    protocol = first.protocol
    table = told_apart(pandas.concat(tables, ignore_index=True))
    return Report(data.name, table, protocol, entries, TABLE_METRICS[protocol], baseline, notes=notes)


def _tidy(result: Evaluation, method: str, source: str) -> pandas.DataFrame:
    table, sources = result.table, result.dataset.table.sources
    # nnU-Net's own validation lies in a folder of that name
    trained = result.labels.name == "labelsTr" and result.predictions.resolve().name != "validation"
    split = table["site"].map(lambda site: (TRAINING if trained else VALIDATION) if site in sources else UNSEEN)
    labels = {"method": method, "dataset": result.dataset.name, "source": source, "ratio": None, "seed": 0}
    return table.rename(columns={"site": "target"}).assign(**labels, split=split)
