"""Weights from a seed, the same bits on every machine: where a training starts, and what it is compared with.

Only whole-number draws and exact arithmetic are used (no logarithm, no sine), and every tensor has its own stream, so
neither the order of construction nor the C library changes a bit. The global random state is not touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from nnunet_dgplugins.sam.models import SamModel
from nnunet_dgplugins.sam.weights import weight_layout

_POSITION_STD = 0.3
_REL_POS_STD = 0.1
_BIAS_STD = 0.02
_BRANCH = 0.25  # keeps a token mostly its own patch through all blocks
_EMBEDDING_STD = 1.0


def seeded_weights(model: SamModel, seed: int) -> dict[str, torch.Tensor]:
    """Return the untrained weights of a model, named as in SAM's files (see :func:`fill_from_seed`)."""
    return fill_from_seed(weight_layout(model), seed)


def fill_from_seed(shapes: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Return float32 values for every named tensor.

    Args:
        shapes: names of SAM's state dict with tensors of the wanted shape (their content is not read).
        seed: any whole number.

    Returns:
        Name to tensor, on the CPU. Norm weights are 1 and norm biases 0; matrices are uniform with standard deviation
        1/sqrt(fan in), smaller at the end of a residual branch; the absolute position is a ladder of triangle waves.
    """
    return {key: torch.from_numpy(_values(key, tuple(value.shape), seed)) for key, value in shapes.items()}


def _values(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    stream = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "little")
    random = np.random.RandomState(stream)  # frozen by NumPy's compatibility policy, unlike default_rng
    if key.endswith("pos_embed"):
        return _triangle_positions(shape, random)
    if _is_norm(key):
        return np.full(shape, 1.0 if key.endswith("weight") else 0.0, dtype=np.float32)
    if key.endswith("bias"):
        return _uniform(random, shape, _BIAS_STD)
    if "rel_pos" in key:
        return _uniform(random, shape, _REL_POS_STD)
    if shape[0] == 1 or "mask_tokens" in key or "gaussian_matrix" in key:  # embeddings, tokens, random frequencies
        return _uniform(random, shape, _EMBEDDING_STD)
    fan_in = int(np.prod(shape[1:]))
    std = fan_in**-0.5
    if key.endswith(("attn.proj.weight", "mlp.lin2.weight", "out_proj.weight")):
        std *= _BRANCH
    return _uniform(random, shape, std)


def _is_norm(key: str) -> bool:
    # SAM's LayerNorm2d sit at 1 and 3 of the neck, at 1 and 4 of the mask downscaling, at 1 of the upscaling
    norms = ("neck.1.", "neck.3.", "mask_downscaling.1.", "mask_downscaling.4.", "output_upscaling.1.")
    return ".norm" in key or any(norm in key for norm in norms)


def _uniform(random: np.random.RandomState, shape: tuple[int, ...], std: float) -> np.ndarray:
    draws = random.randint(-(1 << 23), 1 << 23, size=shape, dtype=np.int32)
    return (draws * (std * 3**0.5 / (1 << 23))).astype(np.float32)


def _triangle_positions(shape: tuple[int, ...], random: np.random.RandomState) -> np.ndarray:
    """Smooth positions (1, H, W, C): the first half of the channels sees rows, the second half columns."""
    _, height, width, channels = shape
    waves = random.randint(1, 17, size=channels, dtype=np.int32) / 4.0  # cycles per image: 0.25 .. 4
    phases = random.randint(0, 1024, size=channels, dtype=np.int32) / 1024.0
    rows = np.broadcast_to((np.arange(height) / height)[:, None, None], (height, width, 1))
    columns = np.broadcast_to((np.arange(width) / width)[None, :, None], (height, width, 1))
    half = channels // 2
    place = np.concatenate([np.repeat(rows, half, axis=2), np.repeat(columns, channels - half, axis=2)], axis=2)
    turns = place * waves + phases
    triangle = 4 * np.abs(turns - np.floor(turns + 0.5)) - 1
    return (triangle * (_POSITION_STD * 3**0.5))[None].astype(np.float32)
