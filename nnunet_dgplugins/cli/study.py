"""``dgplugins study``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import pandas

    from nnunet_dgplugins.study.definition import Study
    from nnunet_dgplugins.study.state import State
    from nnunet_dgplugins.study.tasks import Task


@click.command("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder. Default: beside FILE, its name.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Tasks at a time; cores are divided."
)
@click.option("--status", is_flag=True, help="Say how far it is, and the results so far; start nothing.")
@click.option("--cancel", is_flag=True, help="Stop the process that runs it; what is finished is kept.")
@click.option("--commands", is_flag=True, help="Print every command, as you would type it; start nothing.")
@click.option("--metric", help="Metric of the printed table. Default: Dice of the study's protocol.")
def command(
    file: Path, out: Path | None, jobs: int, status: bool, cancel: bool, commands: bool, metric: str | None
) -> None:
    """Train and evaluate every method x source x seed of FILE, and compare them on unseen sites.

    Each task is a command that you could type. Killed, cancelled or failed? Run the same command again: what is
    finished is kept, and a changed setting reruns only what depends on it.
    """
    from nnunet_dgplugins.study.file import read_study
    from nnunet_dgplugins.study.local import LocalExecutor
    from nnunet_dgplugins.study.results import collect, write_results
    from nnunet_dgplugins.study.run import run_tasks
    from nnunet_dgplugins.study.state import State
    from nnunet_dgplugins.study.tasks import expand

    study = read_study(file)
    out = (out or file.with_suffix("")).resolve()
    state = State(out)
    if cancel:
        _cancel(state)
        return
    tasks = expand(study, out, _device(study.device))
    if commands:
        for task in tasks:
            click.echo(f"# {task.name}\n{task.typed}\n")
        return
    if status:
        _status(tasks, state)
        _print(collect(tasks), study, metric)
        return
    out.mkdir(parents=True, exist_ok=True)
    with state.alone():
        state.forget_running()
        failed = run_tasks(
            tasks, state, LocalExecutor(jobs), study.budget.minutes,
            lambda task: write_results(tasks, study, out) if task.kind == "evaluate" else None,
        )  # fmt: skip
        table = write_results(tasks, study, out)
    _print(table, study, metric)
    click.echo(f"{out}: results.csv, results.json, results.md")
    if failed:
        click.echo(f"{len(failed)} tasks failed: {', '.join(task.name for task in failed)}", err=True)
        sys.exit(1)


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cancel(state: State) -> None:
    import os
    import signal

    runner = state.runner()
    if runner is None:
        click.echo("Nothing runs this study.")
        return
    os.kill(runner, signal.SIGTERM)
    click.echo(f"Asked process {runner} to stop; run the study again to go on.")


def _status(tasks: Sequence[Task], state: State) -> None:
    from nnunet_dgplugins.study.run import failure
    from nnunet_dgplugins.study.state import FAILED, RUNNING

    unique = {task.key: task for task in tasks}
    runner = state.runner()
    kinds: dict[str, list[Task]] = {}
    for task in unique.values():
        kinds.setdefault(state.of(task), []).append(task)
    for task in kinds.get(FAILED, []):
        click.echo(failure(task, state))
    for task in kinds.get(RUNNING, []) if runner else []:
        click.echo(f"running: {task.name}")
    done = sum(state.is_done(task) for task in unique.values())
    who = f"process {runner} runs it" if runner else "nothing runs it"
    click.echo(f"{done} of {len(unique)} tasks done, {len(kinds.get(FAILED, []))} failed, {who}.")


def _print(table: pandas.DataFrame, study: Study, metric: str | None) -> None:
    """Print the source x target matrix; brackets mark the source's own cases."""
    if table.empty:
        return
    from rich.console import Console
    from rich.table import Table

    from nnunet_dgplugins.errors import UserError, nearest
    from nnunet_dgplugins.study.results import printed

    metric, metrics = metric or study.metric, sorted(table["metric"].unique())
    if metric not in metrics:
        raise UserError(f"No metric '{metric}'{nearest(metric, metrics)}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    for one in printed(table, study, metric):
        title = f"{one.title}: {metric}, mean ± sd over seeds; in brackets {one.brackets}"
        shown = Table(title=title, title_justify="left")
        for name in one.heading:
            shown.add_column(name, justify="left" if name in ("source", "method") else "right")
        for row in one.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in one.notes:
            console.print(f"- {note}", highlight=False, markup=False)
