"""What a trainer of tags does after training: predict its validation cases, and score volumes where masks are known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dgplugins.data.folds import is_labelled
from nnunet_dgplugins.data.loaders import read_image, read_properties
from nnunet_dgplugins.files import CAM_VALIDATION, RAW, VALIDATION_MASKS, replacing, write_json
from nnunet_dgplugins.methods.equivariant.maps import THRESHOLDS
from nnunet_dgplugins.methods.equivariant.segmenter import SLOPE
from nnunet_dgplugins.methods.equivariant.volume import volume_dice

FILE = "cam_dice.json"


def validate_maps(trainer: Any, save_probabilities: bool) -> None:
    """Write the validation cases' predictions, and the Dice per volume of those whose mask is known.

    ``validation_cam/cam_dice.json`` has the Dice of every such case at the deployed threshold and at 0.2 to 0.8. Slices
    are never averaged: a mean that counts empty slices rewards drawing nothing. Label files of cases without masks hold
    tags and are not opened.

    Args:
        trainer: with its network trained.
        save_probabilities: also write nnU-Net's .npz files.
    """
    folder = Path(trainer.output_folder) / CAM_VALIDATION
    folder.mkdir(parents=True, exist_ok=True)
    trainer.network.eval()
    (folder / FILE).unlink(missing_ok=True)  # of an earlier validation
    predictor = nnUNetPredictor(use_mirroring=False, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    _, cases = trainer.do_split()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    threshold: float = trainer.network.threshold
    levels = sorted({*THRESHOLDS, round(threshold, 6)})
    scores: dict[str, dict[str, float]] = {}
    reader = trainer.plans_manager.image_reader_writer_class()
    for case in cases:
        trainer.print_to_log_file(f"predicting {case}")
        properties = read_properties(dataset, case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(read_image(dataset, case))).cpu()
        if save_probabilities:
            export_prediction_from_logits(
                logits, properties, trainer.configuration_manager, trainer.plans_manager, trainer.dataset_json,
                os.fspath(folder / case), True,
            )  # fmt: skip
        mask, maps = in_file_geometry(
            logits, threshold, trainer.plans_manager, trainer.configuration_manager, trainer.label_manager, properties
        )
        with replacing(folder / (case + trainer.dataset_json["file_ending"])) as temporary:
            reader.write_seg(mask, os.fspath(temporary), properties)
        if (truth := _truth(trainer, case)) is not None:
            dice = volume_dice(np.where(truth < 0, 0, maps), truth > 0, levels)
            scores[case] = {f"{level:g}": float(value) for level, value in zip(levels, dice, strict=True)}
    trainer.network.train()
    deployed = {case: own[f"{round(threshold, 6):g}"] for case, own in scores.items()}
    summary = folder.parent / "validation" / "summary.json"  # the last file: what has it is validated
    if not scores:
        trainer.print_to_log_file("Validation cases predicted; no masks of them are known, so no Dice.")
        _write_summary(summary, deployed)
        return
    means = {f"{level:g}": float(np.mean([own[f"{level:g}"] for own in scores.values()])) for level in levels}
    values = list(deployed.values())
    write_json(folder / FILE, {"threshold": threshold, "cases": scores, "mean": means})
    trainer.print_to_log_file(
        f"Dice per volume at threshold {threshold:g}: {np.mean(values):.4f} ± {np.std(values):.4f} over "
        f"{len(values)} validation cases; other thresholds: "
        + ", ".join(f"{level} {value:.3f}" for level, value in means.items())
    )
    _write_summary(summary, deployed)


def _write_summary(path: Path, dice: dict[str, float]) -> None:
    """Write the summary that nnU-Net's zip export asks for, with Dice against masks; null where none is known."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mean = {"Dice": float(np.mean(list(dice.values()))) if dice else None}
    cases = [{"case": case, "metrics": {"1": {"Dice": value}}} for case, value in dice.items()]
    write_json(path, {"foreground_mean": mean, "mean": {"1": mean}, "metric_per_case": cases})


def _truth(trainer: Any, case: str) -> npt.NDArray[np.int8] | None:
    """Return the mask of a validation case (Z, Y, X) on its files' grid, -1 where ignored; None where none is known."""
    name = case + trainer.dataset_json["file_ending"]
    base = Path(trainer.preprocessed_dataset_folder_base)
    places = [Path(os.environ.get(RAW, "")) / base.name / VALIDATION_MASKS]
    if is_labelled(trainer.case_table, case):
        places.append(base / "gt_segmentations")
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        return None
    values = trainer.plans_manager.image_reader_writer_class().read_seg(os.fspath(path))[0][0]
    ignore = trainer.label_manager.ignore_label
    return np.where(values == (-1 if ignore is None else ignore), -1, values == 1).astype(np.int8)


def in_file_geometry(
    logits: torch.Tensor, threshold: float, plans: Any, configuration: Any, labels: Any, properties: dict[str, Any]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Bring the logits of a preprocessed case back to its files' grid, by nnU-Net's own road.

    Args:
        logits: (2, Z, Y, X), see :func:`~nnunet_dgplugins.methods.equivariant.segmenter.logits_of`.
        threshold: foreground is above.
        plans: nnU-Net's plans manager.
        configuration: its configuration.
        labels: its label manager.
        properties: of the case.

    Returns:
        Mask and map (Z, Y, X), the map read back from the probability of foreground.
    """
    mask, both = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, labels, properties, return_probabilities=True
    )
    present = np.clip(np.asarray(both[1], np.float64), 1e-12, 1 - 1e-12)
    return np.asarray(mask, np.uint8), threshold + np.log(present / (1 - present)) / SLOPE
