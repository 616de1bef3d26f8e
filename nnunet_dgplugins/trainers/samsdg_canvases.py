"""SAM-SDG's training data: slices with their boxes, put together to canvases, whose embeddings are kept where reused.

A canvas's embedding is SAM's neck alone (:mod:`nnunet_dgplugins.methods.samsdg.segmenter` reads no taps), stored under
the content of its four tiles: nothing is computed twice for the same four slices, whatever fold, seed or settings
brought them together, and other data or another encoder never read it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dgplugins.data.loaders import read_slice
from nnunet_dgplugins.files import human_bytes, require_disk
from nnunet_dgplugins.methods.samsdg.boxes import mask_boxes
from nnunet_dgplugins.methods.samsdg.canvas import TILES, draw_canvases
from nnunet_dgplugins.methods.samsdg.segmenter import SAMSDGSegmenter
from nnunet_dgplugins.sam.embed import SIZE_BOUND, remove_leftovers
from nnunet_dgplugins.sam.slices import SliceSet, masks
from nnunet_dgplugins.sam.store import FOLDER, EmbeddingStore, Key

_MODE = "half"
_GROUPING_SEED = 3
_SLICES_AT_A_TIME = 4
_SAYS_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class PromptedSlices:
    """Slices and what the coarse network says of them.

    Args:
        slices: N of them, labels on the grid of SAM's tile.
        boxes: (N, K, 4) in pixels of the tile, without jitter.
        asked: (N, K) bool, whether SAM is asked for the class there, by the policy for empty coarse masks.
        digests: of each tile's pixels.
    """

    slices: SliceSet
    boxes: torch.Tensor
    asked: torch.Tensor
    digests: list[str]

    @property
    def shown(self) -> np.ndarray:
        """Numbers of the slices that take a place on a canvas."""
        return np.flatnonzero(self.asked.any(1).numpy())

    def only(self, chosen: np.ndarray) -> PromptedSlices:
        """Return some of the slices."""
        kept = SliceSet([self.slices.keys[index] for index in chosen], self.slices.labels[chosen])
        return PromptedSlices(kept, self.boxes[chosen], self.asked[chosen], [self.digests[i] for i in chosen])

    def by_case(self) -> list[np.ndarray]:
        """Return the numbers of each case's slices, in order."""
        cases = np.array([key.case for key in self.slices.keys])
        return [np.flatnonzero(cases == case) for case in dict.fromkeys(cases.tolist())]


