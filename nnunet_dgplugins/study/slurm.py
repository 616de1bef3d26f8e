"""Runs tasks as SLURM jobs, submitted by submitit in arrays. Jobs go on when this process ends, and are found again."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.study.slurm_file import Resources, Slurm
from nnunet_dgplugins.study.slurm_queue import Batch, Entry, NoAnswer, Sent, ask, end
from nnunet_dgplugins.study.slurm_task import OnNode
from nnunet_dgplugins.study.tasks import Task

_PACE = 2.0  # seconds between submissions: what becomes ready meanwhile goes together
_READ = 1.0  # between looks at files of ended tasks
_RETRY = 60.0  # until the next try after SLURM refused more jobs
_SILENCE = 1800.0  # that the controller may be silent
_LOST = ("BOOT_FAIL", "NODE_FAIL", "PREEMPTED")  # not the task's fault
_ADVICE = {
    "CANCELLED": "Somebody ended it.",
    "OUT_OF_MEMORY": "Give its tasks more `memory`.",
    "TIMEOUT": "Give its tasks more `time`.",
}


class SlurmExecutor:
    """Jobs of a SLURM cluster.

    ``start`` collects tasks; whoever asks for a result makes the executor look, which submits what was collected, reads
    the files of ended tasks, and now and then asks squeue once for all.

    Args:
        out: folder of the study, on a disk that the nodes see too.
        options: what tasks ask for.
        alive: jobs of an earlier driver that still wait or run; their tasks are not submitted again.
        every: seconds between questions to squeue.
        lag: seconds that a file may need from a node to here; NFS may hide a new one for a minute.

    Raises:
        UserError: submitit or SLURM's commands are not installed.
    """

    lasting = True

    def __init__(
        self, out: Path, options: Slurm, alive: Iterable[Sent] = (), every: float = 30.0, lag: float = 90.0
    ):  # fmt: skip
        self._submitit = _submitit()
        self.out, self.options, self.slots = out, options, options.queue
        self._alive = {one.key: one for one in alive}
        self._new: list[SlurmJob] = []
        self._open: dict[str, SlurmJob] = {}  # by SLURM's number
        self._every, self._lag, self._longest = every, lag, longest_array()
        self._submit_at, self._read_at, self._ask_at = 0.0, 0.0, 0.0
        self._answered = time.monotonic()
        self._running = 0
        self._ended: list[tuple[float, Batch]] = []

    @property
    def at_once(self) -> int:
        """Jobs that ran when squeue was asked last."""
        return max(1, self._running)

    def start(self, task: Task, log: Path) -> SlurmJob:
        """Take a task, to be submitted with others at the next look, or find it in the queue."""
        log.parent.mkdir(parents=True, exist_ok=True)
        job = SlurmJob(self, task, log)
        sent = self._alive.pop(task.key, None)
        if sent:
            job.sent(sent.batch, sent.job)
            self._open[sent.job] = job
            self._note(job, sent.entry)
        else:
            self._new.append(job)
        return job

    def look(self) -> None:
        """Submit what is new, and learn what became of the rest; cheap, called for every job several times a second.

        Raises:
            UserError: SLURM refuses the jobs, or does not answer for half an hour.
        """
        now = time.monotonic()
        if self._new and now >= self._submit_at:
            self._submit()
        if self._open and now >= self._read_at:
            self._read_at = now + _READ
            self._read_exits()
        if self._open and now >= self._ask_at:
            self._ask_at = now + self._every
            self._ask()
        while self._ended and now - self._ended[0][0] > self._lag:  # its last job is still writing submitit's files
            self._ended.pop(0)[1].remove()

    def _submit(self) -> None:
        new, self._new = self._new, []
        self._submit_at = time.monotonic() + _PACE
        for cuda, resources in ((False, self.options.cpu), (True, self.options.gpu)):
            own = [job for job in new if ("cuda" in job.task.command) == cuda]
            size = min(self._longest, len(own))
            while own:
                refusal = self._send(own[:size], resources)
                if not refusal:
                    own = own[size:]
                elif not _too_many(refusal) or (size == 1 and not self._open):
                    raise UserError(f"SLURM refuses {own[0].task.name}: {refusal}")
                elif size > 1:  # more than the user may have in the queue: fewer
                    size //= 2
                else:  # or later
                    self._new += own
                    self._submit_at = time.monotonic() + _RETRY
                    break

    def _send(self, jobs: Sequence[SlurmJob], resources: Resources) -> str:
        """Submit tasks as one array; return why SLURM refuses them, "" where it takes them."""
        batch = Batch.new(self.out, (job.task for job in jobs))
        calls = [
            OnNode(job.task.name, job.task.command, dict(job.task.environment), str(job.log),
                   str(batch.exit_file(job.task.key)))
            for job in jobs
        ]  # fmt: skip
        executor = self._submitit.SlurmExecutor(folder=batch.folder, max_num_timeout=self.options.requeues)
        executor.update_parameters(**resources.parameters(batch.name))
        # the driver may run in a job, whose variables are not theirs; where SLURM is and what its user prefers stays
        kept = {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or key.startswith("SBATCH_")}
        try:
            with self._submitit.helpers.clean_env(), self._submitit.core.utils.environment_variables(**kept):
                sent = executor.submit_array(calls)
        except (self._submitit.core.utils.FailedJobError, self._submitit.core.utils.FailedSubmissionError) as error:
            batch.remove()
            return str(error).strip()
        batch.submitted([one.job_id for one in sent])
        for job, one in zip(jobs, sent, strict=True):
            job.sent(batch, one.job_id)
            self._open[one.job_id] = job
        return ""

    def _read_exits(self) -> None:
        ended = {batch: batch.ended() for batch in self._batches()}
        for job in list(self._open.values()):
            if job.batch and job.task.key in ended[job.batch] and (left := job.batch.left(job.task.key)):
                self._close(job, *left)

    def _batches(self) -> set[Batch]:
        return {job.batch for job in self._open.values() if job.batch}

    def _ask(self) -> None:
        try:
            entries = {entry.job: entry for entry in ask(self._batches())}
        except NoAnswer as error:
            silent = time.monotonic() - self._answered
            if silent > _SILENCE:
                raise UserError(f"{error} Jobs go on without this process; run the same command again.") from error
            return
        self._answered = time.monotonic()
        self._read_exits()
        self._running = sum(entry.state == "RUNNING" for entry in entries.values())
        for number, job in list(self._open.items()):
            self._note(job, entries.get(number))

    def _note(self, job: SlurmJob, entry: Entry | None) -> None:
        now = time.monotonic()
        if entry and entry.alive:
            job.missing = 0.0
            job.since = (job.since or now) if entry.state == "RUNNING" else 0.0
            return
        job.missing = job.missing or now
        if now - job.missing < self._lag:  # its file may be on the way, or SLURM puts it back
            self._ask_at = min(self._ask_at, now + self._lag)
            return
        if entry and entry.state in _LOST and job.lost < self.options.requeues:
            del self._open[job.number]
            job.again()
            self._new.append(job)
            return
        # a task that fails makes its job fail, so a completed job is a task that ended well
        code, seconds = 0 if entry and entry.state == "COMPLETED" else 1, job.seconds()
        before = job.batch.left(job.task.key) if job.batch else None
        if before:
            code, seconds = before
        else:
            if code:
                job.explain(entry)
            if job.batch:
                job.batch.leave(job.task.key, code, seconds)
        self._close(job, code, seconds)

    def _close(self, job: SlurmJob, code: int, seconds: float) -> None:
        del self._open[job.number]
        job.code, job.took = code, seconds
        left: list[SlurmJob | Sent] = [*self._open.values(), *self._alive.values()]
        if job.batch and not any(other.batch is job.batch for other in left):
            self._ended.append((time.monotonic(), job.batch))


class SlurmJob:
    """A task in SLURM's hands.

    Args:
        executor: looks after it.
        task: that it runs.
        log: receives the task's output.
    """

    def __init__(self, executor: SlurmExecutor, task: Task, log: Path):
        self._executor = executor
        self.task, self.log = task, log
        self.batch: Batch | None = None
        self.number = ""
        self.code: int | None = None
        self.took = self.since = self.missing = 0.0
        self.lost = 0

    def sent(self, batch: Batch, number: str) -> None:
        """Note where it is."""
        self.batch, self.number = batch, number

    def again(self) -> None:
        """Note that it was lost and will be submitted once more."""
        self.batch, self.number, self.since, self.missing = None, "", 0.0, 0.0
        self.lost += 1

    def result(self) -> int | None:
        """Return the exit code, None while it waits or runs."""
        if self.code is None:
            self._executor.look()
        return self.code

    def seconds(self) -> float:
        """Return how long it runs, or ran; of a task that was put back, its last attempt."""
        if self.code is not None:
            return self.took
        return time.monotonic() - self.since if self.since else 0.0

    def stop(self) -> None:
        """Take it out of the queue."""
        if self.batch and self.code is None:
            end([self.number], [self.batch])

    def explain(self, entry: Entry | None) -> None:
        """Write behind its log why it left the queue without an exit code, as far as SLURM says."""
        output = self.batch.output(self.number) if self.batch else ""
        if entry:
            advice = _ADVICE.get(entry.state, "")
            reason = f" ({entry.reason})" if entry.reason not in ("", "None", "NonZeroExitCode") else ""
            sentence = f"SLURM ended job {self.number}: {entry.state}{reason}. {advice}"
        else:
            sentence = (
                f"SLURM job {self.number} has left the queue without an exit code: "
                "cancelled, out of time or memory, or its node failed."
            )
        with open(self.log, "a", encoding="utf-8") as log:
            print(f"\n{output}\n{sentence.strip()}".replace("\n\n", "\n"), file=log)


def _too_many(refusal: str) -> bool:
    """Whether sbatch refused because of the number of jobs; its last line names all limits at once, time among them."""
    limits = re.findall(r"\w+Max\w+", refusal)
    return any("Submit" in limit for limit in limits) if limits else "submit limit" in refusal


def longest_array() -> int:
    """Return how many tasks one array of this cluster may have."""
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"SLURM does not answer here ({error}). Run the study on a machine that submits jobs."
        ) from error
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise UserError(f"SLURM does not answer here: {done.stderr.strip()}")
    return max(1, int(found[1]))


def _submitit() -> Any:
    try:
        import submitit
        import submitit.helpers
    except ImportError as error:
        raise UserError(
            'SLURM needs submitit: pip install "nnunet_dgplugins[slurm]", or pip install submitit.'
        ) from error
    return submitit
