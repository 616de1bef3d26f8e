"""How far a study is: one bar on a terminal, one line per started task elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

_NAMES = 4  # of running tasks in the bar


@dataclass(frozen=True)
class Progress:
    """Where a study stands.

    Args:
        done: tasks that ended well, now or in an earlier run.
        total: tasks of the study.
        running: names of the tasks that run now.
        gone: seconds since this run began.
        left: seconds until its end, expected.
    """

    done: int
    total: int
    running: Sequence[str]
    gone: float
    left: float

    def __str__(self) -> str:
        return f"{clock(self.gone)} gone, about {clock(self.left)} to go"


class Display:
    """Receives what happens; a context manager, so that a terminal is left in order."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        """End the display."""

    def say(self, text: str) -> None:
        """Show a message that stays."""
        raise NotImplementedError

    def started(self, name: str, progress: Progress) -> None:
        """Show that a task was started."""
        raise NotImplementedError

    def tick(self, progress: Progress) -> None:
        """Show the time; called several times a second."""


class Lines(Display):
    """One line per started task, for logs.

    Args:
        write: receives the lines.
    """

    def __init__(self, write: Callable[[str], object] = click.echo):
        self._write = write

    def say(self, text: str) -> None:
        """Write a line."""
        self._write(text)

    def started(self, name: str, progress: Progress) -> None:
        """Write the task's line."""
        self.say(f"[{progress.done}/{progress.total}] {name}; {progress}")


class Bar(Display):
    """One bar with the running tasks, at the bottom of a terminal; messages go above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[time]}"))
        self._bar = RichProgress(*columns, TextColumn("{task.description}", markup=False), refresh_per_second=2)
        self._task = self._bar.add_task("", total=None, time="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it stood last."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def started(self, name: str, progress: Progress) -> None:
        """Show the task among the running ones."""
        self.tick(progress)

    def tick(self, progress: Progress) -> None:
        """Move the bar."""
        names, time = " | ".join(progress.running[:_NAMES]), str(progress)
        names += f" and {len(progress.running) - _NAMES} more" if len(progress.running) > _NAMES else ""
        self._bar.update(self._task, completed=progress.done, total=progress.total, description=names, time=time)


def for_stream() -> Display:
    """Return the bar where standard output is a terminal, else lines."""
    return Bar() if sys.stdout.isatty() else Lines()


def clock(seconds: float) -> str:
    """Return a time in minutes, or in hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
