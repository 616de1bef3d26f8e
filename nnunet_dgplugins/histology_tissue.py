"""Draws made patches of stained tissue with their masks, for demo, study and tests. No patient data.

What tells the tissues apart is structure, not the colour of a patch: large nuclei in sheets (tumour), fibres with
spindles (stroma), crowds of small round nuclei (lymphocytes), pink debris (necrosis), thin walls around air (normal).
Amounts of stain vary from patch to patch by more than the tissues' means differ. Hospitals differ in stains, their
strength, the light, sharpness and grain: two stains absorb light by Beer and Lambert, as Ruifrok and Johnston (2001)
take real pictures apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Random = np.random.RandomState  # its stream is frozen for ever: the same patches in ten years

TUMOUR, STROMA, LYMPHOCYTE, NECROSIS, NORMAL = "tumour", "stroma", "lymphocyte", "necrosis", "normal"
_LEAST = 0.04  # share of the patch that a tissue covers where it occurs
_PATCH = 30.0  # pixels, about the size of regions


@dataclass(frozen=True)
class Hospital:
    """How one laboratory stains and scans.

    Args:
        haematoxylin: optical density of the nuclear stain in red, green and blue.
        eosin: of the other stain.
        strength: amount of both.
        glass: (red, green, blue) of the empty slide, 0 to 255.
        blur: standard deviation in pixels.
        grain: standard deviation of the camera's noise, relative to full light.
    """

    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    strength: tuple[float, float]
    glass: tuple[int, int, int]
    blur: float
    grain: float


HOSPITALS = {
    "A": Hospital((0.65, 0.70, 0.29), (0.09, 0.95, 0.28), (1.30, 0.75), (244, 243, 244), 0.6, 0.012),
    "B": Hospital((0.52, 0.77, 0.37), (0.22, 0.84, 0.50), (0.95, 1.00), (238, 230, 224), 1.3, 0.020),
    "C": Hospital((0.74, 0.60, 0.30), (0.05, 0.98, 0.19), (1.65, 0.50), (250, 250, 252), 0.9, 0.008),
}


@dataclass(frozen=True)
class Drawn:
    """One made patch.

    Args:
        image: (height, width, 3) uint8.
        mask: (height, width) uint8, positions in the list of tissues; the value after the last one is empty slide.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]


def draw_patch(
    seed: Sequence[int], tissues: Sequence[str], hospital: Hospital, shape: tuple[int, int], patient: int = 0
) -> Drawn:
    """Draw one patch; the same seed draws the same, however many others are drawn.

    Args:
        seed: numbers of the patch.
        tissues: that may occur, of the five known ones; one to three of them do.
        hospital: who stains and scans it.
        shape: height and width in pixels.
        patient: patches of one patient share a stain that is slightly off the hospital's.
    """
    rng = Random(list(seed))
    mask = _regions(len(tissues), shape, rng)
    nuclear, other = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for index in np.unique(mask).tolist():
        if index < len(tissues):
            amounts = _TISSUES[tissues[index]](shape, rng)
            for total, amount in zip((nuclear, other), amounts, strict=True):
                np.copyto(total, amount, where=mask == index)
    gains = np.exp(rng.uniform(-0.3, 0.3, 2))
    own = _of_patient(hospital, Random([seed[0], 7919, patient]))
    return Drawn(_scan(nuclear * gains[0], other * gains[1], own, hospital, rng), mask)


def _regions(count: int, shape: tuple[int, int], rng: Random) -> npt.NDArray[np.uint8]:
    """Return which tissue is where: smooth regions of one to three tissues, in some patches with empty slide."""
    kinds = rng.permutation(count)[: rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3])].tolist()
    kinds += [count] if rng.uniform() < 0.25 else []
    fields = np.stack([_smooth(shape, _PATCH, rng) for _ in kinds])
    while True:
        region = np.argmax(fields, axis=0)
        share = np.bincount(region.ravel(), minlength=len(kinds)) / region.size
        small = (share > 0) & (share < _LEAST)
        if not small.any():
            return np.asarray(kinds, np.uint8)[region]
        fields[int(np.flatnonzero(small)[0])] = -np.inf


