"""What the benchmarks share: variants timed in turn, and peaks of memory, each in a process of its own."""

from __future__ import annotations

import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

#: what, published order of work (or without), ours (or with), ratio, note
Row = tuple[str, str, str, str, str]
Name = TypeVar("Name", bound=Hashable)


def in_turn(
    variants: Mapping[Name, Callable[[], object]], repeats: int, device: torch.device | None = None
) -> dict[Name, float]:
    """Run the variants in turn and return the median seconds of each; one round warms up."""
    times: dict[Name, list[float]] = {name: [] for name in variants}
    for number in range(repeats + 1):
        for name, work in variants.items():
            _wait(device)
            begun = time.perf_counter()
            work()
            _wait(device)
            if number:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def place(device: torch.device) -> str:
    """Return the GPU's name, or how many threads the CPU uses."""
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"


def gpu_peak(work: Callable[[], object]) -> float:
    """Return what torch allocates on the GPU at most while it works, GB."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e9


def peak_of_process(script: str, *words: object) -> float:
    """Return what ``python script words`` prints last: the peak of a process of its own, GB."""
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def own_peak() -> float:
    """Return the largest resident memory of this process so far, libraries included, GB."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss on Linux also remembers the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found
        return int(found[1]) * 1024 / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
