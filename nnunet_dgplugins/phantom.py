"""A made multi-site prostate MR data set in the tree of the SAML download, for demo and tests.

Each volume is a drawn pelvis (body outline, fat, muscles, bones, bladder, rectum or endorectal balloon, prostate with
peripheral and transition zone) seen through the "scanner" of one of six sites. What differs between the sites is
listed in :data:`SITES`, one line per site, so that the difficulty of the shift is tuned in one place. No patient data.

    python -m nnunet_dgplugins.phantom OUT --cases 6 --seed 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.errors import UserError, nearest
from nnunet_dgplugins.files import replacing

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# tissue codes of a drawn slice; the order is that of the columns of Site.tissue
AIR, FAT, MUSCLE, BONE, CORTEX, BLADDER, WALL, LUMEN, VEIN, TRANSITION, PERIPHERAL = range(11)
TISSUES = ("air", "fat", "muscle", "bone", "cortex", "bladder", "wall", "lumen", "vein", "transition", "peripheral")


@dataclass(frozen=True)
class Site:
    """How one site's scanner shows the anatomy.

    Args:
        cases: volumes made by default.
        pixels: in-plane size (square).
        spacing: in-plane and through-plane voxel size in mm.
        tissue: mean signal of :data:`TISSUES`, 0 to 1.
        gamma: contrast curve, signal ** gamma.
        bias: strength of the smooth multiplicative field, as the standard deviation of its logarithm.
        coil: extra brightness beside the rectum (endorectal coil), 0 for none; also draws the balloon.
        noise: standard deviation of the complex noise, relative to full signal.
        blur: Gaussian blur in pixels.
        texture: standard deviation of the tissue texture, relative to the tissue's signal.
        scale: arbitrary intensity units of a full signal.
        zones: whether labels hold 1 = peripheral and 2 = transition zone, or 1 = whole gland.
        missing: case numbers that the site leaves out, as the real download does.
        suffix: what follows the case name in label files.
    """

    cases: int
    pixels: int
    spacing: tuple[float, float]
    tissue: tuple[float, ...]
    gamma: float
    bias: float
    coil: float
    noise: float
    blur: float
    texture: float
    scale: float
    zones: bool = False
    missing: tuple[int, ...] = ()
    suffix: str = "_segmentation"


# The shift between the sites. Columns of `tissue`:
#                    air   fat   musc  bone  cort  blad  wall  lum   vein  TZ    PZ
SITES: dict[str, Site] = {
    "RUNMC": Site(
        cases=12, pixels=80, spacing=(2.3, 3.8), gamma=1.0, bias=0.10, coil=0.0, noise=0.02, blur=0.55,
        texture=0.08, scale=600.0, zones=True,
        tissue=(0.01, 0.62, 0.22, 0.45, 0.08, 0.95, 0.35, 0.10, 0.80, 0.42, 0.72),
    ),
    "BMC": Site(
        cases=6, pixels=88, spacing=(1.6, 3.0), gamma=0.8, bias=0.15, coil=1.0, noise=0.04, blur=0.7,
        texture=0.12, scale=1500.0, zones=True, suffix="_Segmentation",
        tissue=(0.01, 0.55, 0.25, 0.40, 0.10, 0.85, 0.40, 0.06, 0.70, 0.40, 0.60),
    ),
    "I2CVB": Site(
        cases=6, pixels=96, spacing=(2.0, 3.0), gamma=1.4, bias=0.15, coil=0.0, noise=0.03, blur=0.5,
        texture=0.10, scale=300.0, missing=(3,),
        tissue=(0.01, 0.80, 0.28, 0.60, 0.08, 0.90, 0.42, 0.30, 0.75, 0.48, 0.60),
    ),
    "UCL": Site(
        cases=6, pixels=72, spacing=(2.2, 3.3), gamma=0.7, bias=0.22, coil=0.0, noise=0.06, blur=0.9,
        texture=0.08, scale=900.0,
        tissue=(0.02, 0.70, 0.24, 0.55, 0.12, 0.80, 0.36, 0.15, 0.66, 0.45, 0.55),
    ),
    "BIDMC": Site(
        cases=6, pixels=72, spacing=(1.9, 2.6), gamma=1.2, bias=0.18, coil=1.4, noise=0.04, blur=0.8,
        texture=0.10, scale=4000.0, missing=(1,),
        tissue=(0.01, 0.72, 0.26, 0.48, 0.10, 0.70, 0.45, 0.05, 0.60, 0.44, 0.52),
    ),
    "HK": Site(
        cases=6, pixels=80, spacing=(2.0, 3.6), gamma=1.0, bias=0.15, coil=1.2, noise=0.035, blur=0.6,
        texture=0.10, scale=250.0,
        tissue=(0.02, 0.56, 0.30, 0.38, 0.12, 0.75, 0.38, 0.08, 0.62, 0.43, 0.54),
    ),
}  # fmt: skip

SIZES = {"tiny": 0.4, "small": 1.0, "large": 2.0}  # factor on in-plane pixels; the anatomy keeps its size in mm


@dataclass(frozen=True)
class _Anatomy:
    """Drawn once per case; lengths in mm; x to the left, y to the back, z to the head, origin mid-prostate."""

    half: Array  # half axes of the prostate (3,)
    waves: Array  # amplitude and phase of the outline's Fourier waves (4, 2)
    zone: Array  # size of the transition zone relative to the prostate (2,)
    body: Array  # half axes of the body (2,)
    shift: Array  # where the prostate's centre lies in the field of view (2,)
    rectum: Array  # x offset, half axes (3,)
    bladder: Array  # x offset, size factor, how far down it reaches (3,)
    nodules: Array  # x, y, z, radius, signal factor of each nodule in the transition zone (n, 5)
    spots: Array  # x, y, radius of periprostatic veins and nodes (n, 3)


def make_phantom(
    root: Path | str, cases_per_site: int | Mapping[str, int] | None = None, seed: int = 0, size: str = "small"
) -> Path:
    """Write the made data set; the same arguments give the same bytes.

    Args:
        root: folder that will hold one folder per site.
        cases_per_site: one number for every site, or a number per site (others are left out); None for the defaults.
        seed: of everything random.
        size: ``tiny`` (tests), ``small`` (demo) or ``large``.

    Returns:
        ``root``.

    Raises:
        UserError: unknown size or site, or a number below one.
    """
    root = Path(root)
    if size not in SIZES:
        raise UserError(f"Unknown size '{size}'{nearest(size, SIZES)}")
    if cases_per_site is None:
        counts = {name: site.cases for name, site in SITES.items()}
    elif isinstance(cases_per_site, int):
        counts = dict.fromkeys(SITES, cases_per_site)
    else:
        counts = dict(cases_per_site)
    for name, count in counts.items():
        if name not in SITES:
            raise UserError(f"Unknown site '{name}'{nearest(name, SITES)}")
        if count < 1:
            raise UserError(f"{name}: {count} cases asked for; at least one is needed.")
    for index, (name, site) in enumerate(SITES.items()):
        numbers = (n for n in range(100) if n not in site.missing)
        for _, number in zip(range(counts.get(name, 0)), numbers, strict=False):
            # RandomState's stream is frozen for ever, so the bytes survive a new NumPy
            image, label = _draw_case(site, SIZES[size], np.random.RandomState([seed, index, number]))
            _write(root / name / f"Case{number:02d}.nii.gz", image, site, SIZES[size])
            _write(root / name / f"Case{number:02d}{site.suffix}.nii.gz", label, site, SIZES[size])
    return root


def _write(path: Path, array: npt.NDArray[np.int16] | npt.NDArray[np.uint8], site: Site, factor: float) -> None:
    import nibabel

    pixel = _pixel(site, factor)
    affine = np.diag([-pixel, -pixel, site.spacing[1], 1.0])  # x to the left and y to the back, as in the scanner
    affine[:2, 3] = pixel * array.shape[0] / 2
    with replacing(path) as temporary:
        nibabel.save(nibabel.Nifti1Image(array, affine), temporary)  # nibabel writes gzip without a time stamp


def _pixel(site: Site, factor: float) -> float:
    return site.spacing[0] * site.pixels / round(site.pixels * factor)


def _draw_case(
    site: Site, factor: float, rng: np.random.RandomState
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Return image and label, both (x, y, z)."""
    anatomy = _draw_anatomy(rng, endorectal=site.coil > 0)
    size, pixel, thick = round(site.pixels * factor), _pixel(site, factor), site.spacing[1]
    margin = rng.uniform(0.4, 2.2, 2)  # slices without prostate below and above
    levels = np.arange(-anatomy.half[2] - margin[0] * thick, anatomy.half[2] + margin[1] * thick, thick)
    if factor < 0.5:
        levels = levels[::2]  # tiny volumes are for tests: fewer slices
    axis = (np.arange(size) - (size - 1) / 2) * pixel
    x, y = np.meshgrid(axis - anatomy.shift[0], axis - anatomy.shift[1], indexing="ij")
    tissue = np.stack([_draw_slice(x, y, z, anatomy, endorectal=site.coil > 0) for z in levels], axis=-1)
    peripheral, transition = tissue == PERIPHERAL, tissue == TRANSITION
    label = (peripheral | transition).astype(np.uint8)
    if site.zones:
        label[transition] = 2
    return _scan(tissue, x, y, levels, anatomy, site, rng), label


