"""Entry point: finds sub-commands lazily and turns errors into exit codes (0 good, 1 failed, 2 usage)."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from nnunet_dgplugins import __version__
from nnunet_dgplugins.errors import UserError

# command -> one line shown by --help; the module is cli/<command>.py and defines `command`
COMMANDS = {
    "list": "Every trainer: method, supervision, data.",
    "describe": "What a trainer reads, its settings, defaults and references.",
    "doctor": "Versions, folders, lookup of every trainer, GPU, disk, SAM files.",
    "advise": "Which trainers fit a dataset, why, and the next command.",
    "convert": "Turn a public download into an nnU-Net dataset.",
    "annotate": "Give an existing nnU-Net dataset sites and patients.",
    "splits": "Write folds by site and patient.",
    "configure": "Write a plans file with other settings for a trainer.",
    "embed": "Compute the image embeddings a SAM trainer reads.",
    "pseudo-labels": "Make an ordinary dataset of the masks that a model of tags draws.",
    "predict": "Segment with four slices per canvas, several times faster (SAM-SDG).",
    "evaluate": "Metrics per case, class and site.",
    "study": "Every method x source x target x seed from one file, resumable.",
    "report": "One HTML page of a study or of any predictions, CSV and JSON beside it.",
    "bundle": "Put the frozen SAM weights into a trained model.",
    "second-fold": "Write network 2 of an EPL model as a fold, so that both are averaged.",
    "import-checkpoint": "Make a model folder from an official checkpoint of DeSAM or EPL.",
}


class _Lazy(click.Group):
    """A group whose commands are imported when called, so that --help stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"nnunet_dgplugins.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dgplugins")
def cli() -> None:
    """Domain generalisation, weak and semi-supervised trainers for nnU-Net v2."""


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors a user can cause end in one message and exit code 1."""
    try:
        return cli.main(args=arguments, prog_name="dgplugins")
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
