"""Options and output shared by the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click

json_option: Callable[..., Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def print_json(content: Any) -> None:
    """Print JSON, readable and complete."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))


def print_rows(rows: Sequence[tuple[str, str]], indent: int = 0) -> None:
    """Print pairs as two aligned columns, the second one wrapped."""
    formatter = click.HelpFormatter(width=118)
    formatter.current_indent = indent
    formatter.write_dl([(key, value or "-") for key, value in rows], col_max=26)
    click.echo(formatter.getvalue(), nl=False)


def known_trainer(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse names of trainers that do not exist."""
    from nnunet_dgplugins.errors import nearest
    from nnunet_dgplugins.registry import TRAINERS

    if value is not None and value not in TRAINERS:
        raise click.BadParameter(f"no trainer '{value}'{nearest(value, TRAINERS)}")
    return value


trainer_option: Callable[..., Any] = click.option(
    "-tr", "trainer", default="DeSAMTrainer", show_default=True, callback=known_trainer, help="Trainer name."
)
plans_option: Callable[..., Any] = click.option(
    "-p", "plans", default="nnUNetPlans", show_default=True, help="Plans name."
)
configuration_option: Callable[..., Any] = click.option(
    "-c", "configuration", default="2d", show_default=True, help="Configuration."
)
