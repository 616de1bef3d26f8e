"""nnU-Net's own trainer on converted CT, prediction on MR, and the other way round."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from trees import convert, save

from dataset_conversion import Dataset504_AbdomenCTMR as module

SHAPE = (40, 40, 6)


def organs(rng: np.random.Generator) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    for value, (x, y) in enumerate(((6, 8), (24, 7), (7, 24), (24, 25)), 1):
        dx, dy = rng.integers(-3, 4, 2)
        label[x + dx : x + dx + 8, y + dy : y + dy + 8, 1:5] = value
    return label


def tree(root: Path) -> Path:
    rng = np.random.default_rng(0)
    affine = np.diag([-1.5, -1.5, 5.0, 1.0])
    contrast = {"SABSCT": np.array([-1000, 110, 190, 60, 250]), "CHAOST2": np.array([100, 300, 700, 500, 900])}
    for folder, values in contrast.items():
        for number in range(5):
            label = organs(rng)
            image = (values[label] + rng.normal(0, 8, SHAPE)).astype(np.int16)
            save(root / folder / "processed" / f"image_{number}.nii.gz", image, affine)
            save(root / folder / "processed" / f"label_{number}.nii.gz", label, affine)
    return root


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("CT", "MR"), ("MR", "CT")])
def test_a_stock_trainer_trained_on_one_modality_predicts_the_other(
    tmp_path: Path, nnunet_folders: Path, source: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    raw = convert(module, tree(tmp_path / "in"), sources=(source,))
    with monkeypatch.context() as patch:  # threads in place of processes that would each import torch anew
        patch.setattr(multiprocessing, "get_context", lambda method=None: SimpleNamespace(Pool=ThreadPool))
        patch.setenv("nnUNet_n_proc_DA", "1")
        api.extract_fingerprints([504], num_processes=1, show_progress_bar=False)
        plans = api.plan_experiments([504])
        api.preprocess([504], plans, ("2d",), (1,), show_progress_bar=False)
    prepared = nnunet_folders / "nnUNet_preprocessed" / raw.name
    assert json.loads((prepared / "splits_final.json").read_text()) == json.loads(
        (raw / "splits_final.json").read_text()
    )
    plan = json.loads((prepared / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    assert plan["configurations"]["2d"]["normalization_schemes"] == ["ZScoreNormalization"]
    np.random.seed(0)
    torch.manual_seed(0)
    dataset = json.loads((prepared / "dataset.json").read_text())
    trainer = nnUNetTrainer(plan, "2d", 0, dataset, torch.device("cpu"))
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch, trainer.num_epochs = 60, 1, 1
    trainer.run_training()
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    scores = {}
    for part, name in (("Tr", dataset_fold(prepared)[0]), ("Ts", f"{target}_000")):
        path = raw / f"images{part}" / f"{name}_0000.nii.gz"
        image, properties = SimpleITKIO().read_images([str(path)])
        predicted = predictor.predict_single_npy_array(image, properties, None, None, False)
        truth = sitk.GetArrayFromImage(sitk.ReadImage(raw / f"labels{part}" / f"{name}.nii.gz"))
        assert predicted.shape == truth.shape
        assert set(np.unique(predicted)) <= {0, 1, 2, 3, 4}
        scores[part] = dice(predicted > 0, truth > 0)
    assert scores["Tr"] > 0.5  # an unseen case of its own modality; the other modality is only promised to run


def dataset_fold(prepared: Path) -> list[str]:
    names: list[str] = json.loads((prepared / "splits_final.json").read_text())[0]["val"]
    return names
