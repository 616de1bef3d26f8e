"""D-CAM's two stages: a classifier of tags with its class maps, and a segmenter from three pseudo masks per patch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.folds import tagged_elsewhere
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.confusion import Matrix, confusion, dataset_scores
from nnunet_dgplugins.methods.dcam.attention import attention_used, gamma_at
from nnunet_dgplugins.methods.dcam.checkpoint import load_classifier_weights, load_deeplab_weights
from nnunet_dgplugins.methods.dcam.deeplab import DeepLab
from nnunet_dgplugins.methods.dcam.losses import layered_loss, tag_agreement, tag_loss
from nnunet_dgplugins.methods.dcam.maps import LAYERS
from nnunet_dgplugins.methods.dcam.masks import IGNORE
from nnunet_dgplugins.methods.dcam.optimisation import classifier_groups, deeplab_groups
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38
from nnunet_dgplugins.methods.dcam.segmenter import CAMClassifier, GatedSegmenter
from nnunet_dgplugins.settings import DCAMClassifierSettings, DCAMSettings
from nnunet_dgplugins.trainers.dcam_stages import (
    BUILT_FROM,
    CLASSIFIER,
    STAGE_ONE,
    PseudoMasks,
    find_classifier,
    stage_stamp,
)
from nnunet_dgplugins.trainers.earlier_stage import Finished, refuse_other_build
from nnunet_dgplugins.trainers.patches import (
    Patches,
    TaggedPatchTrainer,
    background_is_class,
    blurred,
    cut,
    flipped,
    positions,
    resized,
    said,
)
from nnunet_dgplugins.trainers.validation import mask_file


def build_classifier(chosen: DCAMClassifierSettings, classes: int) -> ResNet38:
    """Build stage 1's tower for C classes."""
    return ResNet38(
        classes, width_divisor=chosen.width_divisor, pcnorm=chosen.pcnorm, attention_divisor=chosen.attention_divisor
    )


