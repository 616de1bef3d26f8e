"""``dgplugins import-checkpoint``."""

from __future__ import annotations

from pathlib import Path

import click

from nnunet_dgplugins.cli.options import configuration_option, plans_option, trainer_option

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("import-checkpoint")
@click.argument("checkpoint", type=_FILE)
@click.option("--dataset", help="Planned dataset whose geometry and labels the model takes over.")
@trainer_option
@plans_option
@configuration_option
@click.option("--fold", type=int, default=0, show_default=True, help="Fold folder to write.")
@click.option("--second", type=_FILE, help="EPL: the other of the two released networks.")
@click.option("--spacing", type=click.FloatRange(min=0, min_open=True), help="EPL: in-plane spacing in mm.")
@click.option("--overwrite", is_flag=True, help="Replace a model that is there.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="D-CAM: .safetensors file to write.")
def command(
    checkpoint: Path,
    dataset: str | None,
    trainer: str,
    plans: str,
    configuration: str,
    fold: int,
    second: Path | None,
    spacing: float | None,
    overwrite: bool,
    out: Path | None,
) -> None:
    """Make a model folder from an official CHECKPOINT, ready for nnUNetv2_predict.

    CHECKPOINT is desam_model_best.pth of DeSAM, or one of EPL's two networks, saved as a state dict. With -o it is the
    public MXNet .params file of ResNet-38, whose tensors become start weights of D-CAM's stage 1 (start_weights takes
    either file).
    """
    if out is not None:
        if out.suffix != ".safetensors" or dataset or second or spacing:
            raise click.UsageError("-o takes a .safetensors file and goes with no other option.")
        from nnunet_dgplugins.methods.dcam.mxnet_params import convert_params

        click.echo(f"{convert_params(checkpoint, out)} tensors in {out}.")
        return
    if dataset is None:
        raise click.UsageError("Missing option '--dataset'.")
    from nnunet_dgplugins.registry import TRAINERS
    from nnunet_dgplugins.trainers.imported import Destination, import_desam, import_epl

    to = Destination(dataset, trainer, plans, configuration, fold, overwrite)
    if TRAINERS[trainer].method == "EPL":
        folder = import_epl(checkpoint, second, to, spacing)
    elif second or spacing:
        raise click.UsageError("--second and --spacing are for EPL's released networks (-tr EPLTrainer).")
    else:
        folder = import_desam(checkpoint, to)
    click.echo(f"Made {folder}")
    click.echo(
        f"Predict: nnUNetv2_predict -d {dataset} -i IMAGES -o OUT -c {configuration} -p {plans} -f {fold} -tr {trainer}"
    )
    if second:
        click.echo(f"Both networks: dgplugins second-fold {folder} -f {fold}, then predict with -f {fold} {100 + fold}")
