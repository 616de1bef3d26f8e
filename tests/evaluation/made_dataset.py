"""A raw nnU-Net dataset of a few voxels whose Dice values are known by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from nnunet_dgplugins.evaluation.evaluate import Dataset, Evaluation, evaluate

SPACING = (0.5, 1.0, 3.0)  # (x, y, z) mm
LENGTH = 10  # voxels of the reference's bar

# case: (site, voxels the prediction shares with the reference of LENGTH voxels; it is LENGTH long as well)
# so Dice = shared / LENGTH
CASES = {"A_1": ("A", 9), "A_2": ("A", 7), "B_1": ("B", 6), "C_1": ("C", 2), "C_2": ("C", 4), "C_3": ("C", 6)}


def write(values: np.ndarray, path: Path, spacing: Sequence[float] = SPACING) -> Path:
    """Write a (z, y, x) array with spacing (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing(spacing)
    SimpleITK.WriteImage(image, str(path))
    return path


def bar(start: int, value: int = 1, shape: tuple[int, int, int] = (6, 4, 24)) -> np.ndarray:
    """A bar of LENGTH voxels along x in slices 1 to 4, from ``start`` on."""
    labels = np.zeros(shape, np.uint8)
    labels[1:5, 1, start : start + LENGTH] = value
    return labels


def make(
    root: Path,
    labels: Mapping[str, Any] | None = None,
    source: str | None = "RUNMC",
    cases: Mapping[str, tuple[str, int]] = CASES,
    **extra: Any,
) -> Path:
    """Write Dataset501_Bars into ``root/nnUNet_raw`` and predictions into ``root/predictions``, which is returned."""
    raw = root / "nnUNet_raw" / "Dataset501_Bars"
    predictions = root / "predictions"
    table = {}
    for case, (site, shared) in cases.items():
        write(bar(2), raw / "labelsTs" / f"{case}.nii.gz")
        write(bar(2).astype(np.float32) * 50, raw / "imagesTs" / f"{case}_0000.nii.gz")
        write(bar(2 + LENGTH - shared), predictions / f"{case}.nii.gz")
        table[case] = {"site": site, "patient": case, "labelled": True}
    content = {
        "channel_names": {"0": "T2"},
        "labels": labels or {"background": 0, "prostate": 1},
        "numTraining": 0,
        "file_ending": ".nii.gz",
        **extra,
    }
    if source is not None:
        content["dgplugins"] = {"format": 1, "source": source, "cases": table, "protocol": {}}
    (raw / "dataset.json").write_text(json.dumps(content))
    return predictions


def evaluated(root: Path, protocol: str = "standard", **options: Any) -> Evaluation:
    """Make the dataset and evaluate its predictions."""
    predictions = make(root, **options)
    return evaluate(Dataset.load(501), predictions, protocol=protocol, jobs=1)
