"""Runs commands as processes of this machine; :mod:`nnunet_dgplugins.study.slurm` runs them on a cluster."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from nnunet_dgplugins.study.tasks import Task

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GRACE_SECONDS = 10.0


class Job(Protocol):
    """A command that was started."""

    def result(self) -> int | None:
        """Return the exit code, None while it runs or waits in a queue."""

    def seconds(self) -> float:
        """Return how long it runs, or ran; 0 while it waits in a queue."""

    def stop(self) -> None:
        """End it and everything it started; returns when that is so."""


class Executor(Protocol):
    """Where tasks run."""

    #: how many are started at a time
    slots: int
    #: whether started tasks go on when this process ends
    lasting: bool

    @property
    def at_once(self) -> int:
        """How many of them run at a time, for the time to go."""

    def start(self, task: Task, log: Path) -> Job:
        """Start a task whose output goes to ``log``."""


class LocalExecutor:
    """Processes of this machine.

    Args:
        slots: processes at a time.
        cores: shared by them; each process gets cores of its own where the system can bind it, so that the threads of
            one do not push aside those of another.
    """

    lasting = False

    def __init__(self, slots: int = 1, cores: int | None = None):
        self.slots = slots
        self.cores = cores or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._free = list(range(slots))

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return max(1, self.cores // self.slots)

    @property
    def at_once(self) -> int:
        """All that were started."""
        return self.slots

    def start(self, task: Task, log: Path) -> Job:
        """Start a task; its processes end when this one is killed."""
        place = self._free.pop(0)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment, cores = surroundings(task.environment, self.threads), self._cores(place)
        try:
            return LocalJob(task.command, environment, log, cores, lambda: self._free.insert(0, place))
        except OSError as error:  # no such program
            log.write_text(f"{task.command[0]}: {error.strerror}\n", encoding="utf-8")
            self._free.insert(0, place)
            return NeverStarted()

    def _cores(self, place: int) -> set[int]:
        if self.slots == 1 or not hasattr(os, "sched_getaffinity"):
            return set()
        mine = sorted(os.sched_getaffinity(0))[: self.cores]
        return set(mine[place * self.threads : (place + 1) * self.threads]) or {mine[place % len(mine)]}


class NeverStarted:
    """A command that there is not."""

    def result(self) -> int:
        """Return the exit code that shells give."""
        return 127

    def seconds(self) -> float:
        """Return no time."""
        return 0.0

    def stop(self) -> None:
        """Do nothing."""


class LocalJob:
    """A process group."""

    def __init__(
        self,
        command: tuple[str, ...],
        environment: Mapping[str, str],
        log: Path,
        cores: set[int],
        free: Callable[[], None],
    ):
        self._free: Callable[[], None] | None = free
        self._since, self._ended = time.monotonic(), 0.0
        with open(log, "w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment),
                start_new_session=True, preexec_fn=(lambda: _bind(cores)) if os.name == "posix" else None,
            )  # fmt: skip

    def result(self) -> int | None:
        """Return the exit code, None while it runs."""
        code = self.process.poll()
        if code is not None and self._free:
            self._ended = time.monotonic()
            self._free()
            self._free = None
        return code

    def seconds(self) -> float:
        """Return how long it runs, or ran."""
        return (self._ended or time.monotonic()) - self._since

    def stop(self) -> None:
        """Ask the group to end, then kill what is left of it."""
        for number, patience in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, 1.0)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            ended = time.monotonic() + patience
            while self.process.poll() is None and time.monotonic() < ended:
                time.sleep(0.05)
        self.process.wait()
        self.result()


def surroundings(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return the environment of a task's process.

    Args:
        environment: the task's own.
        threads: of its process.
    """
    # the commands beside this Python come first, also where its environment is not activated
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    inherited = {key: value for key, value in os.environ.items() if key != "DGPLUGINS_SETTINGS"}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHON_CPU_COUNT"), str(threads))
    return {**inherited, "PATH": path, **counts, **environment}


def _bind(cores: set[int]) -> None:
    """Run in the child: end with the parent (Linux), stay on the given cores."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if cores:
            os.sched_setaffinity(0, cores)
