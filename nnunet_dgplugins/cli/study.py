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
    from nnunet_dgplugins.study.local import Executor
    from nnunet_dgplugins.study.slurm_file import Slurm
    from nnunet_dgplugins.study.slurm_queue import Sent
    from nnunet_dgplugins.study.state import State
    from nnunet_dgplugins.study.tasks import Task

_PATIENCE = 60.0  # seconds that a cancelled process may take to end


@click.command("study")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder. Default: beside FILE, its name.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Tasks at a time; cores are divided."
)
@click.option(
    "--slurm",
    "cluster",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Run the tasks as SLURM jobs; FILE says partition, GPUs, time (docs/cluster.md).",
)
@click.option("--status", is_flag=True, help="Say how far it is, and the results so far; start nothing.")
@click.option(
    "--cancel", is_flag=True, help="Stop the process and the SLURM jobs that run it; what is finished is kept."
)
@click.option("--commands", is_flag=True, help="Print every command, as you would type it; start nothing.")
@click.option("--metric", help="Metric of the printed table. Default: Dice of the study's protocol.")
def command(
    file: Path, out: Path | None, jobs: int, cluster: Path | None, status: bool, cancel: bool, commands: bool,
    metric: str | None,
) -> None:  # fmt: skip
    """Train and evaluate every method x source x seed of FILE, and compare them on unseen sites.

    Each task is a command that you could type. Killed, cancelled or failed? Run the same command again: what is
    finished is kept, and a changed setting reruns only what depends on it.
    """
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.study.file import read_study
    from nnunet_dgplugins.study.results import collect, seldom, write_results
    from nnunet_dgplugins.study.run import run_tasks
    from nnunet_dgplugins.study.slurm_file import read_slurm
    from nnunet_dgplugins.study.slurm_queue import resume
    from nnunet_dgplugins.study.state import State
    from nnunet_dgplugins.study.tasks import expand, refuse_taken_ids

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
    refuse_taken_ids(tasks)
    options = read_slurm(cluster) if cluster else None
    if options and jobs > 1:
        raise click.UsageError("--jobs is for this machine; `queue` in the SLURM file says how many are submitted.")
    if options and study.device == "auto":
        raise UserError(f"{file}: device auto asks the machine that runs this command. Write device: cuda, or cpu.")
    out.mkdir(parents=True, exist_ok=True)
    with state.alone():
        executor = _executor(jobs, options, out, tasks, resume(out, tasks, state))
        state.forget_running()
        try:
            failed = run_tasks(tasks, state, executor, study.budget.minutes, seldom(tasks, study, out))
        finally:  # also where it is cancelled
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


def _executor(jobs: int, options: Slurm | None, out: Path, tasks: Sequence[Task], alive: Sequence[Sent]) -> Executor:
    """Return where tasks run; refuse to run them here while SLURM has some of them."""
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.study.local import LocalExecutor
    from nnunet_dgplugins.study.slurm import SlurmExecutor

    if options is None:
        if alive:
            raise UserError(
                f"{len(alive)} tasks of this study are in SLURM's queue. Go on with --slurm FILE, or --cancel first."
            )
        return LocalExecutor(jobs)
    if strangers := {one.key for one in alive} - {task.key for task in tasks}:
        click.echo(f"{len(strangers)} SLURM jobs are of tasks that the study no longer has; --cancel ends all jobs.")
    return SlurmExecutor(out, options, alive)


def _cancel(state: State) -> None:
    import os
    import signal
    import time

    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.study.slurm_queue import cancel, survey

    runner = state.runner()
    if runner is not None:
        if host := state.runner_host():
            raise UserError(f"Process {runner} on {host} runs it. Give --cancel there.")
        os.kill(runner, signal.SIGTERM)
        click.echo(f"Asked process {runner} to stop; run the study again to go on.")
        deadline = time.monotonic() + _PATIENCE
        while (state.out / "slurm").is_dir() and state.runner() and time.monotonic() < deadline:
            time.sleep(0.2)  # it must not submit behind our back
    alive = [one for one in survey(state.out) if one.alive]
    cancel(alive)
    if alive:
        click.echo(f"Ended {len(alive)} SLURM jobs.")
    elif runner is None:
        click.echo("Nothing runs this study.")


def _status(tasks: Sequence[Task], state: State) -> None:
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.study.run import failure
    from nnunet_dgplugins.study.slurm_queue import described, survey
    from nnunet_dgplugins.study.state import FAILED, RUNNING

    unique = {task.key: task for task in tasks}
    runner = state.runner()
    kinds: dict[str, list[Task]] = {}
    for task in unique.values():
        kinds.setdefault(state.of(task), []).append(task)
    for task in kinds.get(FAILED, []):
        click.echo(failure(task, state))
    try:
        sent = survey(state.out)
    except UserError as error:
        click.echo(f"SLURM: {error}")
        sent = []
    keys = {one.key for one in sent}
    for task in kinds.get(RUNNING, []) if runner else []:
        if task.key not in keys:
            click.echo(f"running: {task.name}")
    alive = [one for one in sent if one.alive]
    for one in alive:
        if one.entry and one.entry.state == "RUNNING":
            click.echo(f"running: {one.name} (SLURM job {one.job})")
    if alive:
        click.echo(f"In SLURM's queue: {described(alive)}.")
    done = sum(state.is_done(task) for task in unique.values())
    who = "nothing looks after its jobs" if alive else "nothing runs it"
    if runner:
        who = f"process {runner}{f' on {host}' if (host := state.runner_host()) else ''} runs it"
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
