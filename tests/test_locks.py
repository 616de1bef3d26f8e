"""A file is held by one process at a time, and by none that has died."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.locks import held, holder, other_host

pytest.importorskip("fcntl")
HOLD = """
import os, sys, time
from pathlib import Path
from nnunet_dgplugins.locks import held
with held(Path(sys.argv[1]), "works"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed_even_if_its_workers_live_on(tmp_path: Path):
    file = tmp_path / "new" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"Process {holder.pid} works now"), held(file, "works"):
            pytest.fail("held twice")
        holder.kill()
        holder.wait()
        assert Path(f"/proc/{worker}").exists() or sys.platform != "linux"
        with held(file, "works"):
            assert file.is_file()
    finally:
        subprocess.run(["kill", "-9", str(worker)], check=False)


def test_who_holds_a_file_on_another_machine_is_named_with_it(tmp_path: Path):
    file = tmp_path / "lock"
    with held(file, "works"):
        pass
    assert other_host(file) == ""
    file.write_text("12 login2")
    assert other_host(file) == "login2"
    file.write_text("12")
    assert other_host(file) == ""


def test_a_disk_without_locks_is_worked_on_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with held(tmp_path / "lock", "works"):
        assert "a disk without locks" in capsys.readouterr().err
        assert holder(tmp_path / "lock") is None
