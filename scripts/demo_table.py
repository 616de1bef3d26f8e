"""The demo's end: one table of methods x unseen sites, and one overlay per site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.evaluation.evaluate import Dataset, Evaluation, evaluate

if TYPE_CHECKING:
    import pandas

_PATCHES = 6  # on the page
_MODEL = "__nnUNetPlans__2d"  # behind a trainer's name


@click.group()
def cli() -> None:
    """Numbers for the demo."""


@cli.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
def minutes(models: tuple[Path, ...]) -> None:
    """Print how long the epochs of fold 0 of MODELS (folders of results, without plans) took together, in minutes."""
    click.echo(f"{sum(training_minutes(Path(f'{model}{_MODEL}') / 'fold_0') for model in models):.3f}")


@cli.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def constant(dataset: str, out: Path) -> None:
    """Predict the constant mask for the unseen sites into OUT."""
    from nnunet_dgplugins.evaluation.baselines import constant_mask

    constant_mask(dataset, out)


@cli.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-tr", "trainer", required=True, help="The trainer beside stock nnU-Net.")
@click.option("--minutes", type=float, help="Training time of each trainer.")
@click.option("--iterations", type=int, help="Training steps of each trainer.")
@click.option("--more", multiple=True, help="FOLDER=LABEL of further predictions, each a row.")
def table(
    dataset: str, out: Path, trainer: str, minutes: float | None, iterations: int | None, more: tuple[str, ...]
) -> None:
    """Print one table of Dice per unseen site and write one overlay per site."""
    from nnunet_dgplugins.evaluation.baselines import constant_mask
    from nnunet_dgplugins.files import RESULTS, nnunet_folder, read_json
    from nnunet_dgplugins.registry import TRAINERS

    data = Dataset.load(dataset)
    constant = out / "predictions" / "constant mask"
    constant_mask(dataset, constant)
    models = nnunet_folder(RESULTS) / data.name
    block = read_json(models / f"{trainer}{_MODEL}" / "plans.json")["configurations"]["2d"]["dgplugins"]
    chosen, method = block[trainer], TRAINERS[trainer].method
    rows = []
    for label, name in (
        (f"{method} ({chosen['sam']})" if "sam" in chosen else method, trainer),
        *((label, name) for name, _, label in (item.partition("=") for item in more)),
        ("stock nnU-Net", "nnUNetTrainer"),
        ("constant mask", "constant mask"),
    ):
        result = evaluate(data, out / "predictions" / name)
        fold = models / f"{name}{_MODEL}" / "fold_0" / "validation"
        source = None
        if fold.is_dir():
            source = mean_dice(evaluate(data, fold, data.folder / "labelsTr", partial_folder=True).table)
        rows.append((label, source, result))
    _print(data, rows, f"{minutes:.1f} min each" if minutes else f"{iterations} steps each")
    _overlays(rows[0][2], method, out / "overlays")


@cli.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--minutes", type=float, required=True, help="Training time of each stage.")
def stages(dataset: str, out: Path, minutes: float) -> None:
    """Print Dice per test volume of maps from tags and of stock nnU-Net on their pseudo labels, and draw the cases."""
    from rich.console import Console
    from rich.table import Table

    from nnunet_dgplugins.evaluation.overlay import overlay_folder

    data = Dataset.load(dataset)
    names = {"EquivariantCAMTrainer": "maps from tags", "nnUNetTrainer": "stock nnU-Net on their pseudo labels"}
    results = {label: evaluate(data, out / "predictions" / name) for name, label in names.items()}
    title = f"Dice, mean over test volumes; slice tags only, {minutes:.1f} min for each stage"
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for heading in ("mean", "lowest", "highest"):
        shown.add_column(heading, justify="right")
    for label, result in results.items():
        dice = result.table[result.table["metric"] == "dice"]["value"]
        shown.add_row(label, *[f"{value:.3f}" for value in (dice.mean(), dice.min(), dice.max())])
    Console(width=120).print(shown)
    overlay_folder(results["maps from tags"], out / "overlays")
    click.echo(f"Overlays (truth and maps, every test volume): {out / 'overlays'}")


@cli.command()
@click.argument("dataset")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--minutes", type=float, required=True, help="Training time of stage 2 and of stock nnU-Net.")
def patches(dataset: str, out: Path, minutes: float) -> None:
    """Print the numbers over all pixels of the unseen hospital, and draw a few patches."""
    from rich.console import Console
    from rich.table import Table

    from nnunet_dgplugins.evaluation.dcam_protocol import ALL_CLASSES, METRICS, pooled
    from nnunet_dgplugins.evaluation.panels import PatchPanel, panels_png

    data = Dataset.load(dataset)
    names = {
        "DCAMClassifierTrainer": "D-CAM stage 1: maps from tags",
        "DCAMTrainer": "D-CAM stage 2",
        "nnUNetTrainer": "stock nnU-Net on the pseudo labels",
    }
    folders = {label: out / "predictions" / name for name, label in names.items()}
    results = {label: evaluate(data, folder, protocol="dcam") for label, folder in folders.items()}
    sites = sorted(set(next(iter(results.values())).table["site"]))
    shown = Table(title=f"All pixels of {', '.join(sites)}, tags of {', '.join(data.table.sources)} only; stage 2 and "
                  f"stock {minutes:.1f} min each", title_justify="left")  # fmt: skip
    classes = list(data.classes.values)
    for heading in ("", "mIoU", "FwIoU", "ACC", *(f"IoU {name}" for name in classes)):
        shown.add_column(heading, justify="right" if heading else "left")
    for label, result in results.items():
        found = pooled(result.table)
        whole = [found[ALL_CLASSES, metric] for metric in list(METRICS)[:3]]
        shown.add_row(label, *[f"{value:.3f}" for value in (*whole, *(found[name, "iou"] for name in classes))])
    Console(width=120).print(shown)
    cases = list(data.files(data.folder / "labelsTs"))
    meanings = {0: "background", **{value: name for name, (value,) in data.classes.values.items()}}
    meanings |= {data.classes.ignore: "ignore"} if data.classes.ignore is not None else {}
    rows = []
    for case in cases[:: max(1, len(cases) // _PATCHES)][:_PATCHES]:
        maps = {label: _pixels(folder / f"{case}.png") for label, folder in folders.items()}
        maps["truth"] = _pixels(data.folder / "labelsTs" / f"{case}.png")
        rows.append(PatchPanel(case, _pixels(data.folder / "imagesTs" / f"{case}_0000.png"), maps, meanings))
    panels_png(rows, out / "overlays" / "patches.png")
    click.echo(f"Patches, predictions and truth: {out / 'overlays' / 'patches.png'}")


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(path))


def training_minutes(fold: Path) -> float:
    """Return how long the epochs of a finished training took, in minutes."""
    from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

    times = read_checkpoint(fold / "checkpoint_final.pth")["logging"]
    started, ended = times["epoch_start_timestamps"], times["epoch_end_timestamps"]
    return sum(end - start for start, end in zip(started, ended, strict=True)) / 60


def trains_on_validation(data: Dataset) -> bool:
    """Return whether the dataset's only fold validates on its training cases, as few labels do."""
    from nnunet_dgplugins.data.splits import SPLITS, TRAINING, VALIDATES_ON
    from nnunet_dgplugins.files import read_json

    path = data.folder / SPLITS
    return path.is_file() and read_json(path)[0].get(VALIDATES_ON) == TRAINING


