"""All modalities' networks with gate, fusion and threshold, in the form nnU-Net's predictor wants a network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dgplugins.content import Box, Field, content_box, crop, margins, tiled_warning
from nnunet_dgplugins.methods.equivariant.maps import FUSIONS, Found, foreground_maps, fuse
from nnunet_dgplugins.methods.equivariant.network import STRIDE, UNetCAM

#: slope of the logit; the predictor adds tiles in half precision, where a slope of 1 would be too coarse
SLOPE = 20.0
_ABSENT = (1.0, 0.0)  # logits of a slice that shows nothing


class CAMSegmenter(nn.Module):
    """Segments whole slices: zero padding removed, content in the middle of the field, CAMs, back to the slice.

    Args:
        modalities: M, the number of input channels.
        width_divisor: of each network, see :class:`UNetCAM`.
        field: rows and columns of the frame that every slice stands in, multiples of 8; larger slices have a larger
            one. The statistics of a slice then always include as much black as in training.
        threshold: of the fused map, 0 to 1.
        fusion: ``mean``, ``max`` or the number of a modality.
        gated: empty the map of a network that calls the slice negative.
        dropout: before the classifier, in training.
    """

    def __init__(
        self,
        modalities: int,
        width_divisor: int,
        field: Field,
        threshold: float = 0.5,
        fusion: str | int = "mean",
        gated: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if fusion not in (*FUSIONS, *range(modalities)):
            raise ValueError(f"fusion {fusion!r} names no modality of {modalities}.")
        self.field, self.threshold, self.fusion, self.gated = field, threshold, fusion, gated
        self._warned = False
        self.networks = nn.ModuleList(UNetCAM(width_divisor, dropout=dropout) for _ in range(modalities))

    def members(self) -> list[UNetCAM]:
        """The networks, one per modality."""
        return [network for network in self.networks if isinstance(network, UNetCAM)]

    def found(self, x: Tensor, kind: str = "cam", boxes: Sequence[Box | None] | None = None) -> Found:
        """Return logits (M, B, 2) and maps (B, M, H, W) of slices (B, M, H, W), zero-padded or not.

        Maps are 0 outside a slice's content; a slice of zeros is absent without asking the networks. ``boxes`` are the
        slices' content boxes where the caller has them.
        """
        boxes = [content_box(item) for item in x] if boxes is None else boxes
        frames = {
            index: framed(crop(x[index], box).float(), self.field) for index, box in enumerate(boxes) if box is not None
        }
        maps = x.new_zeros(x.shape, dtype=torch.float32)
        logits = torch.tensor(_ABSENT, device=x.device).repeat(x.shape[1], len(x), 1)
        with torch.autocast(x.device.type, enabled=False):
            for shape in {frame.shape for frame in frames.values()}:
                chosen = [index for index, frame in frames.items() if frame.shape == shape]
                made = foreground_maps(self.members(), torch.stack([frames[index] for index in chosen]), kind)
                logits[:, chosen] = made.logits
                for place, index in enumerate(chosen):
                    top, bottom, left, right = boxes[index]  # type: ignore[misc]
                    maps[index, :, top:bottom, left:right] = unframed(made.maps[place], (bottom - top, right - left))
        return Found(logits, maps)

    def fused(self, found: Found) -> Tensor:
        """Return one map per slice (B, H, W), gated and fused as deployed."""
        return fuse(found.gated() if self.gated else found.maps, self.fusion)

    @torch.compiler.disable  # the way depends on the content of each slice
    def forward(self, x: Tensor) -> Tensor:
        """Map slices (B, M, H, W) to logits (B, 2, H, W): 0, and 20 * (map - threshold), which wins above it."""
        boxes = [content_box(item) for item in x]
        if not self._warned and (text := tiled_warning(boxes, (int(x.shape[-2]), int(x.shape[-1])))):
            self._warned = True
            warnings.warn(text, stacklevel=2)
        return logits_of(self.fused(self.found(x, boxes=boxes)), self.threshold, 1)


def logits_of(maps: Tensor, threshold: float, dim: int = 0) -> Tensor:
    """Return logits of background, 0, and target, 20 * (map - threshold), stacked at ``dim``."""
    present = SLOPE * (maps - threshold)
    return torch.stack([torch.zeros_like(present), present], dim)


def shown_in(image: Tensor, field: Field) -> Tensor:
    """Return a slice (M, H, W) as the networks see it: its content in the middle of the field, float32."""
    return framed(crop(image, content_box(image)).float(), field)


def framed(content: Tensor, field: Field) -> Tensor:
    """Return content (..., h, w) in the middle of a field of zeros; a larger one, of multiples of 8, where it must."""
    height, width = content.shape[-2:]
    rows, columns = (max(rounded(size), least) for size, least in zip((height, width), field, strict=True))
    return F.pad(content, margins(height, width, (rows, columns)))


def unframed(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle (..., h, w) of a frame, where :func:`framed` put content of that size."""
    left, _, top, _ = margins(*size, (frame.shape[-2], frame.shape[-1]))
    return frame[..., top : top + size[0], left : left + size[1]]


def rounded(size: int) -> int:
    """Return the next multiple of 8, which the poolings can divide."""
    return STRIDE * -(-size // STRIDE)
