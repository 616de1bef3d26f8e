"""Reads, checks and writes one patch. Runs in worker processes, so everything here can be pickled."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataset_conversion._patches import TEST, Code, Patch
from nnunet_dgplugins.errors import Problem
from nnunet_dgplugins.files import VALIDATION_MASKS, take, write_bytes

if TYPE_CHECKING:
    from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEPTH = 24  # where a PNG says how many bits a sample has
PALETTE, ALPHA, INDEXED = "palette", "alpha", "indexed"  # peculiarities of files that are put right


class Unusable(Exception):
    """A picture cannot be used; the text says why."""


@dataclass(frozen=True)
class Recipe:
    """How patches are changed on their way.

    Args:
        ignore: label of excluded pixels, and of all pixels where no truth may be seen.
        weak: whether training and validation cases carry tags in place of masks.
        resize: side in pixels that every patch gets; None for their own.
        link: link pictures that need no change.
    """

    ignore: int
    weak: bool
    resize: int | None = None
    link: bool = False


@dataclass
class Checked:
    """What is known of a patch after every byte of it was read.

    Args:
        name: case id.
        problems: what makes it unusable.
        odd: peculiarities that are put right.
        image: SHA-256 of the picture's file.
        mask: SHA-256 of the mask's file; empty without one.
        size: (height, width) as written.
        pixels: label to how many pixels of the mask have it.
        as_is: whether the picture can be used without a change.
        bytes: upper estimate of what is written.
    """

    name: str
    problems: list[Problem] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    image: str = ""
    mask: str = ""
    size: tuple[int, int] = (0, 0)
    pixels: dict[int, int] = field(default_factory=dict)
    as_is: bool = False
    bytes: int = 0


def check_patch(patch: Patch, recipe: Recipe) -> Checked:
    """Read a patch completely and say everything that is wrong with it."""
    report = Checked(patch.name)
    fix = f"Export it again, or leave it out with --exclude {patch.name}."
    shape = labels = None
    try:
        content = _content(patch.image)
        report.image = hashlib.sha256(content).hexdigest()
        picture, plain = read_image(content, report.odd)
        shape = (picture.height, picture.width)
        report.size = (recipe.resize, recipe.resize) if recipe.resize else shape
        report.as_is = plain and report.size == shape
        if not (report.as_is and recipe.link):
            report.bytes = len(content) if report.as_is else 3 * report.size[0] * report.size[1]
    except Unusable as error:
        report.problems.append(Problem(str(patch.image), str(error), "an RGB picture of 8 bits per channel", fix))
    if patch.mask is None:
        return report
    try:
        content = _content(patch.mask)
        report.mask = hashlib.sha256(content).hexdigest()
        labels = read_mask(content, patch.code, report.odd)
        values, counts = np.unique(labels, return_counts=True)
        report.pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        report.bytes += labels.size // 8
    except Unusable as error:
        report.problems.append(Problem(str(patch.mask), str(error), fix=fix))
    if shape is not None and labels is not None and labels.shape != shape:
        found, wanted = (f"{width} x {height} pixels" for height, width in (labels.shape, shape))
        report.problems.append(Problem(str(patch.mask), found, f"{wanted} as its image", fix))
    return report


def write_patch(patch: Patch, checked: Checked, recipe: Recipe, folder: Path) -> None:
    """Write one patch's image and label; files that are there already are left as they are.

    Args:
        patch: the patch.
        checked: result of :func:`check_patch` for the same recipe.
        recipe: what to change.
        folder: dataset folder.
    """
    part = "Ts" if patch.part == TEST else "Tr"
    image = folder / f"images{part}" / f"{patch.name}_0000.png"
    if not image.exists():
        if checked.as_is:
            take(patch.image, image, recipe.link)
        else:
            picture, _ = read_image(_content(patch.image), [])
            write_bytes(image, encoded(_resized(picture, recipe.resize, smooth=True)))
    label = folder / f"labels{part}" / f"{patch.name}.png"
    if recipe.weak and patch.part != TEST:
        if not label.exists():
            write_bytes(label, blank(*checked.size, recipe.ignore))
        label = folder / VALIDATION_MASKS / label.name
    if patch.mask is not None and not label.exists():
        from PIL import Image

        mask = Image.fromarray(read_mask(_content(patch.mask), patch.code, []))
        write_bytes(label, encoded(_resized(mask, recipe.resize, smooth=False)))


def read_image(content: bytes, odd: list[str]) -> tuple[Image.Image, bool]:
    """Return a picture as RGB, and whether its file is an RGB PNG already; takes note of what is put right.

    Raises:
        Unusable: damaged, transparent, grey, or of more than 8 bits.
    """
    picture = _open(content)
    plain = content.startswith(SIGNATURE) and picture.mode == "RGB" and "transparency" not in picture.info
    if content.startswith(SIGNATURE) and content[_DEPTH] == 16:
        raise Unusable("16 bits per channel")
    if picture.mode == "P":
        odd.append(INDEXED)
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if "transparency" in picture.info and picture.mode == "RGB":
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        if picture.getchannel("A").getextrema() != (255, 255):
            raise Unusable("transparent pixels")
        odd.append(ALPHA)
        picture = picture.convert("RGB")
    if picture.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "F"):
        raise Unusable("a grey picture")
    if picture.mode != "RGB":
        raise Unusable(f"a picture of kind {picture.mode}")
    return picture, plain


def read_mask(content: bytes, code: Code, odd: list[str]) -> npt.NDArray[np.uint8]:
    """Return a mask's labels (height, width).

    The index of a palette file is the class, whatever its palette shows: the colours of public files are not reliable.

    Raises:
        Unusable: damaged, of an unknown kind, or with values or colours that mean nothing.
    """
    picture = _open(content)
    if picture.mode in ("RGB", "RGBA"):
        return _from_colours(picture, code)
    array = np.asarray(picture)
    if picture.mode == "P":
        if not _palette_agrees(picture, array, code):
            odd.append(PALETTE)
    elif picture.mode == "L":
        depth = content[_DEPTH] if content.startswith(SIGNATURE) else 8
        array = array // (255 // (2**depth - 1)) if depth < 8 else array  # PIL spreads 2 and 4 bits over 0 to 255
    elif picture.mode not in ("1", "I", "I;16", "I;16B"):
        raise Unusable(f"a mask of kind {picture.mode}; expected whole numbers, a palette or the published colours")
    return _mapped(array.astype(np.int64), code.values, str)


def encoded(picture: Image.Image) -> bytes:
    """Return a picture as PNG; the same pixels give the same bytes."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


