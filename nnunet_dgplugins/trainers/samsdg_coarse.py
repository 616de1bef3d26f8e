"""SAM-SDG's step 1, the coarse network, and what both steps' trainers share."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.loaders import SliceLoader, read_slice
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.samsdg.coarse import CoarseNetwork, load_start_weights
from nnunet_dgplugins.methods.samsdg.location_scale import draw_curves, either_version, global_version, local_version
from nnunet_dgplugins.methods.samsdg.losses import coarse_loss
from nnunet_dgplugins.methods.samsdg.preprocess import CHANNELS
from nnunet_dgplugins.methods.samsdg.saliency import fuse, input_saliency, saliency_map
from nnunet_dgplugins.methods.samsdg.segmenter import CoarseSegmenter
from nnunet_dgplugins.sam.preprocess import check_channels
from nnunet_dgplugins.sam.slices import SliceSet, masks
from nnunet_dgplugins.settings import SAMSDGCoarseSettings
from nnunet_dgplugins.system import keep_freed_memory
from nnunet_dgplugins.trainers.base import flattened
from nnunet_dgplugins.trainers.earlier_stage import Stamped
from nnunet_dgplugins.trainers.samsdg_step_one import data_stamp
from nnunet_dgplugins.trainers.whole_slices import WholeSliceTrainer, are_colours, are_neighbours

_SIDES = (32, 32)  # of which the images of deeplabv3 are a multiple
_AUGMENTATION_SEED, _JITTER_SEED = 1, 2


def build_coarse(chosen: SAMSDGCoarseSettings, plans: Any, configuration: Any, classes: int) -> nn.Module:
    """Build the coarse network for K classes, with initial weights."""
    if chosen.network == "deeplabv3":
        return CoarseNetwork(classes)
    network: nn.Module = nnUNetTrainer.build_network_architecture(plans, configuration, CHANNELS, classes, False)
    return network


class SliceMaskTrainer(WholeSliceTrainer):
    """What both steps share: channels, one mask channel per class or region, Adam with a constant rate."""

    lr_exponent = 0.0
    #: hash of what the fold has now, set by :meth:`read_fold`
    data_stamp: str

    @classmethod
    def complete_settings(cls, resolved: Any, trained: dict[str, Any], dataset_json: dict[str, Any]) -> Any:
        """Name the channels that null stands for, and refuse those that are not there."""
        if resolved.channels is None:
            three = are_colours(dataset_json) or are_neighbours(dataset_json)
            resolved = replace(resolved, channels=(0, 1, 2) if three else (0,))
        check_channels(resolved.channels, len(dataset_json["channel_names"]), cls.__name__)
        return resolved

    def beside_settings(self) -> dict[str, Any]:
        """Keep what the predictor does not tell a network: whether heads are classes or regions, and sizes."""
        heads = "regions" if self.label_manager.has_regions else "classes"
        return {"heads": heads, "field": list(self.field or ())}

    @classmethod
    def shared_options(cls, chosen: Any, block: dict[str, Any]) -> dict[str, Any]:
        """Return what both segmenters are told alike."""
        if chosen.keep_freed_memory:
            keep_freed_memory()  # prediction comes here without ever making a trainer
        return {
            "channels": chosen.channels or (0,),
            "background": block["heads"] == "classes",
            "threshold": chosen.threshold,
            "field": tuple(block["field"]) or None,
            "equalise": chosen.equalise,
        }

    def adam(self, parameters: Any, weight_decay: float = 0.0) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Return Adam at a constant rate, as released."""
        optimizer = torch.optim.Adam(parameters, self.initial_lr, weight_decay=weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=self.lr_exponent)

    def read_fold(self, size: int) -> tuple[Any, SliceSet, SliceSet]:
        """Return the dataset, and the fold's training and validation slices with labels on a grid of ``size``."""
        train_cases, val_cases = self.do_split()
        dataset = self.dataset_class(self.preprocessed_dataset_folder)
        self.data_stamp = data_stamp(dataset, train_cases, self.dataset_json)
        only = self.settings.train_slices == "foreground"
        train = self.read_slices(dataset, train_cases, size, only_foreground=only)
        return dataset, train, self.read_slices(dataset, val_cases, size)

    def take_over(self, train: SliceLoader, val: SliceLoader) -> tuple[SliceLoader, SliceLoader]:
        """Let loaders say how many steps an epoch has."""
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = train.steps, val.steps
        return train, val

    def target_of(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return masks (B, K, h, w) and where they are known (B, 1, h, w) on the device."""
        return masks(labels.to(self.device), self.heads, self.label_manager.ignore_label)

    def on_train_epoch_start(self) -> None:
        """Start the epoch's own streams of jitter and augmentation."""
        super().on_train_epoch_start()
        numbers = [self.settings.seed, self.current_epoch]
        self.augmentation = np.random.default_rng([*numbers, _AUGMENTATION_SEED])
        self.jitter = np.random.default_rng([*numbers, _JITTER_SEED])

    def differentiated(self, loss: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Differentiate a loss that is a number; returns it."""
        self.check_loss(loss, sorted({key.case for key in batch["keys"]}))
        self.backward(loss)
        return loss.detach()


class SAMSDGCoarseTrainer(Stamped, SliceMaskTrainer):
    """SAM-SDG step 1, the coarse network (arXiv 2401.02076, section 3.2).

    A model of its own, predicted by nnU-Net's commands, whose boxes prompt SAM in step 2. Batch statistics move in
    training alone (the released code lets images of the target sites into them), and the validation cases, of the
    source, decide about checkpoint_best.
    """

    settings_class = SAMSDGCoarseSettings
    settings: SAMSDGCoarseSettings
    network: CoarseSegmenter

    @classmethod
    def _resolve_settings(
        cls, plans: dict[str, Any], configuration: str, model_folder: Path | None, dataset_json: dict[str, Any]
    ) -> SAMSDGCoarseSettings:
        resolved: Any = super()._resolve_settings(plans, configuration, model_folder, dataset_json)
        planned, size = resolved.network == "planned", resolved.image_size
        strides = flattened(plans, configuration)["architecture"]["arch_kwargs"]["strides"] if planned else [_SIDES]
        factor = int(np.max(np.prod(strides, axis=0)))
        if size % factor:
            raise UserError(
                f"{cls.__name__}: image_size={size} is no multiple of {factor} (network={resolved.network})."
            )
        if planned and resolved.start_weights:
            raise UserError(f"{cls.__name__}: start_weights are for network=deeplabv3, not for the planned one.")
        return resolved

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> CoarseSegmenter:
        """Build the network from the settings kept in the plans."""
        block = configuration_manager.configuration[settings.KEY]
        chosen = settings.build(SAMSDGCoarseSettings, block[cls.__name__], f"{cls.__name__}, plans beside the model")
        classes = num_output_channels - (block["heads"] == "classes")
        network = build_coarse(chosen, plans_manager, configuration_manager, classes)
        return CoarseSegmenter(network, chosen.image_size, classes, **cls.shared_options(chosen, block))

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Adam at a constant rate, as released; the network takes its start weights, if any."""
        path = self.settings.start_weights
        if path and Path(path).is_file():
            self.print_to_log_file(f"Start weights: {load_start_weights(self.network.network, path)}")
        return self.adam(self.network.parameters())

    def _build_loss(self) -> Any:
        return partial(coarse_loss, double_sigmoid=self.settings.loss == "double_sigmoid")

    # ---------------------------------------------------------------- data and steps

    def get_dataloaders(self) -> tuple[SliceLoader, SliceLoader]:
        """Return loaders of slices as the network sees them."""
        chosen = self.settings
        dataset, train, val = self.read_fold(chosen.image_size)
        self.claim(self.data_stamp)
        if len(train) < 2:
            raise UserError(f"{type(self).__name__}: one training slice; batch statistics need two.")

        def load(part: SliceSet, places: np.ndarray, _epoch: int) -> dict[str, Any]:
            keys = [part.keys[index] for index in places]
            slices = [torch.from_numpy(read_slice(dataset, key.case, key.z)) for key in keys]
            return {"images": self.network.images(slices), "labels": part.labels[places], "keys": keys}

        batch = chosen.batch_size or self.configuration_manager.batch_size
        self.print_to_log_file(f"{len(train)} training slices, {len(val)} validation slices.")
        return self.take_over(
            SliceLoader(len(train), partial(load, train), batch, seed=chosen.seed, steps=chosen.iterations_per_epoch),
            SliceLoader(len(val), partial(load, val), batch),
        )

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step; with saliency two passes and one step of the optimiser with both gradients."""
        images, (target, valid) = batch["images"].to(self.device), self.target_of(batch["labels"])
        self.optimizer.zero_grad(set_to_none=True)
        if self.settings.augmentation == "saliency":
            loss = self._saliency_step(images, target, valid, batch)
        else:
            if self.settings.augmentation == "location_scale":
                draws = draw_curves(len(images), target.shape[1], self.augmentation)
                images = either_version(images, target, draws, self.augmentation.random(len(images)) < 0.5)
            loss = self.differentiated(self._loss_of(images, target, valid), batch)
        self.optimizer_step()
        return {"loss": loss.cpu().numpy()}

    def _loss_of(self, images: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        with self.autocast():
            logits = self.network.network(images)
        total: torch.Tensor = self.loss(logits, target, valid=valid)["total"]
        return total

    def _saliency_step(
        self, images: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None, batch: dict[str, Any]
    ) -> torch.Tensor:
        """Differentiate twice: by the global version, then by its mixture with the local one; returns the mean loss."""
        draws = draw_curves(len(images), target.shape[1], self.augmentation)
        whole, by_class = global_version(images, draws[0]), local_version(images, target, draws[1])
        first = self.differentiated(self._loss_of(whole.requires_grad_(), target, valid), batch)
        assert whole.grad is not None
        # mixed precision begins with a scale that is too large; such a step is skipped, and must not end in NaN
        gradient = torch.nan_to_num(whole.grad, 0.0, 0.0, 0.0)
        where = saliency_map(input_saliency(gradient), self.settings.saliency_grid)
        second = self.differentiated(self._loss_of(fuse(whole, by_class, where), target, valid), batch)
        return (first + second) / 2

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the deployed masks on the network's grid; source cases only."""
        target, valid = self.target_of(batch["labels"])
        with self.autocast():
            logits = self.network.network(batch["images"].to(self.device)).float()
        loss = self.loss(logits, target, valid=valid)["total"]
        return {"loss": loss.cpu().numpy(), **self.hard_counts(logits - self.network.shift, target, valid)}
