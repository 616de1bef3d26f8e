"""DeSAM as nnU-Net trainers: whole-box prompt (``DeSAMTrainer``) and grid of points (``DeSAMGridTrainer``)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.loaders import LoadBatch, SliceLoader
from nnunet_dgplugins.methods.desam.head import DeSAMHead
from nnunet_dgplugins.methods.desam.losses import desam_loss
from nnunet_dgplugins.methods.desam.network import build_decoder, load_decoder, trainable_parameters
from nnunet_dgplugins.methods.desam.prompts import fixed_points, sample_points
from nnunet_dgplugins.methods.desam.selection import SelectionRule
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
from nnunet_dgplugins.sam.batches import AugmentedBatches, StoredBatches
from nnunet_dgplugins.sam.embed import prepare_store
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.sam.models import get_model
from nnunet_dgplugins.sam.segmenter import SliceSegmenter
from nnunet_dgplugins.sam.slices import masks
from nnunet_dgplugins.sam.store import EmbeddingStore
from nnunet_dgplugins.sam.weights import load_parts
from nnunet_dgplugins.settings import DeSAMSettings
from nnunet_dgplugins.system import keep_freed_memory
from nnunet_dgplugins.trainers.views import SliceViews
from nnunet_dgplugins.trainers.whole_slices import WholeSliceTrainer, are_colours, are_neighbours


class DeSAMTrainer(WholeSliceTrainer):
    """DeSAM with one box around the whole image (DeSAM-B; Gao et al., MICCAI 2024, section 2).

    Trains SAM's decoupled mask decoder on stored features of a frozen encoder; one pass over all slices of the fold is
    one epoch. Prediction runs the encoder inside the network, so nnU-Net's own commands predict.
    """

    settings_class = DeSAMSettings
    settings: DeSAMSettings
    prompt: ClassVar[str] = "box"
    free_settings = WholeSliceTrainer.free_settings | {"store"}

    # ---------------------------------------------------------------- settings and network

    @classmethod
    def complete_settings(  # type: ignore[override]
        cls, resolved: DeSAMSettings, trained: dict[str, Any], dataset_json: dict[str, Any]
    ) -> DeSAMSettings:
        """Name the SAM model and the channels that ``auto`` and null stand for."""
        if resolved.sam == "auto":
            resolved = replace(resolved, sam=trained.get("sam") or get_model("auto").name)
        else:
            resolved = replace(resolved, sam=get_model(resolved.sam).name)
        if resolved.channels is None:
            own = (1,) if are_neighbours(dataset_json) else (0,)
            resolved = replace(resolved, channels=(0, 1, 2) if are_colours(dataset_json) else own)
        return resolved

    def beside_settings(self) -> dict[str, Any]:
        """Keep what the predictor does not tell a network: whether heads are classes or regions, and sizes."""
        heads = "regions" if self.label_manager.has_regions else "classes"
        return {"heads": heads, "field": list(self.field or ())}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> SliceSegmenter:
        """Build the network from the settings kept in the plans; no weight file is needed."""
        block = configuration_manager.configuration[settings.KEY]
        chosen = settings.build(DeSAMSettings, block[cls.__name__], f"{cls.__name__}, plans beside the model")
        if chosen.keep_freed_memory:
            keep_freed_memory()  # prediction comes here without ever making a trainer
        regions = block["heads"] == "regions"
        model = get_model(chosen.sam)
        decoder = build_decoder(model, num_output_channels if regions else num_output_channels - 1)
        trainable_parameters(decoder, "box" if cls.prompt == "box" else "points")
        rule = SelectionRule(
            iou_threshold=chosen.iou_threshold,
            nms_threshold=chosen.nms_threshold,
            min_region_area=chosen.min_region_area,
            border=chosen.border_suppression,
        )
        prompt_encoder = build_prompt_encoder(model.prompt_dim, model.grid, model.image_size)
        head = DeSAMHead(decoder, prompt_encoder, cls.prompt, chosen.grid_size, rule)
        return SliceSegmenter(
            model,
            FrozenEncoder(model, torch.bfloat16 if chosen.cpu_bfloat16 else None),
            head,
            chosen.channels or (0,),
            background=not regions,
            field=tuple(block.get("field") or ()) or None,
        )

    def initialize(self) -> None:
        """Build the network, then give it SAM's weights; a checkpoint loaded later replaces the decoder's."""
        super().initialize()
        parts = load_parts(self.network.model)
        self.network.image_encoder.adopt(parts)
        self.network.head.prompt_encoder.load_state_dict(parts.prompt_encoder.state_dict())
        load_decoder(self.network.head.mask_decoder, parts.mask_decoder_state)
        self.print_to_log_file(f"SAM encoder: {self.network.model.described}, weights {parts.weights_hash[:12]}")

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Adam (or SGD) without weight decay over what is truly trained, polynomial decay per epoch."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        if self.settings.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, self.initial_lr, momentum=0.99)
        else:
            optimizer = torch.optim.Adam(trained, self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def _build_loss(self) -> Any:
        return desam_loss

    # ---------------------------------------------------------------- data

    def get_dataloaders(self) -> tuple[SliceLoader, SliceLoader]:
        """Return loaders of stored features, computed first where missing; ``online``: of augmented slices."""
        train_cases, val_cases = self.do_split()
        chosen = self.settings
        dataset = self.dataset_class(self.preprocessed_dataset_folder)
        views = SliceViews(chosen.seed, self.configuration_manager.use_mask_for_norm)
        size = self.network.model.mask_size
        train = self.read_slices(
            dataset,
            train_cases,
            size,
            only_foreground=chosen.train_slices == "foreground",
            drop_last=chosen.drop_last_slice,
            views=0 if chosen.online else chosen.augmented_views,
            augment=views.both,
        )
        val = self.read_slices(dataset, val_cases, size)
        batch = chosen.batch_size or self.configuration_manager.batch_size
        load_train: LoadBatch
        if chosen.online:
            load_train = AugmentedBatches(train, dataset, views.both, size, self.field)
        else:
            store = self._store(train_cases, views=chosen.augmented_views, transform=views)
            load_train = StoredBatches(train, store, self.device)
        loaders = (
            SliceLoader(len(train), load_train, batch, seed=chosen.seed, steps=chosen.iterations_per_epoch),
            SliceLoader(len(val), StoredBatches(val, self._store(val_cases), self.device), batch),
        )
        if not chosen.online:
            self.network.image_encoder.release()
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = (loader.steps for loader in loaders)
        self.print_to_log_file(
            f"{len(train)} training slices, {len(val)} validation slices, {loaders[0].steps} steps per epoch."
        )
        return loaders

    def _store(self, cases: Sequence[str], views: int = 0, transform: SliceViews | None = None) -> EmbeddingStore:
        return prepare_store(
            folder=Path(self.preprocessed_dataset_folder),
            cases=sorted(cases),
            sam=self.settings.sam,
            channels=self.settings.channels or (0,),
            mode=self.settings.store,
            device=self.device,
            # the network's own: one encoder in memory, and never another one than the checkpoint knows
            encoder=self.network.image_encoder,
            views=views,
            transform=transform if views else None,
            field=self.field,
            say=self.print_to_log_file,
        )

    def _batch(self, batch: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """Return features, masks and valid pixels of a batch, on the device."""
        if "images" in batch:
            features = self.network.features([image.to(self.device) for image in batch["images"]])
        else:
            features = [level.to(self.device, torch.float32) for level in batch["features"]]
        target, valid = masks(batch["labels"].to(self.device), self.heads, self.label_manager.ignore_label)
        return features, target, valid

    # ---------------------------------------------------------------- steps

    def on_train_epoch_start(self) -> None:
        """Start the epoch's own stream of prompts."""
        super().on_train_epoch_start()
        self.prompt_generator = np.random.default_rng([self.settings.seed, self.current_epoch, 1])

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step on stored features with the training prompt."""
        features, target, valid = self._batch(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            prediction = self._prompted(features, target, valid)
        loss = self.loss(target=target, valid=valid, variant=self.settings.loss, **prediction)["total"]
        self.check_loss(loss, sorted({key.case for key in batch["keys"]}))
        self.backward(loss)
        self.optimizer_step()
        return {"loss": loss.detach().cpu().numpy()}

    def _prompted(
        self, features: list[torch.Tensor], target: torch.Tensor, valid: torch.Tensor | None
    ) -> dict[str, Any]:
        """Return the loss's inputs for the training prompt: here the whole box, which has no IoU term."""
        return {"logits": self.network.head.box(features)}

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the deployed prediction on the mask grid; source cases only."""
        features, target, valid = self._batch(batch)
        with self.autocast():
            prediction, deployed = self._validated(features, target, valid, batch)
        loss = self.loss(target=target, valid=valid, variant=self.settings.loss, **prediction)["total"]
        return {"loss": loss.cpu().numpy(), **self.hard_counts(deployed, target, valid)}

    def _validated(
        self, features: list[torch.Tensor], target: torch.Tensor, valid: torch.Tensor | None, batch: dict[str, Any]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the loss's inputs and the logits that are scored."""
        logits = self.network.head.box(features)
        return {"logits": logits}, self.network.head.finish(logits)


