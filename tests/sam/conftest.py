"""Small preprocessed datasets and weight files for the tests of ``sam``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sam_helpers import TINY, full_state, write_case

from nnunet_dgplugins.sam.models import SamModel


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep remembered hashes out of the developer's home, and the developer's weight files out of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("DGPLUGINS_SAM_DIR", raising=False)


@pytest.fixture
def preprocessed(tmp_path: Path) -> Path:
    """Two cases of three and two slices, two channels, inside ``<Dataset>/<data_identifier>``."""
    folder = tmp_path / "Dataset901_Small" / "nnUNetPlans_2d"
    random = np.random.default_rng(0)
    for case, depth in (("case_a", 3), ("case_b", 2)):
        write_case(folder, case, random.normal(size=(2, depth, 24, 30)))
    return folder


@pytest.fixture
def weight_file(tmp_path: Path) -> Callable[..., SamModel]:
    """Return a function that writes a weight file of vit_tiny's layout and gives the model that reads it."""

    def write(name: str = "own.pth", change: float = 0.0, **replaced: torch.Tensor) -> SamModel:
        path = tmp_path / "weights" / name
        path.parent.mkdir(exist_ok=True)
        state = full_state() | replaced
        state["image_encoder.neck.0.weight"] += change
        torch.save(state, path)
        return replace(TINY, name=f"vit_tiny:{path}", file=str(path), shipped=False)

    return write
