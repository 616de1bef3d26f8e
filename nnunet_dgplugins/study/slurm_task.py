"""What runs on a cluster's node: one task's command, and the file that says how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dgplugins.files import read_json, write_json
from nnunet_dgplugins.study.local import surroundings

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

_PATIENCE = 5.0  # seconds between a signal to the command and the same signal to us
_KILLED = 3600.0  # seconds until SLURM kills what it asked to end, at most; a job that ends before is not put back


@dataclass(frozen=True)
class OnNode:
    """Runs a task; submitit calls it on the node, and again whenever SLURM has put the job back.

    Args:
        name: of the task.
        command: words.
        environment: set for the command.
        log: receives its output.
        exit_file: receives ``code`` and ``seconds``, in one step, when the command has ended by itself. Without it the
            queue says what became of the task.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: str
    exit_file: str

    def __call__(self) -> None:
        """Run the command.

        Raises:
            RuntimeError: it failed; SLURM then calls the job failed too, and COMPLETED means that it ended well.
        """
        if Path(self.exit_file).is_file():  # put back behind its end
            if code := read_json(self.exit_file)["code"]:
                raise RuntimeError(f"{self.name}: has failed with {code}, see {self.log}")
            return
        asked_to_end: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: asked_to_end.append(number))
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
        began = time.monotonic()
        with open(self.log, "a" if attempt > 1 else "w", encoding="utf-8") as out:
            if attempt > 1:
                print(f"\nAttempt {attempt} of SLURM job {os.environ.get('SLURM_JOB_ID')}", file=out, flush=True)
            environment = surroundings(self.environment, int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
            code = subprocess.run(
                self.command, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            ).returncode
            if code < 0:
                # at a time limit the signal reaches the command and us, and submitit's handler puts the job back
                time.sleep(_PATIENCE)
            if code and asked_to_end:
                time.sleep(_KILLED)  # pre-empted or cancelled: this is no result
                raise RuntimeError(f"{self.name}: SLURM asked it to end.")
            if code < 0:
                print(f"Ended by {signal.Signals(-code).name}; SIGKILL often means too little memory.", file=out)
                code = 128 - code  # as a shell would say it
        write_json(self.exit_file, {"code": code, "seconds": time.monotonic() - began})
        if code:
            raise RuntimeError(f"{self.name}: failed with {code}, see {self.log}")

    def checkpoint(self) -> DelayedSubmission:
        """Return what to run when the job is put back: the same, because every task's command can go on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
