"""The frozen image encoder as a part of a network: out of the checkpoint, but never confused with another one.

A checkpoint holds what was trained, and of the encoder only the hash of its weights. ``carry()`` puts any encoder
inside in half precision (``dgplugins bundle``). Weights that ship with the package (``vit_tiny``) are always inside
and win over those of the installed package: a model predicts with what it was trained with. nnU-Net loads the same
checkpoint strictly, once per fold and case, into a network built without any weight file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam.encoder import TappedEncoder
from nnunet_dgplugins.sam.models import SamModel, get_model
from nnunet_dgplugins.sam.weights import SamParts, build_parts, find_weights, hash_state, load_parts

_HASH_KEY = "weights_hash"
_HASH_BYTES = 32


class FrozenEncoder(nn.Module):
    """SAM's encoder with taps, loaded when first needed and never trained.

    Its state dict holds ``weights_hash`` (32 bytes) and, when carried, the encoder's tensors under SAM's names. Used as
    attribute ``image_encoder`` of a network, the names in a checkpoint are those of SAM's own files.

    Args:
        model: sizes and origin, or a name for :func:`nnunet_dgplugins.sam.models.get_model`.
        dtype: precision of the encoder's matrix products on the CPU; None: float32. CUDA always takes half.

    Example:
        >>> encoder = FrozenEncoder("vit_tiny")
        >>> [tuple(x.shape) for x in encoder(torch.zeros(1, 3, 256, 256))][-1]
        (1, 64, 32, 32)
    """

    weights_hash: torch.Tensor

    def __init__(self, model: SamModel | str, dtype: torch.dtype | None = None):
        super().__init__()
        self.model = model if isinstance(model, SamModel) else get_model(model)
        self.dtype = dtype
        self.carried = self.model.shipped
        self.register_buffer(_HASH_KEY, torch.zeros(_HASH_BYTES, dtype=torch.uint8))
        # in a list, so that torch registers nothing: no parameters for the optimiser, DDP or the state dict
        self._held: list[TappedEncoder] = []

    @property
    def hash(self) -> str:
        """Hash of the weights in hex; "" while it is not known."""
        known = bytes(self.weights_hash.cpu().tolist())
        return known.hex() if any(known) else ""

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return bool(self._held)

    def adopt(self, parts: SamParts) -> None:
        """Take the encoder and hash of parts already loaded.

        Raises:
            UserError: this encoder is known to be another one.
        """
        self._check_hash(parts.weights_hash)
        self._hold(parts.image_encoder, parts.weights_hash)

    def load(self) -> None:
        """Load the weights if they are not in memory.

        Raises:
            UserError: the file is missing, or holds other weights than those this network was trained with.
        """
        if not self._held:
            self.adopt(load_parts(self.model))

    def release(self) -> None:
        """Free the weights if their file can give them again; weights that are carried stay."""
        if not self.carried:
            self._held.clear()

    def carry(self, on: bool = True) -> None:
        """Put the weights into the state dict in half precision, or take them out; shipped ones are always inside."""
        if on:
            self.load()
        self.carried = on or self.model.shipped

    def forward(self, canvas: torch.Tensor) -> list[torch.Tensor]:
        """Encode (B, 3, S, S), see :meth:`TappedEncoder.forward`."""
        self.load()
        encoder = self._held[0]
        if encoder.image_encoder.neck[0].weight.device != canvas.device:
            encoder.to(canvas.device)
        encoder.dtype = torch.float16 if canvas.is_cuda else self.dtype or torch.float32
        with torch.autocast(canvas.device.type, enabled=False):  # the encoder chooses its own precision
            found: list[torch.Tensor] = encoder(canvas.float())
        return found

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    def _hold(self, image_encoder: nn.Module, hash: str) -> None:
        image_encoder.requires_grad_(False).eval().to(self.weights_hash.device)
        self._held[:] = [TappedEncoder(image_encoder, self.model.taps)]
        with torch.no_grad():
            self.weights_hash.copy_(torch.tensor(list(bytes.fromhex(hash)), dtype=torch.uint8))

    def _check_hash(self, found: str) -> None:
        if self.hash and self.hash != found:
            raise UserError(
                f"This network was trained with {self.model.name} weights {self.hash[:12]}..., but the weights "
                f"found ({find_weights(self.model)}) are {found[:12]}.... Put the file it was trained with in "
                f"their place, or use a bundled model (`dgplugins bundle`). Full hashes: {self.hash} and {found}."
            )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenEncoder:
        super()._apply(fn, recurse)
        for encoder in self._held:
            device = self.weights_hash.device  # only devices are followed: precision is the encoder's own matter
            encoder.to(device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.carried:
            self.load()
            for key, value in self._held[0].image_encoder.state_dict().items():
                destination[prefix + key] = _halved(value, self.model.shipped)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if _HASH_KEY not in own:
            missing_keys.append(prefix + _HASH_KEY)
            return
        hash = bytes(own.pop(_HASH_KEY).cpu().tolist()).hex()
        if not own:
            self._expect(hash)
            if self.model.shipped:
                missing_keys.append(f"{prefix}patch_embed.proj.weight")
            return
        if self.loaded and self.carried and self.hash == hash and not self.model.shipped:
            return  # the same bundle again, as nnU-Net does per fold and case
        image_encoder = build_parts(self.model).image_encoder
        wanted = image_encoder.state_dict()
        missing_keys += [prefix + key for key in wanted if key not in own]
        unexpected_keys += [prefix + key for key in own if key not in wanted]
        wrong = [key for key, value in own.items() if key in wanted and wanted[key].shape != value.shape]
        error_msgs += [f"{prefix}{key}: {tuple(own[key].shape)} instead of {tuple(wanted[key].shape)}" for key in wrong]
        if wrong or own.keys() != wanted.keys():
            return
        values = {key: value.detach().float().clone() for key, value in own.items()}
        image_encoder.load_state_dict(values, assign=True)
        self.carried = True
        self._hold(image_encoder, hash)

    def _expect(self, hash: str) -> None:
        """Take over a hash without weights: those in memory stay only if they are the same."""
        if self.hash != hash:
            self._held.clear()
        if not self.model.shipped:
            self.carried = False
        with torch.no_grad():
            self.weights_hash.copy_(torch.tensor(list(bytes.fromhex(hash)), dtype=torch.uint8))


def _halved(value: torch.Tensor, only_exact: bool) -> torch.Tensor:
    """Return half precision; with ``only_exact`` the tensor itself where that would change a value."""
    half = value.half()
    return half if not only_exact or torch.equal(half.float(), value) else value


def encoder_hash(image_encoder: nn.Module) -> str:
    """Return the hash of an encoder's own tensors, as :func:`load_parts` computes it."""
    return hash_state({f"image_encoder.{key}": value for key, value in image_encoder.state_dict().items()})
