"""State dicts of released code, read in safe mode only, and loaded with a count of what fitted."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_dgplugins.errors import UserError

_WRAPPERS = ("model", "state_dict", "model_state_dict", "network_weights")


@dataclass(frozen=True)
class Loaded:
    """Which tensors of a file went into a network.

    Args:
        matched: loaded, by the network's names.
        reshaped: in both but of another shape, ``name (file's shape) instead of (network's)``; skipped.
        unknown: in the file only; skipped.
        missing: in the network only; left as they were.
    """

    matched: tuple[str, ...]
    reshaped: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the network came from the file."""
        return not self.reshaped and not self.missing

    def __str__(self) -> str:
        """Return the counts, and what was skipped by name."""
        text = f"{len(self.matched)} tensors loaded"
        for names, what in (
            (self.reshaped, "of another shape, skipped"),
            (self.unknown, "unknown to the network, skipped"),
            (self.missing, "not in the file, left as they were"),
        ):
            if names:
                text += f"; {len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        return text + "."


def load_matching(network: nn.Module, state: Mapping[str, Tensor]) -> Loaded:
    """Load what has the network's name and shape, and say what became of the rest."""
    own = network.state_dict()
    fits = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    network.load_state_dict(fits, strict=False)
    return Loaded(
        matched=tuple(fits),
        reshaped=tuple(
            f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in state.items()
            if key in own and key not in fits
        ),
        unknown=tuple(key for key in state if key not in own),
        missing=tuple(key for key in own if key not in state),
    )


def fits_somewhere(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Return whether any tensor has the network's name and shape; counters, which fit any network, are left aside."""
    own = network.state_dict()
    return any(key in own and own[key].shape == value.shape and value.ndim for key, value in state.items())


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a file, ``*.safetensors`` or PyTorch's own format.

    Wrapping dictionaries and prefixes of parallel wrappers (``module.``) come off.

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
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals(numpy_scalars()):
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


def _load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}). Is the download complete?") from error


def numpy_scalars() -> list[Any]:
    """Return what safe mode has to know to read NumPy's numbers, which scripts log beside their weights."""
    rebuild = np.float64(0).__reduce__()[0]
    places = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # of NumPy 1 and of NumPy 2
    return [
        *((rebuild, place) for place in places),
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")},
    ]


def _bare(name: str) -> str:
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
