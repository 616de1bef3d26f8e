"""Zero-shot Dice of promptable models on real slices, from one centre point and from the true box.

    python scripts/evaluate_vit_tiny.py                                   the shipped vit_tiny and the simple rules
    python scripts/evaluate_vit_tiny.py --model trained=vit_tiny --model random=vit_tiny:random.safetensors
    python scripts/evaluate_vit_tiny.py --csv objects.csv --markdown table.md --pictures pictures/

One object is the largest connected part of one label in one axial slice, at least 30 pixels large. The point is the
object's pixel farthest from its border; of SAM's three masks the one with the highest predicted IoU counts (``best of
3`` is the one with the highest Dice, which only an oracle knows). From the box SAM gives one mask. The rules see the
same prompt: see ``zero_shot_methods.py``; the images: ``zero_shot_data.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from tqdm import tqdm
from zero_shot_data import MOST_SLICES, SOURCES, Mask, Object, Slice, find_scans, read_slices
from zero_shot_methods import BOX_RULES, POINT_RULES, Answers, Sam, centre_point, dice, true_box

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import write_bytes

ROOT = Path(__file__).resolve().parent.parent
ORACLE = ", best of 3"
PROMPTS = {"point": "One centre point", "box": "True box"}


@dataclass(frozen=True)
class Outcome:
    """One object, its prompts, and every method's mask for each prompt."""

    place: Slice
    thing: Object
    point: tuple[int, int]
    box: tuple[int, int, int, int]
    by_point: dict[str, Mask]
    by_box: dict[str, Mask]
    scores: dict[tuple[str, str], float]


def outcomes(place: Slice, models: dict[str, Sam]) -> list[Outcome]:
    """Segment all objects of one slice by every model and every rule."""
    points = [centre_point(thing.mask) for thing in place.objects]
    boxes = [true_box(thing.mask) for thing in place.objects]
    answers = {label: sam(place.image, np.array(points), np.array(boxes)) for label, sam in models.items()}
    found = []
    for i, (thing, point, box) in enumerate(zip(place.objects, points, boxes, strict=True)):
        by_point, by_box, scores = _of_models(answers, i, thing.mask)
        by_point |= {name: rule(place.image, point) for name, rule in POINT_RULES.items()}
        by_box |= {name: rule(place.image, box) for name, rule in BOX_RULES.items()}
        found.append(Outcome(place, thing, point, box, by_point, by_box, scores))
    return found


def _of_models(
    answers: dict[str, Answers], i: int, truth: Mask
) -> tuple[dict[str, Mask], dict[str, Mask], dict[tuple[str, str], float]]:
    by_point, by_box, scores = {}, {}, {}
    for label, answer in answers.items():
        chosen = int(answer.point_scores[i].argmax())
        best = max(range(3), key=lambda k: dice(truth, answer.point_masks[i, k]))
        by_point[label] = answer.point_masks[i, chosen]
        by_point[label + ORACLE] = answer.point_masks[i, best]
        by_box[label] = answer.box_masks[i]
        scores[label, "point"] = float(answer.point_scores[i, chosen])
        scores[label + ORACLE, "point"] = float(answer.point_scores[i, best])
        scores[label, "box"] = float(answer.box_scores[i])
    return by_point, by_box, scores


