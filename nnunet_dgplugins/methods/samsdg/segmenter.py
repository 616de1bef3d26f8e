"""The networks of SAM-SDG in the form nnU-Net's predictor wants a network: whole slices in, logits out.

Four slices share a canvas, and SAM's global attention lets each of them see the others. Two ways to make groups:

- ``forward`` is what nnU-Net calls, with one slice or several. Each slice fills all four tiles of a canvas of its own,
  and the four answers, which differ because tiles lie at different places, are averaged. A slice's result depends on
  that slice alone: not on the order of cases, its neighbours in the batch or the zero padding around it.
- ``segment_four`` takes neighbouring slices in order and puts four on a canvas, as the paper does, for a quarter of
  the encoder's work. A result then also depends on the neighbours. A last canvas that is not full is filled up with
  its last slice (the released code drops those slices).

In both, a slice where the coarse network finds no class takes no place on a canvas with ``empty="background"``: all of
it is background and the encoder is not run. With ``empty="full_box"`` (published) the box is then the whole tile.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_dgplugins.content import CLOSED, Box, Field, content_box, from_canvas, tiled_warning
from nnunet_dgplugins.methods.sam_parts import disabled_autocast, expected_dice
from nnunet_dgplugins.methods.samsdg.boxes import PUBLISHED_SIDE, BoxRule, find_boxes, jittered
from nnunet_dgplugins.methods.samsdg.canvas import TILES, filled_up, merge, on_canvas
from nnunet_dgplugins.methods.samsdg.decoder import BoxDecoder
from nnunet_dgplugins.methods.samsdg.preprocess import CHANNELS, resized, seen

EMPTY = ("background", "full_box")
_HASH_BYTES = 32
_SLICES_AT_A_TIME = 4  # of the coarse network


class Prompts(NamedTuple):
    """What the coarse network says of B slices and K classes.

    Args:
        boxes: (B, K, 4) in pixels of SAM's tiles; where nothing was found, as the rule says.
        found: (B, K) bool, whether it found the class at all.
        peak: (B, K) its highest probability.
    """

    boxes: Tensor
    found: Tensor
    peak: Tensor


class SliceNetwork(nn.Module):
    """What both segmenters do around their networks: content of a slice in, logits of the slice out.

    Args:
        channels: input channels that are shown, one or three.
        background: put a background channel of zeros first (classes); without it channels are regions of their own.
        threshold: a class wins where its probability is above.
        field: rows and columns that are shown at least, see :func:`~.preprocess.seen`.
        equalise: spread the histogram, as published.
    """

    def __init__(
        self, channels: Sequence[int], background: bool, threshold: float, field: Field | None, equalise: bool
    ):
        super().__init__()
        self.channels, self.background, self.field, self.equalise = tuple(channels), background, field, equalise
        self.shift = math.log(threshold / (1 - threshold))
        self._warned = False

    def seen(self, x: Tensor) -> Tensor | None:
        """Return what is seen of one slice (C, H, W): (3, h, w) in [0, 1]; None for a slice of zeros."""
        return seen(x, self.channels, self.field, self.equalise)

    def segment(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, heads, H, W) and the method's own confidence (B, K), in [0, 1]."""
        raise NotImplementedError

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, heads, H, W) of slices (B, C, H, W); what nnU-Net's predictor calls with a patch.

        The way depends on the content of each slice and is no graph: nnUNet_compile is accepted and has no effect.
        """
        size = (int(x.shape[-2]), int(x.shape[-1]))
        if not self._warned and (text := tiled_warning([content_box(item) for item in x], size)):
            self._warned = True
            warnings.warn(text, stacklevel=3)
        return self.segment(x)[0]

    def _on_slice(self, logits: Tensor | None, box: Box | None, x: Tensor, num_classes: int) -> Tensor:
        """Bring logits (K, s, s) of what was seen back to the slice (C, H, W); None: nothing is there."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        if logits is None:
            found = torch.full((num_classes, *size), CLOSED, device=x.device)
        else:
            found = from_canvas(logits, box, size, CLOSED, self.field).clamp(CLOSED, -CLOSED)
            found[(logits == CLOSED).flatten(1).all(1)] = CLOSED  # resizing rounds
        return torch.cat([torch.zeros_like(found[:1]), found]) if self.background else found