def mean_dice(table: pandas.DataFrame, site: str | None = None) -> float:
    """Return the mean Dice over the cases of an evaluation's table, of one site if given."""
    found = table[table["metric"] == "dice"]
    return float((found if site is None else found[found["site"] == site])["value"].mean())


def _print(data: Dataset, rows: list[tuple[str, float | None, Evaluation]], spent: str) -> None:
    from rich.console import Console
    from rich.table import Table

    sites = sorted(set(rows[0][2].table["site"]))
    source = ", ".join(data.table.sources)
    shown = Table(title=f"Dice, mean over cases; trained on {source} only, {spent}", title_justify="left")
    held_out = "training cases" if trains_on_validation(data) else "validation"
    for heading in ("", f"{source} ({held_out})", *sites, "mean unseen"):
        shown.add_column(heading, justify="left" if not heading else "right")
    for label, validation, result in rows:
        dice = [mean_dice(result.table, site) for site in sites]
        own = "-" if validation is None else f"{validation:.3f}"
        shown.add_row(label, own, *[f"{value:.3f}" for value in dice], f"{sum(dice) / len(dice):.3f}")
    Console(width=120).print(shown)


def _overlays(result: Evaluation, method: str, folder: Path) -> None:
    """One picture per site: the case of median Dice."""
    from nnunet_dgplugins.evaluation.overlay import overlay_png

    data, ending = result.dataset, result.dataset.file_ending
    dice = result.table[result.table["metric"] == "dice"]
    for site, cases in dice.groupby("site"):
        ordered = cases.sort_values("value")
        case, value = ordered.iloc[len(ordered) // 2][["case", "value"]]
        overlay_png(
            data.folder / "imagesTs" / f"{case}_0000{ending}",
            result.labels / f"{case}{ending}",
            result.predictions / f"{case}{ending}",
            folder / f"{site}.png",
            f"{site}: {case}, Dice {value:.2f} (median of the site)",
        )
    click.echo(f"Overlays (truth and {method}, median case of each site): {folder}")


if __name__ == "__main__":
    cli()
