"""``dgplugins list``."""

from __future__ import annotations

from dataclasses import asdict

import click

from nnunet_dgplugins.cli.options import json_option, print_json, print_rows


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List every trainer: method, stage, what it may read, what comes out."""
    from nnunet_dgplugins.registry import TRAINERS

    if as_json:
        print_json([asdict(info) for info in TRAINERS.values()])
        return
    for info in TRAINERS.values():
        click.echo(f"{info.name}  ({info.method}, {info.stage})")
        print_rows([("reads", info.supervision), ("gives", info.output), ("paper", info.paper)], indent=2)
    click.echo("\nUse one: nnUNetv2_train DATASET 2d 0 -tr NAME        Its settings: dgplugins describe NAME")
