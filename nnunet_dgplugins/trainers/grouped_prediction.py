"""Prediction by SAM-SDG with four neighbouring slices on each canvas; everything around it is nnU-Net's own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dgplugins.content import content_box
from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.evaluation.evaluate import Classes
from nnunet_dgplugins.evaluation.label_maps import LabelMap, read_label_map
from nnunet_dgplugins.files import read_json, replacing, write_json
from nnunet_dgplugins.methods.samsdg.segmenter import SAMSDGSegmenter
from nnunet_dgplugins.sam.preprocess import resize_target
from nnunet_dgplugins.trainers.samsdg_canvases import true_boxes
from nnunet_dgplugins.trainers.whole_slices import mask_heads

#: largest logit of a fold among several, p = 0.9997; a class that a fold does not find has -50, which would be a veto
SURE = 8.0
_PICTURES = "NaturalImage2DIO"  # nnU-Net's reader of colours in one file


class FourSlices(nnUNetPredictor):
    """nnU-Net's predictor, but a case's slices are shown together, four on a canvas.

    Logits of several folds are averaged as usual, each cut to :data:`SURE`: a fold that finds nothing is one vote.
    ``label_map`` (Z, Y, X) of the case that comes next, preprocessed as the case is, gives the boxes where it is set.
    """

    label_map: torch.Tensor | None = None

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """Return logits (heads, Z, Y, X) of a preprocessed case (C, Z, Y, X); no slice is cut into tiles."""
        network: SAMSDGSegmenter = getattr(self.network, "_orig_mod", self.network)  # type: ignore[assignment]
        network.to(self.device).eval()
        slices = input_image.transpose(0, 1).float()
        boxes = None if self.label_map is None else self._true_boxes(network, slices, self.label_map).to(self.device)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            logits = network.segment_four(slices.to(self.device), boxes)[0]
        if len(self.list_of_parameters) > 1:
            logits = logits.clamp(-SURE, SURE)
        return logits.transpose(0, 1)

    def _true_boxes(self, network: SAMSDGSegmenter, slices: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return boxes (Z, K, 4) around the true masks of slices (Z, C, Y, X), in pixels of SAM's tile."""
        tile = network.decoder.tile
        on_tile = labels.new_full((len(labels), tile, tile), -1)
        for z, image in enumerate(slices):
            if (box := content_box(image)) is not None:
                on_tile[z] = resize_target(labels[z][None], box, tile, network.field)[0]
        return true_boxes(on_tile, mask_heads(self.label_manager))


def predict_folder(
    model_folder: Path,
    images: Path,
    output: Path,
    folds: Sequence[int | str] = (0,),
    checkpoint: str = "checkpoint_final.pth",
    device: torch.device | str | None = None,
    overwrite: bool = True,
    say: Callable[[str], None] = print,
    masks: Path | None = None,
) -> list[Path]:
    """Predict all cases of a folder of nnU-Net's layout; each file is whole or not there.

    Args:
        model_folder: ``SAMSDGTrainer__<plans>__<configuration>``.
        images: files ``<case>_0000<ending>`` and so on.
        output: gets ``<case><ending>``, and ``dataset.json`` and ``plans.json`` as nnU-Net writes them.
        folds: numbers or ``all``; several are averaged.
        checkpoint: file in the folds' folders.
        device: where the networks run; None: CUDA if there is one.
        overwrite: False leaves out cases that are in ``output`` already, to go on after an interruption.
        say: receives a line per case.
        masks: folder of the cases' true masks, whose boxes prompt SAM in place of the coarse network's: an upper bound.

    Returns:
        The written files.

    Raises:
        UserError: no such model or fold, or files are missing; all of them are named. Images that cannot be read are
            named once all others are written.
    """
    for path in (model_folder / f"fold_{fold}" / checkpoint for fold in folds):
        if not path.is_file():
            there = ", ".join(sorted(p.parent.name for p in model_folder.glob(f"fold_*/{checkpoint}"))) or "none"
            raise UserError(f"{path}: no such checkpoint; folds that have it: {there}.")
    description = read_json(model_folder / "dataset.json")
    ending = description["file_ending"]
    channels = len(description["channel_names"])
    pictures = read_json(model_folder / "plans.json")["image_reader_writer"] == _PICTURES
    cases = find_cases(images, ending, (1, channels) if pictures else (channels,))
    if masks:
        _check_masks({case: masks / f"{case}{ending}" for case in cases}, cases, description)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    predictor = FourSlices(device=device, perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(os.fspath(model_folder), tuple(folds), checkpoint)
    configuration, plans = predictor.configuration_manager, predictor.plans_manager
    write_json(output / "dataset.json", predictor.dataset_json)
    write_json(output / "plans.json", plans.plans)
    for half_written in output.glob(".tmp-*"):  # by a process that was killed
        half_written.unlink(missing_ok=True)
    written: list[Path] = []
    unreadable: list[Problem] = []
    for number, (case, files) in enumerate(cases.items(), 1):
        target = output / f"{case}{ending}"
        if target.is_file() and not overwrite:
            say(f"{case}: is there already ({number} of {len(cases)})")
            continue
        truth = os.fspath(masks / target.name) if masks else None
        try:
            data, seg, properties = configuration.preprocessor_class(verbose=False).run_case(
                [os.fspath(file) for file in files], truth, plans, configuration, predictor.dataset_json
            )
        except (RuntimeError, AssertionError, OSError, ValueError) as error:  # whatever nnU-Net's readers raise
            found = str(error).strip().splitlines()[-1:] or ["its channels differ in size or spacing"]
            unreadable.append(Problem(" and ".join(map(str, files)), f"cannot be read: {found[0]}"))
            say(f"{case}: cannot be read ({number} of {len(cases)})")
            continue
        predictor.label_map = torch.from_numpy(np.asarray(seg[0], np.int16)) if masks else None
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(np.asarray(data)))
        with replacing(target) as temporary:
            truncated = os.fspath(temporary)[: -len(ending)]
            export_prediction_from_logits(
                logits, properties, configuration, plans, predictor.dataset_json, truncated, False
            )
            if (beside := Path(f"{truncated}.json")).is_file():  # TIFF keeps its spacing there
                os.replace(beside, target.with_name(f"{case}.json"))
        written.append(target)
        say(f"{case}: written ({number} of {len(cases)})")
    if unreadable:
        start = (
            f"{len(unreadable)} of {len(cases)} cases cannot be read; the others are predicted. Mend them and run again"
        )
        raise UserError("\n".join([f"{start} with --continue:", *(f"  {problem}" for problem in unreadable)]))
    return written


