from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from public_trees import nci_isbi
from test_prostate_npy import write as write_npy
from trees import convert, image, saml, save

from dataset_conversion import Dataset501_ProstateSAML as module
from dataset_conversion import Dataset512_ProstateNPY, Dataset513_ProstatePublic
from nnunet_dgplugins.data import staging
from nnunet_dgplugins.errors import BadInput, UserError

NAME = "Dataset501_ProstateSAML_RUNMC"


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return saml(tmp_path / "in")


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_run_does_nothing_and_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(module, root)
    before = times_of(out)
    capsys.readouterr()
    convert(module, root)
    assert "nothing to do" in capsys.readouterr().out
    assert times_of(out) == before


def test_a_link_that_leads_nowhere_is_named(root: Path) -> None:
    path = next(root.rglob("Case00.nii.gz"))
    path.unlink()
    path.symlink_to("annex-object-not-fetched")
    with pytest.raises(BadInput, match=r"Case00\.nii\.gz.*cannot be read"):
        convert(module, root)


def test_folds_and_table_edited_by_the_user_survive_a_second_run(root: Path) -> None:
    out = convert(module, root)
    (out / "splits_final.json").write_text("[]")
    convert(module, root)
    assert (out / "splits_final.json").read_text() == "[]"


def test_a_file_lost_from_a_finished_dataset_comes_back(root: Path) -> None:
    out = convert(module, root)
    before = bytes_of(out)
    (out / "splits_final.json").unlink()
    convert(module, root)
    assert bytes_of(out) == before
    (out / "imagesTs" / "HK_Case00_0000.nii.gz").unlink()
    (out / "labelsTr" / "RUNMC_Case00.nii.gz").write_bytes(b"half")
    convert(module, root)
    assert bytes_of(out) == before


def test_other_input_or_options_under_the_same_name_need_overwrite(root: Path) -> None:
    out = convert(module, root)
    before = bytes_of(out)
    with pytest.raises(UserError, match="--overwrite"):
        convert(module, root, drop_empty_slices=True)
    save(root / "UCL" / "Case00.nii.gz", image(4711))
    with pytest.raises(UserError, match="--overwrite"):
        convert(module, root)
    assert bytes_of(out) == before
    convert(module, root, overwrite=True)
    after = bytes_of(out)
    assert {name for name in before if before[name] != after[name]} == {
        "imagesTs/UCL_Case00_0000.nii.gz",
        "dataset.json",
        staging.STAMP,
    }
    assert sorted(path.name for path in out.parent.iterdir()) == [NAME]


def test_overwriting_with_bad_input_leaves_the_old_dataset_alone(root: Path) -> None:
    out = convert(module, root)
    before = bytes_of(out)
    (root / "UCL" / "Case00.nii.gz").write_bytes(b"bad")
    with pytest.raises(BadInput):
        convert(module, root, overwrite=True)
    assert bytes_of(out) == before


