"""Tasks run once, in order; failures, kills and cancels cost only what was running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.study.display import Bar, Lines, Progress
from nnunet_dgplugins.study.local import LocalExecutor
from nnunet_dgplugins.study.run import run_tasks
from nnunet_dgplugins.study.state import State
from nnunet_dgplugins.study.tasks import Task


def write(name: str, out: Path, needs: tuple[str, ...] = (), code: int = 0, text: str = "") -> Task:
    """A task that notes in ``out/trace`` that it ran."""
    script = f"open({str(out / 'trace')!r}, 'a').write({name + ' '!r}); print({text!r}); raise SystemExit({code})"
    return Task(name, name, (sys.executable, "-c", script), {}, needs)


def trace(out: Path) -> list[str]:
    file = out / "trace"
    return file.read_text().split() if file.is_file() else []


@pytest.mark.parametrize("slots", [1, 3])
def test_tasks_run_once_behind_what_they_need(tmp_path: Path, slots: int):
    first, other = write("first", tmp_path), write("other", tmp_path)
    second = write("second", tmp_path, (first.key, other.key))
    said: list[str] = []
    for _ in range(2):
        tasks = [first, other, second, second]
        assert run_tasks(tasks, State(tmp_path), LocalExecutor(slots), display=Lines(said.append)) == []
    assert sorted(trace(tmp_path)) == ["first", "other", "second"]
    assert trace(tmp_path)[-1] == "second"
    assert "3 tasks, 3 done before" in said[-1]


def test_a_program_that_is_not_there_is_a_failed_task(tmp_path: Path):
    missing, free = Task("missing", "missing", ("pyhton", "-V"), {}), write("free", tmp_path)
    said: list[str] = []
    assert run_tasks([missing, free], State(tmp_path), LocalExecutor(1), display=Lines(said.append)) == [missing]
    assert trace(tmp_path) == ["free"]
    assert "pyhton: No such file or directory" in "\n".join(said)


def test_what_another_task_overwrote_is_not_done_any_more(tmp_path: Path):
    chains = []
    for name in ("one", "other"):
        made = replace(write(name, tmp_path), replaces="dataset 741")
        plan = replace(write(f"plan-{name}", tmp_path, (made.key,)), replaces="plans of 741")
        chains.append([made, plan, write(f"train-{name}", tmp_path, (plan.key,))])
    again = [*chains[0], write("train-one-again", tmp_path, (chains[0][1].key,))]
    for tasks in (*chains, again):
        run_tasks(tasks, State(tmp_path), LocalExecutor(1), display=Lines(lambda text: None))
    found = trace(tmp_path)
    assert found[:6] == ["one", "plan-one", "train-one", "other", "plan-other", "train-other"]
    assert found[6:] == ["one", "plan-one", "train-one-again"]  # what it trains on is its own again


def test_a_failure_shows_its_log_and_stops_only_what_needs_it(tmp_path: Path):
    bad = write("bad", tmp_path, code=3, text="the reason")
    blocked, free = write("blocked", tmp_path, (bad.key,)), write("free", tmp_path)
    said: list[str] = []
    state = State(tmp_path)
    failed = run_tasks([bad, blocked, free], state, LocalExecutor(1), display=Lines(said.append))
    assert failed == [bad]
    assert trace(tmp_path) == ["bad", "free"]
    assert [state.of(task) for task in (bad, blocked, free)] == ["failed", "", "done"]
    text = "\n".join(said)
    assert "FAILED with 3: bad" in text
    assert "the reason" in text
    assert "1 tasks were not started" in text


def test_a_failed_task_is_tried_again_and_its_followers_run(tmp_path: Path):
    gate = tmp_path / "gate"
    script = f"import os; raise SystemExit(not os.path.exists({str(gate)!r}))"
    bad = Task("bad", "bad", (sys.executable, "-c", script))
    after = write("after", tmp_path, (bad.key,))
    run_tasks([bad, after], State(tmp_path), LocalExecutor(1), display=Lines(lambda text: None))
    gate.touch()
    assert run_tasks([bad, after], State(tmp_path), LocalExecutor(1), display=Lines(lambda text: None)) == []
    assert trace(tmp_path) == ["after"]


def test_processes_share_the_cores_and_do_not_see_a_trial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DGPLUGINS_SETTINGS", "/nowhere.yaml")
    script = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ.get('DGPLUGINS_SETTINGS'))"
    task = Task("shown", "shown", (sys.executable, "-c", script))
    state = State(tmp_path)
    executor = LocalExecutor(2, cores=4)
    assert executor.threads == 2
    run_tasks([task], state, executor, display=Lines(lambda text: None))
    assert state.tail(task) == "2 None"


_STUDY = """
import sys
from pathlib import Path
from nnunet_dgplugins.study.display import Bar, Lines, Progress
from nnunet_dgplugins.study.local import LocalExecutor
from nnunet_dgplugins.study.run import run_tasks
from nnunet_dgplugins.study.state import State
from nnunet_dgplugins.study.tasks import Task

