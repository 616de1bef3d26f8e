"""Commands that are run once: stamps of finished steps, logs, a line of progress each. For scripts of many hours."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import click

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json, write_bytes, write_json

Word = str | Callable[[], str]


@dataclass(frozen=True)
class Step:
    """One command, run once.

    Args:
        folder: receives ``done/<name>`` (the seconds it took) and ``log/<name>.txt``.
        name: what it does.
        command: words; a function where a word is known only when earlier steps are done.
        environment: set for the command, over this process's own.
        kind: steps of one kind take about the same time.
    """

    folder: Path
    name: str
    command: Sequence[Word]
    environment: Mapping[str, str]
    kind: str = ""

    @property
    def stamp(self) -> Path:
        """File that says the step has ended well."""
        return self.folder / "done" / self.name

    def execute(self) -> None:
        """Run the command; a failure shows the end of its log."""
        log, started = self.folder / "log" / f"{self.name}.txt", time.monotonic()
        words = [word if isinstance(word, str) else word() for word in self.command]
        log.parent.mkdir(parents=True, exist_ok=True)
        # the commands beside this Python come first, also where its environment is not activated
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**os.environ, "PATH": path, **self.environment}
        with open(log, "w", encoding="utf-8") as out:
            code = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        if code:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
            raise UserError(f"{shlex.join(words)}\nfailed with {code}. Last lines of {log}:\n{tail}")
        write_bytes(self.stamp, f"{time.monotonic() - started:.1f}\n".encode())


def run_steps(steps: Sequence[Step], guesses: Mapping[str, float], after: Callable[[], object] = lambda: None) -> None:
    """Run what is not done, one line each.

    Args:
        steps: in their order.
        guesses: seconds by kind, until a step of the kind has been timed here.
        after: called behind every step that was run.

    Raises:
        UserError: a command failed.
    """
    started = time.monotonic()
    for number, step in enumerate(steps, 1):
        title = f"[{number}/{len(steps)}] {step.name}, {'/'.join(step.folder.parts[-2:])}"
        if step.stamp.is_file():
            click.echo(f"{title}: done before")
            continue
        left = [_expected(other, steps, guesses) for other in steps[number - 1 :] if not other.stamp.is_file()]
        gone = (time.monotonic() - started) / 60
        click.echo(f"{title}: about {left[0]:.0f} s; {gone:.1f} min gone, about {sum(left) / 60:.1f} min to go")
        step.execute()
        after()


def _expected(step: Step, steps: Sequence[Step], guesses: Mapping[str, float]) -> float:
    known = [
        float(s.stamp.read_text()) for s in steps if (s.kind, s.name) == (step.kind, step.name) and s.stamp.is_file()
    ]
    return mean(known) if known else guesses.get(step.kind or step.name, 5)


def claim(folder: Path, options: dict[str, object]) -> None:
    """Bind a folder to what its numbers come from.

    Raises:
        UserError: the folder belongs to other options.
    """
    file = folder / "options.json"
    kept = read_json(file) if file.is_file() else options
    changed = [f"{key}={kept.get(key)}, now {value}" for key, value in options.items() if kept.get(key) != value]
    if changed:
        raise UserError(f"{folder} was made with {'; '.join(changed)}. Use another name or --out, or remove it.")
    write_json(file, options)
