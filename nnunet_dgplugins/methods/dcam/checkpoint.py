"""Start weights of both stages, given by path, loaded in safe mode with a count of what fitted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.dcam.deeplab import DeepLab
from nnunet_dgplugins.methods.dcam.mxnet_params import classifier_state
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38
from nnunet_dgplugins.methods.safe_loading import Loaded, fits_somewhere, load_matching, read_state_dict

_LAST_LAYER = "decoder.last_conv.8."
_COUNTER = "num_batches_tracked"


def load_classifier_weights(network: ResNet38, path: str | os.PathLike[str]) -> Loaded:
    """Load start weights of stage 1; freezing, which goes with them, is up to the caller.

    Args:
        network: PCNorm's layers and, with ImageNet weights, the last layer start as they are.
        path: the public MXNet ``.params``, its conversion to ``.safetensors``, or a PyTorch state dict under the
            released names, for example of a released stage 1.

    Raises:
        UserError: the file cannot be read safely, or nothing in it fits.
    """
    state = classifier_state(path) if Path(path).suffix == ".params" else read_state_dict(path)
    return _load(network, state, path, "ResNet-38", "conv1a.weight and b2.conv_branch2a.weight")


def load_deeplab_weights(network: DeepLab, path: str | os.PathLike[str]) -> Loaded:
    """Load start weights of stage 2, the public ``deeplab-resnet.pth.tar``, without its last layer of other classes.

    Raises:
        UserError: the file cannot be read safely, or nothing in it fits.
    """
    state = {key: value for key, value in read_state_dict(path).items() if not key.startswith(_LAST_LAYER)}
    return _load(network, state, path, "DeepLabV3+", "backbone.conv1.weight and aspp.aspp1.atrous_conv.weight")


def _load(
    network: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str], what: str, names: str
) -> Loaded:
    if not fits_somewhere(network, state):
        example = ", ".join(list(state)[:3]) or "no tensor"
        raise UserError(
            f"{path}: nothing fits {what}; found for example {example}. Expected names such as {names}, and the "
            "published width."
        )
    loaded = load_matching(network, state)
    # old files do not count batches, and nothing depends on the counters
    return replace(loaded, missing=tuple(name for name in loaded.missing if not name.endswith(_COUNTER)))
