"""``dgplugins report``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import click


@click.command("report")
@click.argument("what")
@click.argument("predictions", nargs=-1)
@click.option(
    "-o", "out", type=click.Path(dir_okay=False, path_type=Path),
    help="The page; its numbers get the same name with .csv and .json. Default: report.html in the study's folder, or here.",  # noqa: E501
)  # fmt: skip
@click.option("--baseline", help="Method that the others are compared with. Default: the study's, or the first one.")
@click.option(
    "--labels", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Reference labels of PREDICTIONS; default: labelsTs of the dataset.",
)  # fmt: skip
@click.option(
    "--protocol", type=click.Choice(["standard", "desam", "samsdg", "dcam"]), default="standard", show_default=True,
    help="Whose definition of the numbers, for PREDICTIONS; a study has its own.",
)  # fmt: skip
@click.option(
    "--images", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Images of PREDICTIONS; default: imagesTs, then imagesTr of the dataset.",
)  # fmt: skip
@click.option("--partial", "partial_folder", is_flag=True, help="Take the cases that have prediction and label.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Processes.")
def command(
    what: str,
    predictions: tuple[str, ...],
    out: Path | None,
    baseline: str | None,
    labels: Path | None,
    protocol: str,
    images: Path | None,
    partial_folder: bool,
    jobs: int,
) -> None:
    """Write one HTML page that compares methods, and its numbers as CSV and JSON.

    WHAT is the folder of a study (dgplugins study --out), finished or not. Or it is a dataset, id or name, and
    PREDICTIONS are folders written by nnUNetv2_predict, each with a name: stock=out_stock DeSAM=out_desam.
    """
    from dataclasses import replace

    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.evaluation.report.page import beside, write_report

    numbers = beside(out) if out else ()
    if not predictions:
        if labels or images or partial_folder or protocol != "standard":
            raise click.UsageError("--labels, --images, --partial and --protocol are for PREDICTIONS.")
        if not Path(what).is_dir():
            raise UserError(f"{what}: no such folder of a study. For predictions, name them: {what} stock=FOLDER ...")
        from nnunet_dgplugins.study.report import read_study_results
        from nnunet_dgplugins.study.results import FILE

        own = (Path(what) / FILE).resolve()
        if {own, own.with_suffix(".csv")} & {path.resolve() for path in numbers}:
            raise UserError(f"{out}: its numbers would overwrite the study's own. Choose another name.")
        found = read_study_results(Path(what))
        out = out or Path(what) / "report.html"
    else:
        from nnunet_dgplugins.evaluation.evaluate import Dataset, evaluate
        from nnunet_dgplugins.evaluation.report.content import from_evaluations

        folders = _named(predictions)
        _known(baseline, folders)
        data = Dataset.load(what)
        results = {
            name: evaluate(data, folder, labels, protocol=protocol, partial_folder=partial_folder, jobs=jobs)
            for name, folder in folders.items()
        }
        found = from_evaluations(results, next(iter(folders)), images)
        out = out or Path("report.html")
    if baseline is not None:
        _known(baseline, found.methods)
        found = replace(found, baseline=baseline)
    for path in write_report(found, out):
        click.echo(f"{path}")


def _known(baseline: str | None, methods: Collection[str]) -> None:
    from nnunet_dgplugins.errors import UserError, nearest

    if baseline is not None and baseline not in methods:
        raise UserError(f"No method '{baseline}'{nearest(baseline, methods)}")


def _named(predictions: tuple[str, ...]) -> dict[str, Path]:
    """Return folders by name; a folder without one is named by itself."""
    found: dict[str, Path] = {}
    for item in predictions:
        name, equals, folder = item.partition("=")
        path = Path(folder if equals else item)
        name = name if equals else path.resolve().name
        if not path.is_dir():
            raise click.BadParameter(f"{path}: no such folder", param_hint="PREDICTIONS")
        if name in found:
            raise click.BadParameter(f"two are called {name}: give names, NAME=FOLDER", param_hint="PREDICTIONS")
        found[name] = path
    return found
