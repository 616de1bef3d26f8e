"""``dgplugins import-checkpoint``."""

from __future__ import annotations

from pathlib import Path

import click

from nnunet_dgplugins.cli.options import configuration_option, plans_option, trainer_option


@click.command("import-checkpoint")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dataset", required=True, help="Planned dataset whose geometry and label the model takes over.")
@trainer_option
@plans_option
@configuration_option
@click.option("--fold", type=int, default=0, show_default=True, help="Fold folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace a model that is there.")
def command(
    checkpoint: Path, dataset: str, trainer: str, plans: str, configuration: str, fold: int, overwrite: bool
) -> None:
    """Make a model folder from an official DeSAM CHECKPOINT (desam_model_best.pth), ready for nnUNetv2_predict."""
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.registry import TRAINERS

    if (method := TRAINERS[trainer].method) != "DeSAM":
        raise UserError(f"{method} models cannot be imported yet; official checkpoints of DeSAM can.")
    from nnunet_dgplugins.trainers.deployed import import_desam

    folder = import_desam(checkpoint, dataset, trainer, plans, configuration, fold, overwrite)
    click.echo(f"Made {folder}")
    click.echo(
        f"Predict: nnUNetv2_predict -d {dataset} -i IMAGES -o OUT -c {configuration} -p {plans} -f {fold} -tr {trainer}"
    )
