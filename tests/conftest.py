"""Shared fixtures: throw-away nnU-Net folders, the sample data, the golden vectors."""

from __future__ import annotations

import os
from pathlib import Path

# read when nnunetv2 is imported: one process, no background workers, no compilation
os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ.setdefault("nnUNet_compile", "f")
os.environ.setdefault("MPLBACKEND", "Agg")
# two workers with a thread each are quicker than one worker with two threads, and never fight over cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from nnunet_dgplugins import ext

ext.register()
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Folder with real images; the test is skipped where it is absent."""
    folder = Path(os.environ.get("DGPLUGINS_SAMPLE_DATA", HERE / "sample_data"))
    if not (folder / "manifest.csv").is_file():
        pytest.skip(f"no sample data at {folder} (set DGPLUGINS_SAMPLE_DATA)")
    return folder


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty nnUNet_raw, nnUNet_preprocessed and nnUNet_results under a temporary folder, which is returned."""
    return use_folders(tmp_path, monkeypatch)


def use_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point nnU-Net at three folders under ``root``.

    nnU-Net keeps the folders in objects of ``nnunetv2.paths`` that read the environment at each use.
    """
    for name in ("raw", "preprocessed", "results"):
        folder = root / f"nnUNet_{name}"
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(folder))
    return root
