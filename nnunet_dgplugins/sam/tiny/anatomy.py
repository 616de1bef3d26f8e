"""Made anatomies: random multi-label maps of organs, walls, layers and vessels. No patient data, no atlas.

The recipe of synthetic-contrast training (Billot et al., SynthSeg, Medical Image Analysis 2023; Hoffmann et al.,
SynthMorph, IEEE TMI 2022): shapes are drawn at random, so that no anatomy is learnt by heart, and are shown with random
contrasts (:mod:`nnunet_dgplugins.sam.tiny.rendering`). Sampling (:func:`sample_anatomy`, only numbers) is separate from
drawing (:func:`draw`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

MAX_IDS = 255  # maps are 8-bit
AIR = 0
_MIN_SHARE = 0.0004  # of the image: the smallest target, 26 pixels of 256 x 256
_MAX_SHARE = 0.6


@dataclass(frozen=True)
class Outline:
    """A closed shape: a superellipse whose radius waves around its centre. Lengths in half image sides.

    Args:
        centre: (y, x), the image being [-1, 1]^2.
        radii: half axes.
        angle: rotation in radians.
        power: exponent of the superellipse, 2 is an ellipse, larger is squarer.
        waves: (n, 2) amplitude and phase of the radius' waves of 2..n+1 periods.
    """

    centre: tuple[float, float]
    radii: tuple[float, float]
    angle: float
    power: float
    waves: np.ndarray


@dataclass(frozen=True)
class Structure:
    """One thing in the image.

    Args:
        kind: ``solid``, ``walled`` (wall and lumen), ``zoned`` (split by an inner shape), ``nested`` (small things
            inside), ``crescent`` (one shape less another), ``layers`` or ``tree``.
        outlines: its shapes, the outer one first; none for a tree.
        numbers: what else the kind needs: the wall as a share of the way to the centre, or number, direction (radians)
            and phase of layers.
        segments: of a tree, (n, 5): start (y, x), end (y, x), radius.
        twin: drawn a second time, mirrored left to right, with the same tissue.
    """

    kind: str
    outlines: tuple[Outline, ...] = ()
    numbers: tuple[float, ...] = ()
    segments: np.ndarray | None = None
    twin: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Everything that decides one label map.

    Args:
        body: outline of the body, None where the image lies inside it.
        skin: up to two outer layers, each as a share of the way from the outline to the body's centre.
        tissues: low-resolution noise fields (n, g, g); the largest decides the tissue between the organs.
        warp: displacement (2, g, g) of all coordinates, in half image sides.
        structures: in drawing order, later ones lie over earlier ones.
    """

    body: Outline | None
    skin: tuple[float, ...]
    tissues: np.ndarray
    warp: np.ndarray
    structures: tuple[Structure, ...]


@dataclass(frozen=True)
class Drawing:
    """A drawn anatomy.

    Args:
        planes: (3, S, S) uint8: tissue (what shares a mean signal), connected part of a tissue, connected whole
            structure. Of the last two only what ``targets`` names is meant to be prompted.
        targets: (n, 2) whole numbers: plane (1 or 2) and id of everything worth a prompt.
    """

    planes: np.ndarray
    targets: np.ndarray


