"""The options that every converter's command shares, defined once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from dataset_conversion._facts import Facts, ListCases, Request

_SPLITS = {
    "kfold": "five folds by patient",
    "labelled": "one fold that trains on every labelled case and validates on the same",
    "desam": "one fold, the first 90 % of the cases train",
    "published": "one fold, first 20 % test, next 10 % validate, last 70 % train",
}


def make_command(
    facts: Facts, list_cases: ListCases, help_text: str, *more: Callable[..., Any], roots: Sequence[str] = ()
) -> click.Command:
    """Return the click command of a converter.

    Args:
        facts: what the converter knows about its source.
        list_cases: fills a listing with the cases under the root.
        help_text: first lines of ``--help``.
        more: further option decorators, whose values become fields of the request.
        roots: options of ``more`` that name the folders of several downloads, in place of ROOT.
    """
    options: list[Callable[..., Any]] = [
        click.argument("root", type=click.Path(path_type=Path), required=not roots),
        click.option("--id", "dataset_id", type=click.IntRange(1, 999), default=facts.dataset_id, show_default=True,
                     help="nnU-Net's dataset id."),
        *(_supervision() if facts.tags else _sites(facts)),
        click.option("--exclude", multiple=True, metavar="CASE", help="Case to leave out; may be repeated."),
        click.option("--copy/--link", "copy", default=True, show_default=True,
                     help="Copy files, or link those that need no change."),
        click.option("--overwrite", is_flag=True, help="Replace an earlier conversion of other input or options."),
        click.option("--jobs", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True,
                     help="Processes."),
        *more,
    ]  # fmt: skip
    if facts.few_labels:
        options += _few_labels(facts)
    if facts.zones_flag:
        text = f"Write the labels {' and '.join(list(facts.zone_labels or ())[1:])}."
        options.append(click.option(facts.zones_flag, "zones", flag_value="keep", default="merge", help=text))
    elif facts.zone_labels is not None:
        zones = click.Choice(["merge", "keep"])
        text = "Merge the zones into one label, or keep them where every site has them."
        options.append(click.option("--zones", type=zones, default="merge", show_default=True, help=text))
    if facts.neighbours:
        text = "Three channels: each slice's neighbour below, the slice, its neighbour above."
        options.append(click.option("--neighbours", is_flag=True, help=text))
    if len(facts.splits) > 1:
        choice = click.Choice(list(facts.splits))
        text = "; ".join(f"{name}: {_SPLITS[name]}" for name in facts.splits)
        default = facts.splits[0]
        if facts.few_labels:
            default += "; labelled where --ratio or --labelled is given"
        options.append(click.option("--split", type=choice, help=f"{text}. [default: {default}]"))

    def callback(copy: bool, **options: Any) -> None:
        if not facts.tags and not options["sources"] and not options["targets"]:
            raise click.UsageError("Missing option '--source' (sites to train on) or '--target' (sites to test on).")
        if roots:
            options["root"] = _one_root(options, roots)
        from dataset_conversion._common import convert

        convert(facts, list_cases, Request(link=not copy, **options))

    wrapped: Callable[..., Any] = callback
    for option in reversed(options):
        wrapped = option(wrapped)
    settings = {"help_option_names": ["-h", "--help"]}
    return click.command(facts.command, help=help_text, context_settings=settings)(wrapped)


def _one_root(options: dict[str, Any], roots: Sequence[str]) -> Path:
    """Return ROOT, or the first of the folders that are named in its place.

    Raises:
        click.UsageError: neither is given, or both are.
    """
    given = [options[name] for name in roots if options[name] is not None]
    if (options["root"] is None) != bool(given):
        flags = ", ".join("--" + name.replace("_", "-") for name in roots)
        raise click.UsageError(f"Give ROOT, a folder that holds all downloads, or some of {flags}.")
    return Path(options["root"] or given[0])


def _sites(facts: Facts) -> list[Callable[..., Any]]:
    """Return the options of sources with several sites."""
    sites = ", ".join(site.name for site in facts.sites)
    return [
        click.option("--source", "sources", multiple=True, metavar="SITE",
                     help=f"Site to train on; may be repeated. Sites: {sites}. [default: every one but the targets]"),
        click.option("--target", "targets", multiple=True, metavar="SITE",
                     help="Site to test on; may be repeated. [default: every one but the sources]"),
        click.option("--drop-empty-slices", is_flag=True, help="Cut volumes to the slices that show organ."),
    ]  # fmt: skip


def _supervision() -> list[Callable[..., Any]]:
    """Return the options of sources that can become a weak dataset."""
    return [
        click.option("--supervision", type=click.Choice(["tags", "masks"]), default="tags", show_default=True,
                     help="Weak dataset with one tag (present or not) per slice, or its fully supervised twin."),
        click.option("--min-pixels", type=click.IntRange(1), default=1, show_default=True,
                     help="Foreground pixels that make a slice's tag positive."),
    ]  # fmt: skip


def _few_labels(facts: Facts) -> list[Callable[..., Any]]:
    """Return the options that say how many patients are labelled."""
    options: list[Callable[..., Any]] = [
        click.option("--ratio", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
                     help="Label this share of each source site's patients, the others are unlabelled cases. "
                          "[default: all]"),
        click.option("--labelled", type=click.IntRange(1), metavar="N",
                     help="Label N patients of each source site."),
    ]  # fmt: skip
    if len(facts.counts) > 1:
        choice = click.Choice(list(facts.counts))
        text = "Patients that --ratio means: the share rounded up, or one more and per centre, as published."
        options.append(
            click.option("--protocol", "count", type=choice, default=facts.counts[0], show_default=True, help=text)
        )
    return options


def planned_name(module: Any, words: Sequence[str]) -> str:
    """Return the name of the dataset that a converter would write, without opening a file.

    Args:
        module: the converter's.
        words: its command line, root first.

    Raises:
        click.UsageError: the words are no command line of it.
        UserError: an option makes no sense.
    """
    values = dict(module.command.make_context(module.FACTS.command, list(words)).params)
    if hasattr(module, "dataset_name"):  # patches, whose options are others
        return str(module.dataset_name(values))
    request = Request(link=not values.pop("copy"), **values)
    facts: Facts = module.chosen_facts(request) if hasattr(module, "chosen_facts") else module.FACTS
    title = request.supervision if facts.tags else "-".join(facts.site(text).name for text in request.sources)
    return f"Dataset{request.dataset_id:03d}_{facts.name}_{title}"


def run_as_script(command: click.Command) -> None:
    """Run a converter as ``python -m dataset_conversion.DatasetNNN_Name``; exit codes as those of ``dgplugins``."""
    from nnunet_dgplugins.errors import UserError

    try:
        command.main()
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
