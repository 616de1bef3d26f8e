"""Location-scale augmentation: other intensities, by one curve for the whole image or one per class.

Su et al., SLAug (AAAI 2023), section 3.2; part of SAM-SDG's released code, whose paper and scripts do not use it. An
image in [0, 1] goes through a random cubic Bezier curve, then is scaled and shifted. "Global": one curve for all
pixels, rising. "Local": a curve for the background, falling, and one for each class, rising or falling.

Histogram equalisation would undo a rising curve, so the images augmented here are those behind it. Drawing random
numbers and applying them are separate; everything is applied to a batch at once, on its device, in float64: where a
curve turns, its 100,000 points lie closer than float32 can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POINTS = 100_000  # of a curve
SCALE_STD, SCALE_RANGE = 0.1, (0.9, 1.1)
LOCATION_STD = 0.5
QUANTILES = (0.2, 0.8)
BACKGROUND_THRESHOLD = 0.01  # the local version leaves darker pixels as they are
CLASS_INVERSION = 0.5  # share of falling curves among classes; the background's always falls


@dataclass(frozen=True)
class CurveDraw:
    """Random numbers for B images with R regions each.

    Args:
        control: (B, R, 4) the inner control points (x1, y1, x2, y2), 0 to 1 between a region's minimum and maximum.
        falling: (B, R) bool.
        scale: (B, R) around 1, not yet clipped.
        location: (B, R) around 0, not yet clipped.
    """

    control: np.ndarray
    falling: np.ndarray
    scale: np.ndarray
    location: np.ndarray

    def of(self, images: np.ndarray | slice) -> CurveDraw:
        """Return the draw of some of the images, given by their numbers, by True, or as a slice."""
        return CurveDraw(self.control[images], self.falling[images], self.scale[images], self.location[images])


def draw_curves(images: int, num_classes: int, generator: np.random.Generator) -> tuple[CurveDraw, CurveDraw]:
    """Draw for :func:`global_version` (one region) and :func:`local_version` (background, then each class)."""

    def draw(regions: int, inversion: np.ndarray) -> CurveDraw:
        shape = (images, regions)
        return CurveDraw(
            control=generator.random((*shape, 4)),
            falling=generator.random(shape) <= inversion,
            scale=generator.normal(1, SCALE_STD, shape),
            location=generator.normal(0, LOCATION_STD, shape),
        )

    return draw(1, np.array([-1.0])), draw(num_classes + 1, np.array([1.0] + [CLASS_INVERSION] * num_classes))


def global_version(images: Tensor, draw: CurveDraw) -> Tensor:
    """Return images (B, C, H, W) in [0, 1] with one rising curve each, float32."""
    everywhere = torch.ones_like(images[:, None, :1], dtype=torch.bool)
    return _by_region(images, everywhere, draw).float()


def local_version(images: Tensor, masks: Tensor, draw: CurveDraw) -> Tensor:
    """Return images with one curve per class and one for the background; near-black pixels stay as they are.

    Args:
        images: (B, C, H, W) in [0, 1].
        masks: (B, K, H, W), not 0 where the class is; where classes overlap the later one counts.
        draw: of K + 1 regions.

    Returns:
        (B, C, H, W) float32.
    """
    classes = masks != 0
    later = classes.flip(1).cumsum(1).flip(1) - classes.int() > 0
    regions = torch.cat([~classes.any(1, keepdim=True), classes & ~later], 1)
    found = _by_region(images, regions[:, :, None], draw).float()
    return torch.where(images <= BACKGROUND_THRESHOLD, images.float(), found)


def either_version(
    images: Tensor, masks: Tensor, draws: tuple[CurveDraw, CurveDraw], local: np.ndarray | Tensor
) -> Tensor:
    """Return each image in its global or its local version: the augmentation without saliency.

    Args:
        images: (B, C, H, W) in [0, 1].
        masks: (B, K, H, W), see :func:`local_version`.
        draws: of :func:`draw_curves`, for all images.
        local: (B,) bool, which version; SLAug shows both alike.
    """
    whole, by_class = draws
    chosen = torch.as_tensor(local, dtype=torch.bool)
    result = images.float().clone()
    if chosen.any():
        here = chosen.to(images.device)
        result[here] = local_version(images[here], masks[here], by_class.of(chosen.numpy()))
    if not chosen.all():
        here = ~chosen.to(images.device)
        result[here] = global_version(images[here], whole.of(~chosen.numpy()))
    return result


def curved(values: Tensor, inside: Tensor, control: Tensor, falling: Tensor, points: int = POINTS) -> Tensor:
    """Send values through Bezier curves between the minimum and maximum of the pixels inside.

    The x of a curve's points are sorted; those of a rising curve have their y sorted too, those of a falling one keep
    them from high to low.

    Args:
        values: (N, M) float64.
        inside: (N, M) bool.
        control: (N, 4), see :class:`CurveDraw`.
        falling: (N,) bool.
        points: per curve.

    Returns:
        (N, M); pixels that are not inside have no meaning.
    """
    low = values.masked_fill(~inside, torch.inf).amin(1)
    high = values.masked_fill(~inside, -torch.inf).amax(1)
    empty = ~inside.any(1)
    low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 1)
    first_x, first_y, second_x, second_y = (low + share * (high - low) for share in control.unbind(1))
    basis = bernstein(points, values.device).double()
    x = torch.stack([low, second_x, first_x, high], 1) @ basis
    y = torch.stack([low, second_y, first_y, high], 1) @ basis
    x, rising = x.sort(1).values, y.sort(1).values
    return _interpolated(values, x, torch.where(falling[:, None], y, rising))


def shifted(values: Tensor, inside: Tensor, scale: Tensor, location: Tensor) -> Tensor:
    """Scale and shift values (N, M) into [0, 1], the shift limited so that their middle does not leave it.

    Args:
        values: (N, M) float64.
        inside: (N, M) bool, the pixels whose 20 and 80 percentiles limit the shift.
        scale: (N,), clipped to 0.9 .. 1.1 here.
        location: (N,), clipped here.
    """
    darkest, brightest = _quantiles(values, inside)
    shift = torch.minimum(torch.maximum(location, -darkest), 1 - brightest)
    return (values * scale.clamp(*SCALE_RANGE)[:, None] + shift[:, None]).clamp(0, 1)


def bernstein(points: int = POINTS, device: torch.device | str = "cpu") -> Tensor:
    """Return the cubic Bernstein basis (4, points) float32; the curve runs from its last control point to its first."""
    t = torch.linspace(0, 1, points, dtype=torch.float64, device=device)
    return torch.stack([binomial * t ** (3 - i) * (1 - t) ** i for i, binomial in enumerate((1, 3, 3, 1))]).float()


def _by_region(images: Tensor, regions: Tensor, draw: CurveDraw) -> Tensor:
    """Augment each region (B, R, 1, H, W) of images (B, C, H, W) by its own draw; float64."""
    batch, count = regions.shape[:2]
    values = images.double().flatten(1).repeat_interleave(count, 0)  # (BR, CHW)
    inside = regions.expand(-1, -1, images.shape[1], -1, -1).flatten(0, 1).flatten(1)
    numbers = [
        torch.as_tensor(drawn, device=images.device).flatten(0, 1)
        for drawn in (draw.control, draw.falling, draw.scale, draw.location)
    ]
    found = curved(values, inside, numbers[0].double(), numbers[1])
    found = shifted(found, inside, numbers[2].double(), numbers[3].double())
    return (found * inside).view(batch, count, *images.shape[1:]).sum(1)


def _interpolated(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolate linearly between points (N, P) with rising x, constant beyond them; values (N, M)."""
    below = (torch.searchsorted(x, values.contiguous(), right=True) - 1).clamp(0, x.shape[1] - 2)
    x0, x1, y0, y1 = x.gather(1, below), x.gather(1, below + 1), y.gather(1, below), y.gather(1, below + 1)
    # equal neighbours occur only at the upper end, where the last point counts
    share = torch.where(x1 > x0, (values - x0) / torch.where(x1 > x0, x1 - x0, 1.0), 1.0).clamp(0, 1)
    return y0 + share * (y1 - y0)


def _quantiles(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return both quantiles of the pixels inside, linear between neighbours; of none: 0 and 1."""
    ordered = values.masked_fill(~inside, torch.inf).sort(1).values
    count = inside.sum(1)
    found = []
    for share, nothing in zip(QUANTILES, (0.0, 1.0), strict=True):
        place = share * (count - 1).clamp(min=0).double()
        below = place.long()
        above = torch.minimum(below + 1, (count - 1).clamp(min=0))
        first, second = (ordered.gather(1, index[:, None])[:, 0] for index in (below, above))
        found.append(torch.where(count > 0, first + (second - first) * (place - below), nothing))
    return found[0], found[1]
