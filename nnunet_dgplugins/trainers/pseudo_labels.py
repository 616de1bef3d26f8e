"""Masks that a model of tags draws on its own training cases, as an ordinary raw dataset for a second stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nnunet_dgplugins.data import staging
from nnunet_dgplugins.data.case_table import KEY, CaseTable
from nnunet_dgplugins.data.folds import tagged
from nnunet_dgplugins.data.linked_dataset import file_list, link
from nnunet_dgplugins.data.loaders import read_image, read_properties
from nnunet_dgplugins.data.raw_dataset import RawCase, RawDataset
from nnunet_dgplugins.data.splits import SPLITS
from nnunet_dgplugins.data.tags import slice_tags
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.panels import Panel, panels_png
from nnunet_dgplugins.files import (
    CAM_VALIDATION,
    PREPROCESSED,
    VALIDATION_MASKS,
    content_hash,
    file_sha256,
    nnunet_folder,
    read_json,
    replacing,
    write_json,
)
from nnunet_dgplugins.methods.equivariant.maps import FUSIONS, KINDS, fuse
from nnunet_dgplugins.methods.equivariant.segmenter import CAMSegmenter, logits_of
from nnunet_dgplugins.registry import TRAINERS
from nnunet_dgplugins.trainers.cam_validation import in_file_geometry
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint
from nnunet_dgplugins.trainers.deployed import Rebuilt, rebuild

PAGE = "pseudo_labels.png"
GATES = ("tag", "predicted", "none")
_SHOWN = 8  # cases on the page
_SLICES = 16  # run together


@dataclass(frozen=True)
class Choices:
    """How maps become masks.

    Args:
        threshold: foreground where the fused map is above; None: the model's.
        fusion: ``mean``, ``max`` or the number of a modality; None: the model's.
        gate: ``tag``: slices with tag 0 are empty, and a slice with tag 1 that every network calls negative takes the
            ungated map, so that no positive slice is lost without need. ``predicted``: each network's own prediction
            empties its map, as published for images without tags. ``none``: every map counts.
        kind: ``cam``, ``grad_cam`` (the same up to rounding in these networks) or ``grad_cam_plus_plus``.
    """

    threshold: float | None = None
    fusion: str | int | None = None
    gate: str = "tag"
    kind: str = "cam"


def make_pseudo_labels(
    model_folder: Path,
    number: int,
    fold: int | str = 0,
    checkpoint: str = "checkpoint_final.pth",
    choices: Choices = Choices(),
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
        choices: how maps become masks.
        linked: link the images instead of copying them.
        overwrite: replace a dataset of this command that was made from another model or by other choices.
        device: where the network runs; None: CUDA if there is one.
        say: takes each line of progress.

    Returns:
        The new dataset's folder in ``nnUNet_raw``.

    Raises:
        UserError: the model is none of tags, its dataset is gone, the id is taken, or no voxel at all is positive.
    """
    path = model_folder / f"fold_{fold}" / checkpoint
    content = read_checkpoint(path)
    model = rebuild(model_folder, content)
    if not TRAINERS[model.trainer].tags or not isinstance(model.network, CAMSegmenter):
        raise UserError(
            f"{model_folder}: {model.trainer} learns from masks; pseudo labels are made by trainers of tags."
        )
    model.network.load_state_dict(content["network_weights"])
    network = model.network.eval().to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    chosen = _resolved(choices, network)
    raw = RawDataset.open(model.plans.dataset_name)
    table = CaseTable.from_dataset_json(model.dataset_json)
    cases = tagged(sorted(raw.training), table)
    if table is None or not cases:
        raise UserError(f"{raw.folder}: no training case with tags.")
    name = f"Dataset{number:03d}_{raw.folder.name[11:]}_pseudo"
    staging.refuse_other_names(name, "--out")
    masks = {
        case.name: RawCase((case,), None)
        for case in sorted((raw.folder / VALIDATION_MASKS).glob(f"*{raw.file_ending}"))
    }
    model_hash = file_sha256(path)
    digest = content_hash({
        "name": name, "model": model_hash, "choices": asdict(chosen), "linked": linked, "table": table.to_dict(),
        "json": {key: raw.content.get(key) for key in ("labels", "channel_names")}, "splits": _splits(raw),
        "train": file_list(raw.training), "test": file_list(raw.test), "masks": file_list(masks),
    })  # fmt: skip
    final = raw.folder.with_name(name)
    if staging.is_done(final, digest):
        say(f"{name} is there already, made from the same model: nothing to do.")
        return final
    staging.refuse_other_content(final, digest, overwrite)
    drawer = _Drawer(model, network, chosen, table)
    folder = staging.start(final, digest)
    positive = _write_masks(drawer, cases, folder / "labelsTr", raw.file_ending)
    if not positive:
        shutil.rmtree(folder)
        raise UserError(
            f"No voxel of {len(cases)} cases is above {chosen.threshold:g}: nothing could be learnt from these masks. "
            f"Lower --threshold, or see the Dice at each threshold in {path.parent}/{CAM_VALIDATION}."
        )
    say(f"{positive} foreground voxels in {len(cases)} cases.")
    _carry_over(raw, cases, folder, linked)
    _describe(
        raw,
        table,
        cases,
        {"model": "/".join(path.parts[-4:]), "checkpoint": model_hash, **asdict(chosen)},
        digest,
        folder,
    )
    panels_png(_page(drawer, raw, cases), folder / PAGE)
    staging.finish(folder, final, digest)
    return final


