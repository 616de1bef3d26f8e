"""SAM models with tiny canvases, so that a training takes a second: the same code, other numbers in the table."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path

from nnunet_dgplugins.sam.models import MODELS, SamModel

#: stands for vit_tiny: weights from a seed
SEEDED = replace(
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
    SEEDED, name="vit_b", file="small_vit_b.pth", depth=5, global_attn_indexes=(0, 1, 2, 4), note="for tests"
)


def install(models: MutableMapping[str, SamModel] = MODELS) -> None:
    """Put the small models into the table."""
    models.update(vit_tiny=SEEDED, vit_b=FROM_FILE)


def write_file(folder: Path, seed: int = 5, name: str = "small_vit_b.pth") -> Path:
    """Write a weight file in SAM's layout for the small vit_b."""
    import torch

    from nnunet_dgplugins.sam.seeded import fill_from_seed
    from nnunet_dgplugins.sam.weights import _mask_decoder, build_parts

    parts = build_parts(FROM_FILE)
    modules = {
        "image_encoder.": parts.image_encoder,
        "prompt_encoder.": parts.prompt_encoder,
        "mask_decoder.": _mask_decoder(FROM_FILE, parts),
    }
    shapes = {prefix + key: value for prefix, module in modules.items() for key, value in module.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(fill_from_seed(shapes, seed), folder / name)
    return folder / name
