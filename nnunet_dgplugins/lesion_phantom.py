"""A made brain data set in the tree of BraTS 2019, for demo, study and tests of weak supervision.

Each case is a brain of 16 slices in two co-registered modalities; about half of the slices show a lesion. T1 shows its
core alone and T2 the ring around it alone, so a single modality never shows all of it. No patient data.

A classifier must look at the lesion to tell the two kinds of slices apart: where a slice has no lesion, each modality
has a winding vessel of as many voxels and the same signal instead. Otherwise the networks, which standardise each
slice, would read the tag off the level of the healthy tissue, which a bright spot shifts, and their maps would show
that.

    python -m nnunet_dgplugins.lesion_phantom OUT --cases 24 --seed 0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import replacing

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

ROOT = "MICCAI_BraTS_2019_Data_Training"
SHAPE = (64, 64, 16)  # x, y, slices
SPACING = (2.0, 2.0, 5.0)  # mm
CORE, OEDEMA = 4, 2  # label values of the download
_SIGNAL = 0.3  # of lesion and vessels above the tissue, which is about 0.5
_CORE_SHARE = 0.62  # of the lesion's radius
_NOISE = 0.04
_UNITS = 400.0  # arbitrary intensity units of full signal


@dataclass(frozen=True)
class Case:
    """One made patient.

    Args:
        t1: (x, y, z) int16, 0 outside the brain.
        t2: likewise.
        seg: (x, y, z) uint8 in the download's values.
    """

    t1: npt.NDArray[np.int16]
    t2: npt.NDArray[np.int16]
    seg: npt.NDArray[np.uint8]


def draw_case(seed: int, number: int) -> Case:
    """Draw one patient; the same seed and number draw the same, however many others are drawn."""
    rng = np.random.RandomState([seed, number])
    x, y = np.meshgrid(*(np.arange(size) - (size - 1) / 2 for size in SHAPE[:2]), indexing="ij")
    half = rng.uniform(24, 28), rng.uniform(24, 28)
    pattern = _smooth(SHAPE, (3, 3, 1), rng)
    first, last = _lesion_range(rng)
    centre, radius = _lesion(half, rng)
    images = np.zeros((2, *SHAPE))
    seg = np.zeros(SHAPE, np.uint8)
    brain = (x / half[0]) ** 2 + (y / half[1]) ** 2 < 1
    fluid = ((np.abs(x) - 3.5) / 2.2) ** 2 + (y / 6) ** 2 < 1
    # tissue has one mean and spread in every slice, or chance would set the slices with lesion apart
    pattern = (pattern - pattern[brain].mean(0)) / pattern[brain].std(0)
    for z in range(SHAPE[2]):
        shown = first <= z <= last
        # from -1 to 1 through the lesion; a slice without lesion gets the vessel of a random one with
        height = (2 * z - first - last) / (last - first + 1) if shown else rng.uniform(-1, 1)
        reach = radius * np.sqrt(max(0.25, 1 - height**2))
        distance = np.hypot(x - centre[0], y - centre[1])
        inside = brain & (distance < reach)
        parts = inside & (distance < _CORE_SHARE * reach), inside & (distance >= _CORE_SHARE * reach)
        if shown:
            seg[..., z][parts[0]], seg[..., z][parts[1]] = CORE, OEDEMA
        for image, part, contrast in zip(images, parts, (1, -1), strict=True):
            free = brain & ~fluid & ~part
            vessel = _vessel(x, y, free, 40, rng)
            bright = part if shown else _vessel(x, y, free & ~vessel, int(part.sum()), rng)
            tissue = 0.5 + contrast * (0.05 * pattern[..., z] - 0.2 * fluid)
            image[..., z] = np.where(brain, tissue + _SIGNAL * (vessel | bright), 0)
    t1, t2 = (_scanned(image, rng) for image in images)
    return Case(t1, t2, seg)


def _lesion_range(rng: np.random.RandomState) -> tuple[int, int]:
    """Return the first and the last slice of the lesion."""
    count = rng.randint(6, 10)
    first = rng.randint(1, SHAPE[2] - count)
    return first, first + count - 1


def _lesion(half: tuple[float, float], rng: np.random.RandomState) -> tuple[tuple[float, float], float]:
    """Return centre and largest radius in voxels: beside the ventricles and inside the brain."""
    radius, angle = rng.uniform(6, 8.5), rng.uniform(0, 2 * np.pi)
    away = rng.uniform(0.45, 0.6)
    return (away * half[0] * np.cos(angle), away * half[1] * np.sin(angle)), radius


def _vessel(x: npt.NDArray[Any], y: npt.NDArray[Any], allowed: Mask, count: int, rng: np.random.RandomState) -> Mask:
    """Return the ``count`` allowed voxels nearest to a random winding line through the brain."""
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-12, 12)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    line = offset + 4 * np.sin(along / rng.uniform(4, 7) + rng.uniform(0, 2 * np.pi))
    distance = np.where(allowed, np.abs(across - line), np.inf)
    mask = np.zeros(x.shape, bool)
    mask.flat[np.argsort(distance, axis=None, kind="stable")[:count]] = True
    return mask & allowed


def _smooth(shape: tuple[int, ...], sigma: tuple[float, ...], rng: np.random.RandomState) -> Array:
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return np.asarray(field / field.std())


def _scanned(signal: Array, rng: np.random.RandomState) -> npt.NDArray[np.int16]:
    """Return the image in the scanner's units; the background stays exactly 0, the brain above it."""
    measured = (signal + _NOISE * rng.standard_normal(signal.shape)) * _UNITS * rng.uniform(0.8, 1.25)
    return np.where(signal > 0, np.clip(np.rint(measured), 1, 32767), 0).astype(np.int16)


def make_lesion_phantom(out: Path, cases: int = 24, seed: int = 0) -> Path:
    """Write the tree; files that are there are left, so a killed run goes on.

    Args:
        out: the tree's parent.
        cases: patients, at least one.
        seed: of everything.

    Returns:
        The folder that ``dgplugins convert brats`` takes.
    """
    import nibabel

    if cases < 1:
        raise UserError(f"{cases} cases: expected one or more.")
    affine = np.diag((*SPACING, 1.0))
    for number in range(cases):
        name = f"BraTS19_2013_{number}_1"
        folder = out / ROOT / ("HGG", "LGG")[number % 2] / name
        paths = {kind: folder / f"{name}_{kind}.nii.gz" for kind in ("t1", "t2", "seg")}
        if all(path.exists() for path in paths.values()):
            continue
        drawn = draw_case(seed, number)
        for kind, path in paths.items():
            with replacing(path) as temporary:
                nibabel.save(nibabel.Nifti1Image(getattr(drawn, kind), affine), temporary)
    return out / ROOT


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--cases", type=click.IntRange(1), default=24, show_default=True, help="Patients.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, cases: int, seed: int) -> None:
    """Write made brains with lesions in the tree of BraTS 2019 to OUT."""
    folder = make_lesion_phantom(out, cases, seed)
    click.echo(f"{cases} made cases in {folder}\nNext: dgplugins convert brats {folder} --modalities T1,T2")


if __name__ == "__main__":
    main()