def _of_patient(hospital: Hospital, rng: Random) -> tuple[Array, Array]:
    """Return the absorption of both stains in red, green and blue."""
    stains = np.array([hospital.haematoxylin, hospital.eosin]) + rng.normal(0, 0.02, (2, 3))
    strength = np.array(hospital.strength) * rng.uniform(0.88, 1.12, 2)
    first, second = (np.clip(stains, 0.01, None) * strength[:, None]).astype(np.float32)
    return first, second


def _scan(nuclear: Any, other: Any, stains: tuple[Array, Array], hospital: Hospital, rng: Random) -> Any:
    from scipy.ndimage import gaussian_filter

    nuclear, other = np.maximum(nuclear, 0), np.maximum(other, 0) + 0.02
    density = nuclear[..., None] * stains[0] + other[..., None] * stains[1]
    light = np.exp(-density) * (np.array(hospital.glass, np.float32) / 255)
    light = gaussian_filter(light, (hospital.blur, hospital.blur, 0), mode="nearest")
    light += hospital.grain * rng.standard_normal(light.shape)
    return np.clip(np.rint(255 * light), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- amounts of both stains in each tissue


def _tumour(shape: tuple[int, int], rng: Random) -> tuple[Array, Array]:
    nuclei = _cells(shape, 14, (4.0, 6.2), rng, density=rng.uniform(0.6, 1), stretch=(1.0, 1.3))
    chromatin = 0.8 + 0.25 * _smooth(shape, 0.9, rng)
    inked = np.asarray(0.15 + 0.75 * nuclei * chromatin, np.float32)
    return inked, 0.45 + 0.06 * _smooth(shape, 2, rng) - 0.2 * nuclei


def _stroma(shape: tuple[int, int], rng: Random) -> tuple[Array, Array]:
    angle = rng.uniform(0, np.pi)
    y, x = np.indices(shape, dtype=np.float32)
    across = y * np.cos(angle) - x * np.sin(angle) + 5 * _smooth(shape, 18, rng) + 0.6 * _smooth(shape, 3, rng)
    fibres = np.sin(2 * np.pi * across / rng.uniform(6, 9))
    spindles = _cells(shape, 20, (2.6, 3.4), rng, density=0.6, stretch=(1.8, 2.3), angle=angle)
    haze = np.float32(rng.uniform(0.03, 0.3))
    return haze + 0.75 * spindles, 0.5 + 0.28 * fibres + 0.05 * _smooth(shape, 1.2, rng)


def _lymphocyte(shape: tuple[int, int], rng: Random) -> tuple[Array, Array]:
    nuclei = _cells(shape, 8, (2.4, 3.1), rng, density=rng.uniform(0.7, 1))
    return 0.1 + 0.9 * nuclei, 0.32 + 0.05 * _smooth(shape, 2, rng)


def _necrosis(shape: tuple[int, int], rng: Random) -> tuple[Array, Array]:
    debris = _cells(shape, 8, (0.7, 1.4), rng, density=0.5)
    ghosts = _cells(shape, 17, (3.5, 5), rng, density=0.4)
    haze = rng.uniform(0.05, 0.4) + 0.06 * _smooth(shape, 5, rng)
    return haze + 0.6 * debris + 0.12 * ghosts, 0.55 + 0.14 * _smooth(shape, 7, rng) + 0.06 * _smooth(shape, 1.5, rng)


def _normal(shape: tuple[int, int], rng: Random) -> tuple[Array, Array]:
    walls = _walls(shape, 38, rng)
    nuclei = _cells(shape, 9, (1.8, 2.6), rng, density=0.6)
    return walls * (0.1 + 0.8 * nuclei), walls * (0.5 + 0.05 * _smooth(shape, 2, rng))


_TISSUES = {TUMOUR: _tumour, STROMA: _stroma, LYMPHOCYTE: _lymphocyte, NECROSIS: _necrosis, NORMAL: _normal}


# ---------------------------------------------------------------- patterns


def _smooth(shape: tuple[int, int], sigma: float, rng: Random) -> Array:
    """Return a random field of mean 0 and spread 1 with details of about ``sigma`` pixels."""
    from scipy.ndimage import gaussian_filter, zoom

    step = max(1, int(sigma / 3))  # a coarse grid holds a smooth field
    small = tuple(-(-size // step) + 2 for size in shape)
    field = gaussian_filter(rng.standard_normal(small).astype(np.float32), sigma / step, mode="wrap")
    field = (field - field.mean()) / (field.std() + 1e-6)
    if step > 1:
        field = zoom(field, step, order=1, grid_mode=True, mode="nearest")
    return np.asarray(field[: shape[0], : shape[1]], np.float32)


def _lattice(shape: tuple[int, int], spacing: float, rng: Random) -> tuple[Any, Any, Any, Any]:
    """Return a jittered lattice: offsets (rows, columns, 2) in pixels, and the cell of each pixel of the patch."""
    counts = [int(size / spacing) + 4 for size in shape]
    points = (np.moveaxis(np.indices(counts), 0, -1) - 1 + rng.uniform(0.1, 0.9, (*counts, 2))) * spacing
    y, x = np.indices(shape, dtype=np.float32)
    return points.astype(np.float32), (y, x), (y / spacing).astype(int) + 1, (x / spacing).astype(int) + 1


def _cells(
    shape: tuple[int, int],
    spacing: float,
    radius: tuple[float, float],
    rng: Random,
    density: float = 1.0,
    stretch: tuple[float, float] = (1.0, 1.15),
    angle: float | None = None,
) -> Array:
    """Return nuclei, 0 to 1: ellipses on a jittered lattice, with soft edges.

    Args:
        shape: height and width.
        spacing: of the lattice in pixels; no ellipse may reach further.
        radius: least and largest.
        rng: of everything.
        density: share of the lattice that is filled.
        stretch: least and largest factor by which an ellipse is longer and narrower.
        angle: direction of all ellipses, roughly; None for any.
    """
    points, (y, x), row, column = _lattice(shape, spacing, rng)
    counts = points.shape[:2]
    turn = rng.uniform(0, np.pi, counts) if angle is None else angle + rng.normal(0, 0.15, counts)
    size, factor = rng.uniform(*radius, counts), rng.uniform(*stretch, counts)
    depth = rng.uniform(0.75, 1.0, counts) * (rng.uniform(size=counts) < density)
    cosine, sine = np.cos(turn), np.sin(turn)
    # per lattice cell: place, two rows of the matrix that makes the ellipse a unit circle, depth, softness
    table = np.stack(
        [
            points[..., 0], points[..., 1], sine / (size * factor), cosine / (size * factor),
            cosine * factor / size, -sine * factor / size, depth, size / 1.2,
        ],
        axis=-1,
    ).astype(np.float32)  # fmt: skip
    nuclei = np.zeros(shape, np.float32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            own = np.moveaxis(table[row + down, column + right], -1, 0)
            dy, dx = y - own[0], x - own[1]
            distance = np.hypot(own[2] * dy + own[3] * dx, own[4] * dy + own[5] * dx)
            np.maximum(nuclei, own[6] * np.clip(0.5 + (1 - distance) * own[7], 0, 1), out=nuclei)
    return nuclei


def _walls(shape: tuple[int, int], spacing: float, rng: Random) -> Array:
    """Return thin walls around cells of a jittered lattice, 0 to 1."""
    points, (y, x), row, column = _lattice(shape, spacing, rng)
    nearest = np.full(shape, np.inf, np.float32)
    second = nearest.copy()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            own = points[row + down, column + right]
            distance = np.hypot(y - own[..., 0], x - own[..., 1])
            np.minimum(second, np.maximum(nearest, distance), out=second)
            np.minimum(nearest, distance, out=nearest)
    return np.asarray(np.clip((7 - (second - nearest)) / 2, 0, 1), np.float32)
