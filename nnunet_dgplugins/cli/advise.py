"""``dgplugins advise``."""

from __future__ import annotations

from typing import Any

import click

from nnunet_dgplugins.cli.options import json_option, print_json


@click.command("advise")
@click.argument("dataset")
@json_option
def command(dataset: str, as_json: bool) -> None:
    """Say which trainers fit DATASET and why, and the next command to type."""
    from nnunet_dgplugins.advice import advise

    advice = advise(dataset)
    if as_json:
        print_json(advice)
        return
    _show(advice)


def _show(advice: dict[str, Any]) -> None:
    click.echo(f"{advice['dataset']}: {advice['cases']} training cases, {advice['test_cases']} test cases")
    for fact in advice["facts"]:
        click.echo(f"  {fact}")
    for item in advice["trainers"]:
        click.echo(f"\n{'fits' if item['fits'] else 'does not fit'}: {item['name']}")
        for reason in item["why"]:
            click.echo(f"  {reason}")
    if not advice["next"]:
        click.echo("\nNo trainer fits: cases need masks in labelsTr, or tags in the case table (docs/data.md).")
        return
    click.echo("\nNext:")
    for line in advice["next"]:
        click.echo(f"  {line}")
