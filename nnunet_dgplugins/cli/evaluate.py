"""``dgplugins evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nnunet_dgplugins.cli.options import json_option, print_json

if TYPE_CHECKING:
    from nnunet_dgplugins.evaluation.doubt import Correlation, Doubt
    from nnunet_dgplugins.evaluation.evaluate import Dataset, Evaluation

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("evaluate")
@click.argument("dataset")
@click.argument("predictions", type=_FOLDER, required=False)
@click.option("--labels", type=_FOLDER, help="Reference labels; default: labelsTs of the dataset.")
@json_option
@click.option(
    "--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Write every value, one a line."
)
@click.option(
    "--protocol",
    type=click.Choice(["standard", "desam", "samsdg", "dcam"]),
    default="standard",
    show_default=True,
    help="Whose definition of the numbers: whole volumes in mm, or a paper's own (dcam: IoU over a site's pixels).",
)
@click.option(
    "--partial", "partial_folder", is_flag=True, help="Evaluate the cases that have both a prediction and a label."
)
@click.option("--per-case", is_flag=True, help="Print every case, however many.")
@click.option("--no-labels", is_flag=True, help="Rank the cases by the method's own doubt; labels are not needed.")
@click.option(
    "--equivariance", is_flag=True, help="How far --model's maps move with their images; takes no predictions."
)
@click.option("--model", type=_FOLDER, help="Trained model folder: ask for its doubt, keep the answer.")
@click.option("--images", type=_FOLDER, help="Images of the predictions, for --model and pictures; default: imagesTs.")
@click.option("-f", "fold", default="0", show_default=True, help="Fold of --model, a number or all.")
@click.option("-chk", "checkpoint", default="checkpoint_final.pth", show_default=True, help="Checkpoint of --model.")
@click.option("--device", help="Where --model runs. Default: cuda if there is one.")
@click.option("--overlays", type=click.Path(file_okay=False, path_type=Path), help="Write one PNG per case.")
@click.option(
    "--html", "html_file", type=click.Path(dir_okay=False, path_type=Path),
    help="Write one page of tables, charts and cases, and its numbers beside it (.csv, .json).",
)  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Processes.")
def command(
    dataset: str,
    predictions: Path | None,
    labels: Path | None,
    as_json: bool,
    csv_file: Path | None,
    protocol: str,
    partial_folder: bool,
    per_case: bool,
    no_labels: bool,
    equivariance: bool,
    model: Path | None,
    fold: str,
    checkpoint: str,
    device: str | None,
    images: Path | None,
    overlays: Path | None,
    html_file: Path | None,
    jobs: int,
) -> None:
    """Compare PREDICTIONS with the labels of DATASET: per case, class and site, in mm.

    DATASET is an id or a name; PREDICTIONS a folder written by nnUNetv2_predict.
    """
    from nnunet_dgplugins.evaluation.evaluate import Dataset, evaluate
    from nnunet_dgplugins.files import dataset_name

    if equivariance:
        others = {"PREDICTIONS": predictions, "--labels": labels, "--csv": csv_file, "--no-labels": no_labels,
                  "--partial": partial_folder, "--images": images, "--overlays": overlays,
                  "--html": html_file}  # fmt: skip
        if given := [name for name, value in others.items() if value]:
            raise click.UsageError(f"--equivariance asks the --model itself: leave out {', '.join(given)}.")
        if not model:
            raise click.UsageError("--equivariance asks a --model: name its folder.")
        if model.resolve().parent.name != dataset_name(dataset):
            raise click.UsageError(f"{model} is no model of dataset {dataset}.")
        _equivariance(model, fold, checkpoint, device, as_json)
        return
    if predictions is None:
        raise click.UsageError("Missing argument 'PREDICTIONS'.")
    if no_labels and (csv_file or overlays or html_file or protocol != "standard"):
        raise click.UsageError("--no-labels gives a ranking only: leave out --csv, --html, --overlays and --protocol.")
    if images and not (model or overlays or html_file):
        raise click.UsageError("--images is for --model, --overlays and --html: give one of them too.")
    if html_file:
        from nnunet_dgplugins.evaluation.report.page import beside

        numbers = {path.resolve() for path in beside(html_file)}
        if csv_file and csv_file.resolve() in numbers:
            raise click.UsageError(f"--html writes {csv_file} too, one value a line: leave out --csv.")
    if fold != "all" and not fold.isdigit():
        raise click.BadParameter("a number, or all", param_hint="-f")
    data = Dataset.load(dataset)
    if model:
        import contextlib
        import sys

        from nnunet_dgplugins.trainers.doubt import write_doubt

        chosen = fold if fold == "all" else int(fold)
        with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints, and --json promises nothing else
            write_doubt(model, images or data.folder / "imagesTs", predictions, chosen, checkpoint, device)
    if no_labels:
        _rank(data, predictions, labels, as_json, jobs)
        return
    result = evaluate(data, predictions, labels, protocol=protocol, partial_folder=partial_folder, jobs=jobs)
    doubts, correlation = _doubt_beside(result)
    _report(result, doubts, correlation, as_json, csv_file, per_case)
    if overlays:
        from nnunet_dgplugins.evaluation.overlay import overlay_folder

        written = overlay_folder(result, overlays, images)
        click.echo(f"{len(written)} overlays in {overlays}", err=True)
    if html_file:
        from nnunet_dgplugins.evaluation.report.content import from_evaluations
        from nnunet_dgplugins.evaluation.report.page import write_report

        written = write_report(from_evaluations({predictions.resolve().name: result}, images=images), html_file)
        click.echo("\n".join(map(str, written)), err=True)


def _equivariance(model: Path, fold: str, checkpoint: str, device: str | None, as_json: bool) -> None:
    """Print the mean difference of maps per family of transforms, before and after training."""
    from nnunet_dgplugins.evaluation.show import show_equivariance
    from nnunet_dgplugins.trainers.measure_equivariance import measure_equivariance

    found = measure_equivariance(model, fold, checkpoint, device, lambda text: click.echo(text, err=True))
    if as_json:
        print_json(found)
    else:
        show_equivariance(found)


def _report(
    result: Evaluation,
    doubts: list[Doubt],
    correlation: Correlation | None,
    as_json: bool,
    csv_file: Path | None,
    per_case: bool,
) -> None:
    from nnunet_dgplugins.evaluation import doubt, show, tables

    if csv_file:
        tables.write_csv(result, csv_file)
        click.echo(f"{len(result.table)} values in {csv_file}", err=True)
    if as_json:
        print_json(tables.to_json(result, doubt.to_json(doubts, correlation) if doubts else None))
        return
    show.show(result, all_cases=per_case)
    if doubts:
        show.show_doubt(doubts, correlation)


def _rank(data: Dataset, predictions: Path, labels: Path | None, as_json: bool, jobs: int) -> None:
    """Print the cases by doubt, and how that agrees with Dice for the cases that have labels."""
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.evaluation import doubt, show
    from nnunet_dgplugins.evaluation.evaluate import evaluate

    doubts = doubt.read_doubt(predictions)
    correlation = None
    reference = labels or data.folder / "labelsTs"
    if reference.is_dir() and data.files(reference).keys() & data.files(predictions).keys():
        try:
            result = evaluate(data, predictions, reference, partial_folder=True, jobs=jobs)
            correlation = doubt.rank_correlation(doubts, result.table)
        except UserError as error:  # the ranking stands without labels, so faulty ones must not hide it
            click.echo(f"No rank correlation with Dice, because the labels cannot be used. {error}", err=True)
    if as_json:
        print_json(doubt.to_json(doubts, correlation))
    else:
        show.show_doubt(doubts, correlation)


def _doubt_beside(result: Evaluation) -> tuple[list[Doubt], Correlation | None]:
    """Return the doubt that lies beside the predictions, if it does, and its rank correlation with Dice."""
    from nnunet_dgplugins.evaluation import doubt

    if result.protocol != "standard" or not (result.predictions / doubt.FILE).is_file():
        return [], None
    doubts = doubt.read_doubt(result.predictions)
    return doubts, doubt.rank_correlation(doubts, result.table)
