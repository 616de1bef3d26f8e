"""What several tests of ``sam`` build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nnunet_dgplugins.sam.models import MODELS, SamModel
from nnunet_dgplugins.sam.seeded import seeded_weights
from nnunet_dgplugins.sam.weights import load_parts

TINY = MODELS["vit_tiny"]


def write_case(folder: Path, case: str, data: np.ndarray) -> None:
    """Write a preprocessed case (C, Z, Y, X) as nnU-Net does."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{case}*"):
        old.unlink()
    shape = (1, 1, *data.shape[2:])
    seg = np.zeros((1, *data.shape[1:]), dtype=np.int16)
    nnUNetDatasetBlosc2.save_case(data.astype(np.float32), seg, {}, str(folder / case), chunks=shape, blocks=shape)


def full_state(model: SamModel | str = "vit_tiny") -> dict[str, torch.Tensor]:
    """Return vit_tiny's weights under the names of a published SAM file."""
    parts = load_parts(model)
    state = {f"image_encoder.{key}": value for key, value in parts.image_encoder.state_dict().items()}
    state |= {f"prompt_encoder.{key}": value for key, value in parts.prompt_encoder.state_dict().items()}
    return {key: value.clone() for key, value in (state | parts.mask_decoder_state).items()}


def seeded_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights of vit_tiny's layout, made from a seed."""
    return seeded_weights(TINY, seed)


def encoder_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the image encoder's tensors, whose hash is the hash of the weights."""
    return {key: value for key, value in state.items() if key.startswith("image_encoder.")}