def _resolved(choices: Choices, network: CAMSegmenter) -> Choices:
    fusion = network.fusion if choices.fusion is None else choices.fusion
    fusion = int(fusion) if isinstance(fusion, str) and fusion.isdigit() else fusion
    if fusion not in (*FUSIONS, *range(len(network.networks))):
        raise UserError(f"--fusion {fusion}: expected mean, max or the number of a modality.")
    if choices.gate not in GATES or choices.kind not in KINDS:
        raise UserError(f"gate is one of {', '.join(GATES)}, kind one of {', '.join(KINDS)}; got {choices}.")
    threshold = network.threshold if choices.threshold is None else choices.threshold
    return Choices(threshold, fusion, choices.gate, choices.kind)


class _Drawer:
    """Draws masks on preprocessed cases, in the files' own geometry."""

    def __init__(self, model: Rebuilt, network: CAMSegmenter, choices: Choices, table: CaseTable):
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        self.model, self._network, self._choices, self._table = model, network, choices, table
        assert choices.fusion is not None
        assert choices.threshold is not None
        self._fusion, self._threshold = choices.fusion, choices.threshold
        folder = nnunet_folder(PREPROCESSED) / model.plans.dataset_name / model.configuration.data_identifier
        if not folder.is_dir():
            raise UserError(f"{folder}: the preprocessed training cases are not there; run nnUNetv2_preprocess.")
        self._dataset = infer_dataset_class(str(folder))(str(folder))

    def draw(self, case: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64], dict[str, Any]]:
        """Return mask and map (Z, Y, X) of a case, and nnU-Net's properties."""
        properties = read_properties(self._dataset, case)
        tags = slice_tags(self._table, case, properties, self.model.plans.transpose_forward)
        maps = self._maps(torch.from_numpy(read_image(self._dataset, case)), torch.from_numpy(tags))
        mask, shown = in_file_geometry(
            logits_of(maps, self._threshold),
            self._threshold,
            self.model.plans,
            self.model.configuration,
            self.model.labels,
            properties,
        )
        return mask, shown, properties

    def _maps(self, data: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        """Return the fused maps (Z, Y, X) of a preprocessed case (M, Z, Y, X)."""
        device = next(self._network.parameters()).device
        made = []
        for start in range(0, data.shape[1], _SLICES):
            shown = data[:, start : start + _SLICES].transpose(0, 1).to(device)
            found = self._network.found(shown, self._choices.kind)
            fused = fuse(found.maps if self._choices.gate == "none" else found.gated(), self._fusion)
            if self._choices.gate == "tag":
                silent = ~found.present.bool().any(1).view(-1, 1, 1)
                own = tags[start : start + _SLICES].to(device).view(-1, 1, 1)
                fused = torch.where(silent, fuse(found.maps, self._fusion), fused) * own
            made.append(fused)
        return torch.cat(made).cpu()


def _write_masks(drawer: _Drawer, cases: list[str], folder: Path, ending: str) -> int:
    """Write every mask that is not there yet; return the number of foreground voxels of all."""
    import tqdm

    reader = drawer.model.plans.image_reader_writer_class()
    positive = 0
    for case in tqdm.tqdm(cases, disable=None, desc="pseudo labels"):
        path = folder / f"{case}{ending}"
        if path.exists():
            mask = np.asarray(reader.read_seg(os.fspath(path))[0])
        else:
            mask, _, properties = drawer.draw(case)
            with replacing(path) as temporary:
                reader.write_seg(mask, os.fspath(temporary), properties)
        positive += int((mask > 0).sum())
    return positive


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
    raw: RawDataset, table: CaseTable, cases: list[str], origin: dict[str, Any], digest: str, folder: Path
) -> None:
    """Write dataset.json with the channels' own names and where the masks come from, and carry the splits over."""
    names = table.protocol.get("modalities")
    content = {key: value for key, value in raw.content.items() if key not in ("dataset", KEY)}
    if names:  # the names of the weak dataset only say that nothing is to be normalised
        content["channel_names"] = {str(i): name for i, name in enumerate(names)}
    content["numTraining"] = len(cases)
    made = replace(
        table,
        cases={
            name: replace(case, labelled=True, tags=None) if name in cases else case
            for name, case in table.cases.items()
            if name in cases or name in raw.test
        },
        protocol={**table.protocol, "supervision": "pseudo labels", "pseudo_labels": origin, "input": digest},
    )
    content[KEY] = made.to_dict()
    if (splits := _splits(raw)) is not None:
        write_json(folder / SPLITS, splits)
    write_json(folder / "dataset.json", content)


def _splits(raw: RawDataset) -> Any:
    """Return the folds that the model was trained with; None where there is no list."""
    homes = [home for home in (raw.preprocessed, raw.folder) if home is not None and (home / SPLITS).is_file()]
    return read_json(homes[0] / SPLITS) if homes else None


def _page(drawer: _Drawer, raw: RawDataset, cases: list[str]) -> Iterator[Panel]:
    """Yield one slice, the one with the largest mask, of cases spread over the dataset."""
    reader = drawer.model.plans.image_reader_writer_class()
    modalities = drawer.model.dataset_json.get(KEY, {}).get("protocol", {}).get("modalities")
    for index in sorted({round(i) for i in np.linspace(0, len(cases) - 1, min(_SHOWN, len(cases)))}):
        case = cases[index]
        mask, shown, _ = drawer.draw(case)
        z = int(mask.reshape(len(mask), -1).sum(1).argmax())
        images, _ = reader.read_images([os.fspath(path) for path in raw.training[case].images])
        truth_path = raw.folder / VALIDATION_MASKS / f"{case}{raw.file_ending}"
        truth = reader.read_seg(os.fspath(truth_path))[0][0, z] == 1 if truth_path.is_file() else None
        names = modalities or [f"channel {i}" for i in range(len(images))]
        yield Panel(
            f"{case}, slice {z + 1} of {len(mask)}", dict(zip(names, images[:, z], strict=True)), shown[z],
            mask[z] > 0, truth,
        )  # fmt: skip
