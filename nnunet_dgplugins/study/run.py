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
        Cancelled: SIGTERM or Ctrl-C; running tasks were ended, unless the executor's last longer than this process.
    """
    unique = {task.key: task for task in tasks}  # two methods may share a task
    done = {key for key, task in unique.items() if state.is_done(task)}  # in memory: thousands are asked for often
    waiting = [task for task in unique.values() if task.key not in done]
    running: dict[str, tuple[Task, Job]] = {}
    failed: list[Task] = []
    started, known = time.monotonic(), len(done)
    expected = state.expected(list(unique.values()), training_minutes)

    def progress() -> Progress:
        left = _left(waiting, running, expected, executor)
        names = [task.name for task, job in running.values() if job.seconds()]
        return Progress(len(done), len(unique), names, time.monotonic() - started, left)

    with _stoppable(executor), display or for_stream() as shown:
        shown.say(f"{len(unique)} tasks, {len(unique) - len(waiting)} done before, {executor.slots} at a time.")
        try:
            while waiting or running:
                while len(running) < executor.slots and (task := _next(waiting, done)):
                    shown.started(task.name, progress())
                    waiting.remove(task)
                    state.set(task, RUNNING)
                    running[task.key] = (task, executor.start(task, state.log(task)))
                if not running:
                    break  # what waits needs something that failed
                shown.tick(progress())
                time.sleep(_PAUSE)
                for task, job in list(running.values()):
                    code = job.result()
                    if code is None:
                        continue
                    del running[task.key]
                    state.set(task, FAILED if code else DONE, job.seconds())
                    if code:
                        failed.append(task)
                        shown.say(failure(task, state, code))
                    else:
                        done.add(task.key)
                        after(task)
                if len(done) > known:
                    known, expected = len(done), state.expected(list(unique.values()), training_minutes)
            shown.tick(progress())
        except BaseException:
            for _, job in () if executor.lasting else running.values():
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


def _next(waiting: list[Task], done: set[str]) -> Task | None:
    """Return the first task whose needs are done."""
    return next((task for task in waiting if done.issuperset(task.needs)), None)


def _left(
    waiting: list[Task], running: dict[str, tuple[Task, Job]], expected: dict[str, float], executor: Executor
) -> float:
    """Return seconds until the end, if as many tasks run at a time as now."""
    seconds = sum(expected[task.key] for task in waiting)
    seconds += sum(max(0.0, expected[task.key] - job.seconds()) for task, job in running.values())
    return seconds / executor.at_once


@contextmanager
def _stoppable(executor: Executor) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into an exception, so that running tasks are ended."""
    message = "Cancelled. Run the same command again to go on."
    if executor.lasting:
        message = "Stopped; what was submitted goes on. The same command looks after it again, --cancel ends it."

    def stop(number: int, frame: Any) -> None:
        raise Cancelled(message)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