def find_cases(images: Path, ending: str, files_per_case: Sequence[int]) -> dict[str, list[Path]]:
    """Return each case's files, one per channel, cases in order of their names.

    Args:
        images: the folder.
        ending: of the files.
        files_per_case: how many a case may have; colours of a picture are one file, grey pictures one per channel.

    Raises:
        UserError: there is none.
        BadInput: a case has more or fewer files.
    """
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(images.iterdir()):
        if match := pattern.fullmatch(path.name):
            found.setdefault(match[1], {})[int(match[2])] = path
    if not found:
        raise UserError(f"{images}: no images (<case>_0000{ending}) in it.")
    complete = [list(range(count)) for count in sorted(set(files_per_case))]
    problems = [
        Problem(f"{images / case}_*{ending}", f"files {sorted(files)}", " or ".join(map(str, complete)))
        for case, files in found.items()
        if sorted(files) not in complete
    ]
    if problems:
        raise BadInput("Images do not fit the model", problems)
    return {case: [files[index] for index in sorted(files)] for case, files in sorted(found.items())}


def _check_masks(masks: Mapping[str, Path], cases: Mapping[str, list[Path]], description: dict[str, Any]) -> None:
    """Refuse true masks that are missing, lie on another grid than their image, or hold unknown values.

    Raises:
        BadInput: all of them.
    """
    allowed = Classes.from_dataset_json(description).allowed(reference=True)
    problems = []
    for case, path in masks.items():
        if not path.is_file():
            problems.append(Problem(str(path), "no such file", "the case's true mask"))
            continue
        try:
            mask, image = read_label_map(path), _grid(cases[case][0])
        except (UserError, RuntimeError) as error:
            problems.append(Problem(case, str(error).strip().splitlines()[-1]))
            continue
        bare = LabelMap(mask.values, image.spacing, image.origin, image.direction)  # PNG: sizes are all there is
        if difference := (mask if mask.origin else bare).geometry_difference(image):
            problems.append(Problem(str(path), f"grid differs from the image's: {difference}", "the image's grid"))
        if unknown := sorted(set(np.unique(mask.values).tolist()) - allowed):
            problems.append(Problem(str(path), f"unknown values {unknown[:10]}", f"{sorted(allowed)} (dataset.json)"))
    if problems:
        raise BadInput("True masks do not fit the images", problems)


def _grid(path: Path) -> LabelMap:
    """Return the grid of an image, without its values."""
    import SimpleITK

    image = SimpleITK.ReadImage(os.fspath(path))
    empty = np.broadcast_to(np.uint8(0), image.GetSize()[::-1])
    return LabelMap(empty, image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())
