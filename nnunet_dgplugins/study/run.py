"""Runs what is not done, in an order in which it can run, with one progress display."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.study.display import Display, Progress, for_stream
from nnunet_dgplugins.study.local import Executor, Job
from nnunet_dgplugins.study.state import DONE, FAILED, RUNNING, State
from nnunet_dgplugins.study.tasks import Task

_PAUSE = 0.2  # seconds between looks at the running tasks


class Cancelled(UserError):
    """The study was asked to stop; what it had done is kept."""


def run_tasks(
    tasks: Sequence[Task],
    state: State,
    executor: Executor,
    training_minutes: float | None = None,
    after: Callable[[Task], object] = lambda task: None,
    display: Display | None = None,
) -> list[Task]:
    """Run every task that is not done and whose needs are met; a failed one stops only what needs it.

    Args:
        tasks: each behind those it needs.
        state: says what is done.
        executor: where tasks run.
        training_minutes: budget of a training, for the first estimate.
        after: called behind every task that ended well.
        display: shows how far it is; default: a bar on a terminal, else one line per started task.

    Returns:
        Tasks that failed.

    Raises:
        Cancelled: SIGTERM or Ctrl-C; running tasks were ended.
    """
    unique = {task.key: task for task in tasks}  # two methods may share a task
    waiting = [task for task in unique.values() if not state.is_done(task)]
    running: dict[str, tuple[Task, Job, float]] = {}
    failed: list[Task] = []
    started, expected = time.monotonic(), state.expected(list(unique.values()), training_minutes)

    def progress() -> Progress:
        done = len(unique) - len(waiting) - len(running) - len(failed)
        left = _left(waiting, running, expected, executor)
        names = [task.name for task, _, _ in running.values()]
        return Progress(done, len(unique), names, time.monotonic() - started, left)

    with _stoppable(), display or for_stream() as shown:
        shown.say(f"{len(unique)} tasks, {len(unique) - len(waiting)} done before, {executor.slots} at a time.")
        try:
            while waiting or running:
                while len(running) < executor.slots and (task := _next(waiting, unique, state)):
                    shown.started(task.name, progress())
                    waiting.remove(task)
                    state.set(task, RUNNING)
                    running[task.key] = (task, executor.start(task, state.log(task)), time.monotonic())
                if not running:
                    break  # what waits needs something that failed
                shown.tick(progress())
                time.sleep(_PAUSE)
                for task, job, since in list(running.values()):
                    code = job.result()
                    if code is None:
                        continue
                    del running[task.key]
                    state.set(task, FAILED if code else DONE, time.monotonic() - since)
                    if code:
                        failed.append(task)
                        shown.say(failure(task, state, code))
                    else:
                        expected = state.expected(list(unique.values()), training_minutes)
                        after(task)
            shown.tick(progress())
        except BaseException:
            for _, job, _ in running.values():
                job.stop()
            state.forget_running()
            raise
        if waiting:
            shown.say(f"{len(waiting)} tasks were not started, because what they need failed.")
    return failed


def failure(task: Task, state: State, code: int | None = None) -> str:
    """Return what is known of a failed task: its command and the last lines of its log."""
    with_code = "" if code is None else f" with {code}"
    return f"FAILED{with_code}: {task.name}\n  {task.typed}\nLast lines of {state.log(task)}:\n{state.tail(task)}"


def _next(waiting: list[Task], tasks: dict[str, Task], state: State) -> Task | None:
    """Return the first task whose needs are done."""
    return next((task for task in waiting if all(state.is_done(tasks[key]) for key in task.needs)), None)


def _left(
    waiting: list[Task], running: dict[str, tuple[Task, Job, float]], expected: dict[str, float], executor: Executor
) -> float:
    """Return seconds until the end, if all slots stay in use."""
    now = time.monotonic()
    seconds = sum(expected[task.key] for task in waiting)
    seconds += sum(max(0.0, expected[task.key] - (now - since)) for task, _, since in running.values())
    return seconds / executor.slots


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into an exception, so that running tasks are ended."""

    def stop(number: int, frame: Any) -> None:
        raise Cancelled("Cancelled. Run the same command again to go on.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
