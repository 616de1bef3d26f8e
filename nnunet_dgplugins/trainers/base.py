"""What all trainers share: settings, refusals, strict splits, seeds, safe checkpoints, progress with ETA."""

from __future__ import annotations

import io
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dgplugins import __version__, settings
from nnunet_dgplugins.data import folds
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UnsupportedFeature, UserError
from nnunet_dgplugins.files import RESULTS, read_json, replacing
from nnunet_dgplugins.system import keep_freed_memory
from nnunet_dgplugins.trainers import loggers
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

_LATEST, _BEST, _FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"
_EARLIER = "earlier_"  # before the names of checkpoints that a training begun anew finds in its folder


class DGTrainer(nnUNetTrainer):
    """Base of all trainers of this package.

    A subclass names its settings class, says which nnU-Net features its method cannot serve (``refusals``) and
    overrides the hooks its method changes. Settings are resolved once and written into the plans that nnU-Net saves
    beside the model, so that prediction rebuilds the same network.
    """

    settings_class: ClassVar[type[settings.TrainingSettings]] = settings.TrainingSettings
    #: settings that change speed or comfort but not the result; they may differ between runs of one model
    free_settings: ClassVar[frozenset[str]] = frozenset({"keep_freed_memory"})
    #: whether cases with tags, not cases with masks, train and validate
    reads_tags: ClassVar[bool] = False
    #: of the learning rate's polynomial decay, also under a budget; 0 keeps the rate
    lr_exponent: float = 0.9

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, compared by name
    ):
        self._refuse(plans, configuration, dataset_json)
        folder = model_folder(type(self).__name__, plans, configuration)
        resolved = self._resolve_settings(plans, configuration, folder, dataset_json)
        folds.check_fold(plans["dataset_name"], fold)
        loggers.asked()
        self.require_inputs(plans, configuration, fold)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = resolved
        self.case_table = CaseTable.from_dataset_json(dataset_json)
        self.num_epochs = resolved.epochs
        self.initial_lr = resolved.initial_lr
        # the newest checkpoint is written by our on_epoch_end after every epoch
        self.save_every = self.num_epochs + 1
        self._write_into_plans()
        self._epoch_seconds: list[float] = []
        if device.type == "cpu" and resolved.keep_freed_memory:
            self.print_to_log_file(f"CPU memory: {keep_freed_memory()}")
        # also when continuing: without a checkpoint nnU-Net starts afresh
        seed_everything(resolved.seed, 0)

    # ---------------------------------------------------------------- settings and refusals

    @classmethod
    def refusals(cls, configuration: dict[str, Any], dataset_json: dict[str, Any]) -> list[str]:
        """Return one sentence per feature of this plans configuration or dataset that the method cannot serve."""
        return []

    @classmethod
    def _refuse(cls, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> None:
        content = flattened(plans, configuration)
        sentences = cls.refusals(content, dataset_json)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sentences.append(f"{cls.__name__} trains on one GPU: start it without -num_gpus.")
        protocol = dataset_json.get(settings.KEY, {}).get("protocol", {})
        if protocol.get("supervision") == "tags" and not cls.reads_tags:
            sentences.append(
                f"{cls.__name__} learns from masks and this dataset has tags: train a trainer of tags, or convert the "
                "data with --supervision masks."
            )
        if sentences:
            raise UnsupportedFeature(" ".join(sentences))

    @classmethod
    def _resolve_settings(
        cls, plans: dict[str, Any], configuration: str, model_folder: Path | None, dataset_json: dict[str, Any]
    ) -> settings.TrainingSettings:
        resolved = settings.resolve(cls.settings_class, plans, configuration, cls.__name__)
        trained = settings_beside_model(model_folder, configuration, cls.__name__)
        resolved = cls.complete_settings(resolved, trained or {}, dataset_json)
        if trained:
            asked = settings.to_dict(resolved)
            different = [
                f"{key}: the model has {trained[key]!r}, asked for {value!r}"
                for key, value in asked.items()
                if key in trained and trained[key] != value and key not in cls.free_settings
            ]
            if different:
                raise UserError(
                    f"{cls.__name__}: {model_folder} holds checkpoints trained with other settings ("
                    + "; ".join(different)
                    + "). Use the same settings, another plans name (dgplugins configure ... -o NAME), "
                    "or move the folder."
                )
        return resolved

    @classmethod
    def complete_settings(
        cls, resolved: settings.TrainingSettings, trained: dict[str, Any], dataset_json: dict[str, Any]
    ) -> settings.TrainingSettings:
        """Replace values that say ``auto`` by what they stand for; ``trained`` holds an existing model's values."""
        return resolved

    def _write_into_plans(self) -> None:
        """Write resolved settings where nnU-Net saves them (plans) and where the network is built from."""
        content = settings.to_dict(self.settings)
        own = self.plans_manager.plans["configurations"][self.configuration_name]
        for configuration in (own, self.configuration_manager.configuration):
            configuration[settings.KEY] = {
                **configuration.get(settings.KEY, {}),
                type(self).__name__: content,
                **self.beside_settings(),
            }
        self.plans_manager.plans.setdefault(settings.KEY, {})["version"] = __version__

    def beside_settings(self) -> dict[str, Any]:
        """Return what prediction needs in the plans beside the settings to rebuild the network."""
        return {}

    def _set_in_plans(self, key: str, value: Any) -> None:
        """Set a configuration value in the plans that are saved beside the model and in the live copy."""
        self.plans_manager.plans["configurations"][self.configuration_name][key] = value
        self.configuration_manager.configuration[key] = value

    # ---------------------------------------------------------------- hooks every method needs

    @classmethod
    def require_inputs(cls, plans: dict[str, Any], configuration: str, fold: int | str) -> None:
        """Refuse to begin where an earlier stage's result is missing; nothing has been written yet."""

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing where the network has no deep supervision switch."""
        if hasattr(getattr(self.network, "decoder", None), "deep_supervision"):
            super().set_deep_supervision_enabled(enabled)

    def _do_i_compile(self) -> bool:
        # none of our steps is one graph; nnUNet_compile is accepted and has no effect
        return False

    def sets_steps(self) -> bool:
        """Return whether the trainer itself says how many steps an epoch has; most count passes over the data."""
        return True

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return training and validation cases of the fold; a fold or case that does not exist is an error."""
        train, val, where = folds.load_fold(
            Path(self.preprocessed_dataset_folder_base),
            Path(self.preprocessed_dataset_folder),
            self.fold,
            self.case_table,
            tags=self.reads_tags,
        )
        self.print_to_log_file(f"Fold {self.fold} of {where}: {len(train)} training, {len(val)} validation cases.")
        return train, val

    # ---------------------------------------------------------------- seeds, progress, checkpoints

    def on_train_start(self) -> None:
        """Refuse to begin without the start weights that the settings name; log the settings; do what nnU-Net does.

        A training that goes on does without the file.
        """
        path = getattr(self.settings, "start_weights", None)
        if path and self.current_epoch == 0 and not Path(path).is_file():
            raise UserError(f"{type(self).__name__}: start_weights: no file {path}.")
        self.print_to_log_file(f"Settings of {type(self).__name__}: {settings.to_dict(self.settings)}")
        for half_written in Path(self.output_folder).glob(".tmp-*"):  # by a process that was killed while saving
            half_written.unlink(missing_ok=True)
        super().on_train_start()
        self._put_aside_an_earlier_training()
        loggers.attach(self, settings.to_dict(self.settings))

    def _put_aside_an_earlier_training(self) -> None:
        """Rename the checkpoints of a training that this one replaces, lest ``--c`` takes them for its own."""
        if self.current_epoch or self.disable_checkpointing:
            return
        earlier = [path for name in (_LATEST, _BEST, _FINAL) if (path := Path(self.output_folder, name)).is_file()]
        kept = Path(self.output_folder, f"{_EARLIER}{_FINAL}")
        if kept.is_file() and earlier and earlier[-1].name != _FINAL:
            for path in earlier:  # of an aborted training, which does not replace a finished one
                path.unlink()
            return
        for path in earlier:
            os.replace(path, path.with_name(f"{_EARLIER}{path.name}"))
        if earlier:
            self.print_to_log_file(
                f"This training starts anew (no --c); checkpoints of the one before are kept as {_EARLIER}*: rename "
                "them back to go on with that one."
            )

    def on_train_end(self) -> None:
        """Write the final checkpoint and stop the loaders of ours."""
        loggers.draw_progress(self)
        super().on_train_end()
        loggers.finish(self)
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "close"):
                loader.close()

    def on_train_epoch_start(self) -> None:
        """Reseed from (seed, epoch), so that a resumed run draws what an uninterrupted one would."""
        seed_everything(self.settings.seed, self.current_epoch + 1)
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "start_epoch"):
                loader.start_epoch(self.current_epoch)
        super().on_train_epoch_start()

    def log_beside(self, values: dict[str, float]) -> None:
        """Hand this epoch's values of a method's own to W&B, TensorBoard and MLflow; nnU-Net's own curves are fixed."""
        for logger in self.logger.loggers:
            for key, value in values.items():
                logger.log(key, value, self.current_epoch)

    def on_epoch_start(self) -> None:
        """Remember when the epoch began, for the ETA."""
        self._epoch_started = time.monotonic()
        super().on_epoch_start()

    def on_epoch_end(self) -> None:
        """Do what nnU-Net does, say the time left, and save the newest state, best value included."""
        super().on_epoch_end()
        self._epoch_seconds.append(time.monotonic() - self._epoch_started)
        left = max(0, self.num_epochs - self.current_epoch) * float(np.median(self._epoch_seconds[-10:]))
        self.print_to_log_file(f"Epoch {self.current_epoch}/{self.num_epochs} done, about {_duration(left)} left.")
        if self.current_epoch < self.num_epochs:
            # save_checkpoint counts from the running epoch, which nnU-Net has just advanced
            self.current_epoch -= 1
            self.save_checkpoint(os.path.join(self.output_folder, _LATEST))
            self.current_epoch += 1

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint in one step: the previous file stays until the new one is whole."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with replacing(filename) as temporary:
            if not (extra := self.extra_state()):
                super().save_checkpoint(str(temporary))
                return
            content = io.BytesIO()  # nnU-Net hands its entries to torch.save only
            super().save_checkpoint(content)
            content.seek(0)
            entries = torch.load(content, map_location="cpu", weights_only=False)  # written in the line above
            torch.save({**entries, settings.KEY: extra}, temporary)

    def extra_state(self) -> dict[str, Any]:
        """Return what a method keeps in its checkpoints beyond nnU-Net's own keys, as tensors and plain values.

        Random states and loaders are not among it: both start anew from (seed, epoch) at every epoch.
        """
        return {}

    def load_extra_state(self, extra: dict[str, Any] | None) -> None:
        """Take over what ``extra_state`` returned; None: the checkpoint has nothing of the kind."""

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Load a checkpoint; a half-written one gives way to the newest readable one of the fold, and it is said."""
        if isinstance(filename_or_checkpoint, str):
            path, content = self._readable_checkpoint(Path(filename_or_checkpoint))
            super().load_checkpoint(str(path))
        else:  # nnU-Net's signature names a dict, but its code reads files alone
            content = filename_or_checkpoint
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / _LATEST
                torch.save(content, path)
                super().load_checkpoint(str(path))
        self.load_extra_state(content.get(settings.KEY))

    def _readable_checkpoint(self, wanted: Path) -> tuple[Path, dict[str, Any]]:
        candidates = [wanted]
        if wanted.name in (_LATEST, _FINAL):
            others = [wanted.with_name(name) for name in (_LATEST, _BEST, _FINAL) if name != wanted.name]
            candidates += sorted((p for p in others if p.is_file()), key=lambda p: -p.stat().st_mtime)
        complaints = []
        for candidate in candidates:
            try:
                content = read_checkpoint(candidate)
            except UserError as error:
                complaints.append(f"{candidate.name} ({type(error.__cause__ or error).__name__})")
                continue
            if complaints:
                self.print_to_log_file(
                    f"Cannot read {', '.join(complaints)}; continuing from {candidate.name} instead."
                )
            return candidate, content
        raise UserError(f"{type(self).__name__}: no readable checkpoint in {wanted.parent}: {', '.join(complaints)}.")

    def after_training(self) -> None:
        """Write what a method keeps beside its final checkpoint; called again where a kill may have come between."""

    def check_loss(self, loss: torch.Tensor, keys: Any) -> None:
        """Stop with the batch's cases when the loss is not finite, before it reaches the weights."""
        if not torch.isfinite(loss.detach()):
            raise UserError(
                f"{type(self).__name__}: the loss is {float(loss.detach())} at epoch {self.current_epoch}, "
                f"cases {', '.join(map(str, keys))}. Look at these images, or lower initial_lr."
            )

    def backward(self, loss: torch.Tensor) -> None:
        """Differentiate, scaled in mixed precision."""
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def optimizer_step(self) -> None:
        """Step the optimiser, and the scale in mixed precision."""
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the step: float16 on CUDA, bfloat16 on CPU when asked for."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", enabled=self.settings.amp)
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.cpu_bfloat16)


