"""Cross-modality equivariant CAMs as an nnU-Net trainer: masks from slice tags (``EquivariantCAMTrainer``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.loaders import SliceLoader, read_properties, read_slice
from nnunet_dgplugins.data.tags import derive_tags, slice_tags
from nnunet_dgplugins.errors import UnsupportedFeature, UserError
from nnunet_dgplugins.files import write_json
from nnunet_dgplugins.methods.cam import standardise
from nnunet_dgplugins.methods.equivariant import transforms
from nnunet_dgplugins.methods.equivariant.losses import Terms, cross_entropy, terms
from nnunet_dgplugins.methods.equivariant.maps import THRESHOLDS
from nnunet_dgplugins.methods.equivariant.network import UNetCAM, grouped_pass, separate_pass
from nnunet_dgplugins.methods.equivariant.segmenter import CAMSegmenter, rounded, shown_in
from nnunet_dgplugins.methods.equivariant.step import branches, one_graph_at_a_time
from nnunet_dgplugins.settings import EquivariantSettings
from nnunet_dgplugins.trainers.base import derived_seed
from nnunet_dgplugins.trainers.cam_validation import validate_maps, write_summary
from nnunet_dgplugins.trainers.whole_slices import WholeSliceTrainer

_DRAWS_SEED = 4
_PUBLISHED_SHIFT = 0.1
_TERMS = ("ce", "er", "kd", "cmer")
_ZERO_STAYS_BLACK = {"NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"}


class EquivariantCAMTrainer(WholeSliceTrainer):
    """Cross-modality equivariant CAMs (Patel and Dolz, Medical Image Analysis 2022): tags in, masks out.

    One small U-Net classifier per modality learns whether a slice shows the target; its class activation map is the
    segmentation. A map must move with its image (ER) and agree with the other modalities' maps (CMER); the networks
    also learn from each other's predictions (KD). Tags come from the case table alone, label files are never read.

    What nnU-Net calls pseudo Dice is the accuracy of the tags of validation slices here, so ``checkpoint_best`` is that
    of its best moving average. Masks of validation cases, where the dataset has them, are read after training alone,
    for the Dice per volume and, where ``choose_threshold`` says so, the threshold.
    """

    settings_class = EquivariantSettings
    settings: EquivariantSettings
    network: CAMSegmenter
    # the last four decide how maps become masks after training, and may be changed then
    free_settings = WholeSliceTrainer.free_settings | {
        "channels_last", "one_graph_at_a_time", "forwards", "derive_tags",
        "threshold", "choose_threshold", "fusion", "gate",
    }  # fmt: skip
    reads_tags = True
    lr_exponent = 0.0

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, compared by name
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        if not _has_tags(self.case_table):
            self.case_table = derive_tags(
                Path(self.preprocessed_dataset_folder_base), self.dataset_json,
                self.plans_manager.image_reader_writer_class(),
            )  # fmt: skip
            self.print_to_log_file("Tags derived from labelsTr, once, into the case table of dataset.json.")
        schemes = self.configuration_manager.normalization_schemes
        if not {*schemes} <= _ZERO_STAYS_BLACK:
            self.print_to_log_file(
                f"WARNING: channels are normalised by {', '.join(schemes)}, so black and the padding lie in the middle "
                "of the tissue's values. Name the channels noNorm: slices are standardised in the network."
            )

    # ---------------------------------------------------------------- settings and network

    @classmethod
    def refusals(cls, configuration: dict[str, Any], dataset_json: dict[str, Any]) -> list[str]:
        """Refuse 3d, several classes, and a single modality."""
        sentences = super().refusals(configuration, dataset_json)
        labels = {name: value for name, value in dataset_json["labels"].items() if name not in ("background", "ignore")}
        if len(labels) != 1 or any(isinstance(value, list | tuple) for value in labels.values()):
            sentences.append(
                f"{cls.__name__} knows one class; {', '.join(labels)} are {len(labels)} classes or regions."
            )
        if len(dataset_json["channel_names"]) < 2:
            sentences.append(f"{cls.__name__} compares modalities and needs two channels or more.")
        return sentences

    @classmethod
    def complete_settings(  # type: ignore[override]
        cls, resolved: EquivariantSettings, trained: dict[str, Any], dataset_json: dict[str, Any]
    ) -> EquivariantSettings:
        """Refuse a fusion of a modality that is not there, and a dataset that has no tags and is to get none."""
        count = len(dataset_json["channel_names"])
        if resolved.fusion not in ("mean", "max", *range(count)):
            raise UnsupportedFeature(
                f"{cls.__name__}: fusion={resolved.fusion} is neither mean nor max nor a modality (0 to {count - 1})."
            )
        if not resolved.derive_tags and not _has_tags(CaseTable.from_dataset_json(dataset_json)):
            raise UnsupportedFeature(
                f"{cls.__name__} learns from tags, and this dataset has none in its case table: convert it with "
                "--supervision tags, or let the trainer derive them once from the masks in labelsTr (derive_tags=true)."
            )
        return resolved

    def beside_settings(self) -> dict[str, Any]:
        """Keep the frame's size, which prediction cannot know."""
        return {"field": list(self.field)}

    @property
    def field(self) -> tuple[int, int]:
        """Rows and columns of the square frame of every slice, so that quarter turns keep its shape."""
        side = rounded(max(self.largest_slice))
        return side, side

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> CAMSegmenter:
        """Build the network from the settings kept in the plans."""
        block = configuration_manager.configuration[settings.KEY]
        chosen = settings.build(EquivariantSettings, block[cls.__name__], f"{cls.__name__}, plans beside the model")
        return CAMSegmenter(
            num_input_channels, chosen.width_divisor, tuple(block["field"]), chosen.threshold, chosen.fusion,
            chosen.gate == "predicted", chosen.dropout,
        )  # fmt: skip

    def initialize(self) -> None:
        """Build the networks and choose how they run."""
        super().initialize()
        last = self.settings.channels_last is not False
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        self.run = grouped_pass if self.settings.forwards == "grouped" else separate_pass
        self.inference_allowed_mirroring_axes = None  # as published; mirrored maps would be other maps
        shift = self.settings.shift
        self.shift = shift if shift is not None else _PUBLISHED_SHIFT if self.num_input_channels <= 2 else 0.0

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW at a constant rate; one over all networks, which share no gradient, computes what one each would."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.initial_lr, weight_decay=self.settings.weight_decay
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=self.lr_exponent)

    def _build_loss(self) -> Any:
        return terms

    # ---------------------------------------------------------------- data

    def get_dataloaders(self) -> tuple[SliceLoader, SliceLoader]:
        """Return loaders of whole slices with their tags; no label file is opened."""
        train, val = (_Slices(self, cases) for cases in self.do_split())
        chosen = self.settings
        batch = chosen.batch_size or self.configuration_manager.batch_size
        loaders = (
            SliceLoader(len(train), train.load, batch, seed=chosen.seed, steps=chosen.iterations_per_epoch),
            SliceLoader(len(val), val.load, batch),
        )
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = (loader.steps for loader in loaders)
        self.print_to_log_file(
            f"{len(train)} training slices ({train.tags.sum()} positive), {len(val)} validation slices "
            f"({val.tags.sum()} positive), {loaders[0].steps} steps per epoch."
        )
        if not 0 < train.tags.sum() < len(train):
            raise UserError(
                f"{type(self).__name__}: the training slices are all {'positive' if train.tags.any() else 'negative'}; "
                "a classifier needs both."
            )
        return loaders

    # ---------------------------------------------------------------- steps

    def on_train_epoch_start(self) -> None:
        """Start the epoch's own stream of transforms."""
        super().on_train_epoch_start()
        self.draws = torch.Generator().manual_seed(derived_seed(self.settings.seed, self.current_epoch, _DRAWS_SEED))

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step of all modalities' networks."""
        images, tags = batch["images"].to(self.device, non_blocking=True), batch["tags"].to(self.device)
        if self.shift:
            images = self._moved(images)
        count, _, height, width = images.shape
        transform = transforms.sample(count, height, width, self.draws, self.settings.transformation)
        self.optimizer.zero_grad(set_to_none=True)
        totals, parts = [], {}
        for total, found in self._totals(images, tags, transform):
            self.check_loss(total, batch["keys"])
            self.backward(total)
            totals.append(total.detach())
            parts = {name: getattr(found, name).detach().cpu().numpy() for name in _TERMS}
        self.optimizer_step()
        return {"loss": torch.stack(totals).sum().cpu().numpy(), **parts}

    def _totals(
        self, images: torch.Tensor, tags: torch.Tensor, transform: transforms.Transform
    ) -> Iterator[tuple[torch.Tensor, Terms]]:
        """Yield what is to be differentiated, the sum over networks at once or one by one, and the terms."""
        chosen, networks = self.settings, self.network.members()
        weights = chosen.kd_weight, chosen.er_weight, chosen.cmer_weight
        if not chosen.one_graph_at_a_time:
            plain, transformed = branches(networks, images, transform, self._run, self.memory_format)
            found = terms(plain, transformed, tags, chosen.temperature, chosen.cmer_reduction)
            yield found.total(*weights).sum(), found
            return
        each = one_graph_at_a_time(
            networks, images, transform, self._run, self.memory_format, tags, chosen.temperature, chosen.cmer_reduction
        )
        for i, found in enumerate(each):
            yield found.total(*weights)[i], found

    def _run(self, networks: Sequence[UNetCAM], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run networks under autocast; logits and maps come back in float32."""
        with self.autocast():
            logits, maps = self.run(networks, images)
        return logits.float(), maps.float()

    def _moved(self, images: torch.Tensor) -> torch.Tensor:
        """Move each slice, all its modalities alike, by up to the augmentation's share of a side."""
        share = (torch.rand(len(images), 2, generator=self.draws) * 2 - 1) * self.shift
        return transforms.translate(images, share * torch.tensor([images.shape[-1], images.shape[-2]]))

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the slices whose tag each network knows; masks are not read."""
        images, tags = batch["images"].to(self.device), batch["tags"].to(self.device)
        logits, _ = self._run(self.network.members(), standardise(images).to(memory_format=self.memory_format))
        right = (logits.argmax(-1) == tags).sum(1)
        return {
            "loss": cross_entropy(logits, tags).sum().cpu().numpy(),
            "right": right.cpu().numpy(),
            "slices": len(tags),
        }

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log nnU-Net's values and every term, mean over modalities."""
        super().on_train_epoch_end(train_outputs)
        means = {name: float(np.mean([output[name] for output in train_outputs])) for name in _TERMS}
        self.print_to_log_file(", ".join(f"{name} {value:.3g}" for name, value in means.items()))
        self.log_beside(means)

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the accuracy of the tags where nnU-Net keeps its pseudo Dice, which decides about checkpoint_best."""
        slices = sum(output["slices"] for output in val_outputs)
        accuracy = np.sum([output["right"] for output in val_outputs], 0) / slices
        self.logger.log("mean_fg_dice", float(accuracy.mean()), self.current_epoch)
        self.logger.log("dice_per_class_or_region", accuracy.tolist(), self.current_epoch)
        self.logger.log("val_losses", float(np.mean([output["loss"] for output in val_outputs])), self.current_epoch)
        self.print_to_log_file(f"Accuracy of the tags per modality: {np.round(accuracy, 4).tolist()}")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases; score them per volume against masks where there are any, never against tags."""
        self._write_plans()  # how maps become masks may have been changed since the training
        cases, dice = validate_maps(self, save_probabilities)
        if self.settings.choose_threshold and dice:
            best = max(THRESHOLDS, key=dice.__getitem__)
            self.print_to_log_file(f"Threshold {best:g} is the best for the validation volumes, and the model's.")
            if best != self.network.threshold:
                self.network.threshold = best
                self.settings = replace(self.settings, threshold=best)
                self._write_into_plans()
                self._write_plans()
                cases, _ = validate_maps(self, save_probabilities)
        write_summary(self, cases)

    def _write_plans(self) -> None:
        if not self.disable_checkpointing:
            write_json(Path(self.output_folder_base) / "plans.json", self.plans_manager.plans)


class _Slices:
    """Whole slices of some cases and their tags, read when a batch wants them."""

    def __init__(self, trainer: EquivariantCAMTrainer, cases: list[str]):
        self._dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
        self._field = trainer.field
        self._slices: list[tuple[str, int]] = []
        tags = []
        for case in cases:
            properties = read_properties(self._dataset, case)
            assert trainer.case_table is not None  # do_split refuses a dataset without tags
            own = slice_tags(trainer.case_table, case, properties, trainer.plans_manager.transpose_forward)
            tags.append(own)
            self._slices += [(case, z) for z in range(len(own))]
        self.tags = np.concatenate(tags) if tags else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._slices)

    def load(self, chosen: np.ndarray, epoch: int) -> dict[str, Any]:
        """Return images (N, M, H, W) in their frames, tags (N,) and case ids."""
        images = []
        for index in chosen:
            case, z = self._slices[index]
            images.append(shown_in(torch.from_numpy(read_slice(self._dataset, case, z)), self._field))
        return {
            "images": torch.stack(images),
            "tags": torch.from_numpy(self.tags[chosen]),
            "keys": sorted({self._slices[index][0] for index in chosen}),
        }


def _has_tags(table: CaseTable | None) -> bool:
    return table is not None and any(case.tags is not None for case in table.cases.values())