def true_boxes(labels: torch.Tensor, heads: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return boxes (N, K, 4) around the true masks on the tile (N, s, s); all 0 where there is none."""
    found, _ = masks(labels, heads, None)
    return torch.from_numpy(mask_boxes(found.flatten(0, 1).numpy())[0]).unflatten(0, found.shape[:2])


def prompt(
    network: SAMSDGSegmenter, dataset: Any, slices: SliceSet, device: torch.device, given: torch.Tensor | None = None
) -> PromptedSlices:
    """Ask the coarse network once for every slice; it is frozen, so its boxes stay what they are.

    Args:
        network: whose coarse network is asked.
        dataset: reads slices.
        slices: N of them.
        device: of the network.
        given: (N, K, 4) boxes to be taken instead, in pixels of the tile, all 0 where a class is absent.
    """
    boxes, asked, digests = [], [], []
    for start in range(0, len(slices), _SLICES_AT_A_TIME):
        tiles, images = read_tiles(network, dataset, slices.keys[start : start + _SLICES_AT_A_TIME])
        digests += [hashlib.sha256(tile.numpy().tobytes()).hexdigest() for tile in tiles]
        if given is None:
            found = network.prompts(images.to(device))
            boxes.append(found.boxes.cpu())
            asked.append((found.found if network.empty == "background" else torch.ones_like(found.found)).cpu())
    if given is not None:
        return PromptedSlices(slices, given, given.any(-1), digests)
    return PromptedSlices(slices, torch.cat(boxes), torch.cat(asked), digests)


def read_tiles(network: SAMSDGSegmenter, dataset: Any, keys: Sequence[Key]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read slices and return what SAM and what the coarse network sees of them, see :meth:`SAMSDGSegmenter.tiles`."""
    return network.tiles([torch.from_numpy(read_slice(dataset, key.case, key.z)) for key in keys])


def neighbours(places: np.ndarray) -> np.ndarray:
    """Put a case's slices, in order, four by four on canvases, as prediction does: (canvases, 4).

    The last canvas is filled up with its last slice.
    """
    lacking = -len(places) % TILES
    filled = np.concatenate([places, np.repeat(places[-1:], lacking)])
    return filled.reshape(-1, TILES)


class _Store(EmbeddingStore):
    """One file per canvas; a key's case is the canvas's content."""

    def path(self, key: Key) -> Path:
        return self.folder / key.case[:2] / f"{key.case}.emb"


class Canvases:
    """Embeddings of canvases on disk, beside the preprocessed data; killed and run again, the work goes on.

    Args:
        folder: nnU-Net's preprocessed data.
        network: whose encoder sees the canvases.
        dataset: reads slices.
        device: where the encoder runs and embeddings are wanted.
        say: receives lines of text.
    """

    def __init__(
        self, folder: Path, network: SAMSDGSegmenter, dataset: Any, device: torch.device, say: Callable[[str], None]
    ):
        encoder: Any = network.image_encoder
        self.network, self.dataset, self.device, self.say = network, dataset, device, say
        # the neck alone: a model of these sizes without taps
        model = replace(encoder.model, global_attn_indexes=encoder.model.global_attn_indexes[-1:])
        name = f"{folder.name}__{model.label}-{encoder.hash[:12]}__canvases__{_MODE}"
        name += "" if network.pixels else "__raw"
        name += f"__{str(encoder.dtype).removeprefix('torch.')}" if encoder.dtype and device.type != "cuda" else ""
        self.store = _Store(folder.parent / FOLDER / name, model, _MODE, encoder.hash, repair=self._encode)
        self._slices: dict[Key, list[Key]] = {}
        remove_leftovers(self.store.folder)

    def add(self, part: PromptedSlices, groups: np.ndarray) -> list[Key]:
        """Make sure that the canvases of groups (N, 4) are stored; returns their keys."""
        keys = []
        for group in groups:
            content = "".join(part.digests[index] for index in group)
            key = Key(hashlib.sha256(content.encode()).hexdigest()[:32], 0)
            self._slices[key] = [part.slices.keys[index] for index in group]
            keys.append(key)
        missing = [key for key in dict.fromkeys(keys) if not self.store.has(key, key.case)]
        if missing:
            size = len(missing) * self.store.model.raw_bytes * SIZE_BOUND[_MODE]
            self.say(
                f"Embedding {len(missing)} of {len(set(keys))} canvases with {self.store.model.described} on "
                f"{self.device}: at most {human_bytes(size)} in {self.store.folder}"
            )
            require_disk(self.store.folder, size, "the embeddings")
        for key in self._told(missing):
            self._encode(key)
        return keys

    def read(self, keys: Sequence[Key]) -> torch.Tensor:
        """Return embeddings (N, P, g, g) float32 on the device."""
        return self.store.read_batch(keys, device=self.device)[0]

    def _encode(self, key: Key) -> None:
        """Compute and store one canvas; one at a time, so that an interruption changes no bit."""
        tiles, _ = read_tiles(self.network, self.dataset, self._slices[key])
        self.store.write(key, [self.network.embed(tiles.to(self.device))[0].cpu()], key.case)

    def _told(self, keys: Sequence[Key]) -> Iterator[Key]:
        begun = said = time.monotonic()
        for done, key in enumerate(keys):
            if time.monotonic() - said > _SAYS_EVERY:
                said = time.monotonic()
                left = (said - begun) / done * (len(keys) - done)
                self.say(f"  {done} of {len(keys)} canvases, about {left:.0f} s to go")
            yield key


class CanvasBatches:
    """Calls give ``{labels, boxes, asked, keys}`` of some canvases' slices, and ``embeddings``, or ``tiles, images``.

    Args:
        part: slices that take a place on a canvas.
        canvases: where embeddings are kept.
        seed: of the groupings.
        groupings: so many are drawn once, take turns by epoch and have their embeddings kept; None: another in every
            epoch, and the encoder has to run on the ``tiles``.
    """

    def __init__(self, part: PromptedSlices, canvases: Canvases, seed: int, groupings: int | None):
        self.part, self.canvases, self.seed, self.groupings = part, canvases, seed, groupings
        self.stored = [canvases.add(part, self._grouping(number)) for number in range(groupings or 0)]

    def __len__(self) -> int:
        return -(-len(self.part.slices) // TILES)

    def __call__(self, chosen: np.ndarray, epoch: int) -> dict[str, Any]:
        """Read the canvases with these numbers in the epoch's grouping."""
        number = epoch % self.groupings if self.groupings else epoch
        order = self._grouping(number)[chosen].ravel()
        part, keys = self.part, [self.part.slices.keys[index] for index in order]
        batch = {"labels": part.slices.labels[order], "boxes": part.boxes[order], "asked": part.asked[order]}
        if self.stored:
            embeddings = self.canvases.read([self.stored[number][place] for place in chosen])
            return {**batch, "keys": keys, "embeddings": embeddings}
        tiles, images = read_tiles(self.canvases.network, self.canvases.dataset, keys)
        return {**batch, "keys": keys, "tiles": tiles, "images": images}

    def _grouping(self, number: int) -> np.ndarray:
        """Return which slices share a canvas in one pass, (canvases, 4); the same for the same seed and number."""
        return draw_canvases(len(self.part.slices), np.random.default_rng([self.seed, number, _GROUPING_SEED]))


class CaseBatches:
    """Calls give ``{labels, boxes, asked, keys, group, embeddings}`` of all slices of one case.

    ``group`` holds the places in the case of the slices on its canvases, four neighbours on each as in prediction;
    ``embeddings`` is None where there is no canvas.
    """

    def __init__(self, part: PromptedSlices, canvases: Canvases):
        self.part, self.canvases = part, canvases
        self.cases = part.by_case()
        self.groups = [neighbours(own[part.asked[own].any(1).numpy()]) for own in self.cases]
        self.stored = [canvases.add(part, groups) for groups in self.groups]

    def __len__(self) -> int:
        return len(self.cases)

    def __call__(self, chosen: np.ndarray, _epoch: int) -> dict[str, Any]:
        """Read the case with this number."""
        (case,) = chosen
        own, part = self.cases[case], self.part
        return {
            "labels": part.slices.labels[own], "boxes": part.boxes[own], "asked": part.asked[own],
            "keys": [part.slices.keys[index] for index in own], "group": self.groups[case].ravel() - own[0],
            "embeddings": self.canvases.read(self.stored[case]) if len(self.groups[case]) else None,
        }  # fmt: skip
