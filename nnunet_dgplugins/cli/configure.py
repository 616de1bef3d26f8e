"""``dgplugins configure``."""

from __future__ import annotations

import re
from pathlib import Path

import click

from nnunet_dgplugins.cli.options import configuration_option, plans_option, trainer_option


@click.command("configure")
@click.argument("dataset")
@trainer_option
@plans_option
@configuration_option
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="NAME=VALUE ...",
    help="Setting to change; repeat, or give several in quotes.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Planned batch size, for trainers that use it, where the machine is too small for nnU-Net's choice.",
)
@click.option(
    "--patch-size", metavar="'Y X'", help="Planned patch, likewise: 2 or 3 numbers in quotes, as in the plans."
)
@click.option(
    "--width-divisor", type=click.IntRange(1), default=1, help="Channels of the planned network over this, likewise."
)
@click.argument("more", nargs=-1, metavar="[NAME=VALUE]...")
@click.option(
    "-o", "output", required=True, help="Name of the new plans, used after -p. The same name as -p edits in place."
)
def command(
    dataset: str,
    trainer: str,
    plans: str,
    configuration: str,
    values: tuple[str, ...],
    batch_size: int | None,
    patch_size: str | None,
    width_divisor: int,
    more: tuple[str, ...],
    output: str,
) -> None:
    """Write a plans file for DATASET with other settings for a trainer; the data need no new preprocessing.

    Example: dgplugins configure 501 -tr DeSAMTrainer --set sam=vit_b epochs=50 -o nnUNetPlansVitB
    Example: dgplugins configure 501 -p nnUNetResEncUNetMPlans --batch-size 2 -o ResEncSmallBatch
    """
    from nnunet_dgplugins import settings
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.files import PREPROCESSED, dataset_name, nnunet_folder, read_json, write_json
    from nnunet_dgplugins.plans import shrink
    from nnunet_dgplugins.registry import TRAINERS

    if "__" in output:
        raise click.BadParameter("a plans name has no '__' in it: nnU-Net splits folder names there", param_hint="-o")
    asked = {}
    # several in one --set are told apart at blanks before NAME=, so that a value may hold blanks
    for text in [*(word for value in values for word in re.split(r"\s+(?=\w+=)", value.strip())), *more]:
        name, mark, value = text.partition("=")
        if not mark:
            raise click.BadParameter(f"'{text}' is not NAME=VALUE", param_hint="--set")
        asked[name] = settings.parse_value(value)
    folder = nnunet_folder(PREPROCESSED) / dataset_name(dataset)
    source: Path = folder / f"{plans}.json"
    if not source.is_file():
        raise UserError(
            f"{source}: no such plans. Run nnUNetv2_plan_and_preprocess -d {dataset} -c {configuration} first."
        )
    content = read_json(source)
    if configuration not in content["configurations"]:
        raise UserError(f"{source}: no configuration '{configuration}', only {', '.join(content['configurations'])}.")
    shrunk = batch_size is not None or bool(patch_size) or width_divisor > 1
    if shrunk:
        own = content["configurations"][configuration]
        if patch_size and not all(word.isdigit() for word in patch_size.split()):
            raise click.BadParameter(f"'{patch_size}' is not a list of whole numbers", param_hint="--patch-size")
        if "architecture" not in own:
            raise UserError(f"{source}: {configuration} inherits its network; shrink the configuration that has it.")
        shrink(own, batch_size, [int(word) for word in (patch_size or "").split()], width_divisor, f"{source.name}")
    content["plans_name"] = output
    if shrunk and not asked:
        write_json(folder / f"{output}.json", content)
        widths = own["architecture"]["arch_kwargs"]["features_per_stage"]
        click.echo(
            f"Wrote {folder / output}.json: {configuration} with batches of {own['batch_size']}, patches of "
            f"{own['patch_size']}, {widths} channels"
        )
        click.echo(f"Train: nnUNetv2_train {dataset} {configuration} 0 -p {output}")
        return
    block = content["configurations"][configuration].setdefault(settings.KEY, {}).setdefault(trainer, {})
    block.update(asked)
    cls = settings.settings_class(TRAINERS[trainer].settings)
    resolved = settings.build(
        cls, settings.configuration_block(content, configuration, trainer), f"{trainer}, {output}"
    )
    write_json(folder / f"{output}.json", content)
    click.echo(f"Wrote {folder / output}.json: {trainer} on {configuration} with {block}")
    click.echo(f"Train: nnUNetv2_train {dataset} {configuration} 0 -tr {trainer} -p {output}")
    if hasattr(resolved, "store"):
        click.echo(
            f"Embeddings, if not there yet: dgplugins embed {dataset} -p {output}  (the trainer makes them otherwise)"
        )
