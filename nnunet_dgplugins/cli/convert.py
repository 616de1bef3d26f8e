"""``dgplugins convert``: one sub-command per source dataset."""

from __future__ import annotations

import click

from dataset_conversion._registry import CONVERTERS, load_converter


class _Converters(click.Group):
    """Imports a converter when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(CONVERTERS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in CONVERTERS:
            return None
        converter: click.Command = load_converter(cmd_name).command
        return converter

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Sources"):
            formatter.write_dl([(name, text) for name, (_, text) in CONVERTERS.items()])


@click.group("convert", cls=_Converters)
def command() -> None:
    """Turn a public download into an nnU-Net dataset: source site to imagesTr, the other sites to imagesTs."""
