"""Model folders for ``nnUNetv2_predict`` made of official checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunet_dgplugins import settings
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import PREPROCESSED, RESULTS, dataset_name, nnunet_folder, read_json, write_json
from nnunet_dgplugins.registry import TRAINERS, load_trainer
from nnunet_dgplugins.trainers.base import flattened
from nnunet_dgplugins.trainers.checkpoints import write_checkpoint
from nnunet_dgplugins.trainers.second_network import ENTRY

EPL_PATCH = 288  # the released networks' side, in pixels
EPL_SPACING = {4: 1.1, 2: 0.5 * 100 / EPL_PATCH}  # mm, by classes: M&Ms; SCGM's 100 pixels of 0.5 mm shown as 288


@dataclass(frozen=True)
class Destination:
    """The fold folder of a planned dataset that an official checkpoint becomes."""

    dataset: str
    trainer: str
    plans: str
    configuration: str
    fold: int
    overwrite: bool = False

    @property
    def base(self) -> Path:
        """The dataset's preprocessed folder."""
        return nnunet_folder(PREPROCESSED) / dataset_name(self.dataset)

    @property
    def folder(self) -> Path:
        """The model folder."""
        return nnunet_folder(RESULTS) / self.base.name / f"{self.trainer}__{self.plans}__{self.configuration}"

    @property
    def checkpoint(self) -> Path:
        """The file to write."""
        return self.folder / f"fold_{self.fold}" / "checkpoint_final.pth"

    def read_plans(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the plans and their configuration, a part of them, to be changed.

        Raises:
            UserError: the dataset is not planned so, or the fold holds a model already.
        """
        content = read_json(self.base / f"{self.plans}.json")
        if self.configuration not in content["configurations"]:
            raise UserError(f"{self.base / self.plans}.json has no configuration {self.configuration}.")
        if (there := self._present()) and not self.overwrite:
            raise UserError(f"{there[0]} exists; give another --fold, or --overwrite.")
        return content, content["configurations"][self.configuration]

    def _present(self) -> list[Path]:
        return sorted(self.checkpoint.parent.glob("checkpoint_*.pth"))

    def settings(self, plans: dict[str, Any]) -> Any:
        """Return the trainer's settings with changed plans and the trial file."""
        cls = settings.settings_class(TRAINERS[self.trainer].settings)
        return settings.resolve(cls, plans, self.configuration, self.trainer)

    def check_folds(self, plans: dict[str, Any]) -> None:
        """Compare with the model folder's other folds, which share one plans file.

        Raises:
            UserError: they were trained with other settings.
        """
        others = [path for path in self.folder.glob("fold_*/checkpoint_*.pth") if path.parent != self.checkpoint.parent]
        if not others:
            return
        there = dict(read_json(self.folder / "plans.json")["configurations"].get(self.configuration, {}))
        here = dict(plans["configurations"][self.configuration])
        chosen = there.pop(settings.KEY, {}).get(self.trainer)
        here.pop(settings.KEY)
        if there != here or chosen != settings.to_dict(self.settings(plans)):
            raise UserError(
                f"{others[0]} was trained with other settings than the official model's, and all folds of a folder "
                "share them. Import under a plans name of its own: make one with dgplugins configure "
                f"{self.dataset} -tr {self.trainer} -p {self.plans} -o NAME, then import with -p NAME."
            )

    def build(self, plans: dict[str, Any]) -> Any:
        """Return the trainer with changed plans, its networks not built.

        Its result folder comes into being; checkpoints that are to be overwritten go first, so that a model folder
        never holds old weights beside new plans.
        """
        for path in self._present():
            path.unlink()
        dataset_json = read_json(self.base / "dataset.json")
        ready = {**plans, "continue_training": False}
        return load_trainer(self.trainer)(ready, self.configuration, self.fold, dataset_json, torch.device("cpu"))

    def write(self, built: Any, weights: dict[str, torch.Tensor], extra: dict[str, Any] | None = None) -> Path:
        """Write the model folder, the checkpoint last: a model folder that has one is complete.

        Args:
            built: the trainer as it would have trained these weights.
            weights: its network's.
            extra: what the trainer keeps beside nnU-Net's own entries.
        """
        write_json(self.folder / "plans.json", built.plans_manager.plans)
        write_json(self.folder / "dataset.json", built.dataset_json)
        write_checkpoint(self.checkpoint, {
            "network_weights": weights, "optimizer_state": {}, "grad_scaler_state": None, "logging": {},
            "_best_ema": None, "current_epoch": 0,
            "init_args": {"configuration": self.configuration, "fold": self.fold},
            "trainer_name": self.trainer, "inference_allowed_mirroring_axes": None,
            **({settings.KEY: extra} if extra else {}),
        })  # fmt: skip
        return self.folder


def import_desam(path: Path, to: Destination) -> Path:
    """Make a model folder from an official ``desam_model_best.pth``; its encoder is carried inside.

    Returns:
        The model folder, ready for ``nnUNetv2_predict``.

    Raises:
        UserError: the file is unsafe or does not fit, the dataset is not planned or has several classes, or the fold
            holds a model already.
    """
    if "sam" not in settings.settings_class(TRAINERS[to.trainer].settings).__dataclass_fields__:
        raise UserError(f"{to.trainer} is not a DeSAM trainer: an official DeSAM checkpoint is none of its.")
    from nnunet_dgplugins.methods.desam.checkpoint import read_official
    from nnunet_dgplugins.sam.frozen import encoder_hash
    from nnunet_dgplugins.sam.weights import build_parts, recognise

    state = read_official(path)
    plans, configuration = to.read_plans()
    block = configuration.setdefault(settings.KEY, {}).setdefault(to.trainer, {})
    block["sam"] = size = recognise(path)
    if (asked := to.settings(plans).sam) != size:
        raise UserError(f"{settings.VARIABLE} asks for sam={asked}, but {path} is a {size}. Unset {settings.VARIABLE}.")
    to.check_folds(plans)
    built = to.build(plans)
    if len(built.heads) != 1:
        raise UserError(f"{to.dataset} has {len(built.heads)} classes; an official DeSAM checkpoint knows one.")
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
    print(f"{path}: {size} with its own encoder.")
    return to.write(built, network.state_dict())


def import_epl(first: Path, second: Path | None, to: Destination, spacing: float | None = None) -> Path:
    """Make a model folder from EPL's released networks, saved as state dicts.

    The folder's plans show the networks images as released: not normalised, at the released in-plane spacing, in
    patches of 288 x 288, each brought to [0, 1] by itself (M&Ms: by its percentiles; SCGM: by its maximum). What
    differs: larger slices are seen by the sliding window, where the released code cuts them; percentiles are the
    patch's, padding included; no histogram is matched; SCGM's pixels count in mm, where the released code resizes by
    pixel numbers.

    Args:
        first: network 1, which ``nnUNetv2_predict`` uses.
        second: network 2, kept beside it for ``dgplugins second-fold`` and the doubt; None: there is none.
        to: the planned dataset and the folder.
        spacing: in-plane spacing in mm; None: the released one.

    Returns:
        The model folder, ready for ``nnUNetv2_predict``.

    Raises:
        UserError: a file is unsafe or no EPL network, the dataset has other classes or channels, the configuration is
            not 2d, or the fold holds a model already.
    """
    from nnunet_dgplugins.methods.epl.checkpoint import (
        in_channels,
        in_label_order,
        load_matching,
        num_classes,
        read_released,
    )
    from nnunet_dgplugins.methods.epl.deeplab import DeepLabV3Plus

    plans, configuration = to.read_plans()
    dataset_json = read_json(to.base / "dataset.json")
    labels = {name: value for name, value in dataset_json["labels"].items() if value != 0 and name != "ignore"}
    states, problems = [], []
    if len(flattened(plans, to.configuration)["patch_size"]) != 2:
        problems.append(f"EPL's released networks are 2d; {to.configuration} is not.")
    paths = [first, second] if second else [first]
    for path in paths:
        state = read_released(path)
        if (given := in_channels(state)) != (wanted := len(dataset_json["channel_names"])):
            problems.append(f"{path} takes {given} channel(s), {to.dataset} has {wanted}.")
        try:
            states.append(in_label_order(state, labels))
        except ValueError as error:
            problems.append(f"{path}: {to.dataset} has {error}.")
    if problems:
        raise UserError("\n".join(problems))
    classes = num_classes(states[0])
    configuration.update(
        spacing=[spacing or EPL_SPACING[classes]] * 2,
        patch_size=[EPL_PATCH] * 2,
        normalization_schemes=["NoNormalization"],
        use_mask_for_norm=[False],
    )
    block = configuration.setdefault(settings.KEY, {}).setdefault(to.trainer, {})
    block.update(network="deeplabv3plus", input_scaling="percentiles" if classes == 4 else "maximum")
    chosen = to.settings(plans)
    if any(getattr(chosen, name) != block[name] for name in ("network", "input_scaling")):
        raise UserError(f"{settings.VARIABLE} asks for another network or scaling. Unset {settings.VARIABLE}.")
    for state, source in zip(states, paths, strict=True):
        if not (loaded := load_matching(DeepLabV3Plus(1, classes), state)).complete:
            raise UserError(f"{source}: not the whole released network: {loaded}")
        print(f"{source}: {loaded}")
    to.check_folds(plans)
    built = to.build(plans)
    return to.write(built, states[0], {ENTRY: states[1]} if second else None)
