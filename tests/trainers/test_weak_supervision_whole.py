"""From downloads with equal tags and other masks to the last checkpoint: not one bit of the weights differs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK_DCAM, QUICK_EQUIVARIANT
from tiny_dataset import plan
from tiny_patches import plan_patches

from dataset_conversion import Dataset505_BraTS2019, Dataset509_LUADHistoSeg
from nnunet_dgplugins.files import write_json
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "dataset_conversion"))  # the trees of the converters' own tests

import patch_trees
import weak_trees


@dataclass(frozen=True)
class Method:
    """How a method gets from a download to its weights.

    Args:
        write: makes a download; another ``shift`` has other masks and the same tags.
        convert: makes a dataset of it.
        plan: plans and preprocesses a dataset by number and preprocessed folder.
        settings: of the trainers, in the order in which they train.
    """

    write: Callable[..., Path]
    convert: Callable[[Path], Path]
    plan: Callable[[int, Path], Any]
    settings: dict[str, dict[str, Any]]


METHODS = {
    "equivariant": Method(
        weak_trees.brats,
        lambda root: weak_trees.convert(Dataset505_BraTS2019, root),
        lambda number, folder: plan(number),
        {"EquivariantCAMTrainer": QUICK_EQUIVARIANT},
    ),
    "dcam": Method(
        patch_trees.luad,
        lambda root: patch_trees.convert(Dataset509_LUADHistoSeg, root),
        plan_patches,
        {
            "DCAMClassifierTrainer": {**QUICK_DCAM, "width_divisor": 32},
            "DCAMTrainer": {**QUICK_DCAM, "network": "planned"},
        },
    ),
}


def trained(
    method: Method, root: Path, shift: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, bytes]]:
    """Do everything in folders of its own; return each trainer's weights, and the masks of the validation cases."""
    from nnunetv2.run.run_training import get_trainer_from_args

    for kind in ("raw", "preprocessed", "results"):
        (root / f"nnUNet_{kind}").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{kind}", str(root / f"nnUNet_{kind}"))
    write_json(root / "settings.json", method.settings)
    monkeypatch.setenv("DGPLUGINS_SETTINGS", str(root / "settings.json"))
    raw = method.convert(method.write(root / "download", shift=shift))
    number = int(raw.name[len("Dataset") :][:3])
    method.plan(number, root / "nnUNet_preprocessed" / raw.name)
    weights = {}
    for name in method.settings:
        get_trainer_from_args(str(number), "2d", 0, name, device=torch.device("cpu")).run_training()
        model = root / "nnUNet_results" / raw.name / f"{name}__nnUNetPlans__2d"
        weights[name] = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    return weights, {path.name: path.read_bytes() for path in sorted((raw / "labelsVal").iterdir())}


@pytest.mark.parametrize("name", METHODS)
def test_downloads_with_equal_tags_and_other_masks_end_in_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, masks = trained(METHODS[name], tmp_path / "first", 0, monkeypatch)
    second, others = trained(METHODS[name], tmp_path / "second", 3, monkeypatch)
    assert masks.keys() == others.keys()
    assert masks
    assert all(others[case] != mask for case, mask in masks.items())
    for trainer, weights in first.items():
        assert weights.keys() == second[trainer].keys()
        for key, value in weights.items():
            assert torch.equal(value, second[trainer][key]), (trainer, key)