class DeSAMGridTrainer(DeSAMTrainer):
    """DeSAM with a grid of points, of which the IoU head picks one mask per class (DeSAM-P).

    Training shows one point per slice, on or off the organ with equal chance; the organ's mask is the target either
    way, and the IoU head learns to tell the two apart.
    """

    prompt = "grid"

    def _prompted(
        self, features: list[torch.Tensor], target: torch.Tensor, valid: torch.Tensor | None
    ) -> dict[str, Any]:
        points = sample_points(
            target.cpu(),
            self.prompt_generator,
            self.network.model.image_size,
            None if valid is None else valid.cpu(),
            self.settings.background_points,
        )
        return self._at(features, points)

    def _validated(
        self, features: list[torch.Tensor], target: torch.Tensor, valid: torch.Tensor | None, batch: dict[str, Any]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        seeds = [zlib.crc32(f"{key.case} {key.z}".encode()) for key in batch["keys"]]
        points = fixed_points(
            target.cpu(), seeds, self.network.model.image_size, None if valid is None else valid.cpu()
        )
        prediction = self._at(features, points)
        if self.settings.validation == "points":
            return prediction, prediction["logits"]
        return prediction, self.network.head(features)[0]

    def _at(self, features: list[torch.Tensor], points: Any) -> dict[str, Any]:
        logits, iou = self.network.head.points(features, points.xy)
        return {
            "logits": logits,
            "iou": iou,
            "iou_target": points.on_class.to(self.device),
            "speaks": points.speaks.to(self.device),
        }
