"""State dicts of released code, read in safe mode only."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnunet_dgplugins.errors import UserError

_WRAPPERS = ("model", "state_dict", "model_state_dict", "network_weights")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a file; wrapping dictionaries and prefixes of parallel wrappers (``module.``) come off.

    Raises:
        UserError: the file is missing or unreadable, holds pickled code, or no state dict.
    """
    content = _load_safely(path)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a state dict (names and tensors), found {type(content).__name__}.")
    return {_bare(str(key)): value for key, value in content.items() if isinstance(value, Tensor)}


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


def _bare(name: str) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