def sample_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw the numbers of one anatomy."""
    has_body = rng.random() < 0.75
    body = (
        _outline(rng, (rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)), (0.6, 1.1), stretch=1.6) if has_body else None
    )
    skin = tuple(rng.uniform(0.02, 0.12, size=rng.integers(0, 3)).tolist()) if has_body else ()
    count, grid = int(rng.integers(1, 6)), int(rng.integers(3, 11))
    tissues = rng.standard_normal((count, grid, grid)).astype(np.float32)
    bends = int(rng.integers(3, 8))
    warp = (rng.standard_normal((2, bends, bends)) * rng.uniform(0.0, 0.08)).astype(np.float32)
    structures = [_layers(rng)] if rng.random() < 0.3 else []
    structures += [_organ(rng) for _ in range(rng.integers(2, 12))]
    for _ in range(rng.choice([0, 1, 2], p=[0.6, 0.25, 0.15])):
        structures.insert(int(rng.integers(0, len(structures) + 1)), _tree(rng))
    return Anatomy(body, skin, tissues, warp, tuple(structures))


def _outline(
    rng: np.random.Generator, centre: tuple[float, float], size: tuple[float, float], stretch: float = 2.5
) -> Outline:
    radius = float(np.exp(rng.uniform(*np.log(size))))
    aspect = float(np.exp(rng.uniform(-0.5, 0.5) * np.log(stretch)))
    power = float(rng.choice([2.0, 2.0, 2.5, 4.0]))
    number = int(rng.integers(1, 6))
    amplitude = rng.exponential(0.06, number) / np.arange(1, number + 1) ** 0.5
    waves = np.stack([np.minimum(amplitude, 0.25), rng.uniform(0, 2 * np.pi, number)], 1)
    return Outline(centre, (radius * aspect, radius / aspect), rng.uniform(0, np.pi), power, waves)


def _organ(rng: np.random.Generator) -> Structure:
    centre = (rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8))
    outer = _outline(rng, centre, (0.04, 0.5))
    kind = str(rng.choice(["solid", "walled", "zoned", "nested", "crescent"], p=[0.35, 0.25, 0.15, 0.1, 0.15]))
    twin = bool(rng.random() < 0.15)
    small = min(outer.radii)
    if kind == "walled":
        return Structure(kind, (outer,), (rng.uniform(0.12, 0.5),), twin=twin)
    if kind in ("zoned", "crescent"):
        way, shift = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.0) * small
        near = (centre[0] + shift * np.sin(way), centre[1] + shift * np.cos(way))
        return Structure(kind, (outer, _outline(rng, near, (0.6 * small, 1.2 * small))), twin=twin)
    if kind == "nested":
        inside = []
        for _ in range(rng.integers(1, 4)):
            way, shift = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.6) * small
            place = (centre[0] + shift * np.sin(way), centre[1] + shift * np.cos(way))
            inside.append(_outline(rng, place, (0.15 * small, 0.45 * small)))
        return Structure(kind, (outer, *inside), twin=twin)
    return Structure(kind, (outer,), twin=twin)


def _layers(rng: np.random.Generator) -> Structure:
    where = _outline(rng, (rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5)), (0.3, 0.9))
    return Structure("layers", (where,), (float(rng.integers(3, 8)), rng.uniform(0, np.pi), rng.uniform(0, 1)))


def _tree(rng: np.random.Generator) -> Structure:
    """Tubes that bend, thin out and fork."""
    segments: list[list[float]] = []
    tips = [(rng.uniform(-0.7, 0.7, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.07))]
    while tips and len(segments) < 24:
        start, way, radius = tips.pop(0)
        for _ in range(rng.integers(2, 5)):
            end = start + rng.uniform(0.08, 0.25) * np.array([np.sin(way), np.cos(way)])
            segments.append([*start, *end, radius])
            start, way, radius = end, way + rng.normal(0, 0.35), radius * rng.uniform(0.85, 1.0)
        if radius > 0.012:
            fork = rng.uniform(0.3, 0.8)
            tips += [(start, way + fork, 0.75 * radius), (start, way - fork, 0.75 * radius)]
    return Structure("tree", segments=np.array(segments, dtype=np.float32))


class _Canvas:
    """The maps while they are drawn: tissue ids and structure ids."""

    def __init__(self, size: int, warp: np.ndarray):
        line = (torch.arange(size) + 0.5) * (2 / size) - 1
        bend = smooth_fields(torch.from_numpy(warp), size)
        self.y, self.x = line[:, None] + bend[0], line[None, :] + bend[1]
        self.tissue = torch.zeros((size, size), dtype=torch.uint8)
        self.whole = torch.zeros((size, size), dtype=torch.uint8)
        self.inside = torch.ones((size, size), dtype=torch.bool)  # structures are cut off at the body's outline
        self.tissues = 0
        self.wholes = 0

    def new_tissue(self) -> int:
        self.tissues = min(self.tissues + 1, MAX_IDS)
        return self.tissues

    def depth(self, outline: Outline, mirrored: bool = False) -> torch.Tensor:
        """Return 1 at the centre, 0 on the outline, negative outside."""
        dy, dx = self.y - outline.centre[0], (-self.x if mirrored else self.x) - outline.centre[1]
        cos, sin = float(np.cos(outline.angle)), float(np.sin(outline.angle))
        u, v = (dy * cos + dx * sin) / outline.radii[0], (dx * cos - dy * sin) / outline.radii[1]
        if outline.power == 2:
            radius = (u * u + v * v).sqrt()
        else:
            radius = (u.abs() ** outline.power + v.abs() ** outline.power) ** (1 / outline.power)
        turn = torch.atan2(v, u)
        edge = torch.ones_like(turn)
        for periods, (amplitude, phase) in enumerate(outline.waves.tolist(), start=2):
            edge += amplitude * torch.cos(periods * turn + phase)
        return 1 - radius / edge

    def paint(self, mask: torch.Tensor, tissue: int, whole: int | None = None) -> None:
        mask = mask & self.inside
        self.tissue[mask] = tissue
        if whole is not None:
            self.whole[mask] = whole


def smooth_fields(fields: torch.Tensor, size: int) -> torch.Tensor:
    """Enlarge low-resolution noise (N, g, g) to (N, S, S), bicubic."""
    return F.interpolate(fields[None], size=(size, size), mode="bicubic", align_corners=True)[0]


def draw(anatomy: Anatomy, size: int) -> Drawing:
    """Draw an anatomy.

    Args:
        anatomy: what :func:`sample_anatomy` gave.
        size: side S of the square map in pixels.

    Returns:
        Tissue, part and structure maps with the targets worth a prompt.
    """
    canvas = _Canvas(size, anatomy.warp)
    fields = smooth_fields(torch.from_numpy(anatomy.tissues), size)
    between = fields.argmax(0).to(torch.uint8) + 1
    canvas.tissues = len(fields)
    if anatomy.body is None:
        canvas.tissue = between
    else:
        inside = canvas.depth(anatomy.body)
        depth = 0.0
        for thickness in anatomy.skin:
            canvas.paint(inside > depth, canvas.new_tissue())
            depth += thickness
        canvas.tissue = torch.where(inside > depth, between, canvas.tissue)
        canvas.inside = inside > 0
    for structure in anatomy.structures:
        _draw_structure(canvas, structure)
    return _with_targets(canvas.tissue.numpy(), canvas.whole.numpy())


def _draw_structure(canvas: _Canvas, structure: Structure) -> None:
    tissues: list[int] = []
    for mirrored in (False, True) if structure.twin else (False,):
        canvas.wholes = min(canvas.wholes + 1, MAX_IDS)
        for place, mask in enumerate(_masks(canvas, structure, mirrored)):
            if place == len(tissues):
                tissues.append(canvas.new_tissue())  # a twin has the tissues of the first
            canvas.paint(mask, tissues[place], canvas.wholes)


def _masks(canvas: _Canvas, structure: Structure, mirrored: bool) -> list[torch.Tensor]:
    """Return the masks of a structure's tissues in drawing order."""
    if structure.segments is not None:
        return [_tubes(canvas, torch.from_numpy(structure.segments))]
    outer = canvas.depth(structure.outlines[0], mirrored)
    inside = outer > 0
    if structure.kind == "walled":
        return [inside, outer > structure.numbers[0]]
    if structure.kind == "crescent":
        return [inside & (canvas.depth(structure.outlines[1], mirrored) < 0)]
    if structure.kind == "layers":
        number, way, phase = structure.numbers
        along = (canvas.y * float(np.sin(way)) + canvas.x * float(np.cos(way))) * number + phase
        band = along.floor().long() % 3
        return [inside & (band == index) for index in range(3)]
    return [inside, *(inside & (canvas.depth(inner, mirrored) > 0) for inner in structure.outlines[1:])]


