"""What is known of each task: done, failed, running. One small file per task, written in one step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from nnunet_dgplugins.files import read_json, write_json
from nnunet_dgplugins.locks import held, holder, other_host
from nnunet_dgplugins.study.tasks import Task, slug

DONE, FAILED, RUNNING = "done", "failed", "running"
#: seconds on two cores, until a task of the kind has been timed here
_GUESSES = {"prepare": 20, "convert": 15, "plan": 30, "preprocess": 15, "embed": 40, "train": 180, "predict": 90}
_TAIL = 15


class State:
    """The files of a study's folder that say how far it is.

    Args:
        out: folder of the study.
    """

    def __init__(self, out: Path):
        self.out = out
        self._took: dict[str, float] = {}  # seconds of finished tasks by key

    def log(self, task: Task) -> Path:
        """Return the file that receives a task's output; one task's next attempt replaces it."""
        return self.out / "log" / f"{slug(task.name)}-{task.key[:8]}.txt"

    def of(self, task: Task) -> str:
        """Return ``done``, ``failed``, ``running`` or ``""``."""
        return next((kind for kind in (DONE, RUNNING, FAILED) if self._file(kind, task).is_file()), "")

    def is_done(self, task: Task) -> bool:
        """Whether the task ended well, with the inputs it has now."""
        return self._file(DONE, task).is_file()

    def seconds(self, task: Task) -> float | None:
        """Return how long a finished task took; None for one that has not ended well."""
        return float(read_json(self._file(DONE, task))["seconds"]) if self.is_done(task) else None

    def set(self, task: Task, kind: str, seconds: float = 0.0) -> None:
        """Write a task's state; the other two are taken back."""
        content = {"name": task.name, "kind": task.kind, "seconds": round(seconds, 1), "command": task.typed}
        if task.replaces:
            content["replaces"] = task.replaces
            self._forget_replaced(task)
        write_json(self._file(kind, task), {**content, "time": time.strftime("%Y-%m-%d %H:%M:%S")})
        for other in {DONE, FAILED, RUNNING} - {kind}:
            self._file(other, task).unlink(missing_ok=True)

    def _forget_replaced(self, task: Task) -> None:
        """Take back that other tasks are done whose files this one overwrites."""
        for file in (self.out / "state" / DONE).glob("*.json"):
            if file.stem != task.key and read_json(file).get("replaces") == task.replaces:
                file.unlink()

    def forget_running(self) -> None:
        """Take back what a killed study left as running."""
        for file in (self.out / "state" / RUNNING).glob("*.json"):
            file.unlink()

    def tail(self, task: Task) -> str:
        """Return the last lines of a task's log."""
        log = self.log(task)
        if not log.is_file():
            return ""
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])

    def expected(self, tasks: list[Task], training_minutes: float | None) -> dict[str, float]:
        """Return seconds by key: the mean of finished tasks of the kind, else a guess."""
        known: dict[str, list[float]] = {}
        for task in tasks:
            if task.key not in self._took and self.is_done(task):
                self._took[task.key] = float(read_json(self._file(DONE, task))["seconds"])
            if task.key in self._took:
                known.setdefault(task.kind, []).append(self._took[task.key])
        means = {kind: mean(seconds) for kind, seconds in known.items()}
        found = {}
        for task in tasks:
            guess = _GUESSES.get(task.kind.split()[0], 10.0)
            if task.kind.startswith("train") and training_minutes:
                guess = 60 * training_minutes + 30
            found[task.key] = means.get(task.kind, guess)
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the study while it runs.

        Raises:
            UserError: another process runs it.
        """
        with held(self.out / "study.pid", "runs this study (--cancel stops it)"):
            yield

    def runner(self) -> int | None:
        """Return the process that runs the study now, None if there is none."""
        return holder(self.out / "study.pid")

    def runner_host(self) -> str:
        """Return the machine of that process, "" where it is this one."""
        return other_host(self.out / "study.pid")

    def _file(self, kind: str, task: Task) -> Path:
        return self.out / "state" / kind / f"{task.key}.json"