class DCAMClassifierTrainer(TaggedPatchTrainer):
    """D-CAM stage 1 (Han et al., Medical Image Analysis 2022; D-CAM, MICCAI 2025): which tissues a patch shows.

    Learns from the tags in the case table alone. ``nnUNetv2_predict`` gives the segmentation of its class maps; stage 2
    and ``dgplugins pseudo-labels`` take its maps at three depths. On validation patches nnU-Net's ``Pseudo dice [...]``
    is the share of right tags of each class, and the moving average that decides about ``checkpoint_best`` is of the
    Jaccard index of predicted and tagged classes.

    PCNorm is ``instance`` by default, a reconstruction: as released (``official``) it has no effect. Without start
    weights nothing is frozen, normalisations train, and momentum is 0.9 (released: 5e-4, by accident).
    """

    settings_class = DCAMClassifierSettings
    settings: DCAMClassifierSettings
    network: CAMClassifier
    # these decide how maps become masks after training, and may be changed then
    free_settings = TaggedPatchTrainer.free_settings | {
        "cam_threshold", "background_threshold", "white_background", "mask_batch_size",
    }  # fmt: skip

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> CAMClassifier:
        """Build the network from the settings kept in the plans."""
        block = configuration_manager.configuration[settings.KEY]
        chosen = settings.build(DCAMClassifierSettings, block[cls.__name__], f"{cls.__name__}, plans beside the model")
        background = chosen.background_threshold if block["background"] else None
        return CAMClassifier(build_classifier(chosen, num_output_channels - 1), chosen.cam_threshold, background)

    def beside_settings(self) -> dict[str, Any]:
        """Keep whether background is a class of the dataset."""
        return {"background": background_is_class(self.dataset_json)}

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """SGD, the last layer ten times as fast; what start weights freeze is no part of it."""
        self.inference_allowed_mirroring_axes = None  # as published; mirrored maps would be other maps
        network, path = self.network.classifier, self.settings.start_weights
        if path:
            if Path(path).is_file():
                self.print_to_log_file(f"Start weights: {load_classifier_weights(network, path)}")
            network.freeze()
            self.print_to_log_file(
                "Frozen: conv1a, b2 and "
                + ("all normalisations." if self.settings.pcnorm in ("official", "off") else "their normalisations; "
                   "those behind PCNorm train, because its output is nothing like what they were estimated on.")
            )  # fmt: skip
        else:
            self.print_to_log_file(
                f"No start weights: nothing is frozen, normalisations train, momentum {self.settings.momentum:g}, "
                f"{'with' if self.attends else 'no'} dropout attention."
            )
        groups = classifier_groups(network, self.initial_lr, self.settings.weight_decay)
        return self.stepwise(torch.optim.SGD(groups, self.initial_lr, self.settings.momentum))

    def _build_loss(self) -> Any:
        return tag_loss

    # ---------------------------------------------------------------- data

    def get_dataloaders(self) -> Any:
        """Return loaders of whole patches with their tags; no label file is opened."""
        train, val = (Patches(self, cases) for cases in self.do_split())
        self.claim(stage_stamp(self.table, train.cases, self.dataset_json))
        size: tuple[int, int] = tuple(self.configuration_manager.patch_size)
        others = sum(train.size(index) != size for index in range(len(train.cases)))
        if others:
            self.print_to_log_file(
                f"{others} of {len(train.cases)} training patches are not {size[0]} x {size[1]} and are resized. "
                f"Maps and stage 2 see them as they are, at another scale; convert with --resize {max(size)} instead."
            )

        def load(part: Patches, chosen: Sequence[int], epoch: int | None) -> dict[str, Any]:
            images = [resized(part.image(index), size) for index in chosen]
            if epoch is not None:
                rng = self.draws(epoch, chosen)
                images = [flipped(image, rng) for image in images]
            names = [part.cases[index] for index in chosen]
            tags = np.stack([self.tags_of(name) for name in names])
            return {"images": torch.stack(images), "tags": torch.from_numpy(tags), "keys": names}

        return self.loaders(
            len(train.cases), lambda chosen, epoch: load(train, chosen, epoch),
            len(val.cases), lambda chosen, _: load(val, chosen, None),
        )  # fmt: skip

    # ---------------------------------------------------------------- steps

    @property
    def attends(self) -> bool:
        """Whether the dropout attention is used at all; by default only behind start weights."""
        wanted = self.settings.attention
        return bool(self.settings.start_weights) if wanted is None else wanted

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step on whole patches, with dropout attention from the fourth epoch on."""
        images, tags = batch["images"].to(self.device, non_blocking=True), batch["tags"].to(self.device)
        attend = self.attends and attention_used(self.current_epoch)
        with self.autocast():
            logits = self.network.classifier(images, gamma_at(self.current_epoch) if attend else None)
        return self.take_step(self.loss(logits.float(), tags), batch["keys"])

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compare predicted and tagged classes of validation patches; masks are not read."""
        images, tags = batch["images"].to(self.device), batch["tags"].to(self.device)
        logits = self.network.classifier(images).float()
        exact, jaccard = tag_agreement(logits, tags)
        right = ((logits > 0) == tags.bool()).float().mean(0)
        return {
            "loss": float(tag_loss(logits, tags)), "count": len(tags), "exact": float(exact.float().sum()),
            "jaccard": float(jaccard.sum()), "right": right.cpu().numpy() * len(tags),
        }  # fmt: skip

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the Jaccard index where nnU-Net keeps its pseudo Dice, which decides about checkpoint_best."""
        count = sum(output["count"] for output in val_outputs)
        exact, jaccard = (sum(output[name] for output in val_outputs) / count for name in ("exact", "jaccard"))
        right = np.sum([output["right"] for output in val_outputs], 0) / count
        self.logger.log("mean_fg_dice", jaccard, self.current_epoch)
        self.logger.log("dice_per_class_or_region", right.tolist(), self.current_epoch)
        loss = sum(output["loss"] * output["count"] for output in val_outputs) / count
        self.logger.log("val_losses", loss, self.current_epoch)
        self.print_to_log_file(f"Tags of validation patches: exact match {exact:.4f}, Jaccard {jaccard:.4f}")
        self.log_beside({"tags_exact_match": exact})


class DCAMTrainer(TaggedPatchTrainer):
    """D-CAM stage 2 (Han et al., Medical Image Analysis 2022): a segmenter from three pseudo masks per patch.

    Finds stage 1's result of the same fold and plans, checks that it is complete and made from the same tags, and makes
    the pseudo masks first where they are missing. The trained model carries the classifier, whose gate closes tissues
    it thinks absent, so stock prediction applies it. What nnU-Net calls pseudo Dice is the IoU of each class, and
    its moving average that of their mean, on validation patches without the gate, as published, against their real
    masks where the dataset has them.

    Protocol ``release`` of the dataset: trains on the target's tagged patches, as the released code does; ``strict``:
    on the source's.
    """

    settings_class = DCAMSettings
    settings: DCAMSettings
    network: GatedSegmenter
    free_settings = TaggedPatchTrainer.free_settings | {"gate", "gate_threshold"}

    # ---------------------------------------------------------------- stage 1, network

    @classmethod
    def require_inputs(cls, plans: dict[str, Any], configuration: str, fold: int | str) -> None:
        """Refuse to begin before stage 1 has finished this fold."""
        STAGE_ONE.checkpoint(cls.__name__, plans, configuration, fold)

    def beside_settings(self) -> dict[str, Any]:
        """Keep what the network inside and the number of outputs depend on."""
        first = settings.to_dict(self.stage_one.settings)
        refuse_other_build(self, STAGE_ONE.name, CLASSIFIER, first, BUILT_FROM)
        return {"background": background_is_class(self.dataset_json), CLASSIFIER: first}

    @property
    def stage_one(self) -> Finished:
        """Stage 1's finished result; looked for once.

        Raises:
            UserError: it is missing, unfinished, or made from other tags.
        """
        if not hasattr(self, "_stage_one"):
            self._stage_one = find_classifier(self)
        return self._stage_one

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> GatedSegmenter:
        """Build segmenter and classifier from the settings kept in the plans."""
        block = configuration_manager.configuration[settings.KEY]
        where = f"{cls.__name__}, plans beside the model"
        chosen = settings.build(DCAMSettings, block[cls.__name__], where)
        first = settings.build(DCAMClassifierSettings, block[CLASSIFIER], where)
        classes = num_output_channels - 1
        outputs = classes + bool(block["background"])
        if chosen.network == "deeplabv3plus":
            segmenter: torch.nn.Module = DeepLab(outputs)
        else:
            segmenter = nnUNetTrainer.build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, outputs, False
            )
        return GatedSegmenter(segmenter, build_classifier(first, classes), chosen.gate, chosen.gate_threshold)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """SGD on the segmenter, DeepLabV3+'s head ten times as fast."""
        self.inference_allowed_mirroring_axes = None  # as published
        segmenter, chosen = self.network.segmenter, self.settings
        if isinstance(segmenter, DeepLab):
            if chosen.start_weights and Path(chosen.start_weights).is_file():
                self.print_to_log_file(f"Start weights: {load_deeplab_weights(segmenter, chosen.start_weights)}")
            groups = deeplab_groups(segmenter, self.initial_lr, chosen.weight_decay)
        else:
            groups = [
                {
                    "params": list(segmenter.parameters()),
                    "initial_lr": self.initial_lr,
                    "weight_decay": chosen.weight_decay,
                }
            ]
        return self.stepwise(torch.optim.SGD(groups, self.initial_lr, chosen.momentum))

    def _build_loss(self) -> Any:
        return layered_loss

    # ---------------------------------------------------------------- data

    def fold_split(self) -> tuple[list[str], list[str]]:
        """Return the cases that the fold lists, which stage 1 trained and validated on."""
        return super().do_split()

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the fold's cases; under protocol ``release`` the target's tagged patches train."""
        train, val = self.fold_split()
        if self.table.protocol.get("protocol") == "release":
            present = sorted(path.name[: -len(".pkl")] for path in Path(self.preprocessed_dataset_folder).glob("*.pkl"))
            train = tagged_elsewhere(present, self.table)
            self.print_to_log_file(f"Protocol release: trains on {len(train)} tagged patches of the target.")
        return train, val

    def get_dataloaders(self) -> Any:
        """Return loaders of patches with their three masks, which are made first where they are missing."""
        train, val = (Patches(self, cases) for cases in self.do_split())
        own = background_is_class(self.dataset_json)  # then a patch without classes is all background
        shown = [index for index, case in enumerate(train.cases) if own or self.tags_of(case).any()]
        if len(shown) < len(train.cases):
            self.print_to_log_file(
                f"{len(train.cases) - len(shown)} training patches show none of the classes and are left out."
            )
        if len(shown) < 2:  # DeepLabV3+ normalises over a batch
            raise UserError(
                f"{type(self).__name__} needs two training patches or more{'' if own else ' that show a class'}, "
                f"found {len(shown)}."
            )
        # now, because -pretrained_weights may have brought another classifier along
        self.network.classifier.load_state_dict(self.stage_one.weights)
        self.masks = PseudoMasks.of(self)
        self.claim(self.masks.folder.name)
        unknown = [case for case in val.cases if mask_file(self, case) is None]
        self.masks.make(self, [*(train.cases[index] for index in shown), *unknown])
        size: tuple[int, int] = tuple(self.configuration_manager.patch_size)
        self.print_to_log_file(
            f"{len(shown)} training patches. {len(unknown)} of {len(val.cases)} validation patches have no real masks "
            "and are compared with their pseudo masks."
        )

        def load(chosen: Sequence[int], epoch: int) -> dict[str, Any]:
            images, masks, names, rng = [], [], [], self.draws(epoch, chosen)
            for index in (shown[int(place)] for place in chosen):
                image = torch.cat([train.image(index), torch.from_numpy(self.masks.read(train.cases[index])).float()])
                image = flipped(cut(image, size, rng), rng, vertical=False)
                images.append(blurred(image[:3], rng) if self.settings.blur else image[:3])
                masks.append(image[3:])
                names.append(train.cases[index])
            stacked = torch.stack(masks).to(torch.uint8)
            return {"images": torch.stack(images), "masks": dict(zip(LAYERS, stacked.unbind(1), strict=True)),
                    "keys": names}  # fmt: skip

        def load_val(chosen: Sequence[int], epoch: int) -> dict[str, Any]:
            (index,) = chosen
            return {"images": val.image(index)[None], "truth": self._validation_truth(val.cases[index])}

        return self.loaders(len(shown), load, len(val.cases), load_val, val_batch=1)

    def _validation_truth(self, case: str) -> np.ndarray:
        own = background_is_class(self.dataset_json)
        if (truth := self.truth_of(case)) is not None:
            return positions(truth, self.class_labels, own)
        mask = self.masks.read(case)[LAYERS.index("bn7")]
        return mask if own else np.where(mask < len(self.class_labels), mask, np.uint8(IGNORE))  # white is no class

    # ---------------------------------------------------------------- steps

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step against the three masks."""
        chosen = self.settings
        with self.autocast():
            logits = self.network(batch["images"].to(self.device, non_blocking=True))
        published = chosen.published_loss
        loss = self.loss(
            logits.float(), batch["masks"], dummy_logit=published, count_white=published, divide_by_batch=published,
            focal=chosen.focal, easy_examples=chosen.easy_examples,
        )["total"]  # fmt: skip
        return self.take_step(loss, batch["keys"])

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count the pixels of a validation patch by truth and prediction, without the gate."""
        logits = self.network.segmenter(self._divisible(batch["images"].to(self.device)))
        height, width = batch["truth"].shape
        found = logits[0, :, :height, :width].argmax(0).cpu().numpy()
        truth = torch.from_numpy(batch["truth"].astype(np.int64))[None]
        loss = torch.nn.functional.cross_entropy(logits[..., :height, :width].float().cpu(), truth, ignore_index=IGNORE)
        return {"matrix": confusion(truth[0].numpy(), found, range(logits.shape[1])), "loss": float(loss)}

    def _divisible(self, images: torch.Tensor) -> torch.Tensor:
        """Pad below and on the right to what the planned network's poolings divide; DeepLabV3+ needs nothing."""
        if self.settings.network == "deeplabv3plus":
            return images
        strides = self.configuration_manager.network_arch_init_kwargs["strides"]
        rows, columns = (int(np.prod(steps)) for steps in zip(*strides, strict=True))
        height, width = images.shape[-2:]
        return torch.nn.functional.pad(images, (0, -width % columns, 0, -height % rows))

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the mean IoU where nnU-Net keeps its pseudo Dice, which decides about checkpoint_best."""
        matrix: Matrix = np.sum([output["matrix"] for output in val_outputs], 0)
        found = dataset_scores(matrix)
        self.logger.log("mean_fg_dice", float(np.nan_to_num(found.miou)), self.current_epoch)
        self.logger.log("dice_per_class_or_region", np.nan_to_num(found.ious).tolist(), self.current_epoch)
        losses = [output["loss"] for output in val_outputs]
        self.logger.log(
            "val_losses", float(np.nanmean(losses)) if not np.isnan(losses).all() else 0.0, self.current_epoch
        )
        self.print_to_log_file(f"Validation patches, without the gate: {said(found)}")
