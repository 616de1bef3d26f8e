"""The promptable head: frozen prompt encoder and trained decoder, in the form training and prediction call it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_dgplugins.methods.desam.decoder import DeSAMDecoder
from nnunet_dgplugins.methods.desam.grid import PRIM_BATCH, finished, predict_grid
from nnunet_dgplugins.methods.desam.prompts import GRID_SIZE, EncodedPrompts, encode_box, encode_points, grid_points
from nnunet_dgplugins.methods.desam.selection import SelectionRule
from nnunet_dgplugins.methods.sam_parts import expected_dice


class DeSAMHead(nn.Module):
    """From encoder features to masks.

    Args:
        mask_decoder: PRIM and PDMM.
        prompt_encoder: SAM's, frozen.
        prompt: ``box`` (DeSAM-B, the whole image) or ``grid`` (DeSAM-P).
        grid_size: points per side of the grid.
        rule: thresholds, clean-up and frame.
    """

    def __init__(
        self,
        mask_decoder: DeSAMDecoder,
        prompt_encoder: nn.Module,
        prompt: str = "box",
        grid_size: int = GRID_SIZE,
        rule: SelectionRule | None = None,
    ):
        super().__init__()
        self.mask_decoder = mask_decoder
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.prompt, self.grid_size = prompt, grid_size
        self.rule = rule or SelectionRule()

    @property
    def num_classes(self) -> int:
        """Mask channels K."""
        return self.mask_decoder.num_classes

    def box(self, features: Sequence[Tensor]) -> Tensor:
        """Return raw logits (B, K, 4g, 4g) for the box around the whole image: one decoder pass, with gradients."""
        return self._decode(features, encode_box(self.prompt_encoder, len(features[-1])))[0]

    def points(self, features: Sequence[Tensor], xy: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw logits (B, K, 4g, 4g) and IoU predictions (B, max(4, K)) for one point per image, xy (B, 1, 2)."""
        return self._decode(features, encode_points(self.prompt_encoder, xy))

    def finish(self, logits: Tensor) -> Tensor:
        """Return logits (B, K, H, W) in float32 after the rule's clean-up and frame."""
        return torch.stack(
            [torch.stack([finished(one, k, self.rule)[0] for k in range(len(one))]) for one in logits.float()]
        )

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what is deployed: logits (B, K, 4g, 4g) after selection and clean-up, confidence (B, K) in [0, 1].

        With the grid the confidence is the selected mask's predicted IoU. With the whole box nothing trains the IoU
        head; there it is the Dice the mask expects under its own probabilities.
        """
        if self.prompt == "box":
            logits = self.finish(self.box(features))
            return logits, expected_dice(logits)
        canvas = int(self.prompt_encoder.input_image_size[0])  # type: ignore[index]
        prompts = encode_points(self.prompt_encoder, grid_points(self.grid_size, (canvas, canvas), canvas))
        found = [
            predict_grid(
                self.mask_decoder,
                [tap[i : i + 1] for tap in features[:-1]],
                features[-1][i : i + 1],
                prompts,
                self.rule,
                # a GPU scores all points at once and decodes a few masks ahead; a CPU gains nothing by either
                prim_batch=len(prompts.sparse) if features[-1].is_cuda else PRIM_BATCH,
                decode_batch=PRIM_BATCH if features[-1].is_cuda else 1,
            )
            for i in range(len(features[-1]))
        ]
        return torch.stack([one.logits for one in found]), torch.stack([one.iou for one in found]).clamp(0, 1)

    def _decode(self, features: Sequence[Tensor], prompts: EncodedPrompts) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.mask_decoder(
            features[:-1], features[-1], prompts.sparse, prompts.dense, prompts.dense_pe
        )
        return found