out = Path(sys.argv[1])
note = "import os, sys, time; open(sys.argv[1], 'a').write(sys.argv[2] + ' %d ' % os.getpid()); "
sleep = "time.sleep(float(os.environ['SLEEP']))"
trace = str(out / "trace")
quick = Task("quick", "quick", (sys.executable, "-c", note, trace, "quick"))
slow = Task("slow", "slow", (sys.executable, "-c", note + sleep, trace, "slow"), {}, (quick.key,))
state = State(out)
with state.alone():
    state.forget_running()
    run_tasks([quick, slow], state, LocalExecutor(1))
"""


def start(out: Path, seconds: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _STUDY, str(out)], env={**os.environ, "SLEEP": str(seconds)})


def start_slow(out: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a study whose second task sleeps; return it and the sleeper's process id."""
    study = start(out, 60)
    for _ in range(600):
        words = trace(out)
        if "slow" in words and len(words) > words.index("slow") + 1:
            return study, int(words[words.index("slow") + 1])
        time.sleep(0.1)
    raise AssertionError(f"never started: {trace(out)}")


def gone(process: int) -> bool:
    """Whether a process has ended within some seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_ends_its_task_and_goes_on_behind_what_was_done(tmp_path: Path, number: int):
    study, sleeper = start_slow(tmp_path)
    with pytest.raises(UserError, match=f"Process {study.pid} runs this study"), State(tmp_path).alone():
        raise AssertionError("held by two")
    assert State(tmp_path).runner() == study.pid
    os.kill(study.pid, number)
    assert study.wait(30) != 0
    assert gone(sleeper)
    assert State(tmp_path).runner() is None
    assert start(tmp_path, 0).wait(60) == 0
    assert trace(tmp_path).count("quick") == 1
    assert trace(tmp_path).count("slow") == 2


def test_the_time_to_go_comes_from_tasks_of_the_kind(tmp_path: Path):
    state = State(tmp_path)
    a, b = (Task(name, "train stock", ("true", name)) for name in "ab")
    assert state.expected([a, b], 2.0) == {a.key: 150.0, b.key: 150.0}
    state.set(a, "done", 40.0)
    assert state.expected([a, b], 2.0)[b.key] == 40.0


def test_a_line_says_how_far_it_is_and_how_long_it_takes():
    said: list[str] = []
    Lines(said.append).started("train stock", Progress(3, 10, ["train stock"], 61.0, 3900.0))
    assert said == ["[3/10] train stock; 1 min gone, about 1 h 05 min to go"]


def test_on_a_terminal_one_bar_names_what_runs_and_messages_stay_above_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with Bar() as bar, bar._bar.console.capture() as captured:
        bar.started("train stock", Progress(3, 10, ["train stock", "embed"], 61.0, 3900.0))
        bar.say("FAILED: [red] is no colour here")
        bar._bar.refresh()
    text = captured.get()
    assert "3/10" in text
    assert "1 min gone, about 1 h 05 min to go" in text
    assert "train stock | embed" in text
    assert "FAILED: [red] is no colour here" in text
