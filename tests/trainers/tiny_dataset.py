"""A tiny dataset for trainers: generated, written, planned and preprocessed in this process, in seconds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_dgplugins.data.case_table import Case, CaseTable
from nnunet_dgplugins.files import write_json

ENDING = ".nii.gz"
ROWS, COLUMNS = 36, 40
TAGGED_VALIDATION = (0, 4)  # validation cases of the two folds of a dataset with tags


@dataclass(frozen=True)
class Recipe:
    """What a dataset looks like; equal recipes share one planned dataset per session.

    Args:
        name: after ``Dataset9NN_``.
        cases: training cases of 4 to 6 slices of 36 x 40 pixels; the last slice of each shows no organ.
        classes: foreground labels, beside each other in one organ.
        channels: channel names.
        regions: labels are nested regions instead of classes (needs two classes).
        ignore: the left part of every label is the ignore label.
        spacing: x, y, z in mm.
        sagittal: volumes are stored with the slices along x, as sagittal scans are.
        unlabelled: so many of the training cases, the last ones, have no masks: a case table says so, their label files
            hold the ignore label alone, and the two folds list the labelled cases only.
        tags: cases have slice tags instead of masks: slices of labelsTr are constant at their tag, the case table lists
            the tags, and the masks of the two folds' validation cases lie in labelsVal.
    """

    name: str = "Tiny"
    cases: int = 5
    classes: int = 1
    channels: tuple[str, ...] = ("T2",)
    regions: bool = False
    ignore: bool = False
    spacing: tuple[float, float, float] = (0.6, 0.6, 3.0)
    sagittal: bool = False
    unlabelled: int = 0
    tags: bool = False

    @property
    def labelled(self) -> int:
        """Number of training cases with masks; they come first."""
        return self.cases - self.unlabelled


def case_arrays(
    recipe: Recipe, number: int, shape: tuple[int, int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return channels (C, Z, Y, X) float32, positive everywhere, and labels (Z, Y, X) uint8."""
    random = np.random.RandomState(1000 + number)
    depth, rows, columns = shape or (4 + number % 3, ROWS, COLUMNS)
    y, x = np.mgrid[:rows, :columns]
    y, x = (y - rows / 2 - random.uniform(-2, 2)) / rows, (x - columns / 2 - random.uniform(-2, 2)) / columns
    distance, angle = np.hypot(y, x), np.arctan2(y, x) / (2 * np.pi) + 0.5
    label = np.zeros((depth, rows, columns), np.uint8)
    for z in range(depth - 1):
        radius = 0.30 - 0.03 * abs(z - depth / 2)
        part = (
            1 + (distance < 0.6 * radius)
            if recipe.regions
            else 1 + np.minimum(angle * recipe.classes, recipe.classes - 1).astype(int)
        )
        label[z][distance < radius] = part[distance < radius]
    channels = [
        100 + 20 * channel + (40 + 10 * channel) * label + random.normal(0, 6, label.shape).clip(-60, 60)
        for channel in range(len(recipe.channels))
    ]
    if recipe.ignore:
        label[:, :, : columns // 4] = recipe.classes + 1
    return np.stack(channels).astype(np.float32), label


def write_image(path: Path, array: np.ndarray, spacing: tuple[float, ...], direction: Any = None) -> None:
    """Write an array (Z, Y, X) with spacing (x, y, z), an origin that is not zero, and a direction."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((-11.5, 7.25, 3.0))
    if direction is not None:
        image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def write_raw(raw: Path, name: str, recipe: Recipe) -> Path:
    """Write ``<raw>/<name>`` in nnU-Net's layout, with two target cases in imagesTs and labelsTs."""
    folder = raw / name
    for number in range(recipe.cases + 2):
        side = "Tr" if number < recipe.cases else "Ts"
        image, label = case_arrays(recipe, number)
        spacing = recipe.spacing
        if recipe.sagittal:
            image, label = image.transpose(0, 2, 3, 1), label.transpose(1, 2, 0)
            spacing = (spacing[2], spacing[0], spacing[1])
        if recipe.labelled <= number < recipe.cases:
            label = np.full_like(label, recipe.classes + 1)
        if recipe.tags and side == "Tr":
            if number in TAGGED_VALIDATION:
                write_image(folder / "labelsVal" / f"case_{number}{ENDING}", label, spacing)
            label = np.broadcast_to(label.any((1, 2))[:, None, None], label.shape).astype(np.uint8)
        for channel, values in enumerate(image):
            write_image(folder / f"images{side}" / f"case_{number}_{channel:04d}{ENDING}", values, spacing)
        write_image(folder / f"labels{side}" / f"case_{number}{ENDING}", label, spacing)
    labels: dict[str, Any] = {"background": 0}
    if recipe.regions:
        labels.update(whole=[1, 2], core=[2])
    else:
        labels.update({f"part{value}": value for value in range(1, recipe.classes + 1)})
    if recipe.ignore or recipe.unlabelled:
        labels["ignore"] = recipe.classes + 1
    content = {
        "channel_names": {str(i): channel for i, channel in enumerate(recipe.channels)},
        "labels": labels,
        "numTraining": recipe.cases,
        "file_ending": ENDING,
    }
    if recipe.regions:
        content["regions_class_order"] = [1, 2]
    if recipe.tags:
        content["dgplugins"] = _tag_table(recipe).to_dict()
        names = [f"case_{number}" for number in range(recipe.cases)]
        folds = [
            {"train": [n for n in names if n != name], "val": [name]}
            for name in (f"case_{i}" for i in TAGGED_VALIDATION)
        ]
        write_json(folder / "splits_final.json", folds)
    if recipe.unlabelled:
        content["dgplugins"] = _case_table(recipe).to_dict()
        known = [f"case_{number}" for number in range(recipe.labelled)]
        folds = [{"train": known[:-1], "val": known[-1:]}, {"train": known[1:], "val": known[:1]}]
        write_json(folder / "splits_final.json", folds)
    write_json(folder / "dataset.json", content)
    return folder


def _case_table(recipe: Recipe) -> CaseTable:
    sites = ("north", "south")
    return CaseTable(
        {
            f"case_{number}": Case(
                site=sites[number % 2] if number < recipe.cases else "west",
                patient=str(number),
                labelled=not recipe.labelled <= number < recipe.cases,
            )
            for number in range(recipe.cases + 2)
        },
        source=list(sites),
    )


def _tag_table(recipe: Recipe) -> CaseTable:
    return CaseTable(
        {
            f"case_{number}": Case(
                patient=str(number),
                labelled=number >= recipe.cases,
                tags=None
                if number >= recipe.cases
                else case_arrays(recipe, number)[1].any((1, 2)).astype(int).tolist(),
            )
            for number in range(recipe.cases + 2)
        },
        protocol={"supervision": "tags"},
    )


def plan(number: int, planner: str = "ExperimentPlanner", preprocess: bool = True, configuration: str = "2d") -> str:
    """Plan, and preprocess a configuration; nnU-Net's three folders are set. Returns the name of the plans."""
    import torch
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    class FewVoxels(DatasetFingerprintExtractor):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.num_foreground_voxels_for_intensitystats = 10_000  # a hundred million, drawn again and again, else

    threads = torch.get_num_threads()
    with threads_for_processes(), variable("nnUNet_n_proc_DA", "1"):
        if preprocess:
            api.extract_fingerprint_dataset(number, FewVoxels, 1, show_progress_bar=False, verbose=False)
        plans: str = api.plan_experiments([number], planner)
        if preprocess:
            api.preprocess([number], plans, (configuration,), (1,), show_progress_bar=False)
    torch.set_num_threads(threads)  # the planner sets it
    return plans


class _ThreadContext:
    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Pool(self, processes: int | None = None) -> ThreadPool:
        return ThreadPool(processes)


@contextmanager
def threads_for_processes() -> Iterator[None]:
    """Give nnU-Net threads where it asks for spawned processes, each of which would import torch first."""
    from nnunetv2.utilities import utils

    real, pool = multiprocessing.get_context, utils.Pool
    multiprocessing.get_context = lambda method=None: _ThreadContext(real(method))  # type: ignore[assignment, misc]
    utils.Pool = ThreadPool
    try:
        yield
    finally:
        multiprocessing.get_context, utils.Pool = real, pool


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
