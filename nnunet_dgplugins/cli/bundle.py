"""``dgplugins bundle``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("bundle")
@click.argument("model_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-chk", "checkpoint", default="checkpoint_final.pth", show_default=True, help="Checkpoint of each fold.")
def command(model_folder: Path, checkpoint: str) -> None:
    """Write the frozen SAM weights (half precision) into the checkpoints of MODEL_FOLDER.

    nnUNetv2_export_model_to_zip then carries everything; the receiver needs no SAM file.
    """
    from nnunet_dgplugins.trainers.deployed import bundle

    bundle(model_folder, checkpoint, click.echo)
