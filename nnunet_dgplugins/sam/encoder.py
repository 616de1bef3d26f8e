"""SAM's image encoder with taps, run by a forward pass of our own over SAM's own modules.

The plain encoder writes the whole attention matrix of a global block several times over (0.8 GB each for vit_b) and
pads tokens before it multiplies them. Here attention goes band by band, the relative-position bias of a band at a
time, and padding happens after the projection; the features are the same.
Kirillov et al., Segment Anything, ICCV 2023, appendix A; taps as in DeSAM (Gao et al., MICCAI 2024, section 2.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT
    from segment_anything.modeling.image_encoder import Attention, Block


_BIAS_BYTES = 16 << 20  # relative-position bias held at a time
_BIAS_BYTES_CUDA = 512 << 20
_MLP_TOKENS = 512


class TappedEncoder(nn.Module):
    """SAM's ViT that also returns the token maps after chosen blocks.

    Args:
        image_encoder: SAM's encoder; its modules are used, never changed.
        taps: blocks (from 0) whose output is returned, before the neck and without a norm.
        dtype: precision of the matrix products; sums along the residual stream and norms stay in float32.

    Example:
        >>> taps = TappedEncoder(parts.image_encoder, parts.model.taps)(canvas)  # doctest: +SKIP
    """

    def __init__(self, image_encoder: ImageEncoderViT, taps: tuple[int, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.image_encoder = image_encoder
        self.taps = tuple(taps)
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, canvas: torch.Tensor) -> list[torch.Tensor]:
        """Encode.

        Args:
            canvas: (B, 3, S, S), SAM-normalised.

        Returns:
            The taps from shallow to deep, each (B, C, g, g), then the neck's output (B, P, g, g); float32.
        """
        encoder = self.image_encoder
        tokens = encoder.patch_embed(canvas.to(encoder.patch_embed.proj.weight.dtype)).float()
        if encoder.pos_embed is not None:
            tokens = tokens + encoder.pos_embed
        found = []
        for index, block in enumerate(encoder.blocks):
            tokens = run_block(block, tokens, self.dtype)
            if index in self.taps:
                found.append(tokens.permute(0, 3, 1, 2).contiguous())
        found.append(encoder.neck(tokens.permute(0, 3, 1, 2).to(encoder.neck[0].weight.dtype)).float())
        return found


def run_block(block: Block, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run one of SAM's transformer blocks.

    Args:
        block: ``segment_anything``'s ``Block``.
        tokens: (B, H, W, C) float32.
        dtype: precision of the matrix products.

    Returns:
        (B, H, W, C) float32.
    """
    tokens = tokens + _attention(block.attn, block.norm1(tokens), block.window_size, dtype)
    flat = tokens.reshape(-1, tokens.shape[-1])
    step = _MLP_TOKENS if flat.device.type == "cpu" else len(flat)
    for start in range(0, len(flat), step):  # the hidden layer of a few tokens stays in the processor's cache
        part = flat[start : start + step]
        hidden = block.mlp.act(_linear(block.mlp.lin1, block.norm2(part), dtype))
        part += _linear(block.mlp.lin2, hidden, dtype)
    return flat.view(tokens.shape)


def _linear(layer: nn.Linear, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


def _attention(attention: Attention, x: torch.Tensor, window: int, dtype: torch.dtype) -> torch.Tensor:
    """Self-attention with decomposed relative positions on (B, H, W, C); ``window`` 0: global."""
    batch, height, width, channels = x.shape
    side = (window, window) if window else (height, width)
    rows, columns = -(-height // side[0]), -(-width // side[1])
    qkv = _linear(attention.qkv, x, dtype)
    if (rows * side[0], columns * side[1]) != (height, width):
        # SAM pads with zeros before the projection and lets the padding take part as keys; behind it, that is the bias
        padded = attention.qkv.bias.to(dtype).expand(batch, rows * side[0], columns * side[1], -1).clone()
        padded[:, :height, :width] = qkv
        qkv = padded
    heads = attention.num_heads
    qkv = qkv.view(batch, rows, side[0], columns, side[1], 3, heads, channels // heads)
    q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, side[0] * side[1], channels // heads)
    mixed = _attend(attention, q, k, v, side).view(batch, rows, columns, heads, *side, channels // heads)
    mixed = mixed.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * side[0], columns * side[1], channels)
    return _linear(attention.proj, mixed[:, :height, :width], dtype)


def _attend(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, side: tuple[int, int]
) -> torch.Tensor:
    """Attention within each of N token maps (one per image, window and head).

    Args:
        attention: gives scale and relative positions.
        q: (N, H * W, d), and so ``k`` and ``v``.
        k: keys.
        v: values.
        side: (H, W).

    Returns:
        (N, H * W, d).
    """
    height, width = side
    by_row, by_column = _relative_positions(attention, q, side)
    k = k * attention.scale
    # bfloat16 products are fast on a CPU, its fused attention is not
    fused = q.is_cuda or q.dtype == torch.float32
    mixed = torch.empty_like(q)
    budget = _BIAS_BYTES_CUDA if q.is_cuda else _BIAS_BYTES
    rows = max(1, budget // (width * height * width * q.element_size()))
    maps = max(1, rows // height)
    rows = min(rows, height)
    for first in range(0, len(q), maps):
        some = slice(first, first + maps)
        for top in range(0, height, rows):
            band = slice(top * width, (top + rows) * width)
            bias = by_row[some, top : top + rows, :, :, None] + by_column[some, top : top + rows, :, None, :]
            bias = bias.flatten(3, 4).flatten(1, 2)
            if fused:
                out = F.scaled_dot_product_attention(
                    q[None, some, band], k[None, some], v[None, some], attn_mask=bias[None], scale=1.0
                )[0]
            else:
                out = torch.bmm(bias.baddbmm_(q[some, band], k[some].transpose(1, 2)).softmax(-1), v[some])
            mixed[some, band] = out
    return mixed


def _relative_positions(
    attention: Attention, q: torch.Tensor, side: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each query adds to a key's score by the key's row (N, H, W, H) and by its column (N, H, W, W).

    One product with the tables of all distances; since a query's row of the result only slides along the distances, the
    two answers are views of it.
    """
    from segment_anything.modeling.image_encoder import get_rel_pos

    height, width = side
    tables = []
    for size, positions in ((height, attention.rel_pos_h), (width, attention.rel_pos_w)):
        near = get_rel_pos(size, size, positions)  # (query, key, d), interpolated if made for another size
        tables.append(torch.cat([near[-1], near[0, 1:]]))  # distances from size - 1 down to 1 - size
    all_distances = q @ torch.cat(tables).to(q.dtype).T  # (N, H * W, 2 H - 1 + 2 W - 1)
    count, length = len(q), all_distances.shape[-1]
    whole = height * width * length
    by_row = all_distances.as_strided(
        (count, height, width, height), (whole, width * length - 1, length, 1), storage_offset=height - 1
    )
    by_column = all_distances.as_strided(
        (count, height, width, width), (whole, width * length, length - 1, 1), storage_offset=2 * height - 1 + width - 1
    )
    return by_row, by_column
