"""Target cases are never opened in training: the kernel itself is asked, so libraries written in C are seen too."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
from conftest import World
from tiny_dataset import Recipe

_IN_ACCESS, _IN_OPEN = 0x1, 0x20
_EVENT = struct.Struct("iIII")


class Opened:
    """What is opened or read in some folders meanwhile, by this or any other process (Linux inotify)."""

    def __init__(self, *folders: Path):
        self._c = ctypes.CDLL(None, use_errno=True)
        self._handle = self._c.inotify_init1(os.O_NONBLOCK)
        assert self._handle >= 0, os.strerror(ctypes.get_errno())
        self._folders = {}
        for folder in folders:
            watch = self._c.inotify_add_watch(self._handle, os.fsencode(folder), _IN_OPEN | _IN_ACCESS)
            assert watch >= 0, os.strerror(ctypes.get_errno())
            self._folders[watch] = folder

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def paths(self) -> set[str]:
        """Return what was touched since the last call."""
        found = set()
        while True:
            try:
                block = os.read(self._handle, 1 << 16)
            except BlockingIOError:
                return found
            while block:
                watch, _, _, length = _EVENT.unpack_from(block)
                name = block[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
                found.add(str(self._folders[watch] / os.fsdecode(name)))
                block = block[_EVENT.size + length :]


linux = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")


@linux
@pytest.mark.parametrize("trainer", ["DeSAMTrainer", "DeSAMGridTrainer"])
def test_training_and_validation_open_nothing_of_the_target_cases(world: World, trainer: str):
    world.use(Recipe(), own=True)
    target = [world.raw / "imagesTs", world.raw / "labelsTs"]
    with Opened(*target, world.preprocessed / "nnUNetPlans_2d") as opened:
        world.command(trainer)
        paths = opened.paths()
        assert {path for path in paths if "Ts" in path} == set()
        assert any("case_0.b2nd" in path for path in paths)  # a library written in C is seen
        world.predict(world.model(trainer))
        assert any("imagesTs" in path for path in opened.paths())  # and so would the target have been


@linux
def test_only_the_folds_own_cases_decide_the_weights(world: World):
    """Other cases of imagesTr may be looked at for their size, but not one of their voxels counts."""
    import shutil

    import torch

    world.use(Recipe(), own=True)
    world.write_splits([{"train": ["case_0", "case_1"], "val": ["case_2"]}])
    world.train()
    first = torch.load(world.model() / "fold_0" / "checkpoint_final.pth", weights_only=False)
    folder = world.preprocessed / "nnUNetPlans_2d"
    for kind in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copy(folder / f"case_0{kind}", folder / f"case_4{kind}")
    world.elsewhere("changed").train()
    second = torch.load(world.model() / "fold_0" / "checkpoint_final.pth", weights_only=False)
    for key, value in first["network_weights"].items():
        assert np.array_equal(value.numpy(), second["network_weights"][key].numpy()), key
