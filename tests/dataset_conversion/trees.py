"""Tiny trees in the true layouts of the downloads."""

from __future__ import annotations

import multiprocessing.dummy
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

from dataset_conversion import _common
from dataset_conversion._facts import Request
from nnunet_dgplugins.errors import BadInput

SHAPE = (12, 14, 5)
AFFINE = np.array([[-0.6, 0, 0, 30], [0, -0.6, 0, 20], [0, 0, 3.6, -40], [0, 0, 0, 1.0]])


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine, dtype=array.dtype)
    named = path.with_name("plain.nii.gz" if path.name.lower().endswith(".gz") else "plain.nii")
    nibabel.save(image, named)
    return named.rename(path)


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)


def label(values: tuple[int, ...] = (1,), shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Organ in slices 1 and 2 of 5; the values stand side by side."""
    array = np.zeros(shape, np.uint8)
    for index, value in enumerate(values):
        array[3 + 2 * index : 5 + 2 * index, 4:9, 1:3] = value
    return array


def saml(root: Path, per_site: int = 2) -> Path:
    """The SAML tree: capital S at BMC, zones at RUNMC and BMC, a gap in BIDMC's numbers."""
    for index, site in enumerate(("RUNMC", "BMC", "I2CVB", "UCL", "BIDMC", "HK")):
        numbers = [n for n in range(per_site + 1) if (site, n) != ("BIDMC", 1)][:per_site]
        for number in numbers:
            suffix = "_Segmentation" if site == "BMC" else "_segmentation"
            values = (1, 2) if site in ("RUNMC", "BMC") else (1,)
            save(root / site / f"Case{number:02d}.nii.gz", image(100 * index + number))
            save(root / site / f"Case{number:02d}{suffix}.nii.gz", label(values))
    return root


def convert(module: object, root: Path, **options: object) -> Path:
    """Run a converter in this process."""
    request = Request(root, **{"sources": ("RUNMC",), "jobs": 1, **options})  # type: ignore[arg-type]
    return _common.convert(module.FACTS, module.list_cases, request)  # type: ignore[attr-defined]


def refused(module: object, root: Path, **options: object) -> BadInput:
    """Run a converter on input that it must refuse; return the report."""
    with pytest.raises(BadInput) as caught:
        convert(module, root, **options)
    return caught.value


def read(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def verify(folder: Path) -> None:
    """nnU-Net's own check, with threads in place of its processes: each of those would import torch anew."""
    from nnunetv2.experiment_planning import verify_dataset_integrity as module
    from nnunetv2.utilities import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda method: multiprocessing.dummy))
        patch.setattr(utils, "Pool", multiprocessing.dummy.Pool)
        module.verify_dataset_integrity(str(folder), num_processes=1)
