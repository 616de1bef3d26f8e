"""What a report shows of single cases: which to look at first, pictures of some, maps of tags, learning curves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation import dcam_protocol
from nnunet_dgplugins.evaluation.comparison import UNSEEN
from nnunet_dgplugins.evaluation.doubt import read_doubt
from nnunet_dgplugins.evaluation.overlay import overlay_png
from nnunet_dgplugins.evaluation.report import figures
from nnunet_dgplugins.evaluation.report.content import Entry, Report
from nnunet_dgplugins.evaluation.report.parts import Block, Picture, Section, Table, embedded
from nnunet_dgplugins.evaluation.report.sections import metric_of

if TYPE_CHECKING:
    import pandas

FIRST = 10  # cases in a list
_DPI, _QUALITY = 80, 80  # of a picture, 6 inches wide


def views(report: Report) -> list[Section]:
    """Return the sections of cases, maps and curves."""
    return [_look_first(report), _cases(report), _panels(report), _curves(report)]


def case_values(report: Report, entry: Entry) -> pandas.DataFrame:
    """Return columns ``case``, ``target``, ``value`` of an entry's cases, the report's metric over classes."""
    table = report.compared
    own = table[
        (table["method"] == entry.method) & (table["dataset"] == entry.dataset) & (table["source"] == entry.source)
        & (table["seed"] == entry.seed) & (table["split"] == UNSEEN)
    ]  # fmt: skip
    own = own[own["ratio"].isna() if entry.ratio is None else own["ratio"] == entry.ratio]
    keys = ["case", "target"]
    if own.empty:
        return own.reindex(columns=[*keys, "value"])
    if report.metric in dcam_protocol.METRICS:
        counts = dcam_protocol.counts_of(own, [*keys, "class"])
        found = counts.groupby(level=keys, sort=False)[list(counts.columns)].apply(
            lambda part: float(dcam_protocol.score(part.to_numpy(), report.metric))
        )
        return found.rename("value").reset_index()
    return own[own["metric"] == report.metric].groupby(keys, sort=False)["value"].mean().reset_index()


def first_entries(report: Report) -> Iterator[Entry]:
    """Yield one entry per dataset and method: the first source and seed, whose cases are shown."""
    seen = set()
    for entry in report.entries:
        if (entry.dataset, entry.method) not in seen:
            seen.add((entry.dataset, entry.method))
            yield entry


# ---------------------------------------------------------------- lists


def _look_first(report: Report) -> Section:
    tables = []
    for entry in first_entries(report):
        values = case_values(report, entry).set_index("case")
        if entry.doubt is None or values.empty:
            continue
        rows = []
        for place, item in enumerate(read_doubt(entry.doubt)[:FIRST], 1):
            value = f"{values['value'].get(item.case, float('nan')):.3f}".replace("nan", "-")
            slice_number = "-" if item.worst_slice is None else str(item.worst_slice + 1)
            site = str(values["target"].get(item.case, "-"))
            rows.append([str(place), item.case, site, f"{item.doubt:.3f}", slice_number, value])
        heading = ["", "case", "site", "doubt", "most doubtful slice", metric_of(report).title]
        tables.append(Table(f"{_named(entry)}: the model's own doubt, highest first", heading, rows, 3))
    lowest = _lowest(report)
    texts = []
    if tables or lowest:
        texts = [
            "The first lists need no truth: the model says how unsure it is."
            if tables
            else "No model has been asked for its doubt (dgplugins evaluate --model): these are the worst numbers."
        ]
    return Section("first", "Look at these first", texts, [Block(tables=[*tables, *lowest])] if texts else [])


def _lowest(report: Report) -> list[Table]:
    """Return a table per dataset: the cases that all methods together do worst on."""
    import pandas

    tables = []
    for dataset in dict.fromkeys(entry.dataset for entry in report.entries):
        entries = [entry for entry in first_entries(report) if entry.dataset == dataset]
        alike = [entry for entry in entries if _where(entry) == _where(entries[0])]  # unfinished studies lack some
        columns = {entry.method: case_values(report, entry).set_index(["case", "target"])["value"] for entry in alike}
        wide = pandas.DataFrame(columns)
        if wide.empty:
            continue
        higher = metric_of(report).better != "lower"
        order = wide.mean(axis=1).sort_values(ascending=higher).index[:FIRST]
        rows = [[str(case), str(site), *(_number(value) for value in wide.loc[(case, site)])] for case, site in order]
        caption = f"{report.collections.get(dataset, dataset)}: worst on average over the methods, {_where(alike[0])}"
        tables.append(Table(caption, ["case", "site", *wide.columns], rows, 2))
    return tables


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


# ---------------------------------------------------------------- pictures


def _cases(report: Report) -> Section:
    blocks, texts = [], []
    for entry in first_entries(report) if report.protocol != "samsdg" else ():  # a canvas is no case
        missing: list[str] = []
        pictures = list(_overlays(report, entry, missing))
        if pictures:
            blocks.append(Block(figures=pictures, folded=f"{_named(entry)}: {len(pictures)} cases"))
        if missing:
            reasons = ", ".join(f"{missing.count(reason)} {reason}" for reason in dict.fromkeys(missing))
            texts.append(f"{_named(entry)}: cases without a picture: {reasons}.")
    if blocks:
        texts.insert(
            0, f"Best, median and worst case of each {report.kind} site, the slice with most of the organ: truth blue, "
            "prediction orange and dashed. Of the first source and seed of each method.",
        )  # fmt: skip
    return Section("cases", "Cases", texts, blocks)


def _overlays(report: Report, entry: Entry, missing: list[str]) -> Iterator[Picture]:
    """Yield the pictures of an entry's best, median and worst case per site; note why others are missing."""
    values = case_values(report, entry).dropna()
    higher = metric_of(report).better != "lower"
    with tempfile.TemporaryDirectory() as folder:
        for site, own in values.groupby("target", sort=True):
            ordered = own.sort_values("value", ascending=not higher, kind="stable").reset_index(drop=True)
            last = len(ordered) - 1
            places = {"median": len(ordered) // 2, "worst": last, "best": 0}  # of few cases the later name wins
            shown = {place: rank for rank, place in places.items()}
            for place, rank in sorted(shown.items()):
                case, value = ordered.loc[place, ["case", "value"]]
                name = f"{case}{entry.file_ending}"
                image = _image(entry, str(case))
                if not (entry.predictions and entry.labels and (entry.predictions / name).is_file()):
                    missing.append("whose prediction is not in its folder")
                    continue
                if image is None:
                    missing.append("whose image is not where the dataset has its images")
                    continue
                try:
                    png = overlay_png(
                        image, entry.labels / name, entry.predictions / name, Path(folder) / "one.png",
                        ignore=entry.ignore, dpi=_DPI,
                    )  # fmt: skip
                except UserError:
                    missing.append("whose image or truth cannot be read or has another grid than the prediction")
                    continue
                title = metric_of(report).title
                text = ", ".join(part for part in (f"{site}: {case}", rank, f"{title} {value:.3f}") if part)
                alt = f"Slice of {case} ({site}) with the contours of truth and of the prediction by {entry.method}, {title} {value:.3f}."  # noqa: E501
                yield Picture(_small(png), alt, text, narrow=True)


def _small(png: Path) -> str:
    """Return a picture's address, an eighth of its size: a page may hold hundreds."""
    import io

    from PIL import Image

    out = io.BytesIO()
    with Image.open(png) as image:
        image.convert("RGB").save(out, "WEBP", quality=_QUALITY)
    return embedded(out.getvalue(), "webp")


def _image(entry: Entry, case: str) -> Path | None:
    """Return the first channel of a case; None where it is in none of the folders."""
    names = (folder / f"{case}_0000{entry.file_ending}" for folder in entry.images)
    return next((path for path in names if path.is_file()), None)


def _panels(report: Report) -> Section:
    blocks = []
    for entry in first_entries(report):
        alt = "Rows of training images, class activation maps and pseudo labels, and the truth where it is known."
        shown = (entry.panels, f"What {entry.method} learnt from."), (entry.drawn, f"Drawn by {entry.method}.")
        pictures = [
            Picture(embedded(path.read_bytes(), "png"), alt, caption) for path, caption in shown if path is not None
        ]
        if pictures:
            blocks.append(Block(figures=pictures, folded=f"{_named(entry)}: maps and pseudo labels"))
    return Section("maps", "Maps and pseudo labels", [], blocks)


def _curves(report: Report) -> Section:
    blocks = []
    for dataset in dict.fromkeys(entry.dataset for entry in report.entries):
        found: dict[str, list] = {}
        for entry in report.entries:
            if entry.dataset == dataset and entry.curves:
                found.setdefault(entry.method, []).append(entry.curves)
        if found:
            methods = [*report.methods, *(name for name in found if name not in report.methods)]
            svg = embedded(figures.curves(found, methods), "svg+xml")
            alt = f"Learning curves on {dataset}: losses and the score while training, a line per training, of {', '.join(found)}."  # noqa: E501
            caption = "Loss in training (solid) and validation (dashed); nnU-Net's smoothed online score on the source's own cases."  # noqa: E501
            blocks.append(Block(report.collections.get(dataset, dataset), figures=[Picture(svg, alt, caption)]))
    return Section("curves", "Learning curves", [], blocks)


def _named(entry: Entry) -> str:
    return f"{entry.dataset}, {entry.method}, {_where(entry)}"


def _where(entry: Entry) -> str:
    ratio = "" if entry.ratio is None else f", {entry.ratio:g} of the labels"
    return f"trained on {entry.source}{ratio}, seed {entry.seed}"
