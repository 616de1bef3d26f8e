"""Foreground maps from the forward pass alone: CAM, Grad-CAM and Grad-CAM++, gated and fused over modalities.

The logits are means of a linear layer over all places, so the gradient of a logit at the hooked features is the
classifier's weight over the number of places, the same everywhere: no backward pass is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_dgplugins.methods.cam import grad_cam, grad_cam_plus_plus, normalise, standardise
from nnunet_dgplugins.methods.equivariant.network import UNetCAM

KINDS = ("cam", "grad_cam", "grad_cam_plus_plus")
FUSIONS = ("mean", "max")
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Found:
    """What the networks say of slices.

    Args:
        logits: (M, N, 2).
        maps: normalised foreground maps (N, M, H, W), not gated.
    """

    logits: Tensor
    maps: Tensor

    @property
    def present(self) -> Tensor:
        """Whether each network calls each slice positive (N, M), 0 or 1."""
        return self.logits.argmax(-1).transpose(0, 1)

    def gated(self) -> Tensor:
        """Return the maps, empty where the map's own network calls the slice negative (N, M, H, W)."""
        return self.maps * self.present[:, :, None, None]


@torch.no_grad()
def foreground_maps(networks: Sequence[UNetCAM], images: Tensor, kind: str = "cam") -> Found:
    """Return logits and maps of slices (N, M, H, W), not standardised; networks are in evaluation mode.

    Grad-CAM is the CAM up to rounding in this network; Grad-CAM++ differs.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {KINDS}, got {kind!r}.")
    images = standardise(images)
    logits, maps = [], []
    for i, network in enumerate(networks):
        features = network.features(images[:, i : i + 1])
        activation = network.classifier(features)
        scores = activation.mean((2, 3))
        if kind == "cam":
            raw = activation[:, 1]
        else:
            places = features.shape[-2] * features.shape[-1]
            gradients = (network.classifier.weight[1] / places)[None].expand(len(features), -1, -1, -1)
            raw = (
                grad_cam(features, gradients)
                if kind == "grad_cam"
                else grad_cam_plus_plus(features, gradients, scores[:, 1])
            )
        logits.append(scores)
        maps.append(normalise(raw))
    return Found(torch.stack(logits), torch.stack(maps, 1))


def fuse(maps: Tensor, fusion: str | int = "mean") -> Tensor:
    """Return one map per slice (N, H, W) of all modalities' (N, M, H, W): their mean, their maximum, or one of them."""
    if fusion == "mean":
        return maps.mean(1)
    if fusion == "max":
        return maps.amax(1)
    if isinstance(fusion, int) and 0 <= fusion < maps.shape[1]:
        return maps[:, fusion]
    raise ValueError(f"fusion is mean, max or the number of a modality below {maps.shape[1]}, got {fusion!r}.")


def fuse_positive(found: Found, fusion: str | int = "mean") -> Tensor:
    """Fuse the maps of slices that are known to be positive (N, H, W).

    A network that calls a slice negative does not count there, unless all do: with its map as zeros the mean of two
    could not pass 0.5, and a known positive would be left without a voxel. One named modality always has its map.
    """
    if isinstance(fusion, int):
        return fuse(found.maps, fusion)
    counts = found.present.bool()
    counts = counts | ~counts.any(1, keepdim=True)
    kept = found.maps * counts[:, :, None, None]
    return fuse(kept, fusion) * (counts.shape[1] / counts.sum(1)[:, None, None] if fusion == "mean" else 1)
