"""A folder that one process works in at a time."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_dgplugins.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def held(file: Path, what: str) -> Iterator[None]:
    """Hold ``file`` until the block or the process ends, however it ends; it receives the process's number and machine.

    The lock is the kernel's: a file left by a killed process holds nothing back. On Windows, and on network disks that
    know no locks, nothing is locked.

    Args:
        file: made where missing, and left behind; only processes that ask for the same file shut each other out.
        what: what the process does, for the message.

    Raises:
        UserError: another process holds it.
    """
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+") as handle:
        try:
            # not flock: workers of a loader would inherit it, and they outlive a killed training
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            handle.seek(0)
            process, host = _noted(handle.read())
            where = f"{process} on {host}" if host else process
            raise UserError(f"Process {where} {what} now. Wait for it, or stop it.") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"Note: {file.parent} is on a disk without locks; run nothing else there.", file=sys.stderr)
        handle.truncate(0)
        handle.write(f"{os.getpid()} {socket.gethostname()}")
        handle.flush()
        yield


def holder(file: Path) -> int | None:
    """Return the process that holds ``file``, None if there is none (always where nothing is locked).

    Not for the holder itself: a process loses its lock when it closes the file a second time.
    """
    if importlib.util.find_spec("fcntl") is None or not file.is_file():
        return None
    import fcntl

    with open(file, "r+") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return int(_noted(handle.read())[0])
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return None


def other_host(file: Path) -> str:
    """Return the machine on which ``file`` was held last, "" where that is this one: folders may be shared."""
    return _noted(file.read_text())[1]


def _noted(text: str) -> tuple[str, str]:
    process, _, host = text.strip().partition(" ")
    return process, "" if host == socket.gethostname() else host
