"""A trained model of ours outside nnU-Net's commands: bundled, imported, asked for its doubt."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import PREPROCESSED, RESULTS, dataset_name, nnunet_folder, read_json, write_json
from nnunet_dgplugins.registry import TRAINERS, load_trainer
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint, write_checkpoint

DOUBT_FILE = "dgplugins_doubt.json"


def bundle(model_folder: Path, checkpoint: str = "checkpoint_final.pth", say: Callable[[str], None] = print) -> list[Path]:
    """Write the frozen SAM weights, half precision, into every fold's checkpoint, so that a zip carries everything.

    Raises:
        UserError: no such model or checkpoint, or the weights found are not those the model was trained with.
    """
    paths = sorted(model_folder.glob(f"fold_*/{checkpoint}"))
    if not paths:
        raise UserError(f"{model_folder}: no fold_*/{checkpoint} in it.")
    for path in paths:
        content = read_checkpoint(path)
        network = _network(model_folder, content)
        network.load_state_dict(content["network_weights"])
        network.image_encoder.carry()
        content["network_weights"] = network.state_dict()
        write_checkpoint(path, content)
        say(f"{path}: carries {network.model.described} now, {path.stat().st_size / 2**20:.0f} MiB.")
    return paths


def import_desam(
    path: Path, dataset: str, trainer: str, plans: str, configuration: str, fold: int, overwrite: bool
) -> Path:
    """Make a model folder from an official ``desam_model_best.pth``; its encoder is carried inside.

    Returns:
        The model folder, ready for ``nnUNetv2_predict``.

    Raises:
        UserError: the file is unsafe or does not fit, the dataset is not planned or has several classes, or the fold
            holds a model already.
    """
    from nnunet_dgplugins.methods.desam.checkpoint import read_official
    from nnunet_dgplugins.sam.frozen import encoder_hash
    from nnunet_dgplugins.sam.weights import build_parts, recognise

    state = read_official(path)
    base = nnunet_folder(PREPROCESSED) / dataset_name(dataset)
    content = read_json(base / f"{plans}.json")
    block = content["configurations"][configuration].setdefault(settings.KEY, {}).setdefault(trainer, {})
    block["sam"] = size = recognise(path)
    folder = nnunet_folder(RESULTS) / base.name / f"{trainer}__{plans}__{configuration}"
    target = folder / f"fold_{fold}" / "checkpoint_final.pth"
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; give another --fold, or --overwrite.")
    built = load_trainer(trainer)(
        {**content, "continue_training": False}, configuration, fold, read_json(base / "dataset.json"), torch.device("cpu")
    )
    if len(built.heads) != 1:
        raise UserError(f"{dataset} has {len(built.heads)} classes; an official DeSAM checkpoint knows one.")
    network = built.build_network_architecture(built.plans_manager, built.configuration_manager, 1, built.label_manager.num_segmentation_heads)
    own = network.state_dict()
    encoder = build_parts(network.model).image_encoder
    given = {key[len("image_encoder.") :]: value.float() for key, value in state.items() if key.startswith("image_encoder.")}
    encoder.load_state_dict(given, assign=True)
    own["image_encoder.weights_hash"] = torch.tensor(list(bytes.fromhex(encoder_hash(encoder))), dtype=torch.uint8)
    own.update({f"image_encoder.{key}": value.half() for key, value in given.items()})
    own.update({f"head.{key}": value for key, value in state.items() if not key.startswith("image_encoder.")})
    network.load_state_dict(own)
    write_checkpoint(target, {
        "network_weights": network.state_dict(), "optimizer_state": {}, "grad_scaler_state": None, "logging": {},
        "_best_ema": None, "current_epoch": 0, "init_args": {"configuration": configuration, "fold": fold},
        "trainer_name": trainer, "inference_allowed_mirroring_axes": None,
    })  # fmt: skip
    write_json(folder / "plans.json", built.plans_manager.plans)
    write_json(folder / "dataset.json", built.dataset_json)
    print(f"{target}: {size} with its own encoder.")
    return folder


def write_doubt(
    model_folder: Path,
    images: Path,
    predictions: Path,
    folds: Sequence[int | str] = (0,),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Path:
    """Ask a model how sure it was of each case and write ``dgplugins_doubt.json`` beside its predictions.

    The doubt of a class is 1 minus the network's confidence (DeSAM: predicted IoU of the selected mask; whole box: the
    Dice the mask expects of itself), averaged over slices with that class, weighted by area; a class that is nowhere
    has doubt 1, because an organ that is missing is what one should look at. A case's doubt is its classes' mean.

    Args:
        model_folder: ``<Trainer>__<plans>__<configuration>``.
        images: folder of the images that were predicted, nnU-Net's names.
        predictions: folder of the predictions; cases are those found here.
        folds: the first one is asked.
        device: where the network runs.
        progress: show a bar on a terminal.
    """
    import tqdm

    predictor = _predictor(model_folder, folds, torch.device(device))
    network, configuration = predictor.network, predictor.configuration_manager
    if not hasattr(network, "segment"):
        raise UserError(f"{model_folder}: this trainer's network says nothing about its doubt.")
    network.load_state_dict(predictor.list_of_parameters[0])
    network.eval().to(device)
    ending = predictor.dataset_json["file_ending"]
    names = [name for name in predictor.dataset_json["labels"] if name not in ("background", "ignore")]
    cases = sorted(p.name[: -len(ending)] for p in predictions.glob(f"*{ending}"))
    if not cases:
        raise UserError(f"{predictions}: no predictions (*{ending}) in it.")
    found: dict[str, Any] = {}
    for case in tqdm.tqdm(cases, disable=None if progress else True, desc="doubt"):
        files = sorted(str(p) for p in images.glob(f"{case}_*{ending}"))
        if not files:
            raise UserError(f"{images}: no image of case {case}.")
        data = configuration.preprocessor_class(verbose=False).run_case(
            files, None, predictor.plans_manager, configuration, predictor.dataset_json
        )[0]
        found[case] = _case_doubt(network, torch.as_tensor(np.asarray(data)), names, torch.device(device))
    write_json(predictions / DOUBT_FILE, found)
    return predictions / DOUBT_FILE


@torch.inference_mode()
def _case_doubt(network: Any, data: torch.Tensor, names: list[str], device: torch.device) -> dict[str, Any]:
    areas, confidences = [], []
    for z in range(data.shape[1]):
        logits, confidence = network.segment(data[None, :, z].float().to(device))
        foreground = logits[0, 1:] if network.background else logits[0]
        areas.append((foreground > 0).sum((1, 2)).float().cpu())
        confidences.append(confidence[0].cpu())
    area, sure = torch.stack(areas), torch.stack(confidences)  # (Z, K)
    per_class = torch.where(area.sum(0) > 0, 1 - (area * sure).sum(0) / area.sum(0).clamp(min=1), torch.ones(area.shape[1]))
    return {
        "doubt": float(per_class.mean()),
        "per_class": {name: float(value) for name, value in zip(names, per_class, strict=False)},
        "slices": [float(1 - value.mean()) for value in sure],
    }


def _predictor(model_folder: Path, folds: Sequence[int | str], device: torch.device) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=device, perform_everything_on_device=False, verbose=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder), tuple(folds), "checkpoint_final.pth")
    return predictor


def _network(model_folder: Path, checkpoint: dict[str, Any]) -> Any:
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    name = checkpoint.get("trainer_name", "")
    if name not in TRAINERS:
        raise UserError(f"{model_folder}: trained by {name or 'an unknown trainer'}, which has no frozen part to bundle.")
    plans = PlansManager(os.fspath(model_folder / "plans.json"))
    configuration = plans.get_configuration(checkpoint["init_args"]["configuration"])
    content = read_json(model_folder / "dataset.json")
    return load_trainer(name).build_network_architecture(  # type: ignore[attr-defined]
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, content),
        plans.get_label_manager(content).num_segmentation_heads,
        False,
    )
