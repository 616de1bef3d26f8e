"""Converting patches twice, after a kill, and after files were lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from patch_trees import bytes_of, convert, luad, picture
from patch_trees import mask as save_mask

from dataset_conversion import Dataset509_LUADHistoSeg as module
from nnunet_dgplugins.errors import UserError

NAME = "Dataset509_LUADHistoSeg_4classes_tags"


@pytest.fixture
def root(tmp_path: Path, nnunet_folders: Path) -> Path:
    return luad(tmp_path / "in")


def test_a_second_run_does_nothing_and_lost_files_come_back(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(module, root)
    before = bytes_of(out)
    capsys.readouterr()
    convert(module, root)
    assert "nothing to do" in capsys.readouterr().out
    (out / "imagesTs" / "LUAD_400000-1-2_0000.png").unlink()
    (out / "labelsTr" / "LUAD_1031280-2300-27920.png").write_bytes(b"half")
    convert(module, root)
    assert bytes_of(out) == before


def test_other_tags_or_another_validation_mask_need_overwrite(root: Path) -> None:
    convert(module, root)
    path = root / "training" / "1031280-2300-27920-[1 0 0 1].png"
    renamed = path.rename(path.with_name("1031280-2300-27920-[1 0 1 1].png"))
    with pytest.raises(UserError, match="--overwrite"):
        convert(module, root)
    renamed.rename(path)
    convert(module, root)
    truth = root / "val" / "mask" / "387709-9108-71176.png"
    save_mask(truth, np.zeros((24, 20)), [])
    with pytest.raises(UserError, match="--overwrite"):
        convert(module, root)
    convert(module, root, overwrite=True)
    picture(root / "training" / "9-9-9-[0 0 0 1].png", 9)
    with pytest.raises(UserError, match="--overwrite"):
        convert(module, root)


SLOW = """
import sys, time
from dataset_conversion import _pictures, Dataset509_LUADHistoSeg
real = _pictures.write_patch
def slow(*arguments):
    real(*arguments)
    time.sleep(0.2)
_pictures.write_patch = slow
Dataset509_LUADHistoSeg.command.main([sys.argv[1], "--jobs", "1"])
"""


def test_a_killed_conversion_is_invisible_to_nnunet_and_finishes_with_the_same_bytes(
    root: Path, nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bytes_of(convert(module, root))
    raw = nnunet_folders / "nnUNet_raw"
    shutil.rmtree(raw / NAME)
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    hidden = raw / f".dgplugins-{NAME}"
    deadline = time.monotonic() + 180
    while len(list(hidden.glob("labelsTr/[!.]*.png"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = next(hidden.glob("labelsTr/[!.]*.png"))
    before = kept.stat().st_mtime_ns
    (hidden / "imagesTr" / ".tmp-123-LUAD_0000.png").write_bytes(b"half a file")
    assert not (raw / NAME).exists()
    capsys.readouterr()
    out = convert(module, root)
    assert "Continuing an earlier run" in capsys.readouterr().out
    assert bytes_of(out) == whole
    assert (out / kept.relative_to(hidden)).stat().st_mtime_ns == before


def test_a_full_disk_stops_with_a_sentence(root: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataset_conversion import _pictures

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_pictures, "take", full)
        with pytest.raises(UserError, match=r"writing stopped .*Run the same command again"):
            convert(module, root)
    assert not (nnunet_folders / "nnUNet_raw" / NAME).exists()
    assert convert(module, root).name == NAME
