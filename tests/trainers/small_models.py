"""SAM models with tiny canvases, so that a training takes a second: the same code, other numbers in the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dgplugins.sam.models import MODELS, SamModel

if TYPE_CHECKING:
    import pytest
    import torch

#: stands for vit_tiny: weights that count as part of the package; its file is written by `installed`
SHIPPED = replace(
    MODELS["vit_tiny"],
    image_size=64,
    embed_dim=32,
    depth=4,
    num_heads=2,
    global_attn_indexes=(0, 1, 2, 3),
    window_size=4,
    prompt_dim=64,
    decoder_mlp_dim=64,
    decoder_num_heads=2,
    iou_head_hidden=16,
)
#: stands for Meta's vit_b: weights from a file; another depth, so that its size is recognised from the file
FROM_FILE = replace(
    SHIPPED,
    name="vit_b",
    file="small_vit_b.pth",
    shipped=False,
    depth=5,
    global_attn_indexes=(0, 1, 2, 4),
    note="small",
)


def installed(folder: Path, seed: int = 0) -> dict[str, SamModel]:
    """Return what the table of models holds once a package with the small vit_tiny in it lies in ``folder``.

    Its weights are written there unless they are there already.
    """
    from safetensors.torch import save_file

    path = folder / "vit_tiny.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half() for key, value in _weights(SHIPPED, seed).items()}, path)
    return {"vit_tiny": replace(SHIPPED, file=str(path)), "vit_b": FROM_FILE}


def install_newer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a version of the package, in another folder, whose vit_tiny has other weights."""
    for name, model in installed(folder, seed=1).items():
        monkeypatch.setitem(MODELS, name, model)


def write_file(folder: Path, seed: int = 5, name: str = "small_vit_b.pth") -> Path:
    """Write a weight file in SAM's layout for the small vit_b."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(_weights(FROM_FILE, seed), folder / name)
    return folder / name


def _weights(model: SamModel, seed: int) -> dict[str, torch.Tensor]:
    """Return weights from a seed under the names of SAM's files."""
    from nnunet_dgplugins.sam.seeded import seeded_weights

    return seeded_weights(model, seed)
