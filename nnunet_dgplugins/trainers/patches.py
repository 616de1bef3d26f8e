"""What trainers of tagged patches share: 2-D colour images whose tags say which classes they show."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from scipy.ndimage import gaussian_filter

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.loaders import SliceLoader, image_shape, read_image, read_properties
from nnunet_dgplugins.data.tags import image_tags
from nnunet_dgplugins.evaluation.confusion import DatasetScores, Matrix, confusion, dataset_scores
from nnunet_dgplugins.files import CAM_VALIDATION, write_json
from nnunet_dgplugins.methods.dcam.masks import IGNORE
from nnunet_dgplugins.methods.dcam.optimisation import poly, set_learning_rate
from nnunet_dgplugins.settings import DCAMClassifierSettings, DCAMSettings
from nnunet_dgplugins.trainers.base import DGTrainer
from nnunet_dgplugins.trainers.earlier_stage import Stamped
from nnunet_dgplugins.trainers.validation import known_mask, predicted_logits

SCORES = "iou.json"
_FLIPS_SEED = 5
_ZERO_TO_ONE = "RGBTo01Normalization"


class StepwisePoly:
    """Polynomial decay after every step, each group from its own rate.

    Args:
        optimizer: groups with ``initial_lr``.
        steps_per_epoch: returns it; known when the loaders are.
        epochs: returns their number.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps_per_epoch: Callable[[], int], epochs: Callable[[], int]):
        self.optimizer, self._steps_per_epoch, self._epochs, self._done = optimizer, steps_per_epoch, epochs, 0

    def step(self, epoch: int | None = None) -> None:
        """Set the rate of an epoch's first step, or of the next step."""
        self._done = self._done + 1 if epoch is None else epoch * self._steps_per_epoch()
        set_learning_rate(self.optimizer, poly(self._done, self._steps_per_epoch() * self._epochs()))


