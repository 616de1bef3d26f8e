"""Masks that a model of tags draws on its own training cases, as an ordinary raw dataset for a second stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dgplugins.data import staging
from nnunet_dgplugins.data.case_table import KEY, CaseTable
from nnunet_dgplugins.data.folds import tagged
from nnunet_dgplugins.data.linked_dataset import file_list, link
from nnunet_dgplugins.data.raw_dataset import RawCase, RawDataset
from nnunet_dgplugins.data.splits import SPLITS
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.panels import panels_png
from nnunet_dgplugins.files import (
    PANELS,
    VALIDATION_MASKS,
    content_hash,
    file_sha256,
    read_json,
    replacing,
    write_json,
)
from nnunet_dgplugins.methods.dcam.segmenter import CAMClassifier
from nnunet_dgplugins.methods.equivariant.segmenter import CAMSegmenter
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint
from nnunet_dgplugins.trainers.dcam_labels import PatchDrawer
from nnunet_dgplugins.trainers.deployed import rebuild
from nnunet_dgplugins.trainers.equivariant_labels import EquivariantDrawer
from nnunet_dgplugins.trainers.label_drawer import LABELS, Choices, Drawer

_SHOWN = 8  # cases on the page
_DRAWERS: dict[type[torch.nn.Module], type[Drawer]] = {CAMSegmenter: EquivariantDrawer, CAMClassifier: PatchDrawer}
_TEACHERS = "EquivariantCAMTrainer and DCAMClassifierTrainer"


def make_pseudo_labels(
    model_folder: Path,
    number: int,
    fold: int | str = 0,
    checkpoint: str = "checkpoint_final.pth",
    choices: Choices | None = None,
    linked: bool = True,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write ``DatasetNNN_<name>_pseudo``: same images and splits, masks by the model, provenance in the case table.

    Killed and run again, it goes on and ends with the same bytes.

    Args:
        model_folder: ``<Trainer>__<plans>__<configuration>`` of a trainer of tags.
        number: id of the new dataset.
        fold: fold of the model.
        checkpoint: file in the fold's folder.
        choices: how maps become masks; None: as the model and its method say.
        linked: link the images instead of copying them.
        overwrite: replace a dataset of this command that was made from another model or by other choices.
        device: where the network runs; None: CUDA if there is one.
        say: takes each line of progress.

    Returns:
        The new dataset's folder in ``nnUNet_raw``.

    Raises:
        UserError: the model is none of tags, a choice is none of its method, its dataset is gone, the id is taken, or
            no voxel at all is positive.
    """
    path = model_folder / f"fold_{fold}" / checkpoint
    drawer, raw, table = _opened(model_folder, path, choices or Choices(), device)
    listed = _splits(raw)
    cases = drawer.cases(raw, listed)
    name = f"Dataset{number:03d}_{raw.folder.name[11:]}_pseudo"
    staging.refuse_other_names(name, "--out")
    masks = {
        case.name: RawCase((case,), None)
        for case in sorted((raw.folder / VALIDATION_MASKS).glob(f"*{raw.file_ending}"))
    }
    origin = {"model": "/".join(path.parts[-4:]), "checkpoint": file_sha256(path), **drawer.choices}
    digest = content_hash({
        "name": name, "model": origin["checkpoint"], "choices": drawer.choices, "linked": linked,
        "table": table.to_dict(), "json": {key: raw.content.get(key) for key in ("labels", "channel_names")},
        "splits": listed, "train": file_list(raw.training), "test": file_list(raw.test), "masks": file_list(masks),
    })  # fmt: skip
    final = raw.folder.with_name(name)
    if staging.is_done(final, digest):
        say(f"{name} is there already, made from the same model: nothing to do.")
        return final
    staging.refuse_other_content(final, digest, overwrite)
    if left_out := len(tagged(sorted(raw.training), table)) - len(cases):
        say(f"{left_out} tagged training cases are left out: they show none of the classes, or are not trained on.")
    folder = staging.start(final, digest)
    positive, tagged_positive, empty = _write_masks(drawer, cases, folder, raw)
    if not positive:
        shutil.rmtree(folder)
        raise UserError(f"No voxel of {len(cases)} cases is drawn: nothing could be learnt. {drawer.advice}")
    say(f"{positive} foreground voxels in {len(cases)} cases.")
    if empty:
        say(f"{empty} of {tagged_positive} {drawer.unit} tagged positive got no voxel. {drawer.advice}")
    _carry_over(raw, cases, folder, linked)
    if listed is not None:
        write_json(folder / SPLITS, drawer.folds(listed, cases))
    _describe(drawer, raw, cases, origin, digest, folder)
    shown = sorted({round(i) for i in np.linspace(0, len(cases) - 1, min(_SHOWN, len(cases)))})
    panels_png((drawer.panel(cases[index], raw, folder) for index in shown), folder / PANELS)
    staging.finish(folder, final, digest)
    return final


