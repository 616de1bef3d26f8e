"""Checkpoints in nnU-Net's form, read in safe mode and written in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import replacing
from nnunet_dgplugins.methods.safe_loading import numpy_scalars


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net's form with ``weights_only``; NumPy's scalars in its logging block are allowed.

    Raises:
        UserError: the file is missing, broken, or holds objects that could run code.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint.")
    try:
        with torch.serialization.safe_globals(numpy_scalars()):
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
