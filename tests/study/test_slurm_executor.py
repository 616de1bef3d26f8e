"""What a study asks of SLURM, and what follows when SLURM refuses or loses a job; its commands are small scripts."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nnunet_dgplugins.cli.study import command
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.study import slurm
from nnunet_dgplugins.study.slurm_file import Resources, Slurm, read_slurm
from nnunet_dgplugins.study.slurm_queue import Batch, NoAnswer, resume, survey
from nnunet_dgplugins.study.slurm_task import OnNode
from nnunet_dgplugins.study.state import State
from nnunet_dgplugins.study.tasks import Task

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="clusters run Linux")

#: notes each array's options; refuses more jobs than the file `limit` says are free
_SBATCH = """#!/bin/bash
script="${@: -1}"
size=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script"); size=$((${size:-0} + 1))
free=$(cat limit)
if [ "$size" -gt "$free" ]; then
  echo "sbatch: error: $(cat kind)" >&2
  echo "sbatch: error: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)" >&2
  exit 1
fi
echo $((free - size)) > limit
number=$(($(cat number) + 1)); echo $number > number
grep '^#SBATCH' "$script" | sed "s/^/$size /" >> submitted
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
for i in $(seq 0 $((size - 1))); do
  element=$i; [ "$size" -gt 1 ] || element=N/A
  echo "$number|$element|$name|PENDING|Priority" >> queue
