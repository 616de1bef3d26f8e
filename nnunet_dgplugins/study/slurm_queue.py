"""What a study has in SLURM's queue: a folder for each batch, and one question to squeue for all of them.

No accounting database is needed: a task that ended by itself left a file, and of the others squeue tells. A batch is
noted before it is submitted and its jobs' numbers behind that, each in one step, so that a driver killed at any moment
is followed by one that finds its jobs again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json, write_json
from nnunet_dgplugins.study.state import DONE, FAILED, State
from nnunet_dgplugins.study.tasks import Task

#: squeue's states of jobs that do not come again
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)
_NOTE = "batch.json"
_ANSWER = 60  # seconds that squeue and scancel may take
_GONE = 120  # seconds that a cancelled job may take


class NoAnswer(UserError):
    """SLURM's controller did not answer."""


@dataclass(frozen=True)
class Entry:
    """A line of squeue.

    Args:
        job: SLURM's number, ``12`` or ``12_3``.
        name: of the job: its batch's.
        state: in capitals, e.g. PENDING.
        reason: why it waits or failed.
    """

    job: str
    name: str
    state: str
    reason: str

    @property
    def alive(self) -> bool:
        """Whether it waits, runs, or will run again."""
        return self.state not in ENDED


class Batch:
    """Tasks that were submitted together.

    Args:
        folder: holds the note of what was submitted, submitit's files, and a file for each task that ended.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        note = read_json(folder / _NOTE) if (folder / _NOTE).is_file() else {}
        self.tasks: list[tuple[str, str]] = [(key, name) for key, name in note.get("tasks", [])]
        self.jobs: list[str] = note.get("jobs", [])

    @classmethod
    def new(cls, out: Path, tasks: Iterable[Task]) -> Batch:
        """Note tasks that are about to be submitted.

        Args:
            out: folder of the study.
            tasks: of the batch.
        """
        batch = cls(out / "slurm" / uuid.uuid4().hex[:12])
        batch.tasks = [(task.key, task.name) for task in tasks]
        batch.submitted([])
        return batch

    @property
    def name(self) -> str:
        """Name of its jobs."""
        return f"dg-{self.folder.name}"

    def submitted(self, jobs: Sequence[str]) -> None:
        """Note SLURM's numbers of its tasks."""
        self.jobs = list(jobs)
        write_json(self.folder / _NOTE, {"tasks": self.tasks, "jobs": self.jobs})

    def exit_file(self, key: str) -> Path:
        """Return the file that says how a task ended."""
        return self.folder / f"exit-{key}.json"

    def ended(self) -> set[str]:
        """Return the keys of tasks that ended by themselves; one look at the folder."""
        return {file.stem.removeprefix("exit-") for file in self.folder.glob("exit-*.json")}

    def leave(self, key: str, code: int, seconds: float) -> None:
        """Note how a task ended."""
        write_json(self.exit_file(key), {"code": code, "seconds": seconds})

    def left(self, key: str) -> tuple[int, float] | None:
        """Return exit code and seconds of a task, None where it has left none; its file is asked for by its name.

        A disk of the network may list a file late that it opens already.
        """
        try:
            content = json.loads(self.exit_file(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return int(content["code"]), float(content["seconds"])

    def output(self, job: str) -> str:
        """Return the last lines that SLURM wrote beside a task's own log."""
        lines: list[str] = []
        for kind in ("out", "err"):
            file = self.folder / f"{job}_0_log.{kind}"
            lines += file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        return "\n".join(lines[-8:])

    def remove(self) -> None:
        """Forget it."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Sent:
    """A task that was submitted and whose batch is not forgotten.

    Args:
        batch: of the task.
        key: of the task; "" for a job of a batch whose numbers were never noted.
        name: of the task.
        job: SLURM's number.
        entry: what squeue says; None: it does not know the job, or need not be asked.
        code: exit code; None: it has not ended by itself.
        seconds: that it took.
    """

    batch: Batch
    key: str
    name: str
    job: str
    entry: Entry | None = None
    code: int | None = None
    seconds: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether it waits, runs, or will run again."""
        return self.code is None and self.entry is not None and self.entry.alive


def ask(batches: Iterable[Batch]) -> list[Entry]:
    """Return all jobs of batches that squeue knows, those that ended in the last minutes among them.

    Raises:
        NoAnswer: the controller does not answer.
    """
    names = ",".join(batch.name for batch in batches)
    if not names:
        return []
    words = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--name={names}"]
    text = _run([*words, "--format=%F|%K|%j|%T|%r"])
    entries = []
    for line in text.splitlines():
        base, element, name, state, reason = line.strip().split("|", 4)
        entries.append(Entry(base if element == "N/A" else f"{base}_{element}", name, state, reason))
    return entries


def survey(out: Path) -> list[Sent]:
    """Return everything that was submitted for a study and is not forgotten.

    Raises:
        NoAnswer: the controller does not answer. It is asked only where something was submitted.
    """
    notes = (out / "slurm").glob(f"*/{_NOTE}")
    batches = [Batch(note.parent) for note in sorted(notes)]
    # squeue first, files behind it: a job that has left the queue has written how it ended
    entries = ask(batch for batch in batches if not batch.ended().issuperset(key for key, _ in batch.tasks))
    by_job = {entry.job: entry for entry in entries}
    found = []
    for batch in batches:
        ended = batch.ended()
        if not batch.jobs:
            found += [Sent(batch, "", batch.name, one.job, one) for one in entries if one.name == batch.name]
        for index, (key, name) in enumerate(batch.tasks):
            job = batch.jobs[index] if batch.jobs else ""
            code, seconds = (batch.left(key) if key in ended else None) or (None, 0.0)
            found.append(Sent(batch, key, name, job, by_job.get(job), code, seconds))
    return found


def resume(out: Path, tasks: Iterable[Task], state: State) -> list[Sent]:
    """Note how tasks ended while nothing looked after them, and return those that still wait or run.

    Jobs of a batch whose driver was killed while it submitted are ended: nobody knows which is which.
    """
    by_key = {task.key: task for task in tasks}
    found = survey(out)
    cancel([one for one in found if one.alive and not one.key])
    for one in found:
        if one.code is not None and one.key in by_key and not state.is_done(by_key[one.key]):
            state.set(by_key[one.key], FAILED if one.code else DONE, one.seconds)
    alive = [one for one in found if one.alive and one.key]
    for batch in {one.batch for one in found} - {one.batch for one in alive}:
        batch.remove()
    return alive


def cancel(sent: Iterable[Sent]) -> None:
    """End the jobs of these tasks and the others of their arrays; returns when that is so.

    Raises:
        NoAnswer: the controller does not answer, or the jobs do not end.
    """
    sent = list(sent)
    end({one.job.split("_")[0] for one in sent}, {one.batch for one in sent})


def end(jobs: Collection[str], batches: Collection[Batch]) -> None:
    """End jobs, of which ``12`` stands for the whole array; returns when that is so.

    Args:
        jobs: SLURM's numbers.
        batches: of these jobs.

    Raises:
        NoAnswer: the controller does not answer, or the jobs do not end.
    """
    if not jobs:
        return
    _run(["scancel", "--quiet", *sorted(jobs)])  # quiet of jobs that have ended meanwhile
    deadline = time.monotonic() + _GONE
    while any(entry.alive and {entry.job, entry.job.split("_")[0]} & {*jobs} for entry in ask(batches)):
        if time.monotonic() > deadline:
            raise NoAnswer(f"SLURM has not ended cancelled jobs within {_GONE} seconds; look at squeue.")
        time.sleep(1)


def described(sent: Iterable[Sent]) -> str:
    """Return how many tasks run, and how many wait and why."""
    states = [one.entry.state if one.entry.state != "PENDING" else one.entry.reason for one in sent if one.entry]
    counts = sorted({state: states.count(state) for state in states}.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {state}" for state, count in counts)


def _run(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_ANSWER, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"No {words[0]} here, and this study has tasks in SLURM's queue. Run the command on the cluster."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"{words[0]} has not answered within {_ANSWER} seconds.") from error
    if done.returncode:
        raise NoAnswer(f"{words[0]}: {done.stderr.strip()}")
    return done.stdout
