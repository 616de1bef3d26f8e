"""Pseudo labels of equivariant CAMs: the fused map of all modalities above a threshold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.loaders import read_image, read_properties
from nnunet_dgplugins.data.raw_dataset import RawDataset
from nnunet_dgplugins.data.tags import slice_tags
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.panels import Panel
from nnunet_dgplugins.files import CAM_VALIDATION, VALIDATION_MASKS
from nnunet_dgplugins.methods.equivariant.maps import FUSIONS, KINDS, fuse, fuse_positive
from nnunet_dgplugins.methods.equivariant.segmenter import CAMSegmenter, logits_of
from nnunet_dgplugins.trainers.cam_validation import in_file_geometry
from nnunet_dgplugins.trainers.deployed import Rebuilt
from nnunet_dgplugins.trainers.label_drawer import LABELS, Choices, Drawer, Masks

GATES = ("tag", "predicted", "none")
_SLICES = 16  # run together


class EquivariantDrawer(Drawer):
    """See :class:`~nnunet_dgplugins.trainers.label_drawer.Drawer`."""

    takes = frozenset({"threshold", "fusion", "gate", "kind"})
    unit = "slices"

    def __init__(self, model: Rebuilt, choices: Choices, table: CaseTable):
        super().__init__(model, choices, table)
        assert isinstance(model.network, CAMSegmenter)
        self._network = network = model.network
        self._gate, self._kind = choices.gate or GATES[0], choices.kind or KINDS[0]
        fusion = network.fusion if choices.fusion is None else choices.fusion
        self._fusion = int(fusion) if isinstance(fusion, str) and fusion.isdigit() else fusion
        if self._fusion not in (*FUSIONS, *range(len(network.networks))):
            raise UserError(f"--fusion {self._fusion}: expected mean, max or the number of a modality.")
        if self._gate not in GATES or self._kind not in KINDS:
            raise UserError(f"gate is one of {', '.join(GATES)}, kind one of {', '.join(KINDS)}; got {choices}.")
        self._threshold: float = network.threshold if choices.threshold is None else choices.threshold
        self.advice = (
            f"Lower --threshold ({self._threshold:g} now); the model's {CAM_VALIDATION} may have the Dice at each."
        )

    @property
    def choices(self) -> dict[str, Any]:
        """Threshold, fusion, gate and kind of map."""
        return {"threshold": self._threshold, "fusion": self._fusion, "gate": self._gate, "kind": self._kind}

    @property
    def channel_names(self) -> Mapping[str, str] | None:
        """The modalities' own names: those of the weak dataset only say that nothing is to be normalised."""
        names = self.table.protocol.get("modalities")
        return {str(i): name for i, name in enumerate(names)} if names else None

    def draw(self, cases: Sequence[str]) -> list[tuple[Masks, dict[str, Any]]]:
        """Return each case's mask and properties."""
        found = [self._drawn(case) for case in cases]
        return [({LABELS: mask}, properties) for mask, _, properties in found]

    def panel(self, case: str, raw: RawDataset, folder: Path) -> Panel:
        """Return the slice with the largest mask."""
        mask, shown, _ = self._drawn(case)
        z = int(mask.reshape(len(mask), -1).sum(1).argmax())
        images, _ = self.reader.read_images([os.fspath(path) for path in raw.training[case].images])
        truth_path = raw.folder / VALIDATION_MASKS / f"{case}{raw.file_ending}"
        truth = self.reader.read_seg(os.fspath(truth_path))[0][0, z] == 1 if truth_path.is_file() else None
        names = self.table.protocol.get("modalities") or [f"channel {i}" for i in range(len(images))]
        return Panel(
            f"{case}, slice {z + 1} of {len(mask)}", dict(zip(names, images[:, z], strict=True)), shown[z],
            mask[z] > 0, truth,
        )  # fmt: skip

    def _drawn(self, case: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64], dict[str, Any]]:
        """Return mask and map (Z, Y, X) of a case, and nnU-Net's properties."""
        properties = read_properties(self.dataset, case)
        tags = slice_tags(self.table, case, properties, self.model.plans.transpose_forward)
        maps = self._maps(torch.from_numpy(read_image(self.dataset, case)), torch.from_numpy(tags))
        mask, shown = in_file_geometry(
            logits_of(maps, self._threshold),
            self._threshold,
            self.model.plans,
            self.model.configuration,
            self.model.labels,
            properties,
        )
        return mask, shown, properties

    def _maps(self, data: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        """Return the fused maps (Z, Y, X) of a preprocessed case (M, Z, Y, X)."""
        device = next(self._network.parameters()).device
        made = []
        for start in range(0, data.shape[1], _SLICES):
            shown = data[:, start : start + _SLICES].transpose(0, 1).to(device)
            found = self._network.found(shown, self._kind)
            if self._gate == "tag":
                own = tags[start : start + _SLICES].to(device).view(-1, 1, 1)
                fused = fuse_positive(found, self._fusion) * own
            else:
                fused = fuse(found.maps if self._gate == "none" else found.gated(), self._fusion)
            made.append(fused)
        return torch.cat(made).cpu()
