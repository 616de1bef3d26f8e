"""EPL's second network after training: as a fold of its own, and as a second opinion on the first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint, write_checkpoint

OFFSET = 100  # network 2 of fold k is fold 100 + k
ENTRY = "second_network"


def export_second(model_folder: Path, fold: int | str, checkpoint: str = "checkpoint_final.pth") -> Path:
    """Write network 2 as fold ``100 + fold``, which nnU-Net's commands treat as any other fold.

    ``nnUNetv2_predict -f k 100+k`` then averages the logits of both networks. nnU-Net's Python interface takes such a
    fold in by itself when it is asked for all folds it can find (``use_folds=None``).

    Args:
        model_folder: ``<Trainer>__<plans>__<configuration>``.
        fold: number of the trained fold.
        checkpoint: file in the fold's folder.

    Returns:
        The checkpoint written.

    Raises:
        UserError: the fold has no number, or its checkpoint is missing or holds no second network.
    """
    if not str(fold).isdigit():
        raise UserError(f"Fold {fold} has no number, so network 2 cannot become fold {OFFSET} + number.")
    content = read_checkpoint(model_folder / f"fold_{fold}" / checkpoint)
    second = second_weights(content, model_folder)
    content.pop(settings.KEY)
    path = model_folder / f"fold_{OFFSET + int(fold)}" / checkpoint
    write_checkpoint(path, {**content, "network_weights": second, "optimizer_state": {}, "grad_scaler_state": None})
    return path


def exported_checkpoints(model_folder: Path, fold: int | str) -> list[str]:
    """Return the names of the checkpoints of a fold that hold network 2 alone; none for fold ``all``."""
    if not str(fold).isdigit():
        return []
    return sorted(path.name for path in (model_folder / f"fold_{OFFSET + int(fold)}").glob("checkpoint_*.pth"))


def second_weights(content: dict[str, Any], where: Path) -> dict[str, torch.Tensor]:
    """Return network 2 of a checkpoint's content.

    Raises:
        UserError: there is none.
    """
    weights = (content.get(settings.KEY) or {}).get(ENTRY)
    if weights is None:
        raise UserError(f"{where}: this checkpoint holds no second network; is it one of EPLTrainer?")
    return dict(weights)


def exported_folds(results: Path) -> list[Path]:
    """Return the folds of EPL models that hold a second network, over all datasets."""
    found = results.glob("Dataset*/EPLTrainer__*/fold_*/checkpoint_*.pth")
    folders = {path.parent for path in found if re.fullmatch(r"fold_1\d\d", path.parent.name)}
    return sorted(folders)


@torch.inference_mode()
def case_disagreement(
    predictor: Any, weights: Sequence[dict[str, torch.Tensor]], data: torch.Tensor, classes: dict[str, int]
) -> dict[str, Any]:
    """Return the doubt of one case: where two networks draw other masks, one of them is wrong.

    The doubt of a class is 1 minus the Dice between both networks' masks; a class that neither finds has doubt 1,
    because an organ that is missing is what one should look at. A case's doubt is its classes' mean. A slice's doubt is
    the mean over the classes found in it, 0 where both see none.

    Args:
        predictor: nnU-Net's, with its network built.
        weights: state dicts of both networks.
        data: preprocessed case (C, Z, Y, X).
        classes: name to label value.
    """
    maps = []
    for state in weights:
        predictor.list_of_parameters = [state]
        maps.append(predictor.predict_logits_from_preprocessed_data(data).argmax(0))
    masks = torch.stack([torch.stack([x == value for value in classes.values()]) for x in maps])  # (2, K, Z, Y, X)
    overlap = 2 * masks.all(0).sum((2, 3)).double()  # (K, Z)
    size = masks.sum((0, 3, 4)).double()
    per_class = torch.where(size.sum(1) > 0, 1 - overlap.sum(1) / size.sum(1).clamp(min=1), 1.0)
    per_slice = torch.where(size > 0, 1 - overlap / size.clamp(min=1), 0.0).sum(0) / (size > 0).sum(0).clamp(min=1)
    return {
        "doubt": float(per_class.mean()),
        "per_class": {name: float(value) for name, value in zip(classes, per_class, strict=True)},
        "slices": per_slice.tolist(),
    }
