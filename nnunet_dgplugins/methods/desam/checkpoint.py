"""Checkpoints of the released code: a state dict of the whole model, read in safe mode only."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.safe_loading import read_state_dict

PARTS = ("mask_decoder.", "prompt_encoder.", "image_encoder.")
# channels of the taps tell the encoder's size; everything behind them is equal
_SIZES = {1280: "vit_h", 1024: "vit_l", 768: "vit_b"}
_FIRST_CONTEXT = "mask_decoder.pimm.conv_blocks_context.0.block_init.conv1.conv.weight"
_MASK_OUTPUT = "mask_decoder.pimm.seg_outputs.1.weight"


def read_official(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a released checkpoint (``desam_model_best.pth``).

    Prefixes of parallel wrappers (``module.``) are removed.

    Returns:
        Tensors named ``mask_decoder.*``, ``prompt_encoder.*`` and, when they are in the file, ``image_encoder.*``.

    Raises:
        UserError: the file is missing or unreadable, holds pickled code, or is not DeSAM's.
    """
    tensors = {name: value for name, value in read_state_dict(path).items() if name.startswith(PARTS)}
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


def _is_sam(tensors: Mapping[str, Tensor]) -> bool:
    return "mask_decoder.iou_token.weight" in tensors and _FIRST_CONTEXT not in tensors