done
echo "Submitted batch job $number"
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with SLURM's commands as scripts; `queue` is what squeue prints."""
    pytest.importorskip("submitit")
    folder = tmp_path / "cluster"
    folder.mkdir()
    texts = {
        "sbatch": _SBATCH,
        "squeue": "#!/bin/bash\n[ ! -e silent ] || exit 1\ncat queue\n",
        "scontrol": "#!/bin/bash\necho 'MaxArraySize            = 4'\n",
        "scancel": "#!/bin/bash\necho $@ >> cancelled\n",
        "srun": "#!/bin/bash\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text.replace("#!/bin/bash\n", f"#!/bin/bash\ncd {folder}\n", 1))
        (folder / name).chmod(0o755)
    files = {"limit": "1000", "kind": "QOSMaxSubmitJobPerUserLimit", "number": "0", "queue": "", "submitted": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_PACE", 0.0)
    monkeypatch.setattr(slurm, "_RETRY", 0.0)
    monkeypatch.setattr(slurm, "_READ", 0.0)
    return folder


def tasks(number: int, *words: str) -> list[Task]:
    return [Task(f"task {i}", "no-op", ("true", str(i), *words)) for i in range(number)]


def sizes(scripts: Path) -> list[int]:
    lines = (scripts / "submitted").read_text().splitlines()
    return [int(line.split()[0]) for line in lines if "--job-name=" in line]


def started(out: Path, wanted: list[Task], executor: slurm.SlurmExecutor) -> list[slurm.SlurmJob]:
    jobs = [executor.start(task, State(out).log(task)) for task in wanted]
    executor.look()
    return jobs


def test_only_tasks_on_cuda_ask_for_a_gpu_and_arrays_are_as_long_as_the_cluster_allows(tmp_path: Path, scripts: Path):
    options = Slurm(Resources(partition="gpu", memory="32G"), Resources(partition="cpu", gpus=0))
    executor = slurm.SlurmExecutor(tmp_path, options)
    started(tmp_path, [*tasks(5), *tasks(2, "-device", "cuda")], executor)
    text = (scripts / "submitted").read_text()
    assert sizes(scripts) == [4, 1, 2]
    assert {line for line in text.splitlines() if "partition" in line or "gpus" in line} == {
        "4 #SBATCH --partition=cpu", "1 #SBATCH --partition=cpu", "2 #SBATCH --partition=gpu",
        "2 #SBATCH --gpus-per-node=1",
    }  # fmt: skip
    assert text.count("--requeue") == 3
    assert "2 #SBATCH --mem=32G" in text


def test_refused_tasks_are_submitted_in_smaller_parts_and_the_rest_later(tmp_path: Path, scripts: Path):
    (scripts / "limit").write_text("3")
    executor = slurm.SlurmExecutor(tmp_path, Slurm(), every=0.0)
    started(tmp_path, tasks(4), executor)
    assert sizes(scripts) == [2, 1]
    (scripts / "limit").write_text("10")
    executor.look()
    assert sizes(scripts) == [2, 1, 1]
    assert len({one.key for one in survey(tmp_path) if one.alive}) == 4


def test_a_refusal_that_waiting_does_not_help_is_an_error(tmp_path: Path, scripts: Path):
    (scripts / "limit").write_text("0")
    executor = slurm.SlurmExecutor(tmp_path, Slurm())
    with pytest.raises(UserError, match=r"SLURM refuses task 0: .*QOSMaxSubmitJobPerUserLimit"):
        started(tmp_path, tasks(2), executor)
    assert not list((tmp_path / "slurm").glob("*/batch.json"))
    (scripts / "limit").write_text("1")
    (scripts / "kind").write_text("QOSMaxWallDurationPerJobLimit")
    with pytest.raises(UserError, match=r"SLURM refuses task 0: .*QOSMaxWallDurationPerJobLimit"):
        started(tmp_path, tasks(2), executor)  # one of them would be taken: fewer are not tried for another limit


def test_a_task_of_a_lost_node_is_submitted_again_and_a_job_out_of_memory_is_a_failure(tmp_path: Path, scripts: Path):
    executor = slurm.SlurmExecutor(tmp_path, Slurm(), every=0.0, lag=0.0)
    jobs = started(tmp_path, tasks(2), executor)
    queue = scripts / "queue"
    lines = queue.read_text().replace("PENDING|Priority", "NODE_FAIL|None", 1)
    queue.write_text(lines.replace("PENDING|Priority", "OUT_OF_MEMORY|OutOfMemory"))
    executor.look()
    executor.look()
    assert sizes(scripts) == [2, 1]
    assert [job.result() for job in jobs] == [None, 1]
    assert "SLURM ended job 1_1: OUT_OF_MEMORY (OutOfMemory). Give its tasks more `memory`." in jobs[1].log.read_text()


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED"])
def test_a_file_that_the_disk_lists_late_decides_and_is_never_overwritten(
    tmp_path: Path, scripts: Path, monkeypatch: pytest.MonkeyPatch, state: str
):
    executor = slurm.SlurmExecutor(tmp_path, Slurm(), every=0.0, lag=0.0)
    jobs = started(tmp_path, tasks(2), executor)
    assert jobs[0].batch
    real = jobs[0].batch.exit_file(jobs[0].task.key)
    jobs[0].batch.leave(jobs[0].task.key, 3, 7.0)
    monkeypatch.setattr(Batch, "ended", lambda self: set())
    queue = scripts / "queue"
    queue.write_text(queue.read_text().replace("PENDING|Priority", f"{state}|None"))
    executor.look()
    assert [job.result() for job in jobs] == [3, 0 if state == "COMPLETED" else 1]
    assert jobs[0].seconds() == 7.0
    assert json.loads(real.read_text()) == {"code": 3, "seconds": 7.0}
    assert jobs[1].batch
    assert jobs[1].batch.left(jobs[1].task.key) == (jobs[1].result(), 0.0)
    assert jobs[1].log.exists() == (state == "FAILED")  # the reason stands there


def test_a_silent_controller_is_waited_for_and_then_the_driver_ends(
    tmp_path: Path, scripts: Path, monkeypatch: pytest.MonkeyPatch
):
    executor = slurm.SlurmExecutor(tmp_path, Slurm(), every=0.0, lag=0.0)
    jobs = started(tmp_path, tasks(2), executor)
    (scripts / "silent").touch()
    assert [job.result() for job in jobs] == [None, None]
    with pytest.raises(NoAnswer):
        survey(tmp_path)
    monkeypatch.setattr(slurm, "_SILENCE", 0.0)
    with pytest.raises(UserError, match="Jobs go on without this process"):
        executor.look()
    assert jobs[0].batch
    for job in jobs:
        job.batch.leave(job.task.key, 0, 1.0)
    assert [one.code for one in survey(tmp_path)] == [0, 0]  # squeue need not be asked any more


def test_what_ended_while_nobody_looked_is_noted_and_what_waits_is_not_submitted_again(tmp_path: Path, scripts: Path):
    wanted, state = tasks(3), State(tmp_path)
    job = started(tmp_path, wanted, slurm.SlurmExecutor(tmp_path, Slurm()))[0]
    assert job.batch
    job.batch.leave(wanted[0].key, 0, 7.0)
    job.batch.leave(wanted[1].key, 2, 1.0)
    alive = resume(tmp_path, wanted, state)
    assert [one.key for one in alive] == [wanted[2].key]
    assert [state.of(task) for task in wanted] == ["done", "failed", ""]
    started(tmp_path, wanted[2:], slurm.SlurmExecutor(tmp_path, Slurm(), alive))
    assert sizes(scripts) == [3]


def test_a_node_leaves_the_exit_code_and_does_not_repeat_what_ended(tmp_path: Path):
    words = (sys.executable, "-c", f"open({str(tmp_path / 'trace')!r}, 'a').write('x'); raise SystemExit(4)")
    call = OnNode("task", words, {}, str(tmp_path / "log"), str(tmp_path / "exit.json"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        for _ in range(2):  # put back behind its end it is still a failure: COMPLETED always means success
            with pytest.raises(RuntimeError, match="failed with 4"):
                call()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "trace").read_text() == "x"
    assert '"code": 4' in (tmp_path / "exit.json").read_text()


def test_a_slurm_file_says_what_tasks_without_a_gpu_take_instead(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "{partition: gpu, time: 600, gpus: 'a100:1', setup: [module load cuda], sbatch: {constraint: big}, queue: 50,"
        " cpu: {partition: cpu, time: 30}}"
    )
    options = read_slurm(file)
    assert options.queue == 50
    setup, sbatch = ("module load cuda",), {"constraint": "big"}
    assert options.gpu == Resources(partition="gpu", time=600, gpus="a100:1", setup=setup, sbatch=sbatch)
    assert options.cpu == Resources(partition="cpu", time=30, gpus=0, setup=setup)  # whose nodes are not big
    file.write_text("{sbatch: {reservation: ours}, cpu: {time: 30}}")
    assert read_slurm(file).cpu.sbatch == {"reservation": "ours"}  # on the same partition
    file.write_text("{sbatch: {constraint: big}, cpu: {partition: cpu, sbatch: {constraint: small}}}")
    assert read_slurm(file).cpu.sbatch == {"constraint": "small"}
    file.write_text("")
    assert read_slurm(file) == Slurm()


@pytest.mark.parametrize(
    ("written", "minutes"), [("240", 240), ("4:00:00", 240), ("'4:00:00'", 240), ("00:59:01", 60), ("100:00:00", 6000)]
)
def test_a_time_is_minutes_or_hours_minutes_seconds(tmp_path: Path, written: str, minutes: int):
    file = tmp_path / "cluster.yaml"
    file.write_text(f"{{time: {written}, cpu: {{time: {written}}}}}")
    options = read_slurm(file)
    assert (options.gpu.time, options.cpu.time) == (minutes, minutes)


@pytest.mark.parametrize("written", ["4:00", "'4:00'", "1-00:00:00", "0:00:00"])
def test_a_time_that_may_mean_two_things_or_nothing_is_refused(tmp_path: Path, written: str):
    file = tmp_path / "cluster.yaml"
    file.write_text(f"time: {written}")
    with pytest.raises(BadInput, match="time"):
        read_slurm(file)


def test_a_bad_slurm_file_is_refused_with_all_its_problems(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text("{partitions: gpu, time: 4h, cpus: 0, sbatch: {--array: 3}, cpu: {gpus: 1}, queue: 0}")
    with pytest.raises(BadInput) as caught:
        read_slurm(file)
    assert [problem.where for problem in caught.value.problems] == [
        "partitions", "time", "cpus", "sbatch", "cpu, gpus", "queue, requeues",
    ]  # fmt: skip
    assert "did you mean 'partition'?" in str(caught.value)


def test_a_study_whose_device_is_auto_is_not_submitted(tmp_path: Path):
    study, cluster = tmp_path / "tiny.yaml", tmp_path / "cluster.yaml"
    study.write_text(
        "{datasets: {tiny: {convert: prostate-saml, prepare: 'true {download}', first_id: 701, sources: [HK]}},"
        " methods: {stock: {trainer: nnUNetTrainer}}, budget: {iterations: 1}}"
    )
    cluster.write_text("{}")
    with pytest.raises(UserError, match="Write device: cuda, or cpu"):
        CliRunner().invoke(command, [str(study), "--slurm", str(cluster)], catch_exceptions=False)
    assert not (tmp_path / "tiny").exists()
