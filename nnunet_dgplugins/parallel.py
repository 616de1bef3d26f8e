"""Runs one function over many cases in several processes, with progress, and leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

import click

from nnunet_dgplugins.errors import UserError

Result = TypeVar("Result")


def run(
    what: str, function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], jobs: int
) -> list[Result]:  # fmt: skip
    """Return ``[function(*a) for a in arguments]``, computed by ``jobs`` processes.

    Args:
        what: shown beside the progress.
        function: defined at module level, so that spawned processes find it.
        arguments: one tuple per call.
        jobs: processes; 1 works in this one.

    Raises:
        UserError: a worker process was killed.
    """
    results: list[Any] = [None] * len(arguments)
    with _progress(what, len(arguments)) as advance:
        if jobs <= 1 or len(arguments) < 2:
            for index, values in enumerate(arguments):
                results[index] = function(*values)
                advance()
            return results
        # spawn: the same on every system, and safe beside the threads of numerical libraries
        pool = ProcessPoolExecutor(
            min(jobs, len(arguments)), multiprocessing.get_context("spawn"), initializer=_follow_parent
        )
        try:
            futures = {pool.submit(function, *values): index for index, values in enumerate(arguments)}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                advance()
        except BrokenProcessPool as error:
            raise UserError(
                f"{what}: a worker process was killed, often for want of memory. Run the same command again; "
                "--jobs 1 needs the least memory."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results


def _follow_parent() -> None:
    """End this worker when its parent is killed; a pool's workers would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step: a bar in a terminal, else a line for every tenth."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit="case") as bar:
            yield lambda: bar.update() and None
        return
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done * 10 // total > (done - 1) * 10 // total:
            click.echo(f"{what}: {done}/{total}", err=True)

    yield step
