"""SAM's weights: found, read in safe mode, checked key by key, hashed; and the parts of SAM built from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import human_bytes
from nnunet_dgplugins.sam.hash_cache import cached_hash
from nnunet_dgplugins.sam.models import MODELS, VARIABLE, SamModel, get_model, locate

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder

_SECTIONS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
_ENCODER_KEYS = ("pos_embed", "patch_embed.", "blocks.", "neck.")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "sam.")


@dataclass
class SamParts:
    """The parts of SAM that a method builds on.

    Args:
        model: sizes and origin.
        image_encoder: SAM's ViT, frozen, float32.
        prompt_encoder: SAM's prompt encoder, frozen.
        transformer_kwargs: arguments of SAM's ``TwoWayTransformer``.
        mask_decoder_state: SAM's own mask decoder under its file's names, ``mask_decoder.*``.
        weights_hash: SHA-256 of the image encoder's tensors (64 hex digits); "" while there are no weights.
    """

    model: SamModel
    image_encoder: ImageEncoderViT
    prompt_encoder: PromptEncoder
    transformer_kwargs: dict[str, Any]
    mask_decoder_state: dict[str, torch.Tensor] = field(default_factory=dict)
    weights_hash: str = ""


def find_weights(name: str | SamModel) -> Path:
    """Return the weight file of a model, or of a path.

    Raises:
        UserError: the file is nowhere; the message says which file, where it is published and where to put it.
    """
    model = name if isinstance(name, SamModel) else get_model(name)
    found = model.find()
    if found is None:
        raise UserError(_missing(model))
    return found


def _missing(model: SamModel) -> str:
    import os

    if model.shipped:
        return f"{model.file} ({model.name}) is missing from the installed nnunet_dgplugins. Install it again."
    folder = os.environ.get(VARIABLE)
    where = f"{VARIABLE} is {folder}" if folder else f"{VARIABLE} is not set (export {VARIABLE}=/folder/with/sam/files)"
    text = f"SAM weights of {model.name} not found: {model.file}. {where}."
    if model.url:
        text += (
            f" Download {model.url} ({human_bytes(model.size_bytes or 0)}, SHA-256 {model.sha256}) into that folder."
        )
    else:
        text += " Put the file into that folder or give its path."
    return text + " Without it, sam=vit_tiny works: its weights ship with the package."


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict in safe mode (safetensors, or a pickle that holds tensors only), on the CPU.

    Wrappers (``model``, ``state_dict``) and prefixes (``module.``, ``sam.``) are taken off; an encoder's keys may come
    without theirs.

    Raises:
        UserError: the file is missing, broken, a pickled module, or holds no tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own classes; the cause is kept
        raise UserError(f"{path}: {_why_unreadable(error)}") from error
    while isinstance(content, Mapping) and (
        inner := next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), "")
    ):
        content = content[inner]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a state dict (tensor names with tensors), got {type(content).__name__}.")
    state = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    if not state:
        raise UserError(f"{path}: holds no tensors.")
    return {f"image_encoder.{key}" if key.startswith(_ENCODER_KEYS) else key: value for key, value in state.items()}


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    if "weights_only" in text or "Unsupported global" in text or "GLOBAL" in text:
        return (
            "holds pickled Python objects (a whole module?), which could run code when opened, and is refused. "
            "Where you trust its origin, load it in the code that wrote it and save its state_dict() instead."
        )
    first = text.splitlines()[0][:200] if text else type(error).__name__
    return f"cannot be read as weights, broken or incomplete ({first})."


def recognise(path: str | Path) -> str:
    """Return the size (``vit_b`` and so on) of a weight file from its tensors' shapes.

    Raises:
        UserError: the file cannot be found or read, or is of no known size.
    """
    found = locate(str(path))
    if found is None and Path(path).expanduser().is_file():
        found = Path(path).expanduser()
    if found is None:
        raise UserError(f"SAM weights not found: {path}. Give a path to a file, or its name in {VARIABLE}.")
    state = read_state(found)
    position = state.get("image_encoder.pos_embed")
    blocks = {key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")}
    for size, model in MODELS.items():
        if position is not None and (len(blocks), tuple(position.shape)) == (
            model.depth,
            (1, model.grid, model.grid, model.embed_dim),
        ):
            return size
    seen = (
        "no image_encoder.pos_embed" if position is None else f"pos_embed {tuple(position.shape)}, {len(blocks)} blocks"
    )
    raise UserError(f"{found}: not a SAM file of a known size ({', '.join(MODELS)}): {seen}.")


def build_parts(model: SamModel) -> SamParts:
    """Build SAM's parts without weights, on the meta device; no random numbers are drawn.

    Example:
        >>> build_parts(MODELS["vit_tiny"]).transformer_kwargs["embedding_dim"]
        64
    """
    from segment_anything.modeling import ImageEncoderViT, PromptEncoder

    with torch.device("meta"):
        image_encoder = ImageEncoderViT(
            img_size=model.image_size,
            patch_size=model.patch_size,
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            out_chans=model.prompt_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=model.window_size,
            global_attn_indexes=model.global_attn_indexes,
        )
        prompt_encoder = PromptEncoder(
            embed_dim=model.prompt_dim,
            image_embedding_size=(model.grid, model.grid),
            input_image_size=(model.image_size, model.image_size),
            mask_in_chans=16,
        )
    transformer = {
        "depth": 2,
        "embedding_dim": model.prompt_dim,
        "num_heads": model.decoder_num_heads,
        "mlp_dim": model.decoder_mlp_dim,
    }
    return SamParts(model, image_encoder, prompt_encoder, transformer)


def build_mask_decoder(parts: SamParts) -> MaskDecoder:
    """Build SAM's own mask decoder without weights, on the meta device."""
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    with torch.device("meta"):
        return MaskDecoder(
            transformer_dim=parts.model.prompt_dim,
            transformer=TwoWayTransformer(**parts.transformer_kwargs),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=parts.model.iou_head_hidden,
        )