def derived_seed(*numbers: int) -> int:
    """Return one seed made of several numbers (seed, epoch, rank, ...)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch from several numbers (seed, epoch, rank, ...)."""
    value = derived_seed(*numbers)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def flattened(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Return a plans configuration with what it inherits.

    Raises:
        UserError: the plans have no such configuration.
    """
    content = plans["configurations"].get(configuration)
    if content is None:
        raise UserError(
            f"Plans {plans.get('plans_name')} have no configuration {configuration}; "
            f"they have {', '.join(plans['configurations'])}."
        )
    parent = content.get("inherits_from")
    return {**(flattened(plans, parent) if parent else {}), **content}


def model_folder(trainer: str, plans: dict[str, Any], configuration: str) -> Path | None:
    """Return where nnU-Net keeps a trainer's folds, None while ``nnUNet_results`` is not set."""
    results = os.environ.get(RESULTS)
    if not results:
        return None
    return Path(results) / plans["dataset_name"] / f"{trainer}__{plans['plans_name']}__{configuration}"


def settings_beside_model(folder: Path | None, configuration: str, trainer: str) -> dict[str, Any] | None:
    """Return a block of settings kept beside a model that has checkpoints, None if there is none.

    Args:
        folder: of the model, with its folds.
        configuration: of the plans.
        trainer: name of the block: the trainer, or what its ``beside_settings`` calls an earlier stage.
    """
    if folder is None or not (folder / "plans.json").is_file() or not any(folder.glob("fold_*/checkpoint_*.pth")):
        return None
    return settings.configuration_block(read_json(folder / "plans.json"), configuration, trainer) or None
