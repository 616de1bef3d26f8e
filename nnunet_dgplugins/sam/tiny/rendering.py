"""Made images: a label map seen through a random scanner, batched on the device.

Every tissue gets a random mean and texture, as in SynthSeg (Billot et al., Medical Image Analysis 2023), then come what
differs between scanners: partial volume, resolution, noise, bias field, coil falloff, contrast curve, inversion.
Sampling (:func:`sample_look`, only numbers, on the CPU) is separate from rendering (:func:`render`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from nnunet_dgplugins.sam.preprocess import PERCENTILES, PIXEL_MEAN, PIXEL_STD
from nnunet_dgplugins.sam.tiny.anatomy import AIR, MAX_IDS

_FIELD = 5  # side of the low-resolution fields
_OCTAVES = (1, 2, 4, 8)  # texture grains, in pixels
_REFERENCE = 256  # the blur is meant for this canvas; texture is as fine as the canvas allows
_MAX_BLUR = 2.0
_STRIDE = 3  # percentiles are taken of every third pixel in each direction


@dataclass(frozen=True)
class Look:
    """How B images look; every tensor lies on the device.

    Args:
        means: (B, 256) mean signal of each tissue, 0 to 1.
        textures: (B, 256) standard deviation of each tissue's texture.
        grains: (B, 4) share of each octave in the texture.
        shading: (B, 1, 5, 5) field that shifts the signal everywhere, tissue or not.
        blur: (B,) standard deviation of the Gaussian blur in pixels of a 256 canvas.
        resolution: (B, 2) acquired pixels per side, in shares of the canvas.
        bias: (B, 1, 5, 5) logarithm of the smooth multiplicative field.
        coil: (B, 4) place (y, x in half image sides), reach and strength of a local coil.
        gamma: (B,) contrast curve, signal ** gamma.
        inverted: (B,) bool, bright and dark exchanged.
        noise: (B,) standard deviation of the noise in the acquired image.
        rician: (B,) bool, noise of a magnitude image rather than Gaussian.
        seed: of the pixel noise.
    """

    means: torch.Tensor
    textures: torch.Tensor
    grains: torch.Tensor
    shading: torch.Tensor
    blur: torch.Tensor
    resolution: torch.Tensor
    bias: torch.Tensor
    coil: torch.Tensor
    gamma: torch.Tensor
    inverted: torch.Tensor
    noise: torch.Tensor
    rician: torch.Tensor
    seed: int

    def to(self, device: torch.device | str) -> Look:
        """Return the same numbers on a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "seed"}
        return Look(**moved, seed=self.seed)


