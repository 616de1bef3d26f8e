"""Tiny trees of the public sets of tagged patches, in their true layouts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from dataset_conversion._patch_command import collect
from dataset_conversion._patch_dataset import convert_patches
from dataset_conversion._patches import PatchRequest
from nnunet_dgplugins.errors import BadInput

SHAPE = (24, 20)  # rows, columns
Palette = Sequence[tuple[int, int, int]]
# as published, the last one excluded
LUAD = [(205, 51, 51), (0, 255, 0), (65, 105, 225), (255, 165, 0), (255, 255, 255)]
BCSS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (153, 0, 255), (255, 255, 255)]
WSSS = [(0, 64, 128), (64, 128, 0), (243, 152, 0), (255, 255, 255)]
FLAGS = [(1, 0, 0, 1), (0, 1, 0, 0), (1, 1, 1, 1), (0, 0, 1, 0)]  # of the training patches, in turn


def picture(path: Path, seed: int, shape: tuple[int, int] = SHAPE) -> Path:
    """Write an RGB PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)).save(path)
    return path


def bands(values: Sequence[int], shift: int = 0, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Vertical bands of the values; another shift has other pixels and the same values."""
    columns = np.minimum(np.arange(shape[1]) * len(values) // shape[1], len(values) - 1)
    return np.tile(np.asarray(values, np.uint8)[np.roll(columns, shift)], (shape[0], 1))


def mask(path: Path, array: np.ndarray, palette: Palette) -> Path:
    """Write a palette PNG whose pixels are class indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array.astype(np.uint8))
    if palette:
        image.putpalette([level for colour in palette for level in colour])
    image.save(path)
    return path


def _pairs(folder: Path, names: Sequence[str], seed: int, palette: Palette, shift: int) -> None:
    for number, name in enumerate(names):
        picture(folder / "img" / f"{name}.png", seed + number)
        mask(folder / "mask" / f"{name}.png", bands(range(len(palette)), shift), palette)


def luad(root: Path, train: int = 6, shift: int = 0, folder: str = "training") -> Path:
    """Two patients for training, others for validation and test; files at the top as in the archive."""
    for number in range(train):
        flags = " ".join(map(str, FLAGS[number % 4]))
        picture(root / folder / f"{1031280 + number % 2}-2300-{27920 + number}-[{flags}].png", number)
    _pairs(root / "val", ["387709-9108-71176", "387709-9108-71177"], 100, LUAD, shift)
    _pairs(root / "test", ["400000-1-2", "400000-1-3"], 200, LUAD, shift)
    for name in ("Readme.txt", "Example_for_using_image-level_label.py"):
        (root / name).write_text("text")
    return root


def bcss(root: Path, train: int = 6, shift: int = 0, folder: str = "train") -> Path:
    """One patch lacks its index, as some do."""
    for number in range(train):
        flags = "".join(map(str, FLAGS[number % 4]))
        index = "" if number == 1 else str(number)
        stem = f"TCGA-A1-A0S{number % 2}-DX1_xmin45749_ymin25055_MPP-0.2500+{index}"
        picture(root / folder / f"{stem}[{flags}].png", 300 + number)
    _pairs(root / "val", [f"TCGA-A2-A0CM-DX1_xmin1_ymin2_MPP-0.2500+{n}" for n in (247, 5)], 400, BCSS, shift)
    _pairs(root / "test", ["TCGA-A7-A0DA-DX1_xmin1_ymin2_MPP-0.2500+1"], 500, BCSS, shift)
    return root


def wsss(root: Path, train: int = 6, shift: int = 0, folder: str = "1.training") -> Path:
    """Sizes vary; the test images have no masks."""
    for number in range(train):
        flags = ", ".join(map(str, FLAGS[number % 4][:3]))
        shape = (20 + number, 30 - number)
        picture(root / folder / f"{436219 + number % 2}-7159-{48057 + number}-[{flags}].png", 600 + number, shape)
    _pairs(root / "2.validation", ["00", "01"], 700, WSSS, shift)
    (root / "2.validation" / "background-mask").mkdir()
    picture(root / "3.testing" / "img" / "00.png", 800)
    return root


def request_of(module: ModuleType, root: Path, **options: object) -> PatchRequest:
    return PatchRequest(root, **{"dataset_id": module.FACTS.dataset_id, "jobs": 1, **options})  # type: ignore[arg-type]


def convert(module: ModuleType, root: Path, **options: object) -> Path:
    """Run a public set's converter in this process."""
    request = request_of(module, root, **options)
    return convert_patches(collect(module.FACTS, request), request)


def refused(module: ModuleType, root: Path, **options: object) -> str:
    """Run a converter on input that it must refuse; return the report."""
    with pytest.raises(BadInput) as caught:
        convert(module, root, **options)
    return str(caught.value)


def content(folder: Path) -> dict:
    found: dict = json.loads((folder / "dataset.json").read_text())
    return found


def cases(folder: Path) -> dict[str, dict]:
    found: dict[str, dict] = content(folder)["dgplugins"]["cases"]
    return found


def fold(folder: Path) -> dict:
    (only,) = json.loads((folder / "splits_final.json").read_text())
    found: dict = only
    return found


def names(folder: Path) -> list[str]:
    """File names without ending and channel."""
    return sorted(path.stem.removesuffix("_0000") for path in folder.iterdir()) if folder.is_dir() else []


def read(path: Path) -> np.ndarray:
    """What nnU-Net's reader sees of a label: an 8-bit grey picture."""
    image = Image.open(path)
    assert image.mode == "L"
    return np.asarray(image)


def bytes_of(folder: Path, *parts: str) -> dict[str, str]:
    """Hash of every file below the parts of a dataset, of all of it without parts."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in parts or [""]
        for path in sorted([folder / part, *(folder / part).rglob("*")])
        if path.is_file()
    }