def _draw_anatomy(rng: np.random.RandomState, endorectal: bool) -> _Anatomy:
    half = np.array([rng.uniform(18, 29), rng.uniform(12, 21), rng.uniform(13, 21)])
    if endorectal:
        half[:2] *= 1.06, 0.86  # the balloon flattens the gland
    nodules = [
        (rng.uniform(-0.4, 0.4) * half[0], rng.uniform(-0.5, 0.1) * half[1], rng.uniform(-0.4, 0.8) * half[2],
         rng.uniform(3, 8), rng.uniform(0.6, 1.5))
        for _ in range(rng.randint(1, 6))
    ]  # fmt: skip
    spots = [
        (side * (half[0] + rng.uniform(4, 24)), rng.uniform(-20, 16), rng.uniform(2.5, 6))
        for side in (-1, 1)
        for _ in range(rng.randint(2, 5))
    ]
    balloon = (rng.uniform(-3, 3), rng.uniform(19, 24), rng.uniform(14, 18))
    empty = (rng.uniform(-6, 6), rng.uniform(11, 18), rng.uniform(7, 13))
    return _Anatomy(
        half=half,
        waves=np.column_stack([rng.normal(0, [0.03, 0.035, 0.025, 0.015]), rng.uniform(0, 2 * np.pi, 4)]),
        zone=np.array([rng.uniform(0.55, 0.8), rng.uniform(0.5, 0.75)]),
        body=np.array([rng.uniform(150, 185), rng.uniform(92, 120)]),
        shift=np.array([rng.uniform(-18, 18), rng.uniform(-22, 14)]),
        rectum=np.array(balloon if endorectal else empty),
        bladder=np.array([rng.uniform(-8, 8), rng.uniform(0.7, 1.3), rng.uniform(-0.1, 0.7)]),
        nodules=np.array(nodules),
        spots=np.array(spots),
    )