class TaggedPatchTrainer(Stamped, DGTrainer):
    """Base of trainers that learn from tags of whole patches; label files of training cases are never opened."""

    settings: DCAMClassifierSettings | DCAMSettings
    reads_tags = True

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, compared by name
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False

    @classmethod
    def refusals(cls, configuration: dict[str, Any], dataset_json: dict[str, Any]) -> list[str]:
        """Refuse volumes, region labels, images that are not RGB, and datasets without tags."""
        sentences = super().refusals(configuration, dataset_json)
        if len(configuration["patch_size"]) != 2:
            sentences.append(f"{cls.__name__} works on 2-D patches and has no 3d form: use configuration 2d.")
        if configuration.get("previous_stage"):
            sentences.append(f"{cls.__name__} does not work in a cascade.")
        if any(isinstance(value, list | tuple) for value in dataset_json["labels"].values()):
            sentences.append(f"{cls.__name__} needs classes that exclude each other and refuses region labels.")
        if len(dataset_json["channel_names"]) != 3:
            sentences.append(f"{cls.__name__} reads RGB patches; this dataset has {len(dataset_json['channel_names'])} "
                             "channels.")  # fmt: skip
        elif set(schemes := configuration["normalization_schemes"]) != {_ZERO_TO_ONE}:
            sentences.append(
                f"{cls.__name__} reads RGB patches from 0 to 1, and these plans normalise by "
                f"{', '.join(sorted({*schemes}))}: name the channels rgb_to_0_1 in dataset.json and plan again."
            )
        table = CaseTable.from_dataset_json(dataset_json)
        if table is None or all(case.tags is None for case in table.cases.values()):
            sentences.append(
                f"{cls.__name__} learns from tags, and this dataset has none in its case table: see `dgplugins convert "
                "patch-folder --help` and docs/data.md."
            )
        return sentences

    # ---------------------------------------------------------------- what the dataset says

    @property
    def class_labels(self) -> list[int]:
        """Label values of the classes, in the order of tags and maps; background and ignore are none."""
        return class_labels(self.dataset_json)

    @property
    def table(self) -> CaseTable:
        """The case table, which a dataset of tags has."""
        assert self.case_table is not None
        return self.case_table

    def tags_of(self, case: str) -> npt.NDArray[np.int64]:
        """Return which classes a case shows (C,)."""
        return image_tags(self.table, case, len(self.class_labels))

    # ---------------------------------------------------------------- loaders

    def loaders(
        self, train: int, load_train: Callable[..., dict[str, Any]], val: int, load_val: Callable[..., dict[str, Any]],
        val_batch: int | None = None,
    ) -> tuple[SliceLoader, SliceLoader]:  # fmt: skip
        """Return loaders of patches by number, and set the steps of an epoch."""
        chosen = self.settings
        batch = chosen.batch_size or self.configuration_manager.batch_size
        made = (
            SliceLoader(train, load_train, batch, seed=chosen.seed, steps=chosen.iterations_per_epoch),
            SliceLoader(val, load_val, val_batch or batch),
        )
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = (loader.steps for loader in made)
        return made

    def draws(self, epoch: int, chosen: Sequence[int]) -> np.random.Generator:
        """Return a batch's own stream of draws; a patch that comes twice in an epoch is seen in two ways."""
        return np.random.default_rng([self.settings.seed, epoch, *map(int, chosen), _FLIPS_SEED])

    def take_step(self, loss: torch.Tensor, keys: Any) -> dict[str, Any]:
        """Differentiate, step, and decay the rate where no budget does so."""
        self.check_loss(loss, keys)
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(loss)
        self.optimizer_step()
        if isinstance(self.lr_scheduler, StepwisePoly):
            self.lr_scheduler.step()
        return {"loss": loss.detach().float().cpu().numpy()}

    def stepwise(self, optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, StepwisePoly]:
        """Return the optimiser and its schedule."""
        return optimizer, StepwisePoly(optimizer, lambda: self.num_iterations_per_epoch, lambda: self.num_epochs)

    # ---------------------------------------------------------------- validation

    def truth_of(self, case: str) -> npt.NDArray[np.int64] | None:
        """Return the mask of a validation case on its preprocessed grid (H, W), label values; None where unknown."""
        if (values := known_mask(self, case)) is None:
            return None
        folder = self.dataset_class(self.preprocessed_dataset_folder, [case])
        box = read_properties(folder, case)["bbox_used_for_cropping"]
        return values.transpose(self.plans_manager.transpose_forward)[tuple(slice(*bounds) for bounds in box)][0]

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases; score them over all their pixels where masks are known, never against tags."""
        if not self.disable_checkpointing:  # thresholds and the gate may have been changed since the training
            write_json(Path(self.output_folder_base) / "plans.json", self.plans_manager.plans)
        folder = Path(self.output_folder) / CAM_VALIDATION
        labels = [0] * background_is_class(self.dataset_json) + self.class_labels
        reader = self.plans_manager.image_reader_writer_class()
        folder.mkdir(parents=True, exist_ok=True)
        matrices: list[Matrix] = []
        for case, logits, properties in predicted_logits(self):
            export_prediction_from_logits(
                logits, properties, self.configuration_manager, self.plans_manager, self.dataset_json,
                os.fspath(folder / case), save_probabilities,
            )  # fmt: skip
            if (truth := known_mask(self, case)) is not None:
                path = os.fspath(folder / (case + self.dataset_json["file_ending"]))
                matrices.append(confusion(truth, np.asarray(reader.read_seg(path)[0][0], np.int64), labels))
        summary: dict[str, Any] = {"foreground_mean": {"Dice": None}, "mean": {}, "metric_per_case": []}
        (folder / SCORES).unlink(missing_ok=True)  # of an earlier validation
        if matrices:
            found = dataset_scores(np.sum(matrices, 0))
            write_json(folder / SCORES, {"cases": len(matrices), **described(found, labels, self.dataset_json)})
            self.logger.log_summary("final_val/mean_iou", float(found.miou))
            self.print_to_log_file(f"{len(matrices)} validation patches with masks: {said(found)}")
        else:
            self.print_to_log_file("Validation patches predicted; no masks of them are known, so no scores.")
        # nnU-Net's zip export asks for this file; it is the last one: what has it is validated
        write_json(Path(self.output_folder) / "validation" / "summary.json", summary)


def class_labels(dataset_json: Mapping[str, Any]) -> list[int]:
    """Return the label values of a dataset's classes, ascending; background and ignore are none."""
    return sorted(value for name, value in dataset_json["labels"].items() if name not in ("background", "ignore"))


