"""``dgplugins pseudo-labels``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("pseudo-labels")
@click.argument("model_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", "number", type=click.IntRange(1, 999), required=True, help="Id of the new dataset.")
@click.option("-f", "fold", default="0", show_default=True, help="Trained fold, a number or all.")
@click.option("-chk", "checkpoint", default="checkpoint_final.pth", show_default=True, help="Checkpoint of the fold.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Of the map; D-CAM: below it is background, where that is a class. [default: the model's]",
)
@click.option("--fusion", metavar="mean|max|N", help="(equivariant) One map of all modalities'. [default: the model's]")
@click.option(
    "--gate",
    type=click.Choice(["tag", "predicted", "none"]),
    help="(equivariant) tag: slices known to be negative stay empty; in positive ones networks that call the slice "
    "negative do not count, unless all do. predicted: such a network's map is empty. none: every map counts. "
    "[default: tag]",
)
@click.option(
    "--map",
    "kind",
    type=click.Choice(["cam", "grad_cam", "grad_cam_plus_plus"]),
    help="(equivariant) Class activation map, or one by gradients. [default: cam]",
)
@click.option("--white/--no-white", default=None, help="(D-CAM) Leave white pixels out. [default: as the model's]")
@click.option("--overwrite", is_flag=True, help="Replace a dataset made from another model or by other choices.")
@click.option("--link/--copy", default=True, show_default=True, help="Link the images, or copy them.")
@click.option("--device", help="Where the network runs. [default: CUDA if there is one]")
def command(
    model_folder: Path,
    number: int,
    fold: str,
    checkpoint: str,
    threshold: float | None,
    fusion: str | None,
    gate: str | None,
    kind: str | None,
    white: bool | None,
    overwrite: bool,
    link: bool,
    device: str | None,
) -> None:
    """Write the masks that MODEL_FOLDER draws on its training cases as an ordinary nnU-Net dataset.

    The model is one of EquivariantCAMTrainer or DCAMClassifierTrainer; options of the other are refused. Any trainer
    plans, trains and predicts on the new dataset. A page of examples (pseudo_labels.png) lies in it.
    """
    from nnunet_dgplugins.trainers.label_drawer import Choices
    from nnunet_dgplugins.trainers.pseudo_labels import make_pseudo_labels

    folder = make_pseudo_labels(
        model_folder, number, fold, checkpoint, Choices(threshold, fusion, gate, kind, white), link, overwrite, device,
        click.echo,
    )  # fmt: skip
    click.echo(f"Wrote {folder}\nNext: nnUNetv2_plan_and_preprocess -d {number} -c 2d --verify_dataset_integrity")
