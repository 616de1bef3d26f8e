"""One small U-Net classifier per modality, whose class activation map is the segmentation (Patel and Dolz, MedIA 2022).

Layers, order and parameter names are those of the released ``UNetCAM``. No weights are shared between modalities; a
modality's network sees the plain and the transformed image alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8  # three poolings
CLASSES = 2  # absent, present
FULL_WIDTH = 64


class DoubleConv(nn.Module):
    """Two 3x3 convolutions with batch normalisation and ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H, W)."""
        out: Tensor = self.conv(x)
        return out


class _In(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels)


class _Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.mpconv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels))


class _Up(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels)


class UNetCAM(nn.Module):
    """U-Net of four levels; its last 1x1 convolution gives the class activation maps and their means the logits.

    Args:
        width_divisor: channels are 64 // this; published: 1 for BraTS (3,398,144 parameters), 4 for the prostate.
        in_channels: input channels; published: 1.
        dropout: probability of dropping a channel before the classifier; published: 0.
    """

    def __init__(self, width_divisor: int = 1, in_channels: int = 1, dropout: float = 0.0):
        super().__init__()
        width = FULL_WIDTH // width_divisor
        self.inc = _In(in_channels, width)
        self.down1 = _Down(width, 2 * width)
        self.down2 = _Down(2 * width, 4 * width)
        self.down3 = _Down(4 * width, 4 * width)
        self.up1 = _Up(8 * width, 2 * width)
        self.up2 = _Up(4 * width, width)
        self.up3 = _Up(2 * width, width)
        self.backbone = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, CLASSES, 1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)

    def features(self, x: Tensor) -> Tensor:
        """Map standardised images (N, C, H, W) to the hooked features (N, width, H, W); sides are multiples of 8."""
        return _features([self], x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map standardised images (N, C, H, W) to logits (N, 2) and signed activation maps (N, 2, H, W)."""
        maps = self.classifier(self.dropout(self.features(x)))
        return maps.mean((2, 3)), maps


def separate_pass(networks: Sequence[UNetCAM], images: Tensor) -> tuple[Tensor, Tensor]:
    """Run every modality's network on its channel, one after the other, as published.

    Args:
        networks: one per modality.
        images: standardised slices (N, M, H, W).

    Returns:
        Logits (M, N, 2) and signed activation maps (M, N, 2, H, W).
    """
    logits, maps = zip(*(network(images[:, i : i + 1]) for i, network in enumerate(networks)), strict=True)
    return torch.stack(logits), torch.stack(maps)


def grouped_pass(networks: Sequence[UNetCAM], images: Tensor) -> tuple[Tensor, Tensor]:
    """Run all networks at once as groups of one network; results and running statistics are those of the loop.

    See :func:`separate_pass`. Dropout draws differ.
    """
    count = len(networks)
    features = networks[0].dropout(_features(networks, images))
    maps = _conv([network.classifier for network in networks], features).unflatten(1, (count, CLASSES)).transpose(0, 1)
    return maps.mean((3, 4)), maps


def _features(networks: Sequence[UNetCAM], x: Tensor) -> Tensor:
    """Return the hooked features of M networks (N, M * width, H, W) for their channels (N, M, H, W)."""
    if x.shape[-2] % STRIDE or x.shape[-1] % STRIDE:
        raise ValueError(f"Sides must be multiples of {STRIDE}, got {tuple(x.shape[-2:])}.")
    count = len(networks)
    skips = [_double([network.inc.conv for network in networks], x)]
    for name in ("down1", "down2", "down3"):
        pooled = F.max_pool2d(skips[-1], 2)
        skips.append(_double([getattr(network, name).mpconv[1] for network in networks], pooled))
    out = skips.pop()
    for name in ("up1", "up2", "up3"):
        grown = F.interpolate(out, scale_factor=2, mode="nearest")
        parts = [part.unflatten(1, (count, -1)) for part in (skips.pop(), grown)]
        joined = torch.cat(parts, 2).flatten(1, 2)  # skip first, within each network's group
        out = _double([getattr(network, name).conv for network in networks], joined)
    return _norm([n.backbone[1] for n in networks], _conv([n.backbone[0] for n in networks], out)).relu()


def _double(blocks: Sequence[DoubleConv], x: Tensor) -> Tensor:
    for i in (0, 3):
        x = _norm([block.conv[i + 1] for block in blocks], _conv([block.conv[i] for block in blocks], x)).relu_()
    return x


def _conv(layers: Sequence[Any], x: Tensor) -> Tensor:
    first = layers[0]
    if len(layers) == 1:
        out: Tensor = first(x)
        return out
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    return F.conv2d(x, weight, bias, padding=first.padding, groups=len(layers))


def _norm(layers: Sequence[Any], x: Tensor) -> Tensor:
    first = layers[0]
    if len(layers) == 1:
        out: Tensor = first(x)
        return out
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (torch.cat([getattr(layer, name) for layer in layers]) for name in names)
    out = F.batch_norm(x, mean, var, weight, bias, first.training, first.momentum or 0.0, first.eps)
    if first.training:
        for layer, own_mean, own_var in zip(layers, mean.chunk(len(layers)), var.chunk(len(layers)), strict=True):
            layer.get_buffer("running_mean").copy_(own_mean)
            layer.get_buffer("running_var").copy_(own_var)
            layer.get_buffer("num_batches_tracked").add_(1)
    return out