@lru_cache(maxsize=64)
def blank(height: int, width: int, value: int) -> bytes:
    """Return a grey PNG of one value."""
    from PIL import Image

    return encoded(Image.fromarray(np.full((height, width), value, np.uint8)))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror or error})") from error


def _open(content: bytes) -> Image.Image:
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except Exception as error:  # PIL raises many kinds for files that are damaged or no pictures
        raise Unusable(f"a damaged picture, or none ({error})") from error
    return picture


def _resized(picture: Image.Image, side: int | None, smooth: bool) -> Image.Image:
    from PIL import Image

    if side is None or picture.size == (side, side):
        return picture
    return picture.resize((side, side), Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)


def _palette_agrees(picture: Image.Image, array: npt.NDArray[Any], code: Code) -> bool:
    """Return whether the values that occur have their published colours."""
    if not code.colours:
        return True
    palette = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    values, first = np.unique(array.ravel(), return_index=True)
    return all(
        value not in code.colours or tuple(palette[index].tolist()) == code.colours[value]
        for value, index in zip(values.tolist(), first.tolist(), strict=True)
    )


def _from_colours(picture: Image.Image, code: Code) -> npt.NDArray[np.uint8]:
    if not code.colours:
        raise Unusable("a colour picture, and no colours of classes are known; expected one whole number per pixel")
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() != (255, 255):
        raise Unusable("transparent pixels in a mask")
    array = np.asarray(picture.convert("RGB")).astype(np.int64)
    packed = array[..., 0] << 16 | array[..., 1] << 8 | array[..., 2]
    labels = {
        colour[0] << 16 | colour[1] << 8 | colour[2]: code.values[value] for value, colour in code.colours.items()
    }
    return _mapped(packed, labels, lambda value: f"({value >> 16}, {value >> 8 & 255}, {value & 255})")


def _mapped(array: npt.NDArray[np.int64], labels: Any, shown: Any) -> npt.NDArray[np.uint8]:
    values, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    unknown = [index for index, value in enumerate(values.tolist()) if value not in labels]
    if unknown:
        seen = ", ".join(f"{shown(int(values[index]))} ({counts[index]} pixels)" for index in unknown[:5])
        known = ", ".join(shown(value) for value in sorted(labels))
        raise Unusable(f"unknown value {seen}; known are {known}")
    written = np.array([labels[value] for value in values.tolist()], np.uint8)
    return written[inverse].reshape(array.shape)
