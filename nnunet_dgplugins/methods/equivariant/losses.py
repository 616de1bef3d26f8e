"""The four terms of Patel and Dolz, MedIA 2022, for all modalities at once: CE, ER, KD and CMER.

Everything that crosses modalities is detached, so the sum over modalities trains each network as its own total would.
Terms run in float32 at least; call them outside autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_dgplugins.methods.cam import precise

TEMPERATURE = 10.0
KD_WEIGHT = 0.5
_NORM_FLOOR = 1e-12
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Branch:
    """What all networks say of one version of the images.

    Args:
        logits: (M, N, 2).
        maps: normalised foreground maps (M, N, H, W), in the transformed image's frame for both branches.
    """

    logits: Tensor
    maps: Tensor


@dataclass(frozen=True)
class Terms:
    """Loss terms, one value per modality (M,), before weighting."""

    ce: Tensor
    er: Tensor
    kd: Tensor
    cmer: Tensor

    def total(self, kd_weight: float = KD_WEIGHT, er_weight: float = 1.0, cmer_weight: float = 1.0) -> Tensor:
        """Return the weighted sum per modality (M,)."""
        return self.ce + kd_weight * self.kd + er_weight * self.er + cmer_weight * self.cmer


def terms(
    plain: Branch, transformed: Branch, tags: Tensor, temperature: float = TEMPERATURE, cmer_reduction: str = "mean"
) -> Terms:
    """Return all terms.

    Args:
        plain: logits of the plain images, and their normalised maps, transformed afterwards.
        transformed: logits and normalised maps of the transformed images.
        tags: 1 where the slice shows the target, else 0 (N,).
        temperature: of the distillation.
        cmer_reduction: ``mean`` over pixels as released, under which the term is at most 2/(H W) and hardly felt beside
            the others; ``sum`` is 2 - 2 cos of the two maps.
    """
    return Terms(
        ce=(cross_entropy(plain.logits, tags) + cross_entropy(transformed.logits, tags)) / 2,
        er=equivariance(plain.maps, transformed.maps, tags),
        kd=(distillation(plain.logits, temperature) + distillation(transformed.logits, temperature)) / 2,
        cmer=cross_modality(plain, transformed, tags, cmer_reduction),
    )


def cross_entropy(logits: Tensor, tags: Tensor) -> Tensor:
    """Return the two-class cross-entropy of each modality (M,), mean over the batch."""
    count, batch, _ = logits.shape
    losses = F.cross_entropy(precise(logits).flatten(0, 1), tags.long().repeat(count), reduction="none")
    return losses.view(count, batch).mean(1)


def equivariance(plain: Tensor, transformed: Tensor, tags: Tensor) -> Tensor:
    """Return ER of each modality (M,): the squared difference of both maps on positive slices.

    The mean is over all slices; gradients reach both branches.
    """
    difference = (precise(plain) - precise(transformed)).square().mean((2, 3))
    return (difference * tags).mean(1)


def distillation(logits: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return KD of each modality (M,): softened KL from the mean of the other modalities' detached predictions."""
    count = len(logits)
    log_p = F.log_softmax(precise(logits) / temperature, -1)
    teacher = log_p.detach()
    # KL(teacher j || student i) = sum_c p_j (log p_j - log p_i)
    own = (teacher.exp() * teacher).sum(-1)
    cross = torch.einsum("jnc,inc->ijn", teacher.exp(), log_p)
    kl = temperature**2 * (own - cross).mean(-1)
    others = ~torch.eye(count, dtype=torch.bool, device=kl.device)
    return (kl * others).sum(1) / max(count - 1, 1)


def cross_modality(plain: Branch, transformed: Branch, tags: Tensor, reduction: str = "mean") -> Tensor:
    """Return CMER of each modality (M,): its maps against the other branch of every other modality, detached.

    Only positive slices count that the other modality calls positive too, in the branch that its map is from.
    """
    count = len(plain.maps)
    values = []
    for i in range(count):
        pairs = [
            (distance(own.maps[i], other.maps[j].detach(), tags * other.logits[j].argmax(-1), reduction))
            for own, other in ((plain, transformed), (transformed, plain))
            for j in range(count)
            if j != i
        ]
        values.append(torch.stack(pairs).sum() / (2 * (count - 1)) if pairs else plain.maps.new_zeros(()))
    return torch.stack(values)


def distance(own: Tensor, other: Tensor, chosen: Tensor, reduction: str = "mean") -> Tensor:
    """Return the squared difference of unit-length maps (N, H, W) on chosen slices (N,), mean over all slices."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is one of {REDUCTIONS}, got {reduction!r}.")
    difference = (_unit(own) - _unit(other)).square()
    per_slice = difference.mean((1, 2)) if reduction == "mean" else difference.sum((1, 2))
    return (per_slice * chosen).mean()


def _unit(maps: Tensor) -> Tensor:
    maps = precise(maps)
    return maps / (maps + _NORM_FLOOR).flatten(1).norm(dim=1).view(-1, 1, 1)