def sample_look(count: int, generator: torch.Generator, noise: float = 0.12) -> Look:
    """Draw the numbers of ``count`` looks from a CPU generator; the noise goes up to ``noise``, mostly far below."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand((count, *shape), generator=generator) * (high - low) + low

    def chance(share: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) < share

    means = uniform(0, 1, MAX_IDS + 1)
    # half of the images have dark air, as scanners do
    means[:, AIR] = torch.where(chance(0.5), uniform(0.0, 0.05), means[:, AIR])
    textures = uniform(0, 1, MAX_IDS + 1) ** 2 * uniform(0.02, 0.2, 1)
    textures[:, AIR] *= 0.2
    grains = uniform(0, 1, len(_OCTAVES))
    coil = torch.stack([uniform(-1, 1), uniform(-1, 1), uniform(0.4, 1.2), uniform(0.5, 3.0) * chance(0.25)], 1)
    blurred, coarse = chance(0.7), chance(0.65)
    both = uniform(0.22, 1.0, 1)
    resolution = torch.where(coarse[:, None], (both * uniform(0.75, 1.33, 2)).clamp(0.2, 1.0), torch.ones(count, 2))
    return Look(
        means=means,
        textures=textures,
        grains=grains / grains.square().sum(1, keepdim=True).sqrt(),
        shading=torch.randn((count, 1, _FIELD, _FIELD), generator=generator) * uniform(0, 0.08, 1, 1, 1),
        blur=torch.where(blurred, uniform(0.3, _MAX_BLUR), torch.zeros(count)),
        resolution=resolution,
        bias=torch.randn((count, 1, _FIELD, _FIELD), generator=generator) * uniform(0, 0.35, 1, 1, 1),
        coil=coil,
        gamma=uniform(-0.7, 0.7).exp(),
        inverted=chance(0.1),
        noise=uniform(0, 1) ** 2 * noise,
        rician=chance(0.5),
        seed=int(torch.randint(2**62, (1,), generator=generator)),
    )


def render(tissue: torch.Tensor, look: Look) -> torch.Tensor:
    """Render label maps as the encoder will see them.

    Args:
        tissue: (B, S, S) uint8, on the look's device.
        look: B looks.

    Returns:
        (B, 3, S, S) float32: grey in three channels, percentiles to 0..255, SAM's normalisation, as
        :func:`nnunet_dgplugins.sam.preprocess.to_canvas` makes them of a real slice.
    """
    count, size = len(tissue), tissue.shape[-1]
    random = torch.Generator(tissue.device).manual_seed(look.seed)
    index = tissue.flatten(1).long()
    signal = look.means.gather(1, index).view(count, 1, size, size)
    spread = look.textures.gather(1, index).view(count, 1, size, size)
    signal = signal + spread * _texture(look.grains, size, random) + _enlarge(look.shading, size)
    signal = _blur(signal, look.blur * (size / _REFERENCE))
    signal = signal * _enlarge(look.bias, size).exp() * _coil(look.coil, size)
    acquired = [_acquire(signal[i : i + 1], look, i, random) for i in range(count)]  # each has a size of its own
    signal = _to_unit(torch.cat(acquired)) ** look.gamma[:, None, None, None]
    signal = torch.where(look.inverted[:, None, None, None], 1 - signal, signal) * 255
    mean = signal.new_tensor(PIXEL_MEAN)[:, None, None]
    std = signal.new_tensor(PIXEL_STD)[:, None, None]
    return (signal - mean) / std


def _enlarge(field: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(field, size=(size, size), mode="bicubic", align_corners=True)


def _texture(grains: torch.Tensor, size: int, random: torch.Generator) -> torch.Tensor:
    texture = torch.zeros((len(grains), 1, size, size), device=grains.device)
    for share, grain in zip(grains.T, _OCTAVES, strict=True):
        side = -(-size // grain)
        noise = torch.randn((len(grains), 1, side, side), generator=random, device=grains.device)
        if grain > 1:
            noise = F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False)
        texture += share[:, None, None, None] * noise
    return texture


def _blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with a standard deviation (pixels) per image; 0 leaves an image as it is."""
    reach = max(1, int(3 * _MAX_BLUR * x.shape[-1] / _REFERENCE))
    place = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-(place**2) / (2 * sigma.clamp_min(1e-3)[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    flat = F.pad(x.transpose(0, 1), (reach, reach, reach, reach), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(x))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(x)).transpose(0, 1)


def _coil(coil: torch.Tensor, size: int) -> torch.Tensor:
    line = torch.linspace(-1, 1, size, device=coil.device)
    y, x, reach, strength = (value[:, None, None] for value in coil.T)
    distance = (line[None, :, None] - y) ** 2 + (line[None, None, :] - x) ** 2
    return (1 + strength / (1 + distance / reach**2))[:, None]


def _acquire(signal: torch.Tensor, look: Look, index: int, random: torch.Generator) -> torch.Tensor:
    """Sample at the acquired resolution (partial volume), add the noise there, bring back to the canvas."""
    size = signal.shape[-1]
    height, width = (max(24, round(size * float(share))) for share in look.resolution[index])
    if (height, width) != (size, size):
        signal = F.interpolate(signal, size=(height, width), mode="area")
    noise = look.noise[index] * signal.abs().mean() * 2
    real = signal + noise * torch.randn(signal.shape, generator=random, device=signal.device)
    if look.rician[index]:
        real = (real**2 + (noise * torch.randn(signal.shape, generator=random, device=signal.device)) ** 2).sqrt()
    if (height, width) == (size, size):
        return real
    return F.interpolate(real, size=(size, size), mode="bilinear", align_corners=False)


def _to_unit(x: torch.Tensor) -> torch.Tensor:
    """Clip each image to its percentiles and scale to 0..1."""
    ordered = x[:, 0, ::_STRIDE, ::_STRIDE].flatten(1).sort(1).values
    low, high = (ordered[:, round(share * (ordered.shape[1] - 1)), None, None, None] for share in PERCENTILES)
    return ((x - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