def as_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Return one line of the CSV per prompt and method."""
    place, thing = outcome.place, outcome.thing
    return [
        {
            "source": place.source,
            "row": thing.row,
            "scan": place.scan,
            "slice": place.index,
            "label": thing.label,
            "pixels": int(thing.mask.sum()),
            "prompt": prompt,
            "method": method,
            "dice": dice(thing.mask, mask),
            "predicted_iou": outcome.scores.get((method, prompt), float("nan")),
        }
        for prompt, masks in (("point", outcome.by_point), ("box", outcome.by_box))
        for method, mask in masks.items()
    ]


def summary(table: pd.DataFrame, prompt: str) -> pd.DataFrame:
    """Return mean Dice: a line per row, a line per source (its rows weigh equally), and the mean of the sources.

    Returns:
        Index (source, row); columns ``n`` (objects; empty for means) and one per method, in the order they were run.
    """
    chosen = table[table["prompt"] == prompt]
    methods = list(dict.fromkeys(chosen["method"]))
    grouped = chosen.groupby(["source", "row", "method"], sort=False)["dice"].agg(["mean", "size"])
    means = grouped["mean"].unstack("method", sort=False)[methods]
    means.insert(0, "n", grouped["size"].unstack("method", sort=False)[methods[0]])
    parts, of_sources = [], []
    for source in dict.fromkeys(chosen["source"]):
        rows = means.loc[[source]]
        own = rows[methods].mean()
        of_sources.append(own)
        parts += [rows, _line(source, "mean of rows", own)] if len(rows) > 1 else [rows]
    return pd.concat([*parts, _line("mean of sources", "", pd.concat(of_sources, axis=1).mean(axis=1))])


def _line(source: str, row: str, values: pd.Series) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples([(source, row)], names=["source", "row"])
    return pd.DataFrame([{"n": float("nan"), **values.to_dict()}], index=index)


def _cells(line: pd.Series) -> list[str]:
    count = "" if np.isnan(line["n"]) else str(int(line["n"]))
    return [count, *(f"{value:.3f}" for value in line.iloc[1:])]


def markdown(result: pd.DataFrame) -> str:
    """Return the summary as a markdown table; means are bold."""
    lines = [f"| source | object | {' | '.join(result.columns)} |", "|---|---|" + "---:|" * len(result.columns)]
    for (source, row), line in result.iterrows():
        cells = [source, row, *_cells(line)]
        if np.isnan(line["n"]):
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show(result: pd.DataFrame, title: str) -> None:
    """Print the summary."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for heading in ("source", "object"):
        shown.add_column(heading, no_wrap=True)
    for heading in result.columns:
        shown.add_column(heading, justify="right")
    previous = ""
    for (source, row), line in result.iterrows():
        shown.add_row(
            source if source != previous else "", row, *_cells(line), style="bold" if np.isnan(line["n"]) else ""
        )
        previous = source
    # a pipe has no width of its own, and a folded table cannot be read
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def parse_models(given: Sequence[str]) -> dict[str, str]:
    """Return label -> model of ``[LABEL=]NAME[:FILE]``.

    Raises:
        UserError: two models share a label.
    """
    from nnunet_dgplugins.sam.models import get_model

    models: dict[str, str] = {}
    for text in given:
        label, equals, name = text.partition("=")
        if not equals or ":" in label or os.sep in label:  # no label: the sign belongs to a file's name
            label, name = get_model(text).label, text
        if label in models:
            raise UserError(f"--model: two models are called '{label}'. Give labels: --model trained=vit_tiny.")
        models[label] = name
    return models


def evaluate(slices: Sequence[Slice], models: dict[str, Sam], keep: set[tuple[int, int]]) -> tuple[Any, list[Outcome]]:
    """Segment everything.

    Args:
        slices: of :func:`zero_shot_data.read_slices`.
        models: label -> model; may be empty.
        keep: (slice, object) whose masks are wanted for pictures.

    Returns:
        The table of all objects, and the outcomes to keep.
    """
    rows, kept = [], []
    for i, place in enumerate(tqdm(slices, desc="slices", unit="slice", disable=None)):
        for j, outcome in enumerate(outcomes(place, models)):
            rows += as_rows(outcome)
            if (i, j) in keep:
                kept.append(outcome)
    return pd.DataFrame(rows), kept


@click.command()
@click.option("--model", "given", multiple=True, default=["vit_tiny"], show_default=True, metavar="[LABEL=]NAME[:FILE]",
              help="Model to evaluate; may be repeated.")  # fmt: skip
@click.option("--baselines-only", is_flag=True, help="Only the simple rules, which need no weights.")
@click.option("--data", type=click.Path(path_type=Path), envvar="DGPLUGINS_SAMPLE_DATA", show_envvar=True,
              default=ROOT / "tests" / "sample_data", help="Folder with the real images.")  # fmt: skip
@click.option("--only", multiple=True, type=click.Choice(list(SOURCES)), help="Source to use; may be repeated.")
@click.option("--most", default=MOST_SLICES, show_default=True, type=click.IntRange(1), help="Slices per row.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write every object here.")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), help="Write the tables here.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Write one picture per source into this folder.")
def command(
    given: tuple[str, ...],
    baselines_only: bool,
    data: Path,
    only: tuple[str, ...],
    most: int,
    csv_file: Path | None,
    markdown_file: Path | None,
    pictures: Path | None,
) -> None:
    """Zero-shot Dice on real slices: one centre point, and the true box."""
    from zero_shot_pictures import pick_examples, write_pictures

    scans = find_scans(data, only)
    models = {} if baselines_only else {label: Sam.load(name) for label, name in parse_models(given).items()}
    slices = read_slices(scans, most, partial(tqdm, desc="reading", unit="volume", disable=None))
    table, kept = evaluate(slices, models, pick_examples(slices) if pictures else set())
    texts = []
    for prompt, title in PROMPTS.items():
        result = summary(table, prompt)
        show(result, f"{title}: Dice, mean over objects")
        texts.append(f"{title}: Dice, mean over n objects\n\n{markdown(result)}")
    if csv_file:
        write_bytes(csv_file, table.to_csv(index=False, float_format="%.4f").encode())
    if markdown_file:
        write_bytes(markdown_file, "\n".join(texts).encode())
    if pictures:
        write_pictures(kept, list(models), pictures)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; errors a user can cause end in one message and exit code 1."""
    try:
        command.main(args=arguments)
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