def weight_layout(model: SamModel) -> dict[str, torch.Tensor]:
    """Return the names in a model's weight file with tensors that have a shape and no content (meta device)."""
    parts = build_parts(model)
    return _named(_sections(parts, build_mask_decoder(parts)))


def _sections(parts: SamParts, decoder: nn.Module) -> dict[str, nn.Module]:
    return dict(zip(_SECTIONS, (parts.image_encoder, parts.prompt_encoder, decoder), strict=True))


def _named(sections: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for prefix, module in sections.items() for key, value in module.state_dict().items()}


def load_parts(name: str | SamModel, device: str | torch.device = "cpu") -> SamParts:
    """Return SAM's parts with weights, frozen, in evaluation mode, on ``device``.

    Args:
        name: as for :func:`nnunet_dgplugins.sam.models.get_model`.
        device: where the encoders go; ``mask_decoder_state`` stays on the CPU.

    Raises:
        UserError: the file is missing, unsafe, or its keys or shapes do not fit.
    """
    model = name if isinstance(name, SamModel) else get_model(name)
    parts = build_parts(model)
    decoder = build_mask_decoder(parts)
    sections = _sections(parts, decoder)
    path = find_weights(model)
    state = _checked(read_state(path), _named(sections), path)
    for prefix, module in sections.items():
        own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if module is decoder:
            parts.mask_decoder_state = {prefix + key: value for key, value in own.items()}
            continue
        module.load_state_dict(own, assign=True)
        module.requires_grad_(False).eval().to(device)
    encoder = {key: value for key, value in state.items() if key.startswith("image_encoder.")}
    # a small file is quicker hashed than looked up
    parts.weights_hash = hash_state(encoder) if model.shipped else cached_hash(path, lambda: hash_state(encoder))
    return parts


def weights_hash(name: str | SamModel) -> str:
    """Return the hash of a model's image encoder without keeping the weights in memory.

    Raises:
        UserError: as :func:`load_parts`.
    """
    model = name if isinstance(name, SamModel) else get_model(name)
    if model.shipped:
        return load_parts(model).weights_hash
    return cached_hash(find_weights(model), lambda: load_parts(model).weights_hash)


def _checked(state: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Return the wanted tensors in float32.

    Raises:
        UserError: keys are missing, unknown, or of another shape; all of them are listed.
    """
    # an official DeSAM checkpoint holds SAM's parts and its own decoder beside them
    foreign = [
        k for k in state if k.startswith(_SECTIONS) and k not in wanted and not k.startswith("mask_decoder.pimm.")
    ]
    missing = [key for key in wanted if key not in state]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if len(missing) == len(wanted):
        raise UserError(f"{path}: no tensor has a name of SAM's; found for example {', '.join(list(state)[:3])}.")
    if missing or foreign or shapes:
        lines = [f"{path}: does not fit SAM's layout."]
        lines += [f"  missing: {key}" for key in missing]
        lines += [f"  unknown: {key}" for key in foreign]
        lines += [f"  shape: {text}" for text in shapes]
        raise UserError("\n".join(lines))
    return {key: state[key].float().contiguous() for key in wanted}


def hash_state(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 (64 hex digits) over sorted tensor names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
