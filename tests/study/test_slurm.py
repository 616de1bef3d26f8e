"""Studies on a real SLURM of one node; skipped where its packages are not installed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from nnunet_dgplugins.study.display import Lines
from nnunet_dgplugins.study.run import run_tasks
from nnunet_dgplugins.study.slurm import SlurmExecutor
from nnunet_dgplugins.study.slurm_file import Resources, Slurm
from nnunet_dgplugins.study.slurm_queue import cancel, resume, survey
from nnunet_dgplugins.study.state import State
from nnunet_dgplugins.study.tasks import Task

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_one_node.sh"
SMALL = Slurm(Resources(cpus=1, time=60), Resources(cpus=1, time=60, gpus=0), queue=8)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A SLURM of this machine; clients find it through SLURM_CONF."""
    missing = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name)]
    if missing or not hasattr(os, "getuid") or os.getuid():
        pytest.skip(f"a SLURM of one node needs root and {', '.join(missing) or 'munged, slurmctld, slurmd'}")
    pytest.importorskip("submitit")
    folder = tmp_path_factory.mktemp("slurm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "SLURM_PORT": port, "SLURM_CONF": str(folder / "slurm.conf")}
    log = folder / "start.txt"  # no pipe: the daemons would hold it open
    with open(log, "w") as output:
        words = ["bash", str(SCRIPT), "start", str(folder)]
        started = subprocess.run(words, env=environment, stdout=output, stderr=output, timeout=300, check=False)
    if started.returncode:
        pytest.skip(f"no SLURM starts on this machine: {log.read_text()[-500:]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", environment["SLURM_CONF"])
        yield folder
    subprocess.run(["bash", str(SCRIPT), "stop", str(folder)], env=environment, check=True, timeout=300)
    assert subprocess.run(["bash", str(SCRIPT), "status", str(folder)], env=environment, check=False).returncode == 1


def note(out: Path, name: str, seconds: float | str = 0.0, code: int = 0, needs: tuple[str, ...] = ()) -> Task:
    """A task that notes that it began, sleeps, and notes that it ended; seconds may be an expression."""
    script = "import sys, time\n" + (
        f"def say(word): open({str(out / 'trace')!r}, 'a').write({name!r} + word + ' ')\n"
        f"say('<'); time.sleep({seconds}); say('>'); sys.exit({code})"
    )
    return Task(name, name, (sys.executable, "-c", script), {}, needs)


def trace(out: Path) -> list[str]:
    return (out / "trace").read_text().split() if (out / "trace").is_file() else []


def wait(condition: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    for _ in range(int(seconds * 2)):
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"never: {what}")


def finish(out: Path, tasks: list[Task], said: list[str] | None = None) -> list[Task]:
    """Run tasks as the command does, found ones first."""
    state = State(out)
    executor = SlurmExecutor(out, SMALL, resume(out, tasks, state), every=1.0, lag=3.0)
    return run_tasks(tasks, state, executor, display=Lines((said if said is not None else []).append))


def numbers() -> int:
    """SLURM's next number: how many jobs, elements of arrays too, were submitted so far."""
    text = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"NEXT_JOB_ID\s*=\s*(\d+)", text)[0])


def urgent() -> None:
    """Submit a short job that takes the whole node from those of studies."""
    words = ["--partition=urgent", f"--cpus-per-task={os.cpu_count()}", "--output=/dev/null", "--wrap=sleep 2"]
    subprocess.run(["sbatch", *words], check=True)


def test_tasks_of_a_kind_go_as_an_array_and_a_failure_stops_only_what_needs_it(tmp_path: Path):
    first = [note(tmp_path, f"first{number}") for number in range(3)]
    bad = note(tmp_path, "bad", code=3)
    second, blocked = note(tmp_path, "second", needs=(first[0].key,)), note(tmp_path, "blocked", needs=(bad.key,))
    said: list[str] = []
    before = numbers()
    assert finish(tmp_path, [*first, bad, second, blocked], said) == [bad]
    assert sorted(trace(tmp_path)) == sorted(f"{t.name}{mark}" for t in (*first, bad, second) for mark in "<>")
    assert "FAILED with 3: bad" in "\n".join(said)
    assert numbers() - before == 5
    assert [State(tmp_path).of(task) for task in (*first, bad, second, blocked)] == [
        *["done"] * 3,
        "failed",
        "done",
        "",
    ]


@pytest.mark.parametrize("way", ["preempted", "near its time limit"])
def test_a_task_that_slurm_puts_back_runs_again_and_ends_well(tmp_path: Path, way: str):
    task = note(tmp_path, "long", seconds=f"600 if open({str(tmp_path / 'trace')!r}).read() == 'long< ' else 0")
    state = State(tmp_path)
    executor = SlurmExecutor(tmp_path, SMALL, every=1.0, lag=20.0)
    job = executor.start(task, state.log(task))
    wait(lambda: job.result() or trace(tmp_path), "the task's start")
    if way == "preempted":
        urgent()
    else:
        subprocess.run(["scancel", "--signal=USR2", job.number], check=True)
    wait(lambda: job.result() is not None, "the task's end")
    assert job.result() == 0
    assert trace(tmp_path) == ["long<", "long<", "long>"]
    assert "Attempt 2" in state.log(task).read_text()


