"""The memory allocator's setting."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from nnunet_dgplugins import system


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_on_glibc_the_setting_is_taken_and_can_be_undone():
    assert system.keep_freed_memory() == "allocator: glibc, freed memory kept"
    assert system.keep_freed_memory(False) == "allocator: glibc, defaults"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_faulted_in_again():
    code = """
import resource, sys
from nnunet_dgplugins.system import keep_freed_memory
keep_freed_memory(sys.argv[1] == "on")
def faults():
    bytes(bytearray(1)) ; before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = bytearray(48 << 20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    counts = {
        state: int(
            subprocess.run([sys.executable, "-c", code, state], capture_output=True, text=True, check=True).stdout
        )
        for state in ("on", "off")
    }
    assert counts["on"] * 10 < counts["off"]


def test_elsewhere_it_is_harmless(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert "left as it is" in system.keep_freed_memory()
