"""What both SAM methods need around SAM's own classes: sizes, the prompt encoder, precision, how sure a mask is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

MASK_PROMPT_CHANNELS = 16  # SAM's; the mask prompt is never used here, its weights only have a place


class DecoderSizes(Protocol):
    """What a decoder has to know of a SAM model (``nnunet_dgplugins.sam.models.SamModel`` fits)."""

    @property
    def embed_dim(self) -> int:
        """Channels of the taps."""

    @property
    def prompt_dim(self) -> int:
        """Channels of neck and prompts."""

    @property
    def decoder_mlp_dim(self) -> int:
        """Hidden width of the transformer's MLP."""

    @property
    def decoder_num_heads(self) -> int:
        """Heads of the transformer."""

    @property
    def iou_head_hidden(self) -> int:
        """Hidden width of the IoU head."""


def build_prompt_encoder(prompt_dim: int, grid: int, canvas: int) -> nn.Module:
    """Return SAM's prompt encoder, frozen.

    Args:
        prompt_dim: channels of the prompts.
        grid: side of the token grid.
        canvas: side of the image the encoder sees, in pixels.
    """
    from segment_anything.modeling.prompt_encoder import PromptEncoder

    encoder = PromptEncoder(
        embed_dim=prompt_dim,
        image_embedding_size=(grid, grid),
        input_image_size=(canvas, canvas),
        mask_in_chans=MASK_PROMPT_CHANNELS,
    )
    return encoder.requires_grad_(False).eval()


def disabled_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which autocast is off, for positions that half precision would blur."""
    return torch.autocast(device_type=device.type, enabled=False)


def expected_dice(logits: Tensor) -> Tensor:
    """Return the Dice (B, K) a mask expects of itself, ``2 sum(p m) / (sum(p) + sum(m))`` with p its probabilities.

    An empty mask is as sure as its likeliest pixel is unlikely.

    Args:
        logits: (B, K, H, W); the mask m is where they are above 0.
    """
    probability = logits.float().sigmoid()
    mask = (logits > 0).to(probability.dtype)
    overlap, size = 2 * (probability * mask).sum((2, 3)), mask.sum((2, 3))
    return torch.where(
        size > 0, overlap / (probability.sum((2, 3)) + size).clamp(min=1e-6), 1 - probability.amax((2, 3))
    )
