"""Start weights (ImageNet ``resnet50_v1c``) and released models of EPL, as state dicts, into :mod:`.deeplab`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.safe_loading import Loaded, load_matching, read_state_dict

_BACKBONE = "backbone."
_STEM = "backbone.conv1.0.weight"
_CLASSIFIER = ("classifier.weight", "classifier.bias")
# by the number of output channels; the background is one more channel, the last
RELEASED_CLASSES = {4: ("LV", "MYO", "RV"), 2: ("GM",)}  # M&Ms, SCGM


def load_start_weights(network: nn.Module, path: str | os.PathLike[str]) -> Loaded:
    """Load ImageNet weights (``resnet50_v1c.pth``) into the backbone.

    With an input of other than three channels the first convolution has another shape and starts at random, as
    published; ``fc.*`` of the ImageNet classifier is unknown to the network.

    Raises:
        UserError: the file cannot be read safely, or nothing in it fits.
    """
    state = read_state_dict(path)
    if not any(key.startswith(_BACKBONE) for key in state):
        state = {_BACKBONE + key: value for key, value in state.items()}
    # counters of the batches seen fit any network with batch normalisation
    own = network.state_dict()
    if not any(key in own and own[key].shape == value.shape and value.ndim for key, value in state.items()):
        example = ", ".join(key.removeprefix(_BACKBONE) for key in list(state)[:3]) or "no tensor"
        raise UserError(
            f"{path}: nothing fits DeepLabV3+'s ResNet-50 v1c; found for example {example}. Expected the published "
            "resnet50_v1c.pth with names such as conv1.0.weight and layer1.0.conv1.weight."
        )
    return load_matching(network, state)


def read_released(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read one released network, saved as a state dict.

    The released scripts pickle whole modules; such a file is refused with the line that re-saves it.

    Returns:
        Tensors named ``backbone.*``, ``head.*`` and ``classifier.*``; the background is the LAST class.

    Raises:
        UserError: the file cannot be read safely or is no EPL model.
    """
    state = read_state_dict(path)
    missing = [key for key in (_STEM, *_CLASSIFIER) if key not in state]
    if missing:
        raise UserError(
            f"{path}: not an EPL model: {missing[0]} is missing. Expected the state dict of one DeepLabV3+ network "
            "with names such as backbone.conv1.0.weight, head.aspp.map_convs.0.weight and classifier.weight."
        )
    return state


def in_channels(state: Mapping[str, Tensor]) -> int:
    """Return the number of input channels, 1 in every released model."""
    return int(state[_STEM].shape[1])


def num_classes(state: Mapping[str, Tensor]) -> int:
    """Return the number of classes, background included."""
    return int(state[_CLASSIFIER[0]].shape[0])


def in_label_order(state: Mapping[str, Tensor], labels: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the tensors with one class per label value, 0 being the background, which the released code counts last.

    Args:
        state: a released network.
        labels: label value by class name, background left out; names as in ``RELEASED_CLASSES``, in any case.

    Raises:
        ValueError: the names are not those of the released network, or the values not 1 to their number.
    """
    released = RELEASED_CLASSES.get(num_classes(state), ())
    values = {name.upper(): value for name, value in labels.items()}
    if sorted(values) != sorted(released) or sorted(values.values()) != list(range(1, len(values) + 1)):
        raise ValueError(f"classes {dict(labels)} instead of {', '.join(released)}")
    by_value = sorted(released, key=lambda name: values[name])
    rows = [len(released), *(released.index(name) for name in by_value)]
    return {key: value[rows] if key in _CLASSIFIER else value for key, value in state.items()}
