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
    height, width = x.shape[1:3]
    qkv = _linear(attention.qkv, x, dtype)
    if window:
        qkv = _to_windows(qkv, attention.qkv.bias.to(dtype), window)
    mixed = _attend(attention, qkv)
    if window:
        mixed = _from_windows(mixed, x.shape[0], height, width)
    return _linear(attention.proj, mixed, dtype)


def _to_windows(qkv: torch.Tensor, bias: torch.Tensor, window: int) -> torch.Tensor:
    """Cut (B, H, W, D) into (B * windows, window, window, D).

    SAM pads the tokens with zeros before the projection and lets them take part as keys: behind the projection, such
    a token is the bias.
    """
    batch, height, width, depth = qkv.shape
    rows, columns = -(-height // window), -(-width // window)
    if (rows * window, columns * window) != (height, width):
        padded = bias.expand(batch, rows * window, columns * window, depth).clone()
        padded[:, :height, :width] = qkv
        qkv = padded
    qkv = qkv.view(batch, rows, window, columns, window, depth).transpose(2, 3)
    return qkv.reshape(-1, window, window, depth)


def _from_windows(x: torch.Tensor, batch: int, height: int, width: int) -> torch.Tensor:
    """Join (B * windows, window, window, C) to (B, H, W, C), leaving the padding out."""
    window, depth = x.shape[2:]
    rows, columns = -(-height // window), -(-width // window)
    x = x.view(batch, rows, columns, window, window, depth).transpose(2, 3)
    return x.reshape(batch, rows * window, columns * window, depth)[:, :height, :width]


def _attend(attention: Attention, qkv: torch.Tensor) -> torch.Tensor:
    """Attention within each of N token maps.

    Args:
        attention: gives the number of heads and the relative positions.
        qkv: (N, H, W, 3 * C).

    Returns:
        (N, H, W, C).
    """
    from segment_anything.modeling.image_encoder import get_rel_pos

    maps, height, width, depth = qkv.shape
    heads = attention.num_heads
    # (3, N, heads, H * W, d)
    q, k, v = qkv.view(maps, height * width, 3, heads, depth // 3 // heads).permute(2, 0, 3, 1, 4)
    q_map = q.reshape(maps, heads, height, width, -1)
    near_rows = get_rel_pos(height, height, attention.rel_pos_h).to(q.dtype)  # (H, H, d): query row, key row
    near_columns = get_rel_pos(width, width, attention.rel_pos_w).to(q.dtype)  # (W, W, d)
    mixed = torch.empty_like(q_map)
    band = max(1, _BIAS_BYTES // (maps * heads * width * height * width * q.element_size()))
    for top in range(0, height, band):
        rows = q_map[:, :, top : top + band]
        by_row = torch.einsum("nhrwd,rkd->nhrwk", rows, near_rows[top : top + band])
        by_column = torch.einsum("nhrwd,wkd->nhrwk", rows, near_columns)
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(-2).flatten(2, 3)
        out = F.scaled_dot_product_attention(rows.flatten(2, 3), k, v, attn_mask=bias, scale=attention.scale)
        mixed[:, :, top : top + band] = out.view(rows.shape)
    return mixed.permute(0, 2, 3, 1, 4).reshape(maps, height, width, -1)
