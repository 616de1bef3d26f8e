"""``dgplugins predict``."""

from __future__ import annotations

from pathlib import Path

import click

from nnunet_dgplugins.cli.options import configuration_option, known_trainer, plans_option
from nnunet_dgplugins.registry import GROUPS_SLICES


@click.command("predict")
@click.option("-d", "dataset", required=True, help="Dataset the model was trained on, id or name.")
@click.option(
    "-i", "images", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of images, named as nnU-Net wants them.",
)  # fmt: skip
@click.option("-o", "output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Output folder.")
@configuration_option
@plans_option
@click.option(
    "-tr", "trainer", default=GROUPS_SLICES, show_default=True, callback=known_trainer, help="Trainer of the model."
)
@click.option("-f", "folds", multiple=True, help="Fold, or all; several are averaged (-f 0 1 2). Default: 0.")
@click.argument("more_folds", nargs=-1, metavar="")  # the others of -f 0 1 2, as nnU-Net's commands take them
@click.option("-chk", "checkpoint", default="checkpoint_final.pth", show_default=True, help="Checkpoint of each fold.")
@click.option("--continue", "again", is_flag=True, help="Leave out cases that are in the output folder already.")
@click.option(
    "--masks", type=click.Path(exists=True, file_okay=False, path_type=Path), default=None,
    help="Folder of the cases' true masks: their boxes prompt SAM in place of the coarse network's. The upper bound "
    "of a study; of no use for cases without masks.",
)  # fmt: skip
@click.option("-device", "device", default=None, help="cuda, cpu or mps. Default: cuda if there is one.")
def command(
    dataset: str,
    images: Path,
    output: Path,
    configuration: str,
    plans: str,
    trainer: str,
    folds: tuple[str, ...],
    more_folds: tuple[str, ...],
    checkpoint: str,
    again: bool,
    masks: Path | None,
    device: str | None,
) -> None:
    """Segment images with four neighbouring slices on each of SAM's canvases, as the SAM-SDG paper does.

    A quarter of the encoder's work of nnUNetv2_predict, which can show one slice at a time only; a slice's result then
    depends on its neighbours. Geometry, preprocessing and files are the same.
    """
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.files import RESULTS, dataset_name, nnunet_folder

    if trainer != GROUPS_SLICES:
        raise UserError(
            f"{trainer} shows its network one slice or patch at a time, which nnUNetv2_predict does: use that."
        )
    if more_folds and not folds:
        raise click.UsageError(f"Got unexpected extra argument ({more_folds[0]})")
    folds = (*folds, *more_folds) or ("0",)
    if wrong := [fold for fold in folds if not (fold.isdigit() or fold == "all")]:
        raise click.BadParameter(f"'{wrong[0]}' is neither a number nor all", param_hint="-f")
    model = nnunet_folder(RESULTS) / dataset_name(dataset) / f"{trainer}__{plans}__{configuration}"
    if not model.is_dir():
        raise UserError(f"{model}: no such model. Train it: nnUNetv2_train {dataset} {configuration} 0 -tr {trainer}")

    from nnunet_dgplugins.trainers.grouped_prediction import predict_folder

    chosen = [int(fold) if fold.isdigit() else fold for fold in folds]
    predict_folder(model, images, output, chosen, checkpoint, device, not again, click.echo, masks)
