"""Prompt-decoupled mask module: a small U-Net decoder on the encoder's taps that writes the mask.

Gao et al., DeSAM, MICCAI 2024, section 2.3 and figure 2 (called PIMM, prompt-invariant mask module, in arXiv v1 and in
the released code, whose parameter names are kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from nnunet_dgplugins.methods.desam.blocks import Halves, ResSE, Upsample, expanded_to_batch


@dataclass(frozen=True)
class SharedContexts:
    """What one image contributes to the mask of every prompt, worked out once (see :meth:`PDMM.share`).

    Args:
        fusion: part of the fusion block's convolutions that context 0 gives.
        localization: the same for the two localization blocks and contexts 1 and 2.
    """

    fusion: Halves
    localization: tuple[Halves, ...]


class ContextBlock(nn.Module):
    """One tap brought to its width and to 2**doublings times its size."""

    def __init__(self, channels_in: int, channels_out: int, doublings: int):
        super().__init__()
        self.block_init = ResSE(channels_in, channels_out)
        self.residual_block = nn.Sequential(
            *(
                nn.Sequential(Upsample(channels_out, channels_out), ResSE(channels_out, channels_out))
                for _ in range(doublings)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Cin, H, W) to (B, Cout, H * 2**doublings, W * 2**doublings)."""
        return self.residual_block(self.block_init(x))


class LocalizationBlock(nn.Module):
    """Upsampling, concatenation with a context, residual block."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.transp_conv = Upsample(channels_in, channels_out)
        self.res_block = ResSE(2 * channels_out, channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map (B, Cin, H, W) and a context (B, Cout, 2H, 2W) to (B, Cout, 2H, 2W)."""
        up = self.transp_conv(x)
        return self.res_block(torch.cat([up, expanded_to_batch(skip, up)], dim=1))

    def forward_halves(self, x: Tensor, skip: Halves) -> Tensor:
        """Equal :meth:`forward` with the context's part worked out before."""
        return self.res_block.forward_halves(self.transp_conv(x), skip)


class PDMM(nn.Module):
    """The mask module.

    Args:
        encoder_channels: channels of the encoder's taps (1280, 1024, 768 for vit_h, vit_l, vit_b).
        width: channels of the prompt-aware map, 256; halved at each doubling of the size. A multiple of 64.
        num_classes: mask channels K.
    """

    def __init__(self, encoder_channels: int, width: int, num_classes: int = 1):
        super().__init__()
        widths = (width, width // 2, width // 4)
        self.mask_embedding_fusion = ResSE(2 * width, width)
        self.conv_blocks_context = nn.ModuleList(ContextBlock(encoder_channels, c, i) for i, c in enumerate(widths))
        self.conv_blocks_localization = nn.ModuleList(
            LocalizationBlock(wide, narrow) for wide, narrow in pairwise(widths)
        )
        # the first one serves deep supervision only, which the published training never switches on
        self.seg_outputs = nn.ModuleList(nn.Conv2d(c, num_classes, 1, bias=False) for c in widths[1:])

    def contexts(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Return the three prompt-independent maps of an image.

        Args:
            taps: three maps (B, C, g, g), shallow to deep.

        Returns:
            From the deepest tap (B, W, g, g), the middle one (B, W/2, 2g, 2g), the shallow one (B, W/4, 4g, 4g).
        """
        if len(taps) != len(self.conv_blocks_context):
            raise ValueError(f"{len(self.conv_blocks_context)} taps are needed, got {len(taps)}.")
        return [block(tap) for block, tap in zip(self.conv_blocks_context, reversed(taps), strict=True)]

    def share(self, contexts: Sequence[Tensor]) -> SharedContexts:
        """Work out everything that the contexts of one image give to the masks of all its prompts."""
        return SharedContexts(
            fusion=self.mask_embedding_fusion.second_half(contexts[0]),
            localization=tuple(
                block.res_block.second_half(context)  # type: ignore[union-attr, operator]
                for block, context in zip(self.conv_blocks_localization, contexts[1:], strict=True)
            ),
        )

    def fuse(self, mask_embedding: Tensor, contexts: Sequence[Tensor] | SharedContexts) -> Tensor:
        """Join the prompt-aware map (N, W, g, g) with context 0 (batch 1 or N) into (N, W, g, g)."""
        if isinstance(contexts, SharedContexts):
            return self.mask_embedding_fusion.forward_halves(mask_embedding, contexts.fusion)
        context = expanded_to_batch(contexts[0], mask_embedding)
        return self.mask_embedding_fusion(torch.cat([mask_embedding, context], dim=1))

    def stages(self, mask_embedding: Tensor, contexts: Sequence[Tensor] | SharedContexts) -> list[Tensor]:
        """Return the feature maps behind the two localization blocks, small to large."""
        x = self.fuse(mask_embedding, contexts)
        found = []
        if isinstance(contexts, SharedContexts):
            for block, half in zip(self.conv_blocks_localization, contexts.localization, strict=True):
                x = block.forward_halves(x, half)  # type: ignore[operator]
                found.append(x)
        else:
            for block, skip in zip(self.conv_blocks_localization, contexts[1:], strict=True):
                x = block(x, skip)
                found.append(x)
        return found

    def forward(self, mask_embedding: Tensor, contexts: Sequence[Tensor] | SharedContexts) -> Tensor:
        """Write the masks.

        Args:
            mask_embedding: prompt-aware map of N prompts (N, W, g, g).
            contexts: result of :meth:`contexts` with batch 1 (one image for all prompts) or N, or of :meth:`share`.

        Returns:
            Logits (N, K, 4g, 4g).
        """
        return self.seg_outputs[-1](self.stages(mask_embedding, contexts)[-1])

    def deep_supervision(self, mask_embedding: Tensor, contexts: Sequence[Tensor] | SharedContexts) -> list[Tensor]:
        """Return logits of every size, largest first: [(N, K, 4g, 4g), (N, K, 2g, 2g)]."""
        maps = self.stages(mask_embedding, contexts)
        return [output(x) for output, x in zip(self.seg_outputs, maps, strict=True)][::-1]
