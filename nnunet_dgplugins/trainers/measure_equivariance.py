"""How far a model's class activation maps move with their images, before training and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.folds import load_fold
from nnunet_dgplugins.data.loaders import read_properties, read_slice
from nnunet_dgplugins.data.tags import slice_tags
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import PREPROCESSED, nnunet_folder
from nnunet_dgplugins.methods.equivariant.maps import foreground_maps
from nnunet_dgplugins.methods.equivariant.segmenter import CAMSegmenter, shown_in
from nnunet_dgplugins.methods.equivariant.transforms import FAMILIES, Transform, sample
from nnunet_dgplugins.registry import TRAINERS
from nnunet_dgplugins.settings import EquivariantSettings
from nnunet_dgplugins.trainers.base import seed_everything
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint
from nnunet_dgplugins.trainers.deployed import Rebuilt, rebuild

_DRAWS = 4  # of each family per batch
_BATCH = 16


def measure_equivariance(
    model_folder: Path,
    fold: int | str = 0,
    checkpoint: str = "checkpoint_final.pth",
    device: torch.device | str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compare the map of a transformed slice with the transformed map of the slice, on positive validation slices.

    The same slices and draws are shown to the trained networks and to untrained ones of the same seed, which training
    begins with unless it is given other weights.

    Args:
        model_folder: ``<Trainer>__<plans>__<configuration>`` of an equivariant model.
        fold: trained fold; its validation cases are shown.
        checkpoint: file in the fold's folder.
        device: where the networks run; None: CUDA if there is one.
        say: takes a line before the work starts.

    Returns:
        ``slices``, and per family of transforms ``before`` and ``after``, each with ``difference`` (mean absolute
        difference of both maps, over pixels, slices and modalities) and ``relative`` (the same over the maps' mean;
        None where all maps are empty, which move with anything).

    Raises:
        UserError: the model is of another method, or the fold validates on no positive slice.
    """
    content = read_checkpoint(model_folder / f"fold_{fold}" / checkpoint)
    model = rebuild(model_folder, content)
    if not isinstance(model.network, CAMSegmenter):
        raise UserError(f"{model_folder}: {model.trainer} makes no class activation maps of transformed images.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images = _positive_slices(model, fold, model.network.field)
    if not len(images):
        raise UserError(f"{model_folder}: fold {fold} validates on no positive slice.")
    say(f"{len(images)} positive validation slices, {_DRAWS} draws of each of {len(FAMILIES)} families, twice.")
    results: dict[str, Any] = {"slices": len(images)}
    for moment, network in (("before", _untrained(model)), ("after", _trained(model, content))):
        for family, value in differences(network.eval().to(place), images).items():
            results.setdefault(family, {})[moment] = value
    return results


def _untrained(model: Rebuilt) -> CAMSegmenter:
    block = settings.configuration_block(model.plans.plans, model.configuration_name, model.trainer)
    chosen = settings.build(EquivariantSettings, block, "plans beside the model")
    seed_everything(chosen.seed, 0)  # as the trainer does before it builds its networks
    found = model.network
    assert isinstance(found, CAMSegmenter)
    return CAMSegmenter(len(found.networks), chosen.width_divisor, found.field)


def _trained(model: Rebuilt, content: dict[str, Any]) -> CAMSegmenter:
    assert isinstance(model.network, CAMSegmenter)
    model.network.load_state_dict(content["network_weights"])
    return model.network


def _positive_slices(model: Rebuilt, fold: int | str, field: tuple[int, int]) -> torch.Tensor:
    """Return the framed positive slices (N, M, H, W) of the fold's validation cases."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    base = nnunet_folder(PREPROCESSED) / model.plans.dataset_name
    folder = base / model.configuration.data_identifier
    table = CaseTable.from_dataset_json(model.dataset_json)
    if table is None or not folder.is_dir():
        raise UserError(f"{folder}: the preprocessed cases and their tags are needed.")
    _, cases, _ = load_fold(base, folder, fold, table, tags=TRAINERS[model.trainer].tags)
    dataset = infer_dataset_class(str(folder))(str(folder), cases)
    found = []
    for case in cases:
        properties = read_properties(dataset, case)
        tags = slice_tags(table, case, properties, model.plans.transpose_forward)
        for z in np.flatnonzero(tags):
            found.append(shown_in(torch.from_numpy(read_slice(dataset, case, int(z))), field))
    return torch.stack(found) if found else torch.empty(0)


def differences(network: CAMSegmenter, images: torch.Tensor) -> dict[str, dict[str, float | None]]:
    """Return the two numbers of each family for framed slices (N, M, H, W); the draws are always the same."""
    sums = {family: np.zeros(2) for family in FAMILIES}
    generator = torch.Generator().manual_seed(0)
    count = 0
    for batch in tqdm.tqdm(images.split(_BATCH), disable=None, desc="equivariance"):
        shown = batch.to(next(network.parameters()).device)
        plain = foreground_maps(network.members(), shown).maps
        count += len(batch)
        for family in FAMILIES:
            for _ in range(_DRAWS):
                move: Transform = sample(len(shown), *_size(shown), generator, family)
                first, second = move(plain), foreground_maps(network.members(), move(shown)).maps
                difference = (first - second).abs().mean((1, 2, 3)).sum()
                level = ((first + second) / 2).mean((1, 2, 3)).sum()
                sums[family] += np.array([float(difference), float(level)]) / _DRAWS
    return {
        family: {"difference": value / count, "relative": value / level if level else None}
        for family, (value, level) in sums.items()
    }


def _size(images: torch.Tensor) -> tuple[int, int]:
    return int(images.shape[-2]), int(images.shape[-1])
