"""SAM's two-way transformer: the same function with a fraction of the work.

There are only a handful of tokens T (7 here) per prompt but thousands of image positions M, and SAM's attention
(Kirillov et al., Segment Anything, ICCV 2023, appendix A) projects every position to queries, keys and values. Matrix
products associate, so the projections can be folded into the few tokens instead:

- tokens to image: ``q (K Wk)^T = (q Wk^T) K^T`` and ``a (V Wv) = (a V) Wv``. The key bias adds the same number to all
  scores of a query, which softmax ignores; the attention a sums to one, so the value bias is added once.
- image to tokens: ``(K Wq + b) k^T = K (Wq k^T) + b k^T`` and ``a v Wo = a (v Wo)``.

Equal to SAM's own forward up to rounding, and so are the gradients; those of the biases of keys, zero in theory, are
left out where they are folded away. DeSAM trains with SAM's forward, SAM-SDG with this one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# SAM's classes are imported inside functions only, hence no narrower type
Attention = Any
TwoWayTransformer = Any


def two_way(transformer: TwoWayTransformer, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run ``segment_anything``'s ``TwoWayTransformer`` with its projections folded.

    Args:
        transformer: holds the weights.
        image: (B, P, g, g), B = N or 1 for one image shared by all prompts.
        image_pe: (1, P, g, g).
        tokens: (N, T, P).

    Returns:
        Tokens (N, T, P) and image positions (N, M, P).
    """
    keys, position = (x.flatten(2).transpose(1, 2) for x in (image, image_pe))  # (B, M, P)
    queries = tokens
    placed = keys + position
    for layer in transformer.layers:
        queries = _token_side(layer, queries, tokens, keys, placed)
        keys = layer.norm4(_image_to_tokens(layer.cross_attn_image_to_token, keys, placed, queries + tokens, queries))
        placed = keys + position
    queries = queries + _tokens_to_image(transformer.final_attn_token_to_image, queries + tokens, keys, placed)
    return transformer.norm_final_attn(queries), keys


def _token_side(layer: Any, queries: Tensor, tokens: Tensor, keys: Tensor, placed: Tensor) -> Tensor:
    """Self-attention, attention to the image and MLP of one block: (N, T, P)."""
    if layer.skip_first_layer_pe:
        queries = layer.self_attn(q=queries, k=queries, v=queries)
    else:
        with_tokens = queries + tokens
        queries = queries + layer.self_attn(q=with_tokens, k=with_tokens, v=queries)
    queries = layer.norm1(queries)
    queries = layer.norm2(queries + _tokens_to_image(layer.cross_attn_token_to_image, queries + tokens, keys, placed))
    return layer.norm3(queries + layer.mlp(queries))


def _tokens_to_image(attention: Attention, q: Tensor, keys: Tensor, placed: Tensor) -> Tensor:
    """Return what tokens q (N, T, P) read from an image (B, M, P), with positions added in ``placed``: (N, T, P)."""
    heads = attention.num_heads
    q = _split(attention.q_proj(q), heads)  # (N, h, T, c)
    folded = torch.einsum("nhtc,hcp->nhtp", q, _rows(attention.k_proj.weight, heads)) / math.sqrt(q.shape[-1])
    scores = _product(folded.flatten(1, 2), placed.transpose(1, 2))  # (N, hT, M)
    read = _product(scores.softmax(-1), keys).unflatten(1, (heads, -1))  # (N, h, T, P)
    values = torch.einsum("nhtp,hcp->nthc", read, _rows(attention.v_proj.weight, heads)).flatten(2)
    return attention.out_proj(values + attention.v_proj.bias)


def _image_to_tokens(attention: Attention, keys: Tensor, placed: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return an image (B, M, P) plus what it reads from tokens k, v (N, T, P): (N, M, P)."""
    heads, count = attention.num_heads, k.shape[0]
    k, v = _split(attention.k_proj(k), heads), _split(attention.v_proj(v), heads)  # (N, h, T, c)
    k = k / math.sqrt(k.shape[-1])
    folded = torch.einsum("nhtc,hcp->nhtp", k, _rows(attention.q_proj.weight, heads))
    offset = torch.einsum("nhtc,hc->nht", k, attention.q_proj.bias.view(heads, -1))
    # positions last, so that the softmax over the few tokens runs along memory
    scores = _product(folded.flatten(1, 2), placed.transpose(1, 2)).unflatten(1, (heads, -1))  # (N, h, T, M)
    weights = (scores + offset[..., None]).softmax(2).flatten(1, 2)
    out = attention.out_proj.weight.view(attention.out_proj.out_features, heads, -1)  # (P, h, c)
    # each head's weights sum to one, so a share of the bias on every row adds it once
    values = torch.einsum("nhtc,phc->nhtp", v, out).flatten(1, 2) + attention.out_proj.bias / heads
    return torch.baddbmm(keys.expand(count, -1, -1).to(values.dtype), weights.transpose(1, 2), values)


def _product(few: Tensor, image: Tensor) -> Tensor:
    """Multiply (N, a, b) with (N, b, c), or with (1, b, c) without the copies that broadcasting would make."""
    return few @ (image[0] if len(image) == 1 else image)


def _split(x: Tensor, heads: int) -> Tensor:
    """Split (N, T, h * c) into (N, h, T, c)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rows(weight: Tensor, heads: int) -> Tensor:
    """Split a projection's weight (h * c, P) into (h, c, P)."""
    return weight.unflatten(0, (heads, -1))
