"""A fixed random decoder that tells how much a stored feature's rounding would show in a mask.

It has the outline of DeSAM's mask module (Gao et al., MICCAI 2024, section 2.3): every tap and the neck reach the
logits through 3x3 convolutions, instance norms and a residual, at the taps' own scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from nnunet_dgplugins.sam.models import SamModel

Probe = Callable[[Sequence[torch.Tensor]], torch.Tensor]
_SEED = 20240716


@dataclass(frozen=True)
class Change:
    """What rounding did to the logits of one or more slices; the worst slice counts.

    Args:
        logits: largest change of a logit, as a share of the logits' range.
        masks: 1 - Dice of the masks (logits above their median).
    """

    logits: float
    masks: float


def fixed_probe(model: SamModel) -> Probe:
    """Return the probe of a model: features (B, C, g, g) from shallow to deep, then neck, to logits (B, 1, 4g, 4g)."""
    generator = torch.Generator().manual_seed(_SEED)
    width = model.prompt_dim

    def weight(out: int, into: int, side: int) -> torch.Tensor:
        return torch.randn(out, into, side, side, generator=generator) * (into * side * side) ** -0.5

    taps = len(model.taps)
    widths = [max(8, width >> (taps - 1 - index)) for index in range(taps)]  # shallow taps are narrow and fine
    tap_weights = [(weight(w, model.embed_dim, 3), weight(w, w, 3), weight(w, model.embed_dim, 1)) for w in widths]
    fuse = (weight(width, width + widths[-1], 3), weight(width, width, 3), weight(width, width + widths[-1], 1))
    joins = []
    current = width
    for w in reversed(widths[:-1]):
        joins.append((weight(w, current + w, 3), weight(w, w, 3), weight(w, current + w, 1)))
        current = w
    last = weight(1, current, 1)

    def probe(features: Sequence[torch.Tensor]) -> torch.Tensor:
        maps = [x.float() for x in features]
        skips = [_block(x, weights) for x, weights in zip(maps[:-1], tap_weights, strict=True)]
        x = _block(torch.cat([maps[-1], skips[-1]], dim=1), fuse)
        for level, (skip, weights) in enumerate(zip(reversed(skips[:-1]), joins, strict=True), 1):
            x = F.interpolate(x, scale_factor=2, mode="nearest") if level <= 2 else x
            skip = F.interpolate(skip, size=x.shape[-2:], mode="nearest")
            x = _block(torch.cat([x, skip], dim=1), weights)
        return F.conv2d(x, last)

    return probe


def _block(x: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second, shortcut = (weight.to(x.device) for weight in weights)
    inner = F.leaky_relu(F.instance_norm(F.conv2d(x, first, padding=1)), 0.01)
    inner = 0.5 * F.instance_norm(F.conv2d(inner, second, padding=1))
    return F.leaky_relu(inner + F.instance_norm(F.conv2d(x, shortcut)), 0.01)


@torch.no_grad()
def change(probe: Probe, exact: Sequence[torch.Tensor], stored: Sequence[torch.Tensor]) -> Change:
    """Return how far the logits and masks of ``stored`` features are from those of the ``exact`` ones.

    Args:
        probe: features to logits.
        exact: taps and neck of one slice, each (1, C, g, g).
        stored: the same after a round trip through the store.
    """
    before, after = probe(exact), probe(stored)
    spread = (before.amax() - before.amin()).clamp_min(torch.finfo(before.dtype).tiny)
    cut = before.median()
    first, second = before > cut, after > cut
    both = first.sum() + second.sum()
    dice = 2 * (first & second).sum() / both if both else torch.tensor(1.0)
    return Change(float((before - after).abs().amax() / spread), float(1 - dice))