def _ellipse(x: Array, y: Array, centre_x: float, centre_y: float, half_x: float, half_y: float) -> Array:
    """Return the squared relative radius: below 1 inside."""
    return np.asarray(((x - centre_x) / half_x) ** 2 + ((y - centre_y) / half_y) ** 2)


def _draw_slice(x: Array, y: Array, z: float, anatomy: _Anatomy, endorectal: bool) -> npt.NDArray[np.uint8]:
    """Return the tissue codes of one axial slice at height ``z``, painted from the outside in."""
    a, b, c = anatomy.half
    level = z / c
    tissue = np.full(x.shape, AIR, np.uint8)
    body = _ellipse(x, y, 0, 8, *anatomy.body)
    tissue[body < 1] = FAT
    tissue[_ellipse(x, y, 0, 6, anatomy.body[0] * 0.86, anatomy.body[1] * 0.74) < 1] = MUSCLE
    tissue[_ellipse(x, y, 0, 4, a + 30, b + 34) < 1] = FAT  # the fat of the lesser pelvis
    for side in (-1, 1):
        bone = _ellipse(x, y, side * (a + 66), -8 + 6 * level, 24, 26)
        tissue[bone < 1] = CORTEX
        tissue[bone < 0.78] = BONE
        pubis = _ellipse(x + 0.5 * side * (y + b + 30), y, side * 17, -b - 30, 13, 11)
        tissue[pubis < 1] = CORTEX
        tissue[pubis < 0.7] = BONE
        tissue[_ellipse(x, y, side * (a + 26), -2, 10, 27) < 1] = MUSCLE  # obturator internus
        tissue[_ellipse(x, y, side * (a + 7), 10, 3.5, 16) < 1] = MUSCLE  # levator ani
        tissue[_ellipse(x, y, side * 62, 72, 52, 26) < 1] = MUSCLE  # gluteus
    for spot_x, spot_y, radius in anatomy.spots:
        tissue[_ellipse(x, y, spot_x + 2 * level, spot_y, radius, radius) < 1] = VEIN
    if level > anatomy.bladder[2]:
        reach = min(1.0, 0.35 + 0.8 * (level - anatomy.bladder[2])) * anatomy.bladder[1]
        bladder = _ellipse(x, y, anatomy.bladder[0], -b - 8, 30 * reach, 16 * reach)
        tissue[bladder < 1.25] = WALL
        tissue[bladder < 1] = BLADDER
    if level > 0.85:  # seminal vesicles, bright as the gland but not part of it
        for side in (-1, 1):
            tissue[_ellipse(x, y + 0.3 * side * x, side * 16, b * 0.55, 15, 6) < 1] = VEIN
    rectum_y = b * 0.93 + anatomy.rectum[2]
    rectum = _ellipse(x, y, anatomy.rectum[0], rectum_y, anatomy.rectum[1], anatomy.rectum[2])
    tissue[rectum < 1] = WALL
    tissue[rectum < (0.8 if endorectal else 0.45)] = LUMEN
    _paint_prostate(tissue, x, y, level, anatomy)
    return tissue


