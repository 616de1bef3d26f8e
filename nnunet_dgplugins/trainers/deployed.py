"""Trained models opened again, and made complete: frozen weights bundled."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json
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
        say(f"{path}: carries {network.image_encoder.model.described} now, {path.stat().st_size / 2**20:.0f} MiB.")
    return paths


@dataclass(frozen=True)
class Rebuilt:
    """A trained model's parts: its trainer's name, the network without weights, and nnU-Net's descriptions."""

    trainer: str
    network: torch.nn.Module
    plans: Any
    configuration_name: str
    configuration: Any
    labels: Any
    dataset_json: dict[str, Any]


def rebuild(model_folder: Path, checkpoint: dict[str, Any]) -> Rebuilt:
    """Build the network of a model of this package, as nnU-Net's predictor does.

    Args:
        model_folder: ``<Trainer>__<plans>__<configuration>``.
        checkpoint: content of one of its checkpoints.

    Raises:
        UserError: another package's trainer made it.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    name = checkpoint.get("trainer_name", "")
    if name not in TRAINERS:
        raise UserError(f"{model_folder}: trained by {name or 'an unknown trainer'}, none of this package's.")
    plans = PlansManager(os.fspath(model_folder / "plans.json"))
    configuration_name = checkpoint["init_args"]["configuration"]
    configuration = plans.get_configuration(configuration_name)
    content = read_json(model_folder / "dataset.json")
    labels = plans.get_label_manager(content)
    network = load_trainer(name).build_network_architecture(  # type: ignore[attr-defined]
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, content),
        labels.num_segmentation_heads,
        False,
    )
    return Rebuilt(name, network, plans, configuration_name, configuration, labels, content)


def _network(model_folder: Path, checkpoint: dict[str, Any]) -> Any:
    name = checkpoint.get("trainer_name", "")
    if name not in TRAINERS or "sam" not in settings.settings_class(TRAINERS[name].settings).__dataclass_fields__:
        raise UserError(
            f"{model_folder}: trained by {name or 'an unknown trainer'}, which has no frozen part to bundle."
        )
    return rebuild(model_folder, checkpoint).network
