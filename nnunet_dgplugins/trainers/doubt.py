"""A trained model asked how sure it was of the cases it predicted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.doubt import FILE
from nnunet_dgplugins.files import write_json
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint
from nnunet_dgplugins.trainers.second_network import case_disagreement, second_weights


def write_doubt(
    model_folder: Path,
    images: Path,
    predictions: Path,
    fold: int | str = 0,
    checkpoint: str = "checkpoint_final.pth",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Ask a model how sure it was of each case and write ``dgplugins_doubt.json`` beside its predictions.

    EPL compares its two networks (:func:`~nnunet_dgplugins.trainers.second_network.case_disagreement`). Else the doubt
    of a class is 1 minus the network's confidence (DeSAM's grid: predicted IoU of the selected mask; DeSAM's whole box
    and SAM-SDG: the Dice the mask expects of itself), averaged over slices with that class, weighted by area; a class
    that is nowhere has doubt 1, because an organ that is missing is what one should look at. A case's doubt is its
    classes' mean.

    Args:
        model_folder: ``<Trainer>__<plans>__<configuration>``.
        images: folder of the images that were predicted, nnU-Net's names.
        predictions: folder of the predictions; cases are those found here.
        fold: fold that is asked, a number or ``all``.
        checkpoint: file in the fold's folder.
        device: where the network runs; None: CUDA if there is one.
        progress: show a bar on a terminal.
    """
    import tqdm

    path = model_folder / f"fold_{fold}" / checkpoint
    if not path.is_file():
        there = ", ".join(sorted(p.parent.name for p in model_folder.glob(f"fold_*/{checkpoint}"))) or "none"
        raise UserError(f"{path}: no such checkpoint; folds with a {checkpoint}: {there}.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    predictor = _predictor(model_folder, fold, checkpoint, device)
    configuration = predictor.configuration_manager
    ask = _question(predictor, path, device)
    ending = predictor.dataset_json["file_ending"]
    cases = sorted(p.name[: -len(ending)] for p in predictions.glob(f"*{ending}"))
    if not cases:
        raise UserError(f"{predictions}: no predictions (*{ending}) in it.")
    found: dict[str, Any] = {}
    for case in tqdm.tqdm(cases, disable=None if progress else True, desc="doubt"):
        name = re.compile(re.escape(case) + r"_\d{4}" + re.escape(ending))  # p1 is not p1_2
        files = sorted(str(p) for p in images.iterdir() if name.fullmatch(p.name))
        if not files:
            raise UserError(f"{images}: no image of case {case}.")
        data, _, properties = configuration.preprocessor_class(verbose=False).run_case(
            files, None, predictor.plans_manager, configuration, predictor.dataset_json
        )
        found[case] = ask(torch.as_tensor(np.asarray(data)))
        found[case]["slices"] = _in_reader_order(
            found[case]["slices"], properties, predictor.plans_manager.transpose_forward
        )
    write_json(predictions / FILE, found)
    return predictions / FILE


def _question(predictor: Any, path: Path, device: torch.device) -> Callable[[torch.Tensor], dict[str, Any]]:
    """Return what turns a preprocessed case (C, Z, Y, X) into its doubt, for the trainer that made the model."""
    network = getattr(predictor.network, "_orig_mod", predictor.network)  # with nnUNet_compile the predictor wraps it
    labels = predictor.dataset_json["labels"]
    classes = {name: value for name, value in labels.items() if name not in ("background", "ignore")}
    if predictor.trainer_name == "EPLTrainer":
        pair = [predictor.list_of_parameters[0], second_weights(read_checkpoint(path), path)]
        return lambda data: case_disagreement(predictor, pair, data, classes)
    if not hasattr(network, "segment"):
        raise UserError(f"{path.parent.parent}: this trainer's network says nothing about its doubt.")
    network.load_state_dict(predictor.list_of_parameters[0])
    network.eval().to(device)
    return lambda data: _case_doubt(network, data, list(classes), device)


@torch.inference_mode()
def _case_doubt(network: Any, data: torch.Tensor, names: list[str], device: torch.device) -> dict[str, Any]:
    areas, confidences = [], []
    for z in range(data.shape[1]):
        logits, confidence = network.segment(data[None, :, z].float().to(device))
        foreground = logits[0, 1:] if network.background else logits[0]
        areas.append((foreground > 0).sum((1, 2)).float().cpu())
        confidences.append(confidence[0].cpu())
    area, sure = torch.stack(areas), torch.stack(confidences)  # (Z, K)
    per_class = torch.where(
        area.sum(0) > 0, 1 - (area * sure).sum(0) / area.sum(0).clamp(min=1), torch.ones(area.shape[1])
    )
    return {
        "doubt": float(per_class.mean()),
        "per_class": {name: float(value) for name, value in zip(names, per_class, strict=False)},
        "slices": [float(1 - value.mean()) for value in sure],
    }


def _in_reader_order(doubts: list[float], properties: dict[str, Any], transposed: Sequence[int]) -> list[float | None]:
    """Put slices that nnU-Net cropped away back in, without doubt; none where slices are not the reader's."""
    if transposed[0] != 0 or len(doubts) != properties["shape_after_cropping_and_before_resampling"][0]:
        return []
    start, end = properties["bbox_used_for_cropping"][0]
    before, after = start, properties["shape_before_cropping"][0] - end
    return [None] * before + doubts + [None] * after


def _predictor(model_folder: Path, fold: int | str, checkpoint: str, device: torch.device) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=device, perform_everything_on_device=False, verbose=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder), (fold,), checkpoint)
    return predictor
