"""Checkpoints in nnU-Net's form, read in safe mode and written in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import replacing


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net's form with ``weights_only``; NumPy's scalars in its logging block are allowed.

    Raises:
        UserError: the file is missing, broken, or holds objects that could run code.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint.")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has a class per cause; the cause is kept
        raise UserError(
            f"{path}: not a readable nnU-Net checkpoint ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    if "network_weights" not in content:
        raise UserError(f"{path}: not a checkpoint of nnU-Net: no network_weights in it.")
    return content


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint in one step."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _numpy_scalars() -> list[Any]:
    # the function that rebuilds a scalar is wherever this NumPy keeps it
    rebuild = np.float64(0).__reduce__()[0]
    return [rebuild, np.dtype, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")}]
