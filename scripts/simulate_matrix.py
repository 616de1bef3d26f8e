"""What a large study costs its driver and SLURM: submits held jobs, pretends that they end, prints times and memory.

Nothing is computed: no task runs. Needs a SLURM, for example the one of `scripts/slurm_one_node.sh`:

    python scripts/simulate_matrix.py --tasks 1000
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pandas  # noqa: F401  the driver makes tables with it

from nnunet_dgplugins.study.display import Lines
from nnunet_dgplugins.study.run import run_tasks
from nnunet_dgplugins.study.slurm import SlurmExecutor
from nnunet_dgplugins.study.slurm_file import Resources, Slurm
from nnunet_dgplugins.study.slurm_queue import cancel, described, resume, survey
from nnunet_dgplugins.study.state import State
from nnunet_dgplugins.study.tasks import Task


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print wall and processor seconds of a block."""
    wall, processor = time.monotonic(), time.process_time()
    yield
    click.echo(f"{what}: {time.monotonic() - wall:.1f} s, {time.process_time() - processor:.1f} s of processor")


@click.command()
@click.option("--tasks", "number", type=click.IntRange(1), default=1000, show_default=True, help="Tasks.")
@click.option(
    "--watch", type=click.IntRange(1), default=30, show_default=True, help="Seconds to watch the driver wait."
)
def command(number: int, watch: int) -> None:
    """Simulate a study of no-op tasks."""
    held = Resources(time=10, cpus=1, gpus=0, sbatch={"hold": True})
    options = Slurm(held, held, queue=number)
    with tempfile.TemporaryDirectory() as folder:
        out, state = Path(folder), State(Path(folder))
        tasks = [Task(f"no-op {i}", "no-op", ("true", str(i))) for i in range(number)]
        executor = SlurmExecutor(out, options)
        jobs = [executor.start(task, state.log(task)) for task in tasks]
        with timed(f"submit {number} tasks"):
            executor.look()
        try:
            with timed("--status"):
                click.echo(described(survey(out)))
            with timed("resume: find all of them again"):
                alive = resume(out, tasks, state)
                executor = SlurmExecutor(out, options, alive)
                jobs = [executor.start(task, state.log(task)) for task in tasks]
                executor.look()
            with timed("driver waits"):
                end = time.monotonic() + watch
                while time.monotonic() < end:
                    for job in jobs:
                        job.result()
                    time.sleep(0.2)
            for one in alive:
                one.batch.leave(one.key, 0, 1.0)
            with timed(f"note that {number} tasks ended"):
                run_tasks(tasks, state, SlurmExecutor(out, options, alive), display=Lines(lambda line: None))
        finally:
            with timed("cancel"):
                cancel(one for one in survey(out) if one.entry and one.entry.alive)
    click.echo(f"peak memory of the driver: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    command()
