"""Model folders made complete: frozen weights bundled, official checkpoints imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import PREPROCESSED, RESULTS, dataset_name, nnunet_folder, read_json, write_json
from nnunet_dgplugins.registry import TRAINERS, load_trainer
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint, write_checkpoint


def bundle(
    model_folder: Path, checkpoint: str = "checkpoint_final.pth", say: Callable[[str], None] = print
) -> list[Path]:
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
    if "sam" not in settings.settings_class(TRAINERS[trainer].settings).__dataclass_fields__:
        raise UserError(f"{trainer} is not a DeSAM trainer: an official DeSAM checkpoint is none of its.")
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
        {**content, "continue_training": False},
        configuration,
        fold,
        read_json(base / "dataset.json"),
        torch.device("cpu"),
    )
    if built.settings.sam != size:
        raise UserError(
            f"{settings.VARIABLE} asks for sam={built.settings.sam}, but {path} is a {size}. Unset {settings.VARIABLE}."
        )
    if len(built.heads) != 1:
        raise UserError(f"{dataset} has {len(built.heads)} classes; an official DeSAM checkpoint knows one.")
    network = built.build_network_architecture(
        built.plans_manager, built.configuration_manager, 1, built.label_manager.num_segmentation_heads
    )
    own = network.state_dict()
    encoder = build_parts(network.model).image_encoder
    given = {
        key[len("image_encoder.") :]: value.float() for key, value in state.items() if key.startswith("image_encoder.")
    }
    encoder.load_state_dict(given, assign=True)
    own["image_encoder.weights_hash"] = torch.tensor(list(bytes.fromhex(encoder_hash(encoder))), dtype=torch.uint8)
    own.update({f"image_encoder.{key}": value.half() for key, value in given.items()})
    own.update({f"head.{key}": value for key, value in state.items() if not key.startswith("image_encoder.")})
    network.load_state_dict(own)
    # the checkpoint last: a model folder that has one is complete
    write_json(folder / "plans.json", built.plans_manager.plans)
    write_json(folder / "dataset.json", built.dataset_json)
    write_checkpoint(target, {
        "network_weights": network.state_dict(), "optimizer_state": {}, "grad_scaler_state": None, "logging": {},
        "_best_ema": None, "current_epoch": 0, "init_args": {"configuration": configuration, "fold": fold},
        "trainer_name": trainer, "inference_allowed_mirroring_axes": None,
    })  # fmt: skip
    print(f"{target}: {size} with its own encoder.")
    return folder


def _network(model_folder: Path, checkpoint: dict[str, Any]) -> Any:
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    name = checkpoint.get("trainer_name", "")
    if name not in TRAINERS or "sam" not in settings.settings_class(TRAINERS[name].settings).__dataclass_fields__:
        raise UserError(
            f"{model_folder}: trained by {name or 'an unknown trainer'}, which has no frozen part to bundle."
        )
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
