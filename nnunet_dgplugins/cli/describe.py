"""``dgplugins describe``."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from nnunet_dgplugins.cli.options import json_option, known_trainer, print_json, print_rows


@click.command("describe")
@click.argument("trainer", callback=known_trainer)
@json_option
def command(trainer: str, as_json: bool) -> None:
    """Say what TRAINER reads and gives, and print its settings with defaults and paper references."""
    from nnunet_dgplugins.registry import TRAINERS

    info = TRAINERS[trainer]
    settings = _settings(info.settings)
    if as_json:
        print_json({**dataclasses.asdict(info), "settings": settings})
        return
    click.echo(f"{info.name}: {info.method}, {info.stage}")
    print_rows([("reads", info.supervision), ("gives", info.output), ("paper", info.paper)], indent=2)
    click.echo("\nSettings (default in brackets)")
    rows = []
    for item in settings:
        text = f"[{_shown(item['default'])}] {item['help']}"
        if item["choices"]:
            text += f" One of: {', '.join(map(str, item['choices']))}."
        if item["reference"]:
            text += f" ({item['reference']})"
        rows.append((item["name"], text))
    print_rows(rows, indent=2)
    click.echo(
        f"\nChange them: dgplugins configure DATASET -tr {info.name} --set NAME=VALUE -o nnUNetPlansMine, "
        "then train with -p nnUNetPlansMine"
    )


def _settings(name: str) -> list[dict[str, Any]]:
    from nnunet_dgplugins.settings import settings_class

    return [
        {"name": item.name, "default": item.default, "type": str(item.type), **item.metadata}
        for item in dataclasses.fields(settings_class(name))
    ]


def _shown(value: Any) -> str:
    """Write a value as it would be typed after ``--set``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
