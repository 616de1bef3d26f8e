"""EPL as an nnU-Net trainer: two networks that teach each other on images without masks (``EPLTrainer``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.augmentation import without_timing
from nnunet_dgplugins.data.folds import is_labelled
from nnunet_dgplugins.data.unlabelled import (
    LabelledAndUnlabelled,
    UnlabelledLoader,
    in_background,
    unlabelled_cases,
)
from nnunet_dgplugins.errors import UnsupportedFeature, UserError
from nnunet_dgplugins.methods.epl.cutmix import sample_masks
from nnunet_dgplugins.methods.epl.histogram import match_histograms
from nnunet_dgplugins.methods.epl.losses import cps_weight_at, cross_pseudo_supervision, supervised_dice
from nnunet_dgplugins.methods.epl.step import (
    Output,
    UnlabelledImages,
    batched_passes,
    full_resolution,
    published_passes,
)
from nnunet_dgplugins.methods.epl.styles import fourier_version
from nnunet_dgplugins.settings import EPLSettings, TrainingSettings
from nnunet_dgplugins.trainers.base import DGTrainer, derived_seed, flattened, seed_everything
from nnunet_dgplugins.trainers.second_network import export_second, exported_checkpoints

_CLIP = 12  # nnU-Net's
_FULL_MIX_STRENGTH = 0.3  # published: each image draws from 0 to this
_SECOND_SEED, _DRAWS_SEED = 2, 3


class EPLTrainer(DGTrainer):
    """Confidence-aware cross pseudo supervision (EPL; Yao et al., AAAI 2022), 2d and 3d.

    Each step draws one labelled batch and two unlabelled ones. Both networks label the unlabelled images from the mean
    of their outputs on an image and on its Fourier version, CutMix joins the two batches, and each network learns the
    other's labels as far as the other agrees with itself across the two versions. Which case has masks is decided by
    the case table; sites are read only to keep other sites than the source out.

    The networks are two of nnU-Net's planned ones, seeded apart. The published optimiser is the default: AdamW with a
    constant 1e-4 for each network. Both share one AdamW with two groups of parameters, which computes the same, since
    AdamW treats every parameter by itself. nnU-Net's SGD with its decay is an option (``optimizer=sgd``): its rate of
    1e-2 on this sum of losses, of which the unlabelled part counts three times, was never tried by the authors.

    Network 1 is the deployed one, kept where nnU-Net keeps its network; network 2 is an extra entry of the checkpoint.
    """

    settings_class = EPLSettings
    settings: EPLSettings
    batch_size: int
    unlabelled_batch_size: int
    free_settings = DGTrainer.free_settings | {"channels_last", "export_second"}

    # ---------------------------------------------------------------- settings and networks

    @classmethod
    def refusals(cls, configuration: dict[str, Any], dataset_json: dict[str, Any]) -> list[str]:
        """Refuse cascades and region labels."""
        sentences = []
        if configuration.get("previous_stage"):
            sentences.append(f"{cls.__name__} does not work in a cascade.")
        if any(isinstance(value, list | tuple) for value in dataset_json["labels"].values()):
            sentences.append(f"{cls.__name__} needs classes that exclude each other and refuses region labels.")
        return sentences

    @classmethod
    def _resolve_settings(
        cls, plans: dict[str, Any], configuration: str, model_folder: Path | None, dataset_json: dict[str, Any]
    ) -> TrainingSettings:
        resolved = super()._resolve_settings(plans, configuration, model_folder, dataset_json)
        assert isinstance(resolved, EPLSettings)
        if resolved.network == "deeplabv3plus" and len(flattened(plans, configuration)["patch_size"]) != 2:
            raise UnsupportedFeature(
                f"{cls.__name__} has DeepLabV3+ in 2d only: use configuration 2d or network=planned."
            )
        if resolved.network == "planned" and (resolved.start_weights or resolved.input_scaling != "none"):
            raise UserError(f"{cls.__name__}: start_weights and input_scaling are for network=deeplabv3plus.")
        return resolved

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, compared by name
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        chosen = self.settings
        if chosen.export_second and fold == "all":
            raise UserError(f"{type(self).__name__}: export_second needs a fold with a number, not all.")
        self.enable_deep_supervision = chosen.network == "planned"
        self.weight_decay = chosen.weight_decay
        self.lr_exponent = 0.9 if chosen.schedule == "poly" else 0.0

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> torch.nn.Module:
        """Build one network as the settings in the plans say; prediction needs no other."""
        block = configuration_manager.configuration[settings.KEY]
        chosen = settings.build(EPLSettings, block[cls.__name__], f"{cls.__name__}, plans beside the model")
        if chosen.network == "deeplabv3plus":
            from nnunet_dgplugins.methods.epl.deeplab import DeepLabV3Plus

            return DeepLabV3Plus(num_input_channels, num_output_channels, chosen.input_scaling)
        network: torch.nn.Module = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return network

    def networks(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Network 1, which is deployed, and network 2."""
        return self.network, self.second_network

    def initialize(self) -> None:
        """Build both networks, the second drawn from a seed of its own, and give both their start weights.

        nnU-Net's ``-pretrained_weights`` and checkpoints come later, so they replace them. A training that goes on does
        without the file.
        """
        super().initialize()
        seed_everything(self.settings.seed, 0, _SECOND_SEED)
        self.second_network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        if self.settings.start_weights and Path(self.settings.start_weights).is_file():
            self._load_start_weights(self.settings.start_weights)
        self.optimizer.add_param_group({"params": list(self.second_network.parameters())})
        self.memory_format = self._memory_format()
        self.passes = self._forwards()
        for network in self.networks():
            network.to(memory_format=self.memory_format)
        self.print_to_log_file(
            f"{self.batch_size} labelled and 2 x {self.unlabelled_batch_size} unlabelled patches per step, twice over, "
            f"{self.passes.__name__}. The plans count memory for one network and "
            f"{self.configuration_manager.batch_size} patches: on a full GPU lower unlabelled_batch_size first."
        )

    def _load_start_weights(self, path: str) -> None:
        from nnunet_dgplugins.methods.epl.checkpoint import load_start_weights

        for network in self.networks():
            self.print_to_log_file(f"Start weights: {load_start_weights(network, path)}")

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        self.batch_size = self.settings.batch_size or self.batch_size
        self.unlabelled_batch_size = self.settings.unlabelled_batch_size or self.batch_size
        if self.batch_size == 1:  # nnU-Net's share of patches with foreground rounds to none of one
            self.probabilistic_oversampling = True
        smallest = min(self.batch_size, self.unlabelled_batch_size)
        if self.settings.network == "deeplabv3plus" and smallest < 2:
            raise UserError(
                f"{type(self).__name__}: DeepLabV3+ normalises over the batch, which needs 2 patches or more."
            )

    def _memory_format(self) -> torch.memory_format:
        flat = len(self.configuration_manager.patch_size) == 2
        if not (flat if self.settings.channels_last is None else self.settings.channels_last):
            return torch.contiguous_format
        return torch.channels_last if flat else torch.channels_last_3d

    def _forwards(self) -> Any:
        """Return the published order of passes, or the batched one."""
        batch_norm = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in self.network.modules())
        batched = self.settings.forwards == "batched" or (
            self.settings.forwards == "auto" and self.device.type == "cuda" and not batch_norm
        )
        return batched_passes if batched else published_passes

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW (or SGD), constant or with polynomial decay; network 2 joins with a group of its own."""
        parameters = list(self.network.parameters())
        if self.settings.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, self.initial_lr, momentum=0.99, nesterov=True, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(parameters, self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=self.lr_exponent)

    # ---------------------------------------------------------------- data

    def sets_steps(self) -> bool:
        """Return whether the settings say how long an epoch is; else nnU-Net's length, or a budget's."""
        return self.settings.iterations_per_epoch is not None

    @staticmethod
    def get_training_transforms(*arguments: Any, **options: Any) -> Any:
        """Return nnU-Net's augmentation, which here chooses nothing by a clock."""
        return without_timing(nnUNetTrainer.get_training_transforms(*arguments, **options))

    def get_dataloaders(self) -> tuple[LabelledAndUnlabelled, Any]:
        """Return nnU-Net's loaders of labelled cases, the training one joined with two draws of unlabelled ones."""
        if self.settings.iterations_per_epoch:
            self.num_iterations_per_epoch = self.settings.iterations_per_epoch
            self.num_val_iterations_per_epoch = max(1, self.settings.iterations_per_epoch // 5)  # nnU-Net's ratio
        labelled, validation = super().get_dataloaders()
        cases = self._unlabelled_pool()
        rotation, dummy_2d, initial_patch, mirror = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        patch = self.configuration_manager.patch_size
        masked = self.configuration_manager.use_mask_for_norm
        loader = UnlabelledLoader(
            self.dataset_class(self.preprocessed_dataset_folder, cases),
            self.unlabelled_batch_size,
            initial_patch,
            patch,
            self.label_manager,
            self.get_training_transforms(patch, rotation, None, mirror, dummy_2d, use_mask_for_norm=masked),
        )
        return LabelledAndUnlabelled(labelled, in_background(loader, self.device.type == "cuda")), validation

    def _unlabelled_pool(self) -> list[str]:
        train, val = self.do_split()
        folder = Path(self.preprocessed_dataset_folder)
        base = Path(self.preprocessed_dataset_folder_base)
        found = unlabelled_cases(base, folder, self.fold, self.case_table, set(val) - set(train))
        pool = sorted({*found, *(train if self.settings.unlabelled_pool == "all" else [])})
        if not pool:
            raise UserError(
                f"{type(self).__name__}: fold {self.fold} has no case without masks (case table, labelled: false). "
                "Use unlabelled_pool=all, or a dataset with unlabelled cases."
            )
        self.print_to_log_file(f"Unlabelled pool: {len(pool)} cases, {len(found)} of them without masks.")
        return pool

    # ---------------------------------------------------------------- steps

    def on_train_epoch_start(self) -> None:
        """Start the epoch's own stream of masks and partners."""
        super().on_train_epoch_start()
        self.second_network.train()
        self.draws = torch.Generator().manual_seed(derived_seed(self.settings.seed, self.current_epoch, _DRAWS_SEED))

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step of both networks on labelled and unlabelled patches."""
        weight = cps_weight_at(self.current_epoch, self.settings.cps_start_epoch, self.settings.cps_weight)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            supervised, unlabelled, confidence = self._losses(batch, weight)
        loss = supervised if unlabelled is None else supervised + unlabelled
        self.check_loss(loss, sorted({*batch["keys"], *batch["unlabelled_keys"]}))
        self.backward(loss)
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        self._clip()
        self.optimizer_step()
        parts = {"loss": loss, "supervised": supervised, "confidence": confidence}
        return {name: value.detach().float().cpu().numpy() for name, value in parts.items()}

    def _losses(self, batch: dict[str, Any], weight: float) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the supervised loss of both networks, the weighted unlabelled one and the mean confidence."""
        labelled, *pair = (self._on_device(images) for images in (batch["data"], *batch["unlabelled"]))
        if self.settings.histogram_matching:
            labelled, *pair = match_histograms([labelled, *pair], self.draws)
        if not weight:
            outputs = [network(labelled) for network in self.networks()]
            return self.supervised_loss(outputs, batch), None, torch.ones(())
        passes = self.passes(self.networks(), self._unlabelled_images(pair, labelled), labelled)
        terms = cross_pseudo_supervision(
            passes.plain,
            passes.styled,
            passes.labels,
            cps_weight=weight,
            confidence=self.settings.confidence,
            detach_confidence=self.settings.detach_confidence,
        )
        confidence = (terms["confidence_1"] + terms["confidence_2"]) / 2
        return self.supervised_loss(passes.labelled, batch), terms["total"], confidence

    def supervised_loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Return the sum of both networks' losses on the samples whose case has masks, by the batch's keys.

        A sample of a case without masks is taken out before the loss sees it, whatever its target says.
        """
        rows = [row for row, key in enumerate(batch["keys"]) if is_labelled(self.case_table, str(key))]
        if not rows:
            return torch.stack([full_resolution(output).sum() * 0 for output in outputs]).sum()
        target = _rows(batch["target"], rows, len(batch["keys"]))
        target = [x.to(self.device) for x in target] if isinstance(target, list) else target.to(self.device)
        losses = []
        for output in outputs:
            chosen = _rows(output, rows, len(batch["keys"]))
            if self.settings.supervised_loss == "nnunet":
                losses.append(self.loss(chosen, target))
            else:
                channel = None if self.settings.supervised_loss == "published" else 1
                truth = full_resolution(target)[:, 0].long()
                losses.append(supervised_dice(full_resolution(chosen), truth, channel))
        return torch.stack(losses).sum()

    def _unlabelled_images(self, pair: list[torch.Tensor], labelled: torch.Tensor) -> UnlabelledImages:
        """Give every unlabelled patch a Fourier version; partners are the step's source images, shuffled."""
        images = torch.cat(pair)
        sources = torch.cat([images, labelled])
        order = torch.randperm(len(sources), generator=self.draws)[: len(images)]
        chosen = self.settings
        strength: float | torch.Tensor = 1.0 if chosen.fourier_strength is None else chosen.fourier_strength
        if chosen.fourier_mode == "full_mix":
            limit = _FULL_MIX_STRENGTH if chosen.fourier_strength is None else chosen.fourier_strength
            strength = (torch.rand(len(images), generator=self.draws) * limit).to(images.device)
        styled = fourier_version(
            images,
            sources[order.to(images.device)],
            chosen.fourier_mode,
            strength=strength,
            fraction=chosen.fourier_fraction,
            minimum=chosen.fourier_minimum,
        ).to(memory_format=self.memory_format)
        masks = sample_masks(len(pair[0]), tuple(images.shape[2:]), self.draws).to(self.device)
        (first, second), (first_styled, second_styled) = pair, styled.chunk(2)
        return UnlabelledImages(first, second, first_styled, second_styled, masks)

    def _on_device(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.device, non_blocking=True).to(memory_format=self.memory_format)

    def _clip(self) -> None:
        for network in self.networks():
            torch.nn.utils.clip_grad_norm_(network.parameters(), _CLIP)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log nnU-Net's values, and how far the networks were trusted."""
        super().on_train_epoch_end(train_outputs)
        supervised, confidence = (
            float(np.mean([output[name] for output in train_outputs])) for name in ("supervised", "confidence")
        )
        self.print_to_log_file(f"supervised loss {supervised:.4f}, mean confidence {confidence:.4f}")
        self.log_beside({"supervised_losses": supervised, "mean_confidence": confidence})

    # ---------------------------------------------------------------- checkpoints

    def extra_state(self) -> dict[str, Any]:
        """Keep network 2; its optimiser state is the second group of nnU-Net's own ``optimizer_state``."""
        return {"second_network": self.second_network.state_dict()}

    def load_extra_state(self, extra: dict[str, Any] | None) -> None:
        """Take network 2 over."""
        if not extra or "second_network" not in extra:
            raise UserError(f"{type(self).__name__}: the checkpoint holds no second network, so it cannot go on.")
        self.second_network.load_state_dict(extra["second_network"])

    def on_train_end(self) -> None:
        """Write the final checkpoint, and network 2 as a fold where asked for."""
        super().on_train_end()
        self.after_training()

    def after_training(self) -> None:
        """Write network 2 as a fold where asked for, or where an earlier training's would be taken for this one's."""
        if self.disable_checkpointing or not str(self.fold).isdigit():
            return
        model = Path(self.output_folder_base)
        asked = ["checkpoint_final.pth"] if self.settings.export_second else []
        for name in sorted({*asked, *exported_checkpoints(model, self.fold)}):
            if (Path(self.output_folder) / name).is_file():
                path = export_second(model, self.fold, name)
                both = f"{self.fold} {path.parent.name[5:]}"
                self.print_to_log_file(f"Network 2 is {path}: predict with -f {both} for both.")


def _rows(value: Output, rows: list[int], count: int) -> Any:
    """Return some samples of a batch, of every resolution."""
    if len(rows) == count:
        return value
    return value[rows] if isinstance(value, torch.Tensor) else [level[rows] for level in value]
