"""Real stained tissue as tagged patches: cuts pictures with masks of nuclei into small ones, a site for each stain.

python scripts/histology_patches.py HISTOLOGY OUT
dgplugins convert patch-folder OUT --masks OUT/masks --classes-file OUT/classes.csv --source violet_tissue

HISTOLOGY holds ``domains.csv`` (image_id, stain_group) and, anywhere below, ``<image_id>/images/<image_id>.png`` with
``<image_id>/mask/<image_id>.png`` (0 and 1). Stain groups may have any names. Each patch is 64 pixels wide, enlarged
to the network's input, pictures bilinear, masks nearest; it is tagged where nuclei cover more than 0.5 % of it. All
patches of a picture count as one patient, so no fold parts them. Killed? Run it again: the bytes are the same.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.files import replacing, write_bytes

LEAST = 0.005  # share of a patch that nuclei must exceed for the tag
CLASSES = "class,value\nbackground,0\nnuclei,1\n"


@dataclass(frozen=True)
class Source:
    """One stained picture, its mask and its stain group."""

    name: str
    image: Path
    mask: Path
    site: str


def find_sources(root: Path) -> list[Source]:
    """Return the pictures that domains.csv lists.

    Raises:
        UserError: there is no domains.csv.
        BadInput: columns or files are missing.
    """
    table = root / "domains.csv"
    if not table.is_file():
        raise UserError(f"{table}: no such file; it says the stain group of each picture (image_id,stain_group).")
    lines = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"))))
    if not lines or not {"image_id", "stain_group"} <= set(lines[0]):
        raise BadInput(f"The table {table}", [Problem(str(table), "other columns", "image_id and stain_group")])
    images = {path.stem: path for path in sorted(root.rglob("images/*.png"))}
    masks = {path.stem: path for path in sorted(root.rglob("mask/*.png"))}
    names = [line["image_id"].strip() for line in lines]
    problems = [
        Problem(f"{table}, {name}", f"no {kind} {folder}/{name}.png below {root}")
        for name in names
        for kind, folder, found in (("picture", "images", images), ("mask", "mask", masks))
        if name not in found
    ]
    if problems:
        raise BadInput(f"The pictures of {table}", problems)
    return [
        Source(name, images[name], masks[name], line["stain_group"].strip())
        for name, line in zip(names, lines, strict=True)
    ]


def cut(source: Source, out: Path, patch: int, size: int) -> list[list[str]]:
    """Write the patches of a picture; returns a line of the table for each: file, site, patient, nuclei.

    Args:
        source: the picture.
        out: folder with ``images`` and ``masks``.
        patch: side of a patch in the picture; what is left at the right and lower edge is not used.
        size: side of the written patch.
    """
    from PIL import Image

    picture, mask = Image.open(source.image).convert("RGB"), Image.open(source.mask)
    nuclei = np.asarray(mask) > 0
    if nuclei.ndim != 2 or picture.size != mask.size:
        found = f"shape {nuclei.shape}"
        raise BadInput("The masks", [Problem(str(source.mask), found, f"grey, {picture.size} pixels as its picture")])
    lines = []
    for row in range(picture.height // patch):
        for column in range(picture.width // patch):
            x, y = column * patch, row * patch
            file = f"images/{source.name}_r{row}c{column}.png"
            part = nuclei[y : y + patch, x : x + patch]
            lines.append([file, source.site, source.name, str(int(part.mean() > LEAST))])
            crop = picture.crop((x, y, x + patch, y + patch)).resize((size, size), Image.Resampling.BILINEAR)
            truth = Image.fromarray(part.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
            for target, content in ((out / file, crop), (out / "masks" / Path(file).name, truth)):
                if not target.exists():
                    with replacing(target) as temporary:
                        content.save(temporary, format="PNG")
    return lines


def write_patches(root: Path, out: Path, patch: int, size: int) -> list[list[str]]:
    """Cut all pictures and write tags.csv and classes.csv, which say last that everything is there."""
    lines = [line for source in find_sources(root) for line in cut(source, out, patch, size)]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["file", "site", "patient", "nuclei"], *lines])
    write_bytes(out / "classes.csv", CLASSES.encode())
    write_bytes(out / "tags.csv", table.getvalue().encode())
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("root", metavar="HISTOLOGY", type=click.Path(path_type=Path, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--patch", type=click.IntRange(8), default=64, show_default=True, help="Side of a patch in the picture.")
@click.option("--size", type=click.IntRange(8), default=224, show_default=True, help="Side of a written patch.")
def main(root: Path, out: Path, patch: int, size: int) -> None:
    """Cut the stained pictures at HISTOLOGY into tagged patches, written to OUT."""
    try:
        lines = write_patches(root, out, patch, size)
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    for site in sorted({line[1] for line in lines}):
        own = [line for line in lines if line[1] == site]
        pictures, tagged = len({line[2] for line in own}), sum(line[3] == "1" for line in own)
        click.echo(f"{site}: {len(own)} patches of {pictures} pictures, {tagged} with nuclei")
    click.echo(
        f"Next: dgplugins convert patch-folder {out} --masks {out}/masks --classes-file {out}/classes.csv --source SITE"
    )


if __name__ == "__main__":
    main()
