"""Made tissue patches of three "hospitals" in the trees of LUAD-HistoSeg, BCSS-WSSS and WSSS4LUAD.

For demo, study, tests and benchmark of methods that learn from image tags; any number of patches. The masks of the
training patches, which no download has, go into a folder of their own beside the tree.

    python -m nnunet_dgplugins.histology_phantom OUT --layout luad --patches 400
    python -m nnunet_dgplugins.histology_phantom OUT --layout bcss --patches 0
    dgplugins convert luad-histoseg OUT/LUAD-HistoSeg --classes 2 --target bcss-wsss=OUT/BCSS-WSSS
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import replacing, write_bytes
from nnunet_dgplugins.histology_tissue import HOSPITALS, draw_patch

if TYPE_CHECKING:
    from dataset_conversion._patches import PatchFacts

TRAIN, VAL, TEST = "train", "val", "test"
_PER_PATIENT = 20  # patches of a patient, at most
_NOTE = "MADE PATCHES. No tissue, no patients: drawn by nnunet_dgplugins.histology_phantom.\n"


@dataclass(frozen=True)
class Layout:
    """How a set keeps its patches.

    Args:
        converter: name after ``dgplugins convert``.
        root: folder of the set.
        folders: of training, validation and test patches.
        name: patient, number and part to a patch's name.
        flags: tags to what follows the name of a training patch.
        hospital: that the set is from, unless another is asked for.
        extra: further files at the top.
        varied: whether pictures have different sizes.
    """

    converter: str
    root: str
    folders: dict[str, str]
    name: Callable[[int, int, str], str]
    flags: Callable[[Sequence[int]], str]
    hospital: str
    extra: tuple[str, ...] = ("Readme.txt", "Example_for_using_image-level_label.py")
    varied: bool = False


def _place(number: int) -> tuple[int, int]:
    return 1000 + 224 * (number % 97), 2000 + 224 * (number // 97)


def _luad_name(patient: int, number: int, part: str) -> str:
    return f"{1031280 + 17 * patient}-{_place(number)[0]}-{_place(number)[1]}"


def _bcss_name(patient: int, number: int, part: str) -> str:
    slide = f"TCGA-A{patient % 10}-A{patient:03X}-DX1"
    return f"{slide}_xmin{_place(number)[0]}_ymin{_place(number)[1]}_MPP-0.2500+{number}"


def _wsss_name(patient: int, number: int, part: str) -> str:
    if part != TRAIN:
        return f"{number:02d}"
    return f"{436219 + 13 * patient}-{_place(number)[0]}-{_place(number)[1]}"


_PLAIN = {TRAIN: "train", VAL: "val", TEST: "test"}
LAYOUTS = {
    "luad": Layout(
        "luad-histoseg", "LUAD-HistoSeg", {**_PLAIN, TRAIN: "training"}, _luad_name,
        lambda tags: f"-[{' '.join(map(str, tags))}]", "A",
    ),
    "bcss": Layout("bcss-wsss", "BCSS-WSSS", _PLAIN, _bcss_name, lambda tags: f"[{''.join(map(str, tags))}]", "B"),
    "wsss": Layout(
        "wsss4luad", "WSSS4LUAD", {TRAIN: "1.training", VAL: "2.validation", TEST: "3.testing"}, _wsss_name,
        lambda tags: f"-[{', '.join(map(str, tags))}]", "C", (), True,
    ),
}  # fmt: skip


def make_histology_phantom(
    out: Path,
    layout: str = "luad",
    patches: int = 400,
    val: int | None = None,
    test: int | None = None,
    hospital: str | None = None,
    size: int = 224,
    seed: int = 0,
    jobs: int = 1,
) -> Path:
    """Write the tree; files that are there are left, so a killed run goes on.

    Args:
        out: the tree's parent.
        layout: a key of :data:`LAYOUTS`.
        patches: training patches.
        val: validation patches; None for a fifth of the training patches, at least four.
        test: likewise.
        hospital: a key of :data:`nnunet_dgplugins.histology_tissue.HOSPITALS`; None for the layout's own.
        size: of a patch in pixels.
        seed: of everything.
        jobs: processes.

    Returns:
        The folder that the layout's converter takes. The training patches' masks lie in ``<folder>_train_masks``.
    """
    from nnunet_dgplugins import parallel

    if layout not in LAYOUTS or (hospital or LAYOUTS[layout].hospital) not in HOSPITALS:
        raise UserError(f"Layouts are {', '.join(LAYOUTS)}, hospitals {', '.join(HOSPITALS)}.")
    form = LAYOUTS[layout]
    own = max(4, patches // 5)
    counts = {TRAIN: patches, VAL: own if val is None else val, TEST: own if test is None else test}
    arguments = [
        (out / form.root, layout, hospital or form.hospital, part, number, size, seed)
        for part, count in counts.items()
        for number in range(count)
    ]
    parallel.run("Drawing", write_patch, arguments, jobs)
    for name in (*form.extra, "MADE.txt"):
        write_bytes(out / form.root / name, _NOTE.encode())
    return out / form.root


def write_patch(root: Path, layout: str, hospital: str, part: str, number: int, size: int, seed: int) -> None:
    """Draw and write one patch with its mask, unless it is there."""
    from dataset_conversion._registry import load_converter

    form = LAYOUTS[layout]
    facts: PatchFacts = load_converter(form.converter).FACTS
    names = facts.classes(None)
    parts = list(form.folders)
    numbers = [seed, sorted(LAYOUTS).index(layout), parts.index(part), number]
    rng = np.random.RandomState([*numbers, 1])
    patient = len(parts) * (number // _PER_PATIENT) + parts.index(part)  # on one side only
    name = form.name(patient, number, part)
    folder = root / form.folders[part]
    mask_path = (folder / "mask" if part != TRAIN else root.with_name(f"{root.name}_train_masks")) / f"{name}.png"
    if mask_path.exists():  # written last
        return
    shape = (size, size)
    if form.varied:
        height, width = rng.randint(3 * size // 4, 5 * size // 4, 2).tolist()
        shape = (height, width)
    drawn = draw_patch(numbers, names, HOSPITALS[hospital], shape, patient)
    tags = [int((drawn.mask == index).any()) for index in range(len(names))]
    _save(folder / f"{name}{form.flags(tags)}.png" if part == TRAIN else folder / "img" / f"{name}.png", drawn.image)
    _save(mask_path, drawn.mask, [tissue.colour for tissue in facts.tissues] + [facts.excluded])


def _save(path: Path, array: npt.NDArray[np.uint8], palette: Sequence[Any] = ()) -> None:
    from PIL import Image

    picture = Image.fromarray(array)
    if palette:
        picture.putpalette([level for colour in palette for level in colour])
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--layout", type=click.Choice(list(LAYOUTS)), default="luad", show_default=True)
@click.option("--patches", type=click.IntRange(0), default=400, show_default=True, help="Training patches.")
@click.option("--val", type=click.IntRange(0), help="Validation patches. [default: a fifth as many, at least 4]")
@click.option("--test", type=click.IntRange(0), help="Test patches. [default: likewise]")
@click.option("--hospital", type=click.Choice(list(HOSPITALS)), help="Stain and scanner. [default: the layout's own]")
@click.option("--size", type=click.IntRange(32), default=224, show_default=True, help="Side of a patch in pixels.")
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True)
def main(
    out: Path, layout: str, patches: int, val: int | None, test: int | None, hospital: str | None, size: int,
    seed: int, jobs: int,
) -> None:  # fmt: skip
    """Write made tissue patches in the tree of a public set to OUT."""
    folder = make_histology_phantom(out, layout, patches, val, test, hospital, size, seed, jobs)
    command = f"dgplugins convert {LAYOUTS[layout].converter} {folder}"
    click.echo(f"{patches} made training patches in {folder}\nNext: {command}")


if __name__ == "__main__":
    main()
