"""A frozen SAM encoder with a promptable head, in the form nnU-Net's predictor wants a network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from nnunet_dgplugins.content import CLOSED, Field, content_box, from_canvas, tiled_warning
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.sam.models import SamModel
from nnunet_dgplugins.sam.preprocess import to_canvas


class SliceSegmenter(nn.Module):
    """Segments whole slices: zero padding removed, canvas, frozen encoder, head, back to the slice.

    Args:
        model: sizes of SAM.
        encoder: the frozen image encoder.
        head: promptable decoder; ``head(features)`` gives mask logits (B, K, m, m) and a confidence (B, K) in [0, 1].
        channels: input channels shown to SAM, one or three.
        background: put a background channel of zeros first (classes); without it channels are regions of their own.
        field: rows and columns that the canvas shows at least, see :func:`nnunet_dgplugins.sam.preprocess.to_canvas`.
    """

    def __init__(
        self,
        model: SamModel,
        encoder: FrozenEncoder,
        head: nn.Module,
        channels: Sequence[int],
        background: bool,
        field: Field | None = None,
    ):
        super().__init__()
        self.model, self.channels, self.background = model, tuple(channels), background
        self.field = field
        self.image_encoder = encoder
        self.head = head
        self._warned = False

    def canvas(self, x: torch.Tensor) -> torch.Tensor:
        """Return the canvas (3, S, S) of one slice (C, H, W)."""
        return to_canvas(x, self.model, self.channels, self.field)

    def features(self, x: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the encoder's features of slices (C, H, W) each: taps from shallow to deep, then the neck."""
        return self.image_encoder(torch.stack([self.canvas(item) for item in x]))

    def segment(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment slices.

        Args:
            x: (B, C, H, W) as nnU-Net preprocessed them, zero-padded or not.

        Returns:
            Logits (B, heads, H, W), finite, and the head's confidence (B, K); 1 for a slice that is zero everywhere,
            because nothing is there to be wrong about.
        """
        boxes = [content_box(item) for item in x]
        shown = [index for index, box in enumerate(boxes) if box is not None]
        size = (int(x.shape[-2]), int(x.shape[-1]))
        heads = int(self.head.num_classes)  # type: ignore[arg-type]
        logits = torch.full((len(x), heads, *size), CLOSED, device=x.device)
        confidence = torch.ones((len(x), heads), device=x.device)
        if shown:
            found, sure = self.head(self.features(x[shown]))
            confidence[shown] = sure.float()
            for place, index in enumerate(shown):
                clamped = found[place].float().clamp(CLOSED, -CLOSED)
                logits[index] = from_canvas(clamped, boxes[index], size, CLOSED, self.field)
        if self.background:
            logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)
        return logits, confidence

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, heads, H, W) of slices (B, C, H, W); what nnU-Net's predictor calls with a patch.

        The way depends on the content of each slice and is no graph: nnUNet_compile is accepted and has no effect.
        """
        size = (int(x.shape[-2]), int(x.shape[-1]))
        if not self._warned and (text := tiled_warning([content_box(item) for item in x], size)):
            self._warned = True
            warnings.warn(text, stacklevel=3)
        return self.segment(x)[0]
