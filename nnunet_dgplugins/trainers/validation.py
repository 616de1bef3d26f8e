"""What trainers of tags do after training: predict the validation cases, and find the masks they may be scored by."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dgplugins.data.folds import is_labelled
from nnunet_dgplugins.data.loaders import read_image, read_properties
from nnunet_dgplugins.files import RAW, VALIDATION_MASKS


def predicted_logits(trainer: Any) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Yield name, logits (K, Z, Y, X) and nnU-Net's properties of each validation case of the fold.

    Args:
        trainer: with its network trained; the network is in evaluation mode while cases are yielded.
    """
    trainer.network.eval()
    predictor = nnUNetPredictor(use_mirroring=False, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    _, cases = trainer.do_split()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    for case in cases:
        trainer.print_to_log_file(f"predicting {case}")
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(read_image(dataset, case)))
        yield case, logits.cpu(), read_properties(dataset, case)
    trainer.network.train()


def mask_file(trainer: Any, case: str) -> Path | None:
    """Return the file with the mask of a validation case, None where there is none.

    Masks of cases with tags lie in ``labelsVal`` of the raw dataset; their files in ``labelsTr`` do not count. Under
    fold ``all`` the validation cases train, too, and their masks count as unknown.
    """
    if trainer.fold == "all":
        return None
    name = case + trainer.dataset_json["file_ending"]
    base = Path(trainer.preprocessed_dataset_folder_base)
    places = [Path(os.environ.get(RAW, "")) / base.name / VALIDATION_MASKS]
    if is_labelled(trainer.case_table, case):
        places.append(base / "gt_segmentations")
    return next((place / name for place in places if (place / name).is_file()), None)


def known_mask(trainer: Any, case: str) -> npt.NDArray[np.int64] | None:
    """Return the label values of a validation case (Z, Y, X) on its files' grid; None where no mask is known."""
    if (path := mask_file(trainer, case)) is None:
        return None
    return np.asarray(trainer.plans_manager.image_reader_writer_class().read_seg(os.fspath(path))[0][0], np.int64)
