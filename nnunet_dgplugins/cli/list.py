"""``dgplugins list``."""

from __future__ import annotations

from dataclasses import asdict

import click

from nnunet_dgplugins.cli.options import json_option, print_json, print_rows


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List every trainer: method, stage, what it may read, what comes out; and the SAM encoder used by default."""
    from nnunet_dgplugins.registry import TRAINERS
    from nnunet_dgplugins.sam.models import AUTO, get_model, what_a_file_adds

    sam = get_model(AUTO)
    if as_json:
        chosen = {"name": sam.name, "shipped": sam.shipped, "file": sam.find(), "note": sam.note}
        print_json({"trainers": [asdict(info) for info in TRAINERS.values()], "sam": chosen})
        return
    for info in TRAINERS.values():
        click.echo(f"{info.name}  ({info.method}, {info.stage})")
        print_rows([("reads", info.supervision), ("gives", info.output), ("paper", info.paper)], indent=2)
    click.echo(f"\nSAM encoder (sam=auto): {sam.described}" + ("" if sam.shipped else f", {sam.find()}"))
    if sam.shipped:
        click.echo(f"  {what_a_file_adds()}")
    click.echo("\nUse one: nnUNetv2_train DATASET 2d 0 -tr NAME        Its settings: dgplugins describe NAME")
