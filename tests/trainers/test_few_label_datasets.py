"""A dataset with unlabelled cases in nnU-Net itself: planned, preprocessed, and what a stock trainer draws from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_dataset import Recipe, case_arrays, plan, write_image

from dataset_conversion import Dataset514_SimulatedVendors as module
from dataset_conversion._common import convert
from dataset_conversion._facts import Request
from nnunet_dgplugins.data.case_table import CaseTable


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients at each of three vendors, one of each of two vendors labelled; the third vendor is the target."""
    root = tmp_path_factory.mktemp("few")
    recipe = Recipe(classes=3)
    for number in range(6):
        image, label = case_arrays(recipe, number)
        site = root / "in" / f"Sim{'ABD'[number // 2]}"
        write_image(site / f"patient{number:03d}_frame01.nii.gz", image[0], recipe.spacing)
        write_image(site / f"patient{number:03d}_frame01_gt.nii.gz", label, recipe.spacing)
    (root / "in" / "README.txt").write_text("simulated")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / f"nnUNet_{name}").mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / f"nnUNet_{name}"))
        convert(module.FACTS, module.list_cases, Request(root / "in", 950, targets=("SimD",), labelled=1, jobs=1))
        plan(950)
    return root


def trainer_of(folders: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A stock nnUNetTrainer on fold 0."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(folders / f"nnUNet_{name}"))
    return get_trainer_from_args("950", "2d", 0, "nnUNetTrainer", "nnUNetPlans", False, torch.device("cpu"))


def test_a_stock_trainer_sees_labelled_source_cases_only(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(folders, monkeypatch)
    table = CaseTable.from_dataset_json(trainer.dataset_json)  # type: ignore[attr-defined]
    assert table is not None
    train, val = trainer.do_split()  # type: ignore[attr-defined]
    assert sorted(train) == sorted(val) == ["SimA_patient000_frame01", "SimB_patient002_frame01"]
    assert all(table.cases[name].labelled for name in (*train, *val))


def test_unlabelled_cases_are_preprocessed_and_hold_nothing_but_ignore(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    trainer = trainer_of(folders, monkeypatch)
    folder = Path(trainer.preprocessed_dataset_folder)  # type: ignore[attr-defined]
    dataset = infer_dataset_class(str(folder))(str(folder))
    assert len(list(folder.glob("*.pkl"))) == 4
    for name in ("SimA_patient001_frame01", "SimB_patient003_frame01"):
        _, label, _, properties = dataset.load_case(name)
        assert set(label[:].ravel().tolist()) == {4}
        assert not any(len(places) for key, places in properties["class_locations"].items() if key in (1, 2, 3))
    truth = dataset.load_case("SimA_patient000_frame01")[1][:]
    assert set(truth.ravel().tolist()) == {0, 1, 2, 3}


def test_our_own_trainers_accept_the_same_fold(folders: Path) -> None:
    from nnunet_dgplugins.data.folds import load_fold

    base = folders / "nnUNet_preprocessed" / "Dataset950_SimulatedVendors_without_SimD"
    table = CaseTable.from_dataset_json(json.loads((base / "dataset.json").read_text()))
    train, val, _ = load_fold(base, next(base.glob("*_2d")), 0, table)
    assert train == val == ["SimA_patient000_frame01", "SimB_patient002_frame01"]