def background_is_class(dataset_json: Mapping[str, Any]) -> bool:
    """Return whether pixels of no class are a target; in the published sets every pixel is tissue or excluded."""
    return bool(dataset_json.get(settings.KEY, {}).get("protocol", {}).get("background", False))


def positions(values: npt.NDArray[np.int64], labels: list[int], background: bool) -> npt.NDArray[np.uint8]:
    """Return a label map as the method's masks have it: 0 to C - 1 classes, C background, the rest unknown."""
    found = np.full(values.shape, IGNORE, np.uint8)
    for place, value in enumerate([*labels, *([0] if background else [])]):
        found[values == value] = place
    return found


def described(found: DatasetScores, labels: list[int], dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores as JSON content, IoU by the classes' names."""
    names = {value: name for name, value in dataset_json["labels"].items()}
    ious = {names[label]: _number(value) for label, value in zip(labels, found.ious, strict=True)}
    return {"IoU": ious, "mIoU": _number(found.miou), "FwIoU": _number(found.fwiou), "ACC": _number(found.accuracy)}


def said(found: DatasetScores) -> str:
    """Return scores as one line."""
    return f"mIoU {found.miou:.4f}, FwIoU {found.fwiou:.4f}, ACC {found.accuracy:.4f}"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


class Patches:
    """The images of some cases, read when a batch wants them.

    Args:
        trainer: whose preprocessed data they are.
        cases: their names.
    """

    def __init__(self, trainer: TaggedPatchTrainer, cases: list[str]):
        self.cases = cases
        self._dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)

    def size(self, index: int) -> tuple[int, int]:
        """Return rows and columns of an image; only its header is read."""
        _, _, height, width = image_shape(self._dataset, self.cases[index])
        return height, width

    def image(self, index: int) -> torch.Tensor:
        """Return an image (3, H, W), 0 to 1."""
        return torch.from_numpy(read_image(self._dataset, self.cases[index])[:, 0])


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return an image (3, H, W) at that size, bilinear."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def flipped(image: torch.Tensor, rng: np.random.Generator, vertical: bool = True) -> torch.Tensor:
    """Return (C, H, W) mirrored with probability 0.5 along each axis asked for."""
    axes = [axis for axis, drawn in ((-1, rng.random() < 0.5), (-2, vertical and rng.random() < 0.5)) if drawn]
    return image.flip(axes) if axes else image


def cut(image: torch.Tensor, size: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """Return a drawn window of (3 + 3, H, W), image and masks together; small ones are padded, masks with unknown."""
    if image.shape[1:] == size:
        return image
    missing = [max(0, wanted - have) for wanted, have in zip(size, image.shape[1:], strict=True)]
    padding = (0, missing[1], 0, missing[0])
    padded = [F.pad(image[:3], padding), F.pad(image[3:], padding, value=IGNORE)]
    image = torch.cat(padded)
    top, left = (int(rng.integers(0, have - wanted + 1)) for wanted, have in zip(size, image.shape[1:], strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def blurred(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return (3, H, W) blurred with probability 0.5, by a Gaussian of up to one pixel."""
    if rng.random() >= 0.5:
        return image
    sigma = rng.random()
    return torch.from_numpy(gaussian_filter(image.numpy(), (0, sigma, sigma)))