def _paint_prostate(tissue: npt.NDArray[np.uint8], x: Array, y: Array, level: float, anatomy: _Anatomy) -> None:
    a, b, _ = anatomy.half
    if abs(level) >= 1:
        return
    shrink = (1 - level**2) ** 0.4
    angle = np.arctan2(y / b, x / a)
    orders = np.arange(2, 2 + len(anatomy.waves))
    outline = 1 + (anatomy.waves[:, :1, None] * np.cos(
        orders[:, None, None] * angle + anatomy.waves[:, 1:, None] + 1.5 * level
    )).sum(0)  # fmt: skip
    dent = 1 - 0.12 * np.exp(-((x / (0.35 * a)) ** 2)) * (y > 0)  # the rectum presses the back of the gland in
    radius = np.sqrt(_ellipse(x, y, 0, 0, a * shrink, b * shrink)) / (outline * dent)
    gland = radius < 1
    tissue[(radius < 1.0 + 1.2 / (b * shrink)) & ~gland] = CORTEX  # the capsule
    tissue[gland] = PERIPHERAL
    # apex: almost only peripheral zone; base: almost only transition and central zone
    grow = np.clip(0.75 + 0.45 * level, 0.2, 1.1)
    inner = _ellipse(
        x, y, 0, -0.26 * b * shrink, anatomy.zone[0] * a * shrink * grow, anatomy.zone[1] * b * shrink * grow
    )
    tissue[gland & (inner < 1)] = TRANSITION


def _smooth_noise(shape: tuple[int, ...], sigma: tuple[float, ...], rng: np.random.RandomState) -> Array:
    """Return Gaussian noise of the given smoothness with mean 0 and standard deviation 1."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    field -= field.mean()
    return np.asarray(field / (field.std() + 1e-12))


def _scan(
    tissue: npt.NDArray[np.uint8], x: Array, y: Array, levels: Array, anatomy: _Anatomy, site: Site,
    rng: np.random.RandomState,
) -> npt.NDArray[np.int16]:  # fmt: skip
    """Return the image (x, y, z) that the site's scanner makes of the tissue."""
    from scipy.ndimage import gaussian_filter

    shape = tissue.shape
    means = np.array(site.tissue) * rng.uniform(0.93, 1.07, len(site.tissue))
    signal = means[tissue]
    for centre_x, centre_y, centre_z, radius, factor in anatomy.nodules:
        distance = _ellipse(x, y, centre_x, centre_y, radius, radius)[..., None] + ((levels - centre_z) / radius) ** 2
        signal = np.where((distance < 1) & (tissue == TRANSITION), signal * factor, signal)
    fine = _smooth_noise(shape, (0.8, 0.8, 0.3), rng)
    coarse = _smooth_noise(shape, (3.0, 3.0, 0.7), rng)
    signal = signal * (1 + site.texture * (0.6 * fine + 0.8 * coarse))
    signal = np.clip(gaussian_filter(signal, (site.blur, site.blur, 0.0)), 0, None) ** site.gamma
    field = np.exp(site.bias * _smooth_noise(shape, (shape[0] / 4, shape[1] / 4, 1.5), rng))
    if site.coil:
        # brightness falls off from the wall of the balloon, as with a real endorectal coil
        distance = np.sqrt(
            _ellipse(x, y, anatomy.rectum[0], anatomy.half[1] * 0.93 + anatomy.rectum[2], *anatomy.rectum[1:])
        )
        away = np.clip(distance - 1, 0, None) * anatomy.rectum[1:].mean()
        field = field * (0.6 + site.coil / (1 + (away / 14) ** 2))[..., None]
    signal = signal * field
    noise = site.noise * rng.standard_normal((2, *shape))
    measured = np.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)  # magnitude images have Rician noise
    return np.clip(np.rint(measured * site.scale * rng.uniform(0.8, 1.25)), 0, 32767).astype(np.int16)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--cases", type=click.IntRange(1, 90), help="Cases per site. [default: 12 at RUNMC, 6 elsewhere]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
def main(out: Path, cases: int | None, seed: int, size: str) -> None:
    """Write a made six-site prostate data set in the SAML tree to OUT."""
    make_phantom(out, cases, seed, size)
    click.echo(f"{len(list(out.glob('*/*.nii.gz'))) // 2} made cases of {len(SITES)} sites in {out}")


if __name__ == "__main__":
    main()
