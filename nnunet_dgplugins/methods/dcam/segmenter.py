"""What both stages deploy: networks from a patch to logits of label values, background first, as nnU-Net wants them.

Their way depends on the content of each patch and is no graph: nnUNet_compile is accepted and has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nnunet_dgplugins.content import content_box, crop
from nnunet_dgplugins.methods.cam import precise
from nnunet_dgplugins.methods.dcam.deeplab import DeepLab
from nnunet_dgplugins.methods.dcam.gate import (
    DEPLOYED_CLOSED,
    GATE_THRESHOLD,
    close,
    open_classes,
    published_gate,
)
from nnunet_dgplugins.methods.dcam.maps import cams, enlarge
from nnunet_dgplugins.methods.dcam.masks import EVALUATION_THRESHOLD, present_classes, scale_jointly
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38

SLOPE = 20.0
GATES = ("closed", "published", "none")


def with_background(scores: Tensor, background: float | Tensor) -> Tensor:
    """Return scores of C classes (N, C, H, W) with those of background in front (N, C + 1, H, W)."""
    first = background if isinstance(background, Tensor) else torch.full_like(scores[:, :1], background)
    return torch.cat([first, scores], 1)


class CAMClassifier(nn.Module):
    """Stage 1 as a segmenter: the class maps of the tissues that the classifier thinks present.

    Args:
        classifier: the tag classifier.
        threshold: classes of a higher probability take part; where there is none, the most probable one if background
            is no class, else none.
        background: pixels whose maps, scaled jointly, all stay below it are background; None: background is no class.
    """

    def __init__(self, classifier: ResNet38, threshold: float = EVALUATION_THRESHOLD, background: float | None = None):
        super().__init__()
        self.classifier, self.threshold, self.background = classifier, threshold, background

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Map patches (N, 3, H, W) to logits (N, C + 1, H, W): 20 times a map, -50 for classes that take no part."""
        out = x.new_full(
            (len(x), self.classifier.fc8.out_channels + 1, *x.shape[2:]), DEPLOYED_CLOSED, dtype=torch.float32
        )
        for index, box in contents(x):
            shown = crop(x[index : index + 1], box).float()
            with torch.autocast(x.device.type, enabled=False):  # the same classes as pseudo masks see
                found = cams(self.classifier, shown)
            size = (shown.shape[-2], shown.shape[-1])
            own = self.background is not None
            present = present_classes(found.logits.sigmoid(), self.threshold, own)[:, :, None, None]
            scaled = scale_jointly(enlarge(found.layers["bn7"], size) * present)
            scores = torch.where(present, SLOPE * scaled, DEPLOYED_CLOSED)
            level = DEPLOYED_CLOSED if self.background is None else SLOPE * self.background
            out[index, :, box[0] : box[1], box[2] : box[3]] = with_background(scores, level)[0]
        return out


class GatedSegmenter(nn.Module):
    """Stage 2 with stage 1 inside: tissues that the classifier thinks absent are closed at inference.

    In training mode it is the segmenter alone, C logits, and one of background behind them where that is a class. The
    classifier never trains and stays in evaluation mode.

    Args:
        segmenter: patches to logits (N, K, H, W), K = C, or C + 1 where background is a class.
        classifier: stage 1's.
        gate: ``closed``, ``published`` or ``none``; see :mod:`~.gate`.
        threshold: a tissue is absent at this probability or below.

    Raises:
        ValueError: no such gate.
    """

    def __init__(
        self, segmenter: nn.Module, classifier: ResNet38, gate: str = "closed", threshold: float = GATE_THRESHOLD
    ):
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate is one of {GATES}, got {gate!r}.")
        self.segmenter, self.classifier, self.gate, self.threshold = segmenter, classifier.eval(), gate, threshold
        self.classifier.requires_grad_(False)

    def train(self, mode: bool = True) -> GatedSegmenter:
        """Set the mode; the classifier stays in evaluation."""
        super().train(mode)
        self.classifier.eval()
        return self

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Map patches (N, 3, H, W) to K logits in training, to logits (N, C + 1, H, W) of label values at inference."""
        if self.training:
            trained: Tensor = self.segmenter(x)
            return trained
        count = self.classifier.fc8.out_channels
        out = x.new_full((len(x), count + 1, *x.shape[2:]), DEPLOYED_CLOSED, dtype=torch.float32)
        whole = None if isinstance(self.segmenter, DeepLab) else self.segmenter(x).float()  # a U-Net needs the padding
        for index, box in contents(x):
            shown = crop(x[index : index + 1], box).float()
            scores = precise(self.segmenter(shown) if whole is None else crop(whole[index : index + 1], box))
            # closed for good where background is no class; a tissue wins however low all tissues' logits are
            own = scores.shape[1] > count
            background = scores[:, count:] if own else -math.inf
            scores = scores[:, :count]
            if self.gate != "none":
                with torch.autocast(x.device.type, enabled=False):
                    probabilities = self.classifier(shown).sigmoid()
                scores = self._gated(scores, probabilities, own)
            out[index, :, box[0] : box[1], box[2] : box[3]] = moderate(with_background(scores, background))[0]
        return out

    def _gated(self, scores: Tensor, probabilities: Tensor, background: bool) -> Tensor:
        if self.gate == "published":
            return published_gate(scores, probabilities, self.threshold)
        return close(scores, open_classes(probabilities, self.threshold, background))


def moderate(logits: Tensor) -> Tensor:
    """Return logits (N, K, ...) of the same softmax from -50 to 0: nnU-Net's predictor sums them in half precision."""
    return (logits - logits.amax(1, keepdim=True)).clamp(min=DEPLOYED_CLOSED)


def contents(x: Tensor) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """Yield index and content box of each patch of (N, C, H, W) that shows something; nnU-Net pads with zeros."""
    for index, item in enumerate(x):
        if (box := content_box(item)) is not None:
            yield index, box