def _opened(
    model_folder: Path, path: Path, choices: Choices, device: torch.device | str | None
) -> tuple[Drawer, RawDataset, CaseTable]:
    """Return what draws a model's masks, its dataset and the case table."""
    content = read_checkpoint(path)
    model = rebuild(model_folder, content)
    kind = _DRAWERS.get(type(model.network))
    if kind is None:
        raise UserError(f"{model_folder}: {model.trainer} learns from masks; pseudo labels are made by {_TEACHERS}.")
    model.network.load_state_dict(content["network_weights"])
    model.network.eval().to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    raw = RawDataset.open(model.plans.dataset_name)
    table = CaseTable.from_dataset_json(model.dataset_json)
    if table is None or not tagged(raw.training, table):
        raise UserError(f"{raw.folder}: no training case with tags.")
    return kind(model, choices, table), raw, table


def _write_masks(drawer: Drawer, cases: list[str], folder: Path, raw: RawDataset) -> tuple[int, int, int]:
    """Write every mask that is not there yet.

    Returns:
        Of all masks: foreground voxels, slices (patches) tagged positive, and those of them without any such voxel.
    """
    import tqdm

    counts, ignore = np.zeros(3, int), raw.content["labels"].get("ignore")
    with tqdm.tqdm(total=len(cases), disable=None, desc="pseudo labels") as bar:
        for group in drawer.groups(cases):
            paths = [folder / LABELS / f"{case}{raw.file_ending}" for case in group]
            if not all(path.exists() for path in paths):
                for path, (masks, properties) in zip(paths, drawer.draw(group), strict=True):
                    for name in (*drawer.beside, LABELS):  # what says that a case is done comes last
                        with replacing(folder / name / path.name) as temporary:
                            drawer.reader.write_seg(masks[name], os.fspath(temporary), properties)
            for case, path in zip(group, paths, strict=True):
                mask = np.asarray(drawer.reader.read_seg(os.fspath(path))[0][0])
                drawn = ((mask > 0) & (mask != ignore)).sum((1, 2))
                shown = np.asarray(drawer.table.cases[case].tags).reshape(len(mask), -1).any(1)
                counts += np.array([drawn.sum(), shown.sum(), (shown & (drawn == 0)).sum()])
            bar.update(len(group))
    positive, tagged_positive, empty = map(int, counts)
    return positive, tagged_positive, empty


def _carry_over(raw: RawDataset, cases: list[str], folder: Path, linked: bool) -> None:
    """Bring images, and the masks of validation and test cases, where they are."""
    ending, wanted = raw.file_ending, {}
    for part, members in (("Tr", {case: raw.training[case] for case in cases}), ("Ts", raw.test)):
        for case, files in members.items():
            for channel, path in enumerate(files.images):
                wanted[f"images{part}/{case}_{channel:04d}{ending}"] = path
    for case, files in raw.test.items():
        if files.label is not None:
            wanted[f"labelsTs/{case}{raw.file_ending}"] = files.label
    if (raw.folder / VALIDATION_MASKS).is_dir():
        wanted.update(
            {f"{VALIDATION_MASKS}/{path.name}": path for path in sorted((raw.folder / VALIDATION_MASKS).iterdir())}
        )
    for name, source in wanted.items():
        target = folder / name
        if linked:
            link(source, target)
        elif not target.exists():
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)


def _describe(
    drawer: Drawer, raw: RawDataset, cases: list[str], origin: dict[str, Any], digest: str, folder: Path
) -> None:
    """Write dataset.json, which says where the masks come from."""
    content = {key: value for key, value in raw.content.items() if key not in ("dataset", KEY)}
    if drawer.channel_names:
        content["channel_names"] = dict(drawer.channel_names)
    content["numTraining"] = len(cases)
    table, known = drawer.table, set(cases)
    made = replace(
        table,
        cases={
            name: replace(case, labelled=True, tags=None) if name in known else case
            for name, case in table.cases.items()
            if name in known or name in raw.test
        },
        protocol={**table.protocol, "supervision": "pseudo labels", "pseudo_labels": origin, "input": digest},
    )
    content[KEY] = made.to_dict()
    write_json(folder / "dataset.json", content)


def _splits(raw: RawDataset) -> Any:
    """Return the folds that the model was trained with; None where there is no list."""
    homes = [home for home in (raw.preprocessed, raw.folder) if home is not None and (home / SPLITS).is_file()]
    return read_json(homes[0] / SPLITS) if homes else None
