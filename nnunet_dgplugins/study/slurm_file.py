"""What a study's tasks ask of SLURM: one small file for all studies of a cluster. It decides no result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from nnunet_dgplugins.errors import BadInput, Problem, UserError, nearest
from nnunet_dgplugins.study.file import _misfit

#: options of sbatch that are decided here
_OURS = {"array", "error", "gpus-per-node", "job-name", "open-mode", "output", "time", "wrap"}
_TIME = re.compile(r"(\d+):([0-5]?\d):([0-5]?\d)")


@dataclass(frozen=True)
class Resources:
    """What one task asks for; names as sbatch's where it has one.

    Args:
        partition: one, or several with commas; None: the cluster's own choice.
        account: who pays.
        qos: quality of service.
        time: minutes of one attempt; a file may say ``4:00:00`` too. A task that needs longer is put back into the
            queue, where trainings go on from their last epoch.
        cpus: cores.
        gpus: a number, or kind and number (``a100:1``); 0 for tasks without a GPU.
        memory: as sbatch takes it, e.g. ``32G``; None: the cluster's own choice.
        setup: lines of shell that come first, such as ``module load cuda``.
        sbatch: further options of sbatch without their dashes; ``true`` for those without a value.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: int = 240
    cpus: int = 4
    gpus: int | str = 1
    memory: str | None = None
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self, name: str) -> dict[str, Any]:
        """Return submitit's parameters.

        Args:
            name: of the job.
        """
        own = {
            "job_name": name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem": self.memory,
            "setup": list(self.setup) or None,
            # a batch is as large as the queue may be; submitit would hold back all but 256 of it
            "array_parallelism": 1_000_000,
            # from SLURM 22.05 srun does not inherit the cores of sbatch
            "srun_args": ["--cpus-per-task", str(self.cpus)],
            "additional_parameters": {"requeue": True, **self.sbatch},
        }
        return {key: value for key, value in own.items() if value is not None}


@dataclass(frozen=True)
class Slurm:
    """The file.

    Args:
        gpu: of tasks that use a GPU: those whose command names ``cuda``.
        cpu: of all others: the same, without a GPU, with what stands under ``cpu``; without ``sbatch`` where that
            names a partition, whose nodes need not have what it asks for.
        queue: tasks in the queue at a time, waiting or running.
        requeues: how often a task is put back because its time was over or its node was lost.
    """

    gpu: Resources = field(default_factory=Resources)
    cpu: Resources = field(default_factory=lambda: Resources(gpus=0))
    queue: int = 200
    requeues: int = 10


def read_slurm(path: Path) -> Slurm:
    """Read a SLURM file.

    Raises:
        BadInput: with every problem of the file.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Leaves 4:00:00 as text, which YAML 1.1 takes for a number of base 60."""

    Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}  # a safe loader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    problems: list[Problem] = []
    hints = get_type_hints(Resources)
    whole = {key: hint for key, hint in get_type_hints(Slurm).items() if key in ("queue", "requeues")}
    values = _known("", content, {**hints, **whole, "cpu": Mapping[str, Any]}, problems)
    other = {key: value for key, value in hints.items() if key != "gpus"}
    cpu = _known("cpu, ", values.pop("cpu", {}), other, problems)
    own = {key: values.pop(key) for key in whole if key in values}
    if own.get("queue", 1) < 1 or own.get("requeues", 0) < 0:
        problems.append(Problem("queue, requeues", f"{own}", "queue from 1, requeues from 0"))
    if problems:
        raise BadInput(f"{path} is not a SLURM file", problems)
    shared = {key: value for key, value in values.items() if key != "sbatch" or "partition" not in cpu}
    return Slurm(Resources(**values), Resources(**{**shared, **cpu, "gpus": 0}), **own)


def _whole_number(loader: Any, node: Any) -> Any:
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


def _minutes(text: str) -> int | None:
    """Return hours:minutes:seconds as minutes, rounded up; None of other text: sbatch takes 4:00 for minutes."""
    found = _TIME.fullmatch(text)
    if not found:
        return None
    hours, minutes, seconds = map(int, found.groups())
    return 60 * hours + minutes + (seconds > 0)


def _known(where: str, content: Any, hints: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Return the values that fit; note the others."""
    if not isinstance(content, dict):
        problems.append(Problem(where or "file", repr(content), f"a mapping with {', '.join(hints)}"))
        return {}
    found = {}
    for key, given in content.items():
        value: Any = tuple(given) if isinstance(given, list) else given
        if key == "time" and isinstance(given, str):
            value = given if (minutes := _minutes(given)) is None else minutes
        if key not in hints:
            problems.append(Problem(f"{where}{key}", f"unknown key{nearest(str(key), hints)}"))
        elif expected := _misfit(value, hints[key]):
            expected += " of minutes, or hours:minutes:seconds" if key == "time" else ""
            problems.append(Problem(f"{where}{key}", repr(value), expected))
        elif key in ("time", "cpus") and value < 1:
            problems.append(Problem(f"{where}{key}", repr(value), "1 or more"))
        else:
            found[key] = value
    for key in found.get("sbatch", {}):
        if str(key).startswith("-") or str(key).replace("_", "-") in _OURS:
            known = ", ".join(item.name for item in fields(Resources))
            problems.append(Problem(f"{where}sbatch", str(key), "an option without dashes that is not decided here",
                                    f"Keys of the file: {known}."))  # fmt: skip
    return found
