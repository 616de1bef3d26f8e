"""Published numbers for the rows of a study's tables, where data and protocol are the paper's own."""

from __future__ import annotations

from dataset_conversion._registry import load_converter
from nnunet_dgplugins.evaluation.published import UNITS, published
from nnunet_dgplugins.study.definition import Data, Study

#: protocol -> the average over unseen sites that its paper prints
AVERAGES = {"desam": "pooled unseen", "samsdg": "mean unseen"}


def comparable(study: Study, data: Data) -> bool:
    """Whether papers' numbers may stand beside those of a collection.

    They may where the protocol is a paper's own and the images are the public download: not made by a command of the
    study, not simulated, nothing left out of it by an option, all labels used.
    """
    return (
        study.protocol in AVERAGES
        and data.prepare is None
        and not data.ratios
        and not data.options
        and not load_converter(data.convert).FACTS.simulated
    )


def published_rows(study: Study, data: Data, source: str) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return what papers report for one source site of a collection.

    Returns:
        Row title -> target (a site, or the protocol's average of :data:`AVERAGES`) -> Dice as a fraction, and the
        caveats of these numbers, each with its citation.
    """
    if not comparable(study, data):
        return {}, []
    table = published(load_converter(data.convert).FACTS.name, study.protocol)
    chosen = table[(table["metric"] == "dice") & (table["source"] == source) & (table["target"] != "")]
    rows: dict[str, dict[str, float]] = {}
    notes: dict[str, None] = {}
    for line in chosen.to_dict("records"):
        target = AVERAGES[study.protocol] if line["target"] == "mean" else str(line["target"])
        rows.setdefault(_title(line), {})[target] = float(line["value"]) / UNITS[line["unit"]]
        notes[f"{line['where']}: {line['caveat'] or 'no caveat known'}."] = None
    return rows, list(notes)


def _title(line: dict[str, str]) -> str:
    parts = [line["method"], line["setting"], line["table"]]
    return f"{', '.join(part for part in parts if part)} (published)"
