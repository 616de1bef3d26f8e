"""The table of SAM encoders: sizes, where the weights are published, how a user names one. Importable without torch.

Kirillov et al., Segment Anything, ICCV 2023; the taps are those of DeSAM (Gao et al., MICCAI 2024, section 2.1).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_dgplugins.errors import UserError, nearest
from nnunet_dgplugins.files import human_bytes

VARIABLE = "DGPLUGINS_SAM_DIR"
AUTO = "auto"
_ENDINGS = (".pth", ".pt", ".safetensors")
_PACKAGE = Path(__file__).parent  # where weights that ship with the package lie


@dataclass(frozen=True)
class SamModel:
    """Sizes of one SAM model, and where its weights come from.

    Args:
        name: what the user typed: ``vit_b``, or ``vit_b:/path/medsam_vit_b.pth`` for a file of that size's layout.
        image_size: side of the square canvas, in pixels.
        patch_size: side of one token, in pixels.
        embed_dim: channels of the ViT's tokens, and of the taps.
        depth: number of transformer blocks.
        num_heads: attention heads per block.
        global_attn_indexes: blocks (from 0) with global attention; the others attend within windows.
        window_size: side of a window, in tokens.
        prompt_dim: channels of the neck, the prompts and the mask decoder.
        decoder_mlp_dim: hidden width of the two-way transformer's MLP.
        decoder_num_heads: heads of the two-way transformer.
        iou_head_hidden: hidden width of the IoU head.
        file: name or path of the weight file.
        shipped: whether the file is part of this package; such weights are also part of every checkpoint.
        url: where the file is published.
        size_bytes: size of the published file.
        sha256: SHA-256 of the published file.
        note: what a user should know about it.
    """

    name: str
    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    window_size: int
    prompt_dim: int
    decoder_mlp_dim: int
    decoder_num_heads: int
    iou_head_hidden: int
    file: str
    shipped: bool = False
    url: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    note: str = ""

    @property
    def size(self) -> str:
        """Name of the size, a key of :data:`MODELS`."""
        return self.name.partition(":")[0]

    @property
    def label(self) -> str:
        """Short name that is safe in a folder name."""
        _, _, file = self.name.partition(":")
        return self.size if not file else f"{self.size}-{re.sub(r'[^A-Za-z0-9.]+', '-', Path(file).stem)[:40]}"

    @property
    def described(self) -> str:
        """Name with what has to be said wherever the model is named."""
        return f"{self.name} (shipped)" if self.shipped else self.name

    def find(self) -> Path | None:
        """Return where the weight file lies: in the package if it ships with it, else see :func:`locate`."""
        if not self.shipped:
            return locate(self.file)
        path = _PACKAGE / self.file
        return path if path.is_file() else None

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.patch_size

    @property
    def mask_size(self) -> int:
        """Side of the mask that the decoder writes, in pixels."""
        return 4 * self.grid

    @property
    def taps(self) -> tuple[int, ...]:
        """Blocks whose output is tapped: all global ones but the last, which feeds only the neck."""
        return self.global_attn_indexes[:-1]

    @property
    def feature_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes (C, g, g) of a slice's features: the taps from shallow to deep, then the neck."""
        tap = (self.embed_dim, self.grid, self.grid)
        return (tap,) * len(self.taps) + ((self.prompt_dim, self.grid, self.grid),)

    @property
    def raw_bytes(self) -> int:
        """Bytes of one slice's features in float32."""
        return 4 * sum(c * h * w for c, h, w in self.feature_shapes)


def _meta(
    name: str, dim: int, depth: int, heads: int, taps: tuple[int, ...], file: str, size: int, sha: str
) -> SamModel:
    return SamModel(
        name=name,
        image_size=1024,
        patch_size=16,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        global_attn_indexes=taps,
        window_size=14,
        prompt_dim=256,
        decoder_mlp_dim=2048,
        decoder_num_heads=8,
        iou_head_hidden=256,
        file=file,
        url=f"https://dl.fbaipublicfiles.com/segment_anything/{file}",
        size_bytes=size,
        sha256=sha,
        note="Meta's weights, Apache-2.0",
    )


MODELS: dict[str, SamModel] = {
    model.name: model
    for model in (
        _meta("vit_h", 1280, 32, 16, (7, 15, 23, 31), "sam_vit_h_4b8939.pth", 2564550879,
              "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
        _meta("vit_l", 1024, 24, 16, (5, 11, 17, 23), "sam_vit_l_0b3195.pth", 1249524607,
              "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
        _meta("vit_b", 768, 12, 12, (2, 5, 8, 11), "sam_vit_b_01ec64.pth", 375042383,
              "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
        SamModel(
            name="vit_tiny",
            image_size=256,
            patch_size=8,
            embed_dim=128,
            depth=8,
            num_heads=2,
            global_attn_indexes=(1, 3, 5, 7),
            window_size=8,
            prompt_dim=64,
            decoder_mlp_dim=256,
            decoder_num_heads=4,
            iou_head_hidden=64,
            file="vit_tiny.safetensors",
            shipped=True,
            note="ours, trained on generated images only, part of the package",
        ),
    )
}  # fmt: skip


def get_model(name: str) -> SamModel:
    """Return the model a user means.

    Args:
        name: a key of :data:`MODELS`; ``auto`` (the largest whose file is found, else ``vit_tiny``); a path to a
            weight file, whose size is recognised from its tensors; or ``size:path``, which needs no file yet.

    Raises:
        UserError: no such model, or the file cannot be read or recognised.
    """
    if name in MODELS:
        return MODELS[name]
    if name == AUTO:
        return next((m for m in MODELS.values() if m.find() and not m.shipped), MODELS["vit_tiny"])
    size, _, file = name.partition(":")
    if size in MODELS and file:
        note = f"{Path(file).name}, given by the user"
        return replace(
            MODELS[size], name=name, file=file, shipped=False, url=None, size_bytes=None, sha256=None, note=note
        )
    if name.endswith(_ENDINGS) or os.sep in name:
        from nnunet_dgplugins.sam.weights import recognise  # only here: it needs torch

        return get_model(f"{recognise(name)}:{name}")
    raise UserError(f"No SAM model called '{name}'{nearest(name, [*MODELS, AUTO])}")


def locate(file: str) -> Path | None:
    """Return where a weight file lies: at its own path, else by its name in ``DGPLUGINS_SAM_DIR``; None if nowhere."""
    places = [Path(file).expanduser()] if os.path.dirname(file) else []
    places += [Path(folder) / Path(file).name for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    return next((place for place in places if os.path.isfile(place)), None)  # also False where a folder is not readable


def what_a_file_adds() -> str:
    """Say in one line what a real SAM file would add to the shipped model, and where it belongs."""
    files = ", ".join(f"{m.name} {human_bytes(m.size_bytes)}" for m in MODELS.values() if m.size_bytes)
    return f"A real SAM file in {VARIABLE} adds training on 11 million photos: {files}."
