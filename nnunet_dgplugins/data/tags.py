"""Tags of slices and of whole images: from the case table, through nnU-Net's crop, never from a label file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.data.case_table import KEY, Case, CaseTable
from nnunet_dgplugins.data.folds import is_labelled
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import RAW, nnunet_folder, read_json, write_json


def derive_tags(base: Path, dataset_json: dict[str, Any], reader: Any) -> CaseTable:
    """Derive the tags of all training cases from their masks and keep them in the case table.

    Args:
        base: the dataset's preprocessed folder, where nnU-Net keeps copies of labelsTr in ``gt_segmentations``.
        dataset_json: content of its dataset.json, which gets the table; the file there and the raw one are rewritten.
        reader: nnU-Net's for this dataset.

    Returns:
        The table; a slice is positive where its mask shows one pixel of foreground or more. A case without masks gets
        no tags.

    Raises:
        UserError: a slice shows no foreground but unknown pixels (the ignore label), so its tag is unknown.
    """
    ending, ignore = dataset_json["file_ending"], dataset_json["labels"].get("ignore")
    table = CaseTable.from_dataset_json(dataset_json) or CaseTable()
    cases = dict(table.cases)
    for path in sorted((base / "gt_segmentations").glob(f"*{ending}")):
        name = path.name[: -len(ending)]
        if not is_labelled(table, name):
            continue
        mask = np.asarray(reader.read_seg(str(path))[0])[0]
        unknown = np.zeros_like(mask, bool) if ignore is None else mask == ignore
        positive = ((mask > 0) & ~unknown).any((1, 2))
        if (unknown.any((1, 2)) & ~positive).any():
            raise UserError(f"{path}: a slice holds ignored pixels and no foreground, so its tag is unknown.")
        found = positive.astype(int).tolist()
        cases[name] = replace(cases.get(name, Case()), tags=found)
    made = replace(table, cases=cases)
    dataset_json[KEY] = made.to_dict()
    raw = nnunet_folder(RAW) / base.name
    for folder in (base, raw):
        if (folder / "dataset.json").is_file():
            write_json(folder / "dataset.json", {**read_json(folder / "dataset.json"), KEY: made.to_dict()})
    return made


def slice_tags(
    table: CaseTable, name: str, properties: Mapping[str, Any], transpose: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return the tags of a preprocessed case's slices (Z,), 0 or 1.

    Args:
        table: with one whole number per slice in the reader's order (axis 0 of what nnU-Net's reader returns).
        name: the case.
        properties: nnU-Net's, with ``shape_before_cropping`` and ``bbox_used_for_cropping``.
        transpose: the plans' ``transpose_forward``.

    Raises:
        UserError: the case has no tags of this kind, another number of slices, or plans that turn its slices around.
    """
    tags = table.cases[name].tags if name in table.cases else None
    if tags is None or not all(isinstance(tag, int) and tag in (0, 1) for tag in tags):
        raise UserError(f"{name}: expected one tag per slice, 0 or 1, in the case table; found {tags!r}.")
    if transpose[0] != 0:
        raise UserError(
            f"{name}: these plans cut slices along axis {transpose[0]}, but tags are along axis 0 of the files. Write "
            "the images with the slices along their last axis (NIfTI), at the largest spacing."
        )
    slices = int(properties["shape_before_cropping"][0])
    if len(tags) != slices:
        raise UserError(f"{name}: {len(tags)} tags in the case table, {slices} slices in the image.")
    first, last = (int(bound) for bound in properties["bbox_used_for_cropping"][0])
    return np.asarray(tags[first:last], np.int64)


def image_tags(table: CaseTable, name: str, classes: int) -> npt.NDArray[np.int64]:
    """Return which classes a 2-D image shows (classes,), 0 or 1, in the order of the label values.

    Args:
        table: with one entry for the image, a list with one number per class.
        name: the case.
        classes: labels of the dataset, without background and ignore.

    Raises:
        UserError: the case has no tags of this kind.
    """
    tags = table.cases[name].tags if name in table.cases else None
    entry = tags[0] if tags is not None and len(tags) == 1 else None
    if classes == 1 and isinstance(entry, int):
        entry = [entry]
    if not isinstance(entry, list) or len(entry) != classes or not set(entry) <= {0, 1}:
        raise UserError(
            f"{name}: expected one entry in the case table with 0 or 1 for each of {classes} classes; found {tags!r}."
        )
    return np.asarray(entry, np.int64)
