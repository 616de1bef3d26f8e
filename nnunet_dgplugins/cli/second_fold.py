"""``dgplugins second-fold``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("second-fold")
@click.argument("model_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-f", "fold", type=int, default=0, show_default=True, help="Trained fold.")
@click.option("-chk", "checkpoint", default="checkpoint_final.pth", show_default=True, help="Checkpoint of the fold.")
def command(model_folder: Path, fold: int, checkpoint: str) -> None:
    """Write network 2 of an EPL model as fold 100 + FOLD of MODEL_FOLDER.

    nnUNetv2_predict then averages both networks.
    """
    from nnunet_dgplugins.trainers.second_network import OFFSET, export_second

    click.echo(f"Wrote {export_second(model_folder, fold, checkpoint)}")
    click.echo(f"Predict with both networks: nnUNetv2_predict ... -tr EPLTrainer -f {fold} {OFFSET + fold}")
