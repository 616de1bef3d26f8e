"""The decoupled decoder: PRIM (SAM's two-way transformer and IoU head) beside PDMM (the mask).

Gao et al., DeSAM, MICCAI 2024, section 2.2. Parameter names are those of the released ``mask_decoder``, parts that are
never called included, so that its checkpoints and SAM's load strictly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nnunet_dgplugins.methods.desam.pdmm import PDMM, SharedContexts
from nnunet_dgplugins.methods.two_way import two_way

NUM_MASK_TOKENS = 4  # SAM's: one mask, or three for an ambiguous prompt
TRANSFORMER_DEPTH = 2
IOU_HEAD_DEPTH = 3


class DeSAMDecoder(nn.Module):
    """Prompt-relevant IoU module and prompt-decoupled mask module.

    The IoU head answers for class k in column k and has ``max(4, K)`` columns; with K = 1 everything is the paper's.

    Args:
        encoder_channels: channels of the encoder's taps.
        width: channels of neck, prompts and transformer (256 in SAM).
        mlp_dim: hidden width of the transformer's MLP (2048 in SAM).
        num_heads: attention heads of the transformer (8 in SAM).
        iou_head_hidden: hidden width of the IoU head (256 in SAM).
        num_classes: mask channels K.
    """

    def __init__(
        self,
        *,
        encoder_channels: int,
        width: int = 256,
        mlp_dim: int = 2048,
        num_heads: int = 8,
        iou_head_hidden: int = 256,
        num_classes: int = 1,
    ):
        from segment_anything.modeling.common import LayerNorm2d
        from segment_anything.modeling.mask_decoder import MLP
        from segment_anything.modeling.transformer import TwoWayTransformer

        super().__init__()
        self.num_classes = num_classes
        self.transformer = TwoWayTransformer(
            depth=TRANSFORMER_DEPTH, embedding_dim=width, num_heads=num_heads, mlp_dim=mlp_dim
        )
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(NUM_MASK_TOKENS, width)
        # SAM's own mask branch: never called, here because official checkpoints hold it
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(width, width, width // 8, 3) for _ in range(NUM_MASK_TOKENS))
        columns = max(NUM_MASK_TOKENS, num_classes)
        self.iou_prediction_head = MLP(width, iou_head_hidden, columns, IOU_HEAD_DEPTH)
        self.pimm = PDMM(encoder_channels, width, num_classes)

    def contexts(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Return the prompt-independent maps of each image, see :meth:`PDMM.contexts`."""
        return self.pimm.contexts(taps)

    def share(self, contexts: Sequence[Tensor]) -> SharedContexts:
        """Work out once what one image's contexts give to all its prompts, see :meth:`PDMM.share`."""
        return self.pimm.share(contexts)

    def prim(self, neck: Tensor, sparse: Tensor, dense: Tensor, dense_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Read the prompts against the image.

        Args:
            neck: encoder output (B, P, g, g), B = N, or B = 1 where all prompts look at one image. One image is
                never copied per prompt: the transformer's first layer works on its single copy.
            sparse: encoded prompts (N, 2, P).
            dense: encoded absence of a mask prompt, (1, P, g, g) or (N, P, g, g).
            dense_pe: positions of the image tokens (1, P, g, g).

        Returns:
            Prompt-aware map (N, P, g, g), that is the transformer's image side, and IoU predictions (N, max(4, K)),
            raw (no sigmoid).
        """
        count, (batch, channels, height, width) = sparse.shape[0], neck.shape
        if batch not in (1, count):
            raise ValueError(f"{count} prompts need {count} images or 1, got {batch}.")
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(count, *tokens.shape), sparse], dim=1)  # (N, 1 + 4 + 2, P)
        # without gradients the folded form: the same function, several times faster
        transform = self.transformer if torch.is_grad_enabled() else partial(two_way, self.transformer)
        queries, keys = transform(neck + dense, dense_pe, tokens)
        mask_embedding = keys.transpose(1, 2).reshape(count, channels, height, width)
        return mask_embedding, self.iou_prediction_head(queries[:, 0])

    def fuse(self, mask_embedding: Tensor, contexts: Sequence[Tensor] | SharedContexts) -> Tensor:
        """Return the bottleneck map (N, P, g, g) in which prompt and image meet."""
        return self.pimm.fuse(mask_embedding, contexts)

    def mask(self, mask_embedding: Tensor, contexts: Sequence[Tensor] | SharedContexts) -> Tensor:
        """Return logits (N, K, 4g, 4g) of N prompts; contexts have batch 1 (one image) or N, or are shared."""
        return self.pimm(mask_embedding, contexts)

    def forward(
        self, taps: Sequence[Tensor], neck: Tensor, sparse: Tensor, dense: Tensor, dense_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mask logits (N, K, 4g, 4g) and IoU predictions (N, max(4, K)): the training pass."""
        mask_embedding, iou = self.prim(neck, sparse, dense, dense_pe)
        return self.mask(mask_embedding, self.contexts(taps)), iou
