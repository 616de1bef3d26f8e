"""What the operating system's memory allocator does to CPU speed, and how much memory a process has taken."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform

# numbers of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# glibc moves its thresholds up as large blocks are freed; this is where they end, and setting any stops the moving
_DEFAULTS = {_M_TRIM_THRESHOLD: 64 << 20, _M_TOP_PAD: 128 << 10, _M_MMAP_THRESHOLD: 32 << 20, _M_MMAP_MAX: 65536}
_KEEP = {_M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}
_LARGE = 1 << 30  # blocks above this still come from, and go back to, the kernel


def keep_freed_memory(on: bool = True) -> str:
    """Keep freed memory in the process instead of handing it back to the kernel.

    glibc maps every large block anew and unmaps it when freed, so that the kernel zeroes the same pages at every step
    of a network on the CPU. With other C libraries nothing is done.

    Args:
        on: keep it; False restores glibc's defaults.

    Returns:
        One line saying which setting is in force, for logs and benchmark tables.
    """
    if platform.libc_ver()[0] != "glibc":
        return "allocator: not glibc, left as it is"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "allocator: glibc without mallopt, left as it is"
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    accepted = [mallopt(option, value) == 1 for option, value in (_KEEP if on else _DEFAULTS).items()]
    if on:  # glibc before 2.35 refuses a threshold above 32 MiB; there no block at all is mapped
        accepted.append(mallopt(_M_MMAP_THRESHOLD, _LARGE) == 1 or mallopt(_M_MMAP_MAX, 0) == 1)
    if not all(accepted):
        return "allocator: glibc refused the setting, left as it is"
    return "allocator: glibc, freed memory kept" if on else "allocator: glibc, defaults"


def peak_memory() -> int | None:
    """Return the most memory this process has held at a time, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
