"""Checkpoints of the released code: a state dict of the whole model, read in safe mode only."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnunet_dgplugins.errors import UserError

PARTS = ("mask_decoder.", "prompt_encoder.", "image_encoder.")
# channels of the taps tell the encoder's size; everything behind them is equal
_SIZES = {1280: "vit_h", 1024: "vit_l", 768: "vit_b"}
_FIRST_CONTEXT = "mask_decoder.pimm.conv_blocks_context.0.block_init.conv1.conv.weight"
_MASK_OUTPUT = "mask_decoder.pimm.seg_outputs.1.weight"
_WRAPPERS = ("model", "state_dict", "model_state_dict", "network_weights")


def read_official(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a released checkpoint (``desam_model_best.pth``).

    Prefixes of parallel wrappers (``module.``) are removed.

    Returns:
        Tensors named ``mask_decoder.*``, ``prompt_encoder.*`` and, when they are in the file, ``image_encoder.*``.

    Raises:
        UserError: the file is missing or unreadable, holds pickled code, or is not DeSAM's.
    """
    state = _state_dict(_load_safely(path), path)
    tensors = {}
    for key, value in state.items():
        name = str(key)
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name.startswith(PARTS):
            tensors[name] = value
    missing = [key for key in (_FIRST_CONTEXT, _MASK_OUTPUT) if key not in tensors]
    if missing or not any(key.startswith("prompt_encoder.") for key in tensors):
        hint = "It looks like a plain SAM file; give it as `sam=` instead. " if _is_sam(tensors) else ""
        raise UserError(
            f"{path}: not a DeSAM checkpoint: {(missing or ['prompt_encoder.*'])[0]} is missing. {hint}"
            "Expected the state dict of the whole model that the released training scripts save."
        )
    return tensors


def sam_size(tensors: Mapping[str, Tensor]) -> str:
    """Return ``vit_h``, ``vit_l`` or ``vit_b``, told by the shapes.

    Raises:
        UserError: the shapes are those of none of them.
    """
    channels = int(tensors[_FIRST_CONTEXT].shape[1])
    if channels not in _SIZES:
        known = ", ".join(f"{count} ({name})" for count, name in _SIZES.items())
        raise UserError(f"This DeSAM checkpoint was made for taps of {channels} channels; known are {known}.")
    return _SIZES[channels]


def num_classes(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of mask channels, 1 in every released checkpoint."""
    return int(tensors[_MASK_OUTPUT].shape[0])


def _load_safely(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: this file holds more than tensors (a pickled module or other code), and loading it could run "
            "that code, so it is refused. Where you trust it, in the original environment, save the bare tensors: "
            'torch.save(torch.load("old.pth", map_location="cpu").state_dict(), "new.pth"), then import new.pth.'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read as a PyTorch checkpoint ({error}). Is the download complete?"
        ) from error


def _state_dict(content: Any, path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a state dict (names and tensors), found {type(content).__name__}.")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _is_sam(tensors: Mapping[str, Tensor]) -> bool:
    return "mask_decoder.iou_token.weight" in tensors and _FIRST_CONTEXT not in tensors
