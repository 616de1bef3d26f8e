"""The equivariant maps after training: validation cases are predicted, and scored by volume where masks are known."""

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

from nnunet_dgplugins.files import CAM_VALIDATION, replacing, write_json
from nnunet_dgplugins.methods.equivariant.maps import THRESHOLDS
from nnunet_dgplugins.methods.equivariant.segmenter import SLOPE
from nnunet_dgplugins.methods.equivariant.volume import volume_dice
from nnunet_dgplugins.trainers.validation import known_mask, predicted_logits

FILE = "cam_dice.json"


def validate_maps(trainer: Any, save_probabilities: bool) -> tuple[dict[str, float], dict[float, float]]:
    """Write the validation cases' predictions, and the Dice per volume of those whose mask is known.

    ``validation_cam/cam_dice.json`` has the Dice of every such case at the deployed threshold and at 0.2 to 0.8. Slices
    are never averaged, and volumes whose mask is empty are listed but have no Dice: a mean that counts either rewards
    drawing nothing. Label files of cases without masks hold tags and are not opened.

    Args:
        trainer: with its network trained.
        save_probabilities: also write nnU-Net's .npz files.

    Returns:
        Dice per case at the deployed threshold and mean Dice at each; both empty where no mask shows anything.
    """
    folder = Path(trainer.output_folder) / CAM_VALIDATION
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)  # of an earlier validation
    threshold: float = trainer.network.threshold
    levels = sorted({*THRESHOLDS, round(threshold, 6)})
    scores: dict[str, dict[str, float]] = {}
    empty: list[str] = []
    reader = trainer.plans_manager.image_reader_writer_class()
    for case, logits, properties in predicted_logits(trainer):
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
        if (truth := known_mask(trainer, case)) is not None:
            if not (truth == 1).any():
                empty.append(case)
                continue
            ignore = trainer.label_manager.ignore_label
            unknown = truth == (-1 if ignore is None else ignore)
            dice = volume_dice(np.where(unknown, 0, maps), truth == 1, levels)
            scores[case] = {f"{level:g}": float(value) for level, value in zip(levels, dice, strict=True)}
    deployed = {case: own[f"{round(threshold, 6):g}"] for case, own in scores.items()}
    if empty:
        trainer.print_to_log_file(f"Masks of {', '.join(empty)} are empty: no Dice of them, and no part in any mean.")
    if not scores:
        found = "of none is a mask with foreground known" if empty else "no masks of them are known"
        trainer.print_to_log_file(f"Validation cases predicted; {found}, so no Dice.")
        return {}, {}
    means = {f"{level:g}": float(np.mean([own[f"{level:g}"] for own in scores.values()])) for level in levels}
    values = list(deployed.values())
    trainer.logger.log_summary("final_val/foreground_dice", float(np.mean(values)))
    write_json(folder / FILE, {"threshold": threshold, "cases": scores, "empty": empty, "mean": means})
    trainer.print_to_log_file(
        f"Dice per volume at threshold {threshold:g}: {np.mean(values):.4f} ± {np.std(values):.4f} over "
        f"{len(values)} validation cases; other thresholds: "
        + ", ".join(f"{level} {value:.3f}" for level, value in means.items())
    )
    return deployed, {level: means[f"{level:g}"] for level in levels}


def write_summary(trainer: Any, dice: dict[str, float]) -> None:
    """Write the summary that nnU-Net's zip export asks for, with Dice against masks; null where none is known.

    It is the last file of a validation: a fold that has it is validated.
    """
    path = Path(trainer.output_folder) / "validation" / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    mean = {"Dice": float(np.mean(list(dice.values()))) if dice else None}
    cases = [{"case": case, "metrics": {"1": {"Dice": value}}} for case, value in dice.items()]
    write_json(path, {"foreground_mean": mean, "mean": {"1": mean}, "metric_per_case": cases})


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
