"""A tiny dataset of tagged colour patches, as the converters of histology write it."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_dataset import plan

from nnunet_dgplugins.data.case_table import Case, CaseTable
from nnunet_dgplugins.files import read_json, write_json

ENDING = ".png"
VALIDATION = 2  # the last training patches
TEST = 2
WIDEST = 16  # channels of the planned U-Net


@dataclass(frozen=True)
class PatchRecipe:
    """What a dataset of patches looks like; equal recipes share one planned dataset per session.

    Patches are vertical bands of one or two tissues, each of its own colour; masks of the validation patches lie in
    labelsVal, those of two target patches in labelsTs.

    Args:
        name: after ``Dataset9NN_``.
        cases: training and validation patches of the source.
        classes: tissues.
        sizes: rows and columns, by turns.
        background: pixels of no tissue are a class; the lower quarter of each patch is.
        white: the upper left of each patch is white, 12 x 12 pixels; the dataset says so.
        empty: this training patch shows no tissue.
        release: so many tagged patches of the target train, too; the fold does not list them.
        normalisation: names of the channels.
    """

    name: str = "Patches"
    cases: int = 8
    classes: int = 3
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)
    background: bool = False
    white: bool = False
    empty: int | None = None
    release: int = 0
    normalisation: str = "rgb_to_0_1"

    @property
    def validation(self) -> list[str]:
        """The patches that validate."""
        return [f"case_{number}" for number in range(self.cases - VALIDATION, self.cases)]

    @property
    def training(self) -> list[str]:
        """The source's patches that train."""
        return [f"case_{number}" for number in range(self.cases - VALIDATION)]

    @property
    def targets(self) -> list[str]:
        """The target's patches that train under protocol release."""
        return [f"target_{number}" for number in range(self.release)]


def patch(recipe: PatchRecipe, number: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return picture (H, W, 3) uint8, label values (H, W) uint8 and which classes it shows."""
    random = np.random.RandomState(2000 + number)
    height, width = recipe.sizes[number % len(recipe.sizes)]
    shown = [] if number == recipe.empty else [number % recipe.classes, (number // 2) % recipe.classes]
    label = np.zeros((height, width), np.uint8)
    for place, kind in enumerate(shown):
        label[:, place * width // 2 :] = kind + 1
    if recipe.background:
        label[-height // 4 :] = 0
    colours = [(0.5, 0.5, 0.5)] + [colorsys.hsv_to_rgb(kind / recipe.classes, 0.6, 0.7) for kind in range(9)]
    picture = np.asarray(colours)[label] * 255 + random.normal(0, 12, (height, width, 3))
    picture = picture.clip(1, 190).astype(np.uint8)
    if recipe.white:
        picture[:12, :12] = 250
    return picture, label, [int(kind in shown) for kind in range(recipe.classes)]


def write_patches(raw: Path, name: str, recipe: PatchRecipe) -> Path:
    """Write ``<raw>/<name>`` in nnU-Net's layout."""
    folder, ignore, cases = raw / name, recipe.classes + 1, {}
    numbers = {f"case_{number}": number for number in range(recipe.cases + TEST)}
    numbers |= {name: 100 + number for number, name in enumerate(recipe.targets)}
    for case, number in numbers.items():
        picture, label, tags = patch(recipe, number)
        test = recipe.cases <= number < recipe.cases + TEST
        save(picture, folder / ("imagesTs" if test else "imagesTr") / f"{case}_0000{ENDING}")
        save(label if test else np.full_like(label, ignore), folder / ("labelsTs" if test else "labelsTr"), case)
        if case in recipe.validation:
            save(label, folder / "labelsVal", case)
        site = "south" if test or case in recipe.targets else "north"
        cases[case] = Case(site, str(number), labelled=test, tags=None if test else [tags])
    labels = {"background": 0, **{f"tissue{kind}": kind for kind in range(1, recipe.classes + 1)}, "ignore": ignore}
    protocol: dict[str, Any] = {"supervision": "tags", "background": recipe.background, "input": "made"}
    protocol |= {"protocol": "release" if recipe.release else "strict", "white_background": recipe.white}
    content = {
        "channel_names": {str(channel): recipe.normalisation for channel in range(3)},
        "labels": labels,
        "numTraining": recipe.cases + recipe.release,
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "NaturalImage2DIO",
        "dgplugins": CaseTable(cases, "north", protocol).to_dict(),
    }
    write_json(folder / "splits_final.json", [{"train": recipe.training, "val": recipe.validation}])
    write_json(folder / "dataset.json", content)
    return folder


def save(values: np.ndarray, path: Path, case: str = "") -> None:
    """Write a picture or a label map; with a case, ``path`` is its folder."""
    path = path / f"{case}{ENDING}" if case else path
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def plan_patches(number: int, preprocessed: Path) -> None:
    """Plan and preprocess, and make the planned U-Net narrow, so that a step takes no time."""
    path = preprocessed / f"{plan(number)}.json"
    plans = read_json(path)
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [min(count, WIDEST) for count in kwargs["features_per_stage"]]
    write_json(path, plans)
