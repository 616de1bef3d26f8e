"""SAM-SDG as nnU-Net trainers: a coarse network (``SAMSDGCoarseTrainer``), then SAM prompted by its boxes, four slices
on each canvas (``SAMSDGTrainer``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnunet_dgplugins import settings
from nnunet_dgplugins.content import CLOSED
from nnunet_dgplugins.data.loaders import SliceLoader
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
from nnunet_dgplugins.methods.samsdg.boxes import BoxRule, draw_jitter
from nnunet_dgplugins.methods.samsdg.canvas import TILES
from nnunet_dgplugins.methods.samsdg.decoder import (
    BoxDecoder,
    build_mask_decoder,
    load_mask_decoder,
    trainable_parameters,
)
from nnunet_dgplugins.methods.samsdg.location_scale import draw_curves, either_version
from nnunet_dgplugins.methods.samsdg.losses import canvas_loss
from nnunet_dgplugins.methods.samsdg.segmenter import SAMSDGSegmenter
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.sam.models import get_model
from nnunet_dgplugins.sam.preprocess import PIXEL_MEAN, PIXEL_STD
from nnunet_dgplugins.sam.slices import SliceSet, masks
from nnunet_dgplugins.sam.weights import load_parts
from nnunet_dgplugins.settings import SAMSDGCoarseSettings, SAMSDGSettings
from nnunet_dgplugins.trainers.base import model_folder, settings_beside_model
from nnunet_dgplugins.trainers.earlier_stage import Finished, refuse_other_build
from nnunet_dgplugins.trainers.samsdg_canvases import (
    CanvasBatches,
    Canvases,
    CaseBatches,
    PromptedSlices,
    prompt,
    true_boxes,
)
from nnunet_dgplugins.trainers.samsdg_coarse import SAMSDGCoarseTrainer, SliceMaskTrainer, build_coarse
from nnunet_dgplugins.trainers.samsdg_step_one import BUILT_FROM, COARSE, STEP_ONE, check_same_data, find_step_one

__all__ = ["SAMSDGCoarseTrainer", "SAMSDGTrainer"]


class SAMSDGTrainer(SliceMaskTrainer):
    """SAM-SDG steps 2 and 3: SAM prompted by step 1's boxes (arXiv 2401.02076, sections 3.3 and 3.4).

    Finds step 1's result of the same fold and plans. SAM's mask decoder alone is trained. SAM is asked in training for
    what it is asked for in prediction: with ``empty=background`` slices and classes that the coarse network does not
    find take no part. Canvases of the validation cases, and with ``groupings`` those of training, are embedded once.

    nnU-Net's own prediction gives each slice a canvas of its own; ``dgplugins predict`` puts four neighbouring slices
    on one, as the paper does and as the score shown while training does.
    """

    settings_class = SAMSDGSettings
    settings: SAMSDGSettings
    network: SAMSDGSegmenter

    # ---------------------------------------------------------------- settings and network

    @classmethod
    def complete_settings(  # type: ignore[override]
        cls, resolved: SAMSDGSettings, trained: dict[str, Any], dataset_json: dict[str, Any]
    ) -> SAMSDGSettings:
        """Name the SAM model that ``auto`` stands for; canvases are four slices."""
        sam = resolved.sam
        name = (trained.get("sam") if sam == "auto" else None) or get_model(sam).name
        if (resolved.batch_size or TILES) % TILES:
            raise UserError(f"{cls.__name__}: batch_size={resolved.batch_size} is no multiple of {TILES}.")
        if resolved.groupings and resolved.augmentation != "none":
            raise UserError(
                f"{cls.__name__}: groupings={resolved.groupings} keeps embeddings, and with "
                f"augmentation={resolved.augmentation} none can be kept: choose one of them."
            )
        found: SAMSDGSettings = super().complete_settings(replace(resolved, sam=name), trained, dataset_json)
        return found

    @classmethod
    def require_inputs(cls, plans: dict[str, Any], configuration: str, fold: int | str) -> None:
        """Refuse to begin before step 1 has finished this fold; what has begun carries step 1's network itself."""
        folder = model_folder(cls.__name__, plans, configuration)
        if folder is None or not any((folder / f"fold_{fold}").glob("checkpoint_*.pth")):
            STEP_ONE.checkpoint(cls.__name__, plans, configuration, fold)

    @property
    def encoder(self) -> FrozenEncoder:
        """SAM's image encoder."""
        found: Any = self.network.image_encoder
        return found

    @property
    def step_one(self) -> Finished:
        """Step 1's finished result; looked for once."""
        if not hasattr(self, "_step_one"):
            self._step_one = find_step_one(self)
        return self._step_one

    def beside_settings(self) -> dict[str, Any]:
        """Keep what the network inside depends on: of a fold that has a checkpoint as it was, else step 1's."""
        if not (first := self._kept_step_one()):
            first = settings.to_dict(self.step_one.settings)
            self._refuse_other_build(first)
        return {**super().beside_settings(), COARSE: first}

    def _kept_step_one(self) -> dict[str, Any] | None:
        """Return step 1's settings as the plans beside this fold's checkpoints have them; None where it has none."""
        if not any(Path(self.output_folder).glob("checkpoint_*.pth")):
            return None
        return settings_beside_model(Path(self.output_folder_base), self.configuration_name, COARSE)

    def _refuse_other_build(self, first: dict[str, Any]) -> None:
        refuse_other_build(self, STEP_ONE.name, COARSE, first, BUILT_FROM)

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> SAMSDGSegmenter:
        """Build both networks from the settings kept in the plans; no weight file is needed."""
        block = configuration_manager.configuration[settings.KEY]
        where = f"{cls.__name__}, plans beside the model"
        chosen = settings.build(SAMSDGSettings, block[cls.__name__], where)
        first = settings.build(SAMSDGCoarseSettings, block[COARSE], where)
        classes = num_output_channels - (block["heads"] == "classes")
        model = get_model(chosen.sam)
        mask_decoder = build_mask_decoder(model, classes)
        trainable_parameters(mask_decoder, classes)
        return SAMSDGSegmenter(
            FrozenEncoder(model, torch.bfloat16 if chosen.cpu_bfloat16 else None),
            BoxDecoder(build_prompt_encoder(model.prompt_dim, model.grid, model.image_size), mask_decoder, classes),
            build_coarse(first, plans_manager, configuration_manager, classes),
            first.image_size,
            # true masks are for whoever has them; the network by itself deploys the refined boxes
            rule=BoxRule("refined" if chosen.boxes == "masks" else chosen.boxes, chosen.box_threshold),
            empty=chosen.empty,
            pixels=(PIXEL_MEAN, PIXEL_STD) if chosen.sam_pixel_norm else None,
            **cls.shared_options(chosen, block),
        )

    def initialize(self) -> None:
        """Build the network, then give it SAM's and step 1's weights; a checkpoint loaded later has its own of step 1.

        Where there is one, step 1 is not asked for: validation goes on without it.
        """
        super().initialize()
        network = self.network
        parts = load_parts(self.encoder.model)
        self.encoder.adopt(parts)
        network.decoder.prompt_encoder.load_state_dict(parts.prompt_encoder.state_dict())
        load_mask_decoder(network.decoder.mask_decoder, parts.mask_decoder_state)
        self.print_to_log_file(f"SAM encoder: {self.encoder.model.described}, weights {parts.weights_hash[:12]}.")
        if not self._kept_step_one():
            self._adopt_step_one()

    def _adopt_step_one(self) -> None:
        found = self.step_one
        self._refuse_other_build(settings.to_dict(found.settings))  # a fold may be trained over an older one
        self.network.adopt_coarse(found.weights, found.digest)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Adam at a constant rate with L2 over what gets true gradients."""
        return self.adam([p for p in self.network.parameters() if p.requires_grad], self.settings.weight_decay)

    def _build_loss(self) -> Any:
        return partial(canvas_loss, ce_weight=self.settings.ce_weight)

    def on_train_start(self) -> None:
        """Begin with step 1's own coarse network, whatever start weights brought; go on with no other one."""
        if not self.was_initialized:
            self.initialize()
        step_one = self.step_one
        if self.current_epoch == 0:
            self._adopt_step_one()
        elif bytes(self.network.coarse_hash.cpu().tolist()).hex() != step_one.digest:
            raise UserError(
                f"{type(self).__name__}: step 1 has been trained anew since ({step_one.path}), and its boxes are "
                f"others. Remove {self.output_folder} and train again, without --c."
            )
        self.print_to_log_file(f"Step 1: {step_one.path}")
        super().on_train_start()

    # ---------------------------------------------------------------- data

    def get_dataloaders(self) -> tuple[SliceLoader, SliceLoader]:
        """Return loaders of canvases in training and of cases in validation."""
        chosen, network = self.settings, self.network
        dataset, train, val = self.read_fold(network.decoder.tile)
        check_same_data(self.step_one, self.data_stamp, type(self).__name__)
        network.eval()
        asked = self._prompted(dataset, train)
        part = asked.only(asked.shown)
        self.print_to_log_file(self._said(asked, part))
        if not len(part.slices):
            raise UserError(
                f"{type(self).__name__}: the coarse network finds nothing on any training slice. Train step 1 longer, "
                "or set box_threshold lower, or empty=full_box."
            )
        canvases = Canvases(
            Path(self.preprocessed_dataset_folder), network, dataset, self.device, self.print_to_log_file
        )
        load_train = CanvasBatches(part, canvases, chosen.seed, chosen.groupings)
        load_val = CaseBatches(self._prompted(dataset, val), canvases)
        if chosen.groupings:
            self.encoder.release()
        batch = max(1, (chosen.batch_size or self.configuration_manager.batch_size) // TILES)
        return self.take_over(
            SliceLoader(len(load_train), load_train, batch, seed=chosen.seed, steps=chosen.iterations_per_epoch),
            SliceLoader(len(load_val), load_val, 1),
        )

    def _prompted(self, dataset: Any, slices: SliceSet) -> PromptedSlices:
        given = true_boxes(slices.labels, self.heads) if self.settings.boxes == "masks" else None
        return prompt(self.network, dataset, slices, self.device, given)

    def _said(self, asked: PromptedSlices, part: PromptedSlices) -> str:
        """Say how many training slices there are, and on how many the coarse network finds nothing."""
        organ = masks(asked.slices.labels, self.heads, self.label_manager.ignore_label)[0].flatten(1).any(1).numpy()
        left_out = np.setdiff1d(np.arange(len(organ)), asked.shown)
        text = f"{len(part.slices)} training slices on {-(-len(part.slices) // TILES)} canvases."
        if len(left_out):
            text += f" {len(left_out)} more, where step 1 finds nothing, are left out; {organ[left_out].sum()} of them "
            text += "show an organ."
        return text

    # ---------------------------------------------------------------- steps

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step on canvases, with jitter; each mask is made and scored in its own tile only."""
        target, valid = self.target_of(batch["labels"])
        boxes, asked = batch["boxes"].to(self.device), batch["asked"].to(self.device)
        if "embeddings" in batch:
            embeddings = batch["embeddings"]
        else:
            tiles = batch["tiles"].to(self.device)
            if self.settings.augmentation == "location_scale":
                tiles, boxes, asked = self._augmented(batch, target)
            embeddings = self.network.embed(tiles)
        draw = draw_jitter(tuple(boxes.shape[:-1]), self.jitter, self.settings.jitter)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.network.decode(embeddings, self.network.with_jitter(boxes, draw))
        loss = self.differentiated(self.loss(logits, target, valid=_where_asked(valid, asked, target))["total"], batch)
        self.optimizer_step()
        return {"loss": loss.cpu().numpy()}

    def _augmented(
        self, batch: dict[str, Any], target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give slices other intensities, the same to both networks; returns tiles, boxes, and what SAM is asked for.

        The last two are the coarse network's answer to the new slices, except where true boxes are prompts.
        """
        tiles, images = batch["tiles"].to(self.device), batch["images"].to(self.device)
        draws = draw_curves(len(tiles), target.shape[1], self.augmentation)
        local = self.augmentation.random(len(tiles)) < 0.5
        moved = either_version(tiles, target, draws, local)
        if images.shape == tiles.shape:
            seen = moved
        else:
            smaller = nn.functional.interpolate(target, size=images.shape[-2:], mode="nearest")
            seen = either_version(images, smaller, draws, local)
        if self.settings.boxes == "masks":
            return moved, batch["boxes"].to(self.device), batch["asked"].to(self.device)
        found = self.network.prompts(seen)
        asked = found.found if self.network.empty == "background" else torch.ones_like(found.found)
        return moved, found.boxes, asked

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score a source case as ``dgplugins predict`` would segment it, on the grid of SAM's tiles."""
        target, valid = self.target_of(batch["labels"])
        asked, deployed = batch["asked"].to(self.device), torch.full_like(target, CLOSED)
        if batch["embeddings"] is None:
            loss = target.flatten(1).any().float()  # what Dice costs: nothing is found
        else:
            group = batch["group"]
            boxes = batch["boxes"][group].to(self.device)
            with self.autocast():
                logits = self.network.decode(batch["embeddings"], boxes).float()
            known = _where_asked(None if valid is None else valid[group], asked[group], target)
            loss = self.loss(logits, target[group], valid=known)["total"]
            own, first = np.unique(group, return_index=True)  # what fills a canvas up comes last
            shift = self.network.shift
            deployed[own] = torch.where(asked[own][..., None, None], logits[first] - shift, CLOSED)
        return {"loss": loss.cpu().numpy(), **self.hard_counts(deployed, target, valid)}


def _where_asked(valid: torch.Tensor | None, asked: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Return where the loss looks (B, 1 or K, h, w): at known pixels of classes that SAM is asked for."""
    if asked.all():
        return valid
    own = asked[:, :, None, None].float().expand(-1, -1, *target.shape[-2:])
    return own if valid is None else valid * own