def test_a_dataset_that_somebody_else_made_is_never_replaced(root: Path, nnunet_folders: Path) -> None:
    foreign = nnunet_folders / "nnUNet_raw" / NAME
    foreign.mkdir()
    (foreign / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not made by this command"):
        convert(module, root, overwrite=True)
    assert (foreign / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("where", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_an_id_with_another_name_is_refused_wherever_it_is(root: Path, nnunet_folders: Path, where: str) -> None:
    (nnunet_folders / where / "Dataset501_Else").mkdir()
    with pytest.raises(UserError, match="Id 501 is taken by"):
        convert(module, root, overwrite=True)
    assert convert(module, root, dataset_id=601).name == "Dataset601_ProstateSAML_RUNMC"


@pytest.mark.parametrize("where", ["nnUNet_preprocessed", "nnUNet_results"])
def test_preprocessed_data_or_results_of_other_content_are_refused(
    root: Path, nnunet_folders: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nnunet_folders / where / NAME / ("nnUNetTrainer__nnUNetPlans__2d" if "results" in where else "")
    model.mkdir(parents=True)
    (model / "dataset.json").write_text(json.dumps({"labels": {}}))
    with pytest.raises(UserError, match="belongs to other content"):
        convert(module, root)
    convert(module, root, overwrite=True)
    assert "out of date" in capsys.readouterr().err


def test_raw_data_deleted_to_save_disk_can_be_made_again_beside_their_results(root: Path, nnunet_folders: Path) -> None:
    out = convert(module, root)
    before = bytes_of(out)
    model = nnunet_folders / "nnUNet_results" / NAME / "nnUNetTrainer__nnUNetPlans__2d"
    model.mkdir(parents=True)
    shutil.copy(out / "dataset.json", model)
    shutil.rmtree(out)
    assert bytes_of(convert(module, root)) == before


def test_an_unfinished_run_of_other_input_is_thrown_away(root: Path, nnunet_folders: Path) -> None:
    folder = staging.start(nnunet_folders / "nnUNet_raw" / NAME, "another input")
    (folder / "imagesTr").mkdir()
    (folder / "imagesTr" / "stray_0000.nii.gz").write_bytes(b"old")
    out = convert(module, root)
    assert not (out / "imagesTr" / "stray_0000.nii.gz").exists()
    assert not folder.exists()


def test_copies_and_links_are_the_same_dataset(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(module, root)
    capsys.readouterr()
    convert(module, root, link=True)
    assert "nothing to do" in capsys.readouterr().out


def test_two_processes_write_the_same_bytes_as_one(root: Path, tmp_path: Path) -> None:
    one = bytes_of(convert(module, root))
    shutil.rmtree(tmp_path / "nnUNet_raw" / NAME)
    assert bytes_of(convert(module, root, jobs=2)) == one


SLOW = """
import importlib, sys, time
from dataset_conversion import _volumes
real = _volumes.write_case
def slow(*arguments):
    real(*arguments)
    time.sleep(0.2)
_volumes.write_case = slow
module = importlib.import_module(sys.argv[1])
module.command.main([sys.argv[2], "--source", "RUNMC", "--jobs", "1"])
"""


def npy(root: Path) -> Path:
    """Arrays of single slices; a case is read from several files."""
    for domain in (1, 2):
        for number in range(2):
            write_npy(root, domain, number)
    return root


@pytest.mark.parametrize(
    ("converter", "tree"),
    [(module, saml), (Dataset512_ProstateNPY, npy), (Dataset513_ProstatePublic, nci_isbi)],
    ids=["volumes", "npy", "dicom"],
)
def test_a_killed_conversion_is_invisible_to_nnunet_and_finishes_with_the_same_bytes(
    converter: ModuleType,
    tree: Callable[[Path], Path],
    tmp_path: Path,
    nnunet_folders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, raw = tree(tmp_path / "in"), nnunet_folders / "nnUNet_raw"
    first = convert(converter, root)
    whole = bytes_of(first)
    shutil.rmtree(first)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, converter.__name__, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    hidden = raw / f".dgplugins-{first.name}"
    deadline = time.monotonic() + 180
    while len(list(hidden.glob("labels*/[!.]*.nii.gz"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = next(hidden.glob("labels*/[!.]*.nii.gz"))
    before = kept.stat().st_mtime_ns
    (hidden / "imagesTr" / ".tmp-123-RUNMC_Case01_0000.nii.gz").write_bytes(b"half a file")
    assert not first.exists()
    capsys.readouterr()
    out = convert(converter, root)
    assert "Continuing an earlier run" in capsys.readouterr().out
    assert bytes_of(out) == whole
    assert (out / kept.relative_to(hidden)).stat().st_mtime_ns == before


PARALLEL = """
import sys, time
from nnunet_dgplugins import parallel
if __name__ == "__main__":
    parallel.run("Waiting", time.sleep, [(600,)] * 4, jobs=2)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_no_worker_outlives_a_killed_conversion(tmp_path: Path) -> None:
    script = tmp_path / "waiting_here.py"
    script.write_text(PARALLEL)
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE)

    def workers() -> list[int]:
        found = []
        for folder in Path("/proc").iterdir():
            try:
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
                if folder.name.isdigit() and parent == str(process.pid):
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended while we looked
        return found

    deadline = time.monotonic() + 180
    while len(workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)  # spawned workers need a moment to come up
    children = workers()
    assert len(children) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_worker_that_is_killed_gives_a_sentence_and_not_a_traceback() -> None:
    from nnunet_dgplugins import parallel

    with pytest.raises(UserError, match="a worker process was killed"):
        parallel.run("Dying", os._exit, [(9,), (9,)], jobs=2)


def test_a_full_disk_stops_cleanly_and_a_rerun_continues(
    root: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataset_conversion import _volumes

    save_file, calls = _volumes._save, []

    def full(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_volumes, "_save", full)
    with pytest.raises(UserError, match=r"writing stopped .*Run the same command again"):
        convert(module, root)
    assert not (nnunet_folders / "nnUNet_raw" / NAME).exists()
    monkeypatch.setattr(_volumes, "_save", save_file)
    assert convert(module, root).name == NAME