class CoarseSegmenter(SliceNetwork):
    """Step 1 alone: the coarse network as a segmentation network.

    Args:
        network: images (B, 3, size, size) in [0, 1] to logits (B, K, size, size).
        size: side of its images in pixels.
        num_classes: K.
        channels: see :class:`SliceNetwork`, and so the rest.
        background: put a background channel of zeros first.
        threshold: the paper's comparison takes 0.75.
        field: rows and columns that are shown at least.
        equalise: spread the histogram.
    """

    def __init__(
        self,
        network: nn.Module,
        size: int,
        num_classes: int,
        *,
        channels: Sequence[int] = (0,),
        background: bool = True,
        threshold: float = 0.5,
        field: Field | None = None,
        equalise: bool = True,
    ):
        super().__init__(channels, background, threshold, field, equalise)
        self.network, self.size, self.num_classes = network, size, num_classes

    def images(self, x: Sequence[Tensor] | Tensor) -> Tensor:
        """Return what the network sees of slices (C, H, W) each: (B, 3, size, size); black for a slice of zeros."""
        found = (self.seen(item) for item in x)
        black = x[0].new_zeros((CHANNELS, self.size, self.size), dtype=torch.float32)
        return torch.stack([black if image is None else resized(image, self.size) for image in found])

    def segment(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Segment slices one by one, so that none depends on its neighbours.

        Args:
            x: (B, C, H, W) as nnU-Net preprocessed them, zero-padded or not.

        Returns:
            Logits (B, heads, H, W), finite, and the Dice that each mask expects of itself (B, K); 1 for a slice that is
            zero everywhere.
        """
        logits, confidence = [], torch.ones((len(x), self.num_classes), device=x.device)
        for index, item in enumerate(x):
            box = content_box(item)
            found = None
            if box is not None:
                found = self.network(self.images(item[None]))[0].float() - self.shift
                confidence[index] = expected_dice(found[None])[0]
            logits.append(self._on_slice(found, box, item, self.num_classes))
        return torch.stack(logits), confidence


class SAMSDGSegmenter(SliceNetwork):
    """Steps 2 and 3: boxes of the frozen coarse network prompt SAM, whose mask decoder alone is trained.

    Args:
        encoder: SAM's frozen image encoder; ``encoder(canvases)`` gives a list whose last map is the neck's
            (:class:`nnunet_dgplugins.sam.frozen.FrozenEncoder` fits).
        decoder: trained mask decoder with the frozen prompt encoder.
        coarse: step 1's network, images (B, 3, s, s) in [0, 1] to logits (B, K, s, s); frozen here.
        coarse_size: side s of its images.
        rule: how a box comes from its probabilities.
        empty: ``background`` or ``full_box``: what a class is where the coarse network does not find it.
        pixels: mean and standard deviation, for values 0..255, that the encoder was trained with; None: it gets
            [0, 1] as it is, as published.
        channels: see :class:`SliceNetwork`, and so the rest.
        background: put a background channel of zeros first.
        threshold: theta 2.
        field: rows and columns that are shown at least.
        equalise: spread the histogram.
    """

    coarse_hash: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: BoxDecoder,
        coarse: nn.Module,
        coarse_size: int,
        *,
        rule: BoxRule | None = None,
        empty: str = "background",
        pixels: tuple[Sequence[float], Sequence[float]] | None = None,
        channels: Sequence[int] = (0,),
        background: bool = True,
        threshold: float = 0.5,
        field: Field | None = None,
        equalise: bool = True,
    ):
        super().__init__(channels, background, threshold, field, equalise)
        if empty not in EMPTY:
            raise ValueError(f"empty is one of {EMPTY}, got {empty!r}.")
        self.image_encoder, self.decoder = encoder, decoder
        self.coarse, self.coarse_size = coarse.requires_grad_(False).eval(), coarse_size
        self.rule, self.empty, self.pixels = rule or BoxRule(), empty, pixels
        # which step 1 this is; the weights themselves are part of the state dict
        self.register_buffer("coarse_hash", torch.zeros(_HASH_BYTES, dtype=torch.uint8))

    @property
    def num_classes(self) -> int:
        """Foreground classes K."""
        return self.decoder.num_classes

    def train(self, mode: bool = True) -> SAMSDGSegmenter:
        """Keep everything but the mask decoder in evaluation mode: no batch statistic of step 1 ever moves."""
        super().train(False)
        self.training = mode
        self.decoder.mask_decoder.train(mode)
        return self

    def adopt_coarse(self, state: Mapping[str, Any], hash: str) -> None:
        """Take step 1's weights and their SHA-256 (64 hex digits)."""
        self.coarse.load_state_dict(state)
        self.coarse_hash.copy_(torch.tensor(list(bytes.fromhex(hash)), dtype=torch.uint8))

    def tiles(self, x: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        """Return what is seen of slices (C, H, W) each, none of them all zero.

        Returns:
            Tiles for SAM (B, 3, S / 2, S / 2) and images for the coarse network (B, 3, s, s), both in [0, 1].
        """
        images = [image for image in map(self.seen, x) if image is not None]
        if len(images) != len(x):
            raise ValueError("A slice of zeros has no tile.")
        return _stretched(images, self.decoder.tile), _stretched(images, self.coarse_size)

    @torch.no_grad()
    def prompts(self, images: Tensor) -> Prompts:
        """Ask the coarse network for boxes, without jitter; in float32 always, so that AMP does not move them.

        Args:
            images: (B, 3, s, s) in [0, 1], see :meth:`tiles`.
        """
        with disabled_autocast(images.device):
            probability = self.coarse(images.float()).sigmoid()
        boxes, found = find_boxes(probability.flatten(0, 1), self.rule)
        scale = self.decoder.tile / self.coarse_size
        shape = (-1, self.num_classes)
        return Prompts((boxes * scale).unflatten(0, shape), found.unflatten(0, shape), probability.amax((2, 3)))

    def with_jitter(self, boxes: Tensor, draw: np.ndarray) -> Tensor:
        """Return boxes (B, K, 4) of tiles with their edges moved as drawn (:func:`~.boxes.draw_jitter`), in training.

        Draws are in pixels of a tile of 512 and mean the same share of a smaller one.
        """
        tile = self.decoder.tile
        return jittered(boxes, draw, tile, step=tile / PUBLISHED_SIDE)

    @torch.no_grad()
    def embed(self, tiles: Tensor) -> Tensor:
        """Return SAM's embeddings (N, P, g, g) of the canvases that tiles (4N, 3, S / 2, S / 2) in [0, 1] make."""
        if self.pixels is not None:
            mean, std = (tiles.new_tensor(numbers)[:, None, None] for numbers in self.pixels)
            tiles = (tiles * 255 - mean) / std
        embeddings: Tensor = self.image_encoder(merge(tiles))[-1]
        return embeddings

    def decode(self, embeddings: Tensor, boxes: Tensor) -> Tensor:
        """Return logits (4N, K, S / 2, S / 2) for boxes (4N, K, 4) in pixels of their tiles; with gradients."""
        return self.decoder(embeddings, on_canvas(boxes, self.decoder.tile))

    def segment(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Segment slices one by one, each in all four tiles of its own canvas.

        Args:
            x: (B, C, H, W) as nnU-Net preprocessed them, zero-padded or not.

        Returns:
            Logits (B, heads, H, W), finite, and the Dice that each mask expects of itself (B, K); where the coarse
            network finds nothing with ``empty="background"``, 1 minus its highest probability; 1 for a slice of zeros.
        """
        found = [self._segmented(item[None], alone=True) for item in x]
        return torch.cat([logits for logits, _ in found]), torch.cat([confidence for _, confidence in found])

    def segment_four(self, x: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Segment neighbouring slices in order, four per canvas.

        Args:
            x: (B, C, H, W), slices of one volume.
            boxes: (B, K, 4) in pixels of SAM's tiles, to be taken instead of the coarse network's; a class whose box
                is all 0 is not there, whatever ``empty`` says. For upper bounds with true boxes.

        Returns:
            As :meth:`segment`.
        """
        return self._segmented(x, alone=False, boxes=boxes)

    @torch.no_grad()
    def _segmented(self, x: Tensor, alone: bool, boxes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        content = [content_box(item) for item in x]
        shown = [index for index, box in enumerate(content) if box is not None]
        masks: dict[int, Tensor] = {}
        confidence = torch.ones((len(x), self.num_classes), device=x.device)
        if shown:
            images = [image for image in map(self.seen, x) if image is not None]
            prompts = self._prompts(images) if boxes is None else _given(boxes[shown])
            closed = self.empty == "background" or boxes is not None
            present = prompts.found if closed else torch.ones_like(prompts.found)
            confidence[shown] = 1 - prompts.peak
            wanted = present.any(1).nonzero()[:, 0].tolist()
            for place, logits in self._asked(images, prompts.boxes, wanted, alone):
                masks[shown[place]] = torch.where(present[place][:, None, None], logits, CLOSED)
                sure = expected_dice(logits[None])[0]
                confidence[shown[place]] = torch.where(present[place], sure, confidence[shown[place]])
        back = [
            self._on_slice(masks.get(index), content[index], item, self.num_classes) for index, item in enumerate(x)
        ]
        return torch.stack(back), confidence

    def _prompts(self, images: Sequence[Tensor]) -> Prompts:
        """Return the coarse network's prompts of what is seen of slices."""
        starts = range(0, len(images), _SLICES_AT_A_TIME)
        parts = [self.prompts(_stretched(images[at : at + _SLICES_AT_A_TIME], self.coarse_size)) for at in starts]
        return Prompts(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _asked(
        self, images: Sequence[Tensor], boxes: Tensor, wanted: Sequence[int], alone: bool
    ) -> list[tuple[int, Tensor]]:
        """Return the wanted slices' numbers, each with its logits (K, S / 2, S / 2), above 0 where a class wins."""
        found: list[tuple[int, Tensor]] = []
        for start in range(0, len(wanted), 1 if alone else TILES):
            group = list(wanted[start : start + (1 if alone else TILES)])
            tiles = _stretched([images[index] for index in group], self.decoder.tile)
            logits = self.decode(self.embed(filled_up(tiles)), filled_up(boxes[group])).float() - self.shift
            # what fills a canvas up has no number
            found += [(group[0], logits.mean(0))] if alone else list(zip(group, logits, strict=False))
        return found


def _stretched(images: Sequence[Tensor], size: int) -> Tensor:
    return torch.stack([resized(image, size) for image in images])


def _given(boxes: Tensor) -> Prompts:
    return Prompts(boxes, boxes.any(-1), torch.zeros_like(boxes[..., 0]))