def test_a_job_that_somebody_ends_is_a_failure_that_says_so(tmp_path: Path):
    task = note(tmp_path, "long", seconds=600)
    state = State(tmp_path)
    executor = SlurmExecutor(tmp_path, SMALL, every=1.0, lag=3.0)
    job = executor.start(task, state.log(task))
    wait(lambda: job.result() or trace(tmp_path), "the task's start")
    job.stop()
    assert wait(job.result, "the task's end") == 1
    assert re.search(r"SLURM ended job \d+: CANCELLED.*Somebody ended it", state.tail(task))
    assert not [one for one in survey(tmp_path) if one.alive]


_DRIVER = """
import sys
from pathlib import Path
from tests_slurm import SMALL, finish, note
out = Path(sys.argv[1])
first = note(out, "first", 0.0)
finish(out, [first, note(out, "second", 20.0, needs=(first.key,)), note(out, "third", 20.0, needs=(first.key,))])
"""


def test_a_killed_driver_is_followed_by_one_that_finds_its_jobs(tmp_path: Path):
    (tmp_path / "tests_slurm.py").write_text(Path(__file__).read_text())
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    words = [sys.executable, "-c", _DRIVER, str(tmp_path)]
    before = numbers()
    driver = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path})
    wait(lambda: {"second<", "third<"} & {*trace(tmp_path)}, "the second task's start")
    driver.kill()
    driver.wait()
    assert len([one for one in survey(tmp_path) if one.alive]) == 2
    assert subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, check=False).returncode == 0
    assert sorted(trace(tmp_path)) == sorted(f"{name}{mark}" for name in ("first", "second", "third") for mark in "<>")
    assert numbers() - before == 3
    assert len(list((tmp_path / "state" / "done").iterdir())) == 3


def test_jobs_of_a_driver_that_died_while_it_submitted_are_ended_and_their_tasks_run_once(tmp_path: Path):
    tasks = [note(tmp_path, name, seconds=5) for name in ("one", "two")]
    executor = SlurmExecutor(tmp_path, SMALL, every=1.0)
    jobs = [executor.start(task, State(tmp_path).log(task)) for task in tasks]
    executor.look()
    assert jobs[0].batch
    jobs[0].batch.submitted([])  # as it stands between sbatch and the note of the numbers
    assert finish(tmp_path, tasks) == []
    assert sum(word.endswith(">") for word in trace(tmp_path)) == 2


def test_cancelling_ends_what_waits_and_what_runs(tmp_path: Path):
    tasks = [note(tmp_path, f"task{number}", seconds=600) for number in range(6)]
    executor = SlurmExecutor(tmp_path, SMALL, every=1.0)
    for task in tasks:
        executor.start(task, State(tmp_path).log(task))
    executor.look()
    alive = [one for one in survey(tmp_path) if one.alive]
    assert len(alive) == 6
    cancel(alive)
    assert resume(tmp_path, tasks, State(tmp_path)) == []
    assert not list((tmp_path / "slurm").iterdir())


STUDY: dict[str, Any] = {
    "datasets": {
        "tiny": {
            "convert": "prostate-saml",
            "prepare": "python -m nnunet_dgplugins.phantom {download} --size tiny --cases 5",
            "first_id": 701,
            "sources": ["HK"],
        }
    },
    "methods": {"stock": {"trainer": "nnUNetTrainer"}, "DeSAM": {"trainer": "DeSAMTrainer"}},
    "baseline": "stock",
    "seeds": [0],
    "budget": {"iterations": 2},
    "mirroring": False,
    "device": "cpu",
}


def running_training(out: Path) -> bool:
    return any(
        one.alive and one.entry and one.entry.state == "RUNNING" and ": train" in one.name for one in survey(out)
    )


def test_a_study_survives_a_preempted_training_and_a_killed_driver(tmp_path: Path):
    file, cluster, out = tmp_path / "tiny.yaml", tmp_path / "cluster.yaml", tmp_path / "tiny"
    file.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    cluster.write_text(yaml.safe_dump({"cpus": 1, "time": 60, "queue": 6}))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    study = [str(Path(sys.executable).parent / "dgplugins"), "study", str(file)]
    before = numbers()
    driver = subprocess.Popen([*study, "--slurm", str(cluster)], env=environment)
    wait(lambda: driver.poll() is not None or running_training(out), "a running training", 900)
    urgent()
    driver.kill()
    driver.wait()
    alive = [one for one in survey(out) if one.alive]
    assert alive
    shown = subprocess.run([*study, "--status"], env=environment, capture_output=True, text=True, check=True).stdout
    assert "In SLURM's queue" in shown
    here = subprocess.run(study, env=environment, capture_output=True, text=True, check=False)
    assert here.returncode == 1
    assert "are in SLURM's queue" in here.stderr + here.stdout
    assert subprocess.run([*study, "--slurm", str(cluster)], env=environment, check=False).returncode == 0
    done = list((out / "state" / "done").iterdir())
    assert len(done) == 12
    assert not list((out / "state" / "running").iterdir())
    assert numbers() - before == 12 + 1  # every task once, and the urgent job
    assert set(pandas.read_csv(out / "results.csv")["method"]) == {"stock", "DeSAM"}
    assert sum("Attempt 2" in log.read_text() for log in (out / "log").iterdir()) >= 1
    again = subprocess.run(study, env=environment, capture_output=True, text=True, check=True).stdout
    assert "12 tasks, 12 done before" in again