def _tubes(canvas: _Canvas, segments: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(canvas.tissue, dtype=torch.bool)
    for y0, x0, y1, x1, radius in segments.tolist():
        dy, dx = y1 - y0, x1 - x0
        along = (((canvas.y - y0) * dy + (canvas.x - x0) * dx) / (dy * dy + dx * dx)).clamp_(0, 1)
        found |= (canvas.y - y0 - along * dy) ** 2 + (canvas.x - x0 - along * dx) ** 2 < radius * radius
    return found


def _with_targets(tissue: np.ndarray, whole: np.ndarray) -> Drawing:
    """Split tissues and structures into connected parts and list those of a size worth a prompt."""
    size = tissue.size
    planes, targets = [tissue], []
    for plane, source in enumerate((tissue, whole), start=1):
        parts = np.zeros_like(tissue)
        number = 0
        for value in np.unique(source):
            if plane == 2 and (value == 0 or len(np.unique(tissue[source == value])) == 1):
                continue  # of one tissue: its parts are targets already
            components, count = ndimage.label(source == value)
            areas = np.bincount(components.ravel(), minlength=count + 1)
            for component in range(1, count + 1):
                if _MIN_SHARE * size <= areas[component] <= _MAX_SHARE * size and number < MAX_IDS:
                    number += 1
                    parts[components == component] = number
                    if plane == 2 or value != AIR:
                        targets.append((plane, number))
        planes.append(parts)
    return Drawing(np.stack(planes), np.array(targets, dtype=np.int64).reshape(-1, 2))
