"""Grid inference of DeSAM: the published order of work against ours, in torch, run in turn.

Published: nine batches of nine points, each through the whole decoder, contexts included, the image repeated per point;
then all 81 masks go through the selection. Ours: see ``nnunet_dgplugins/methods/desam/grid.py``. Both use the same
weights (random), threads and allocator.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from nnunet_dgplugins.methods.desam.decoder import DeSAMDecoder
from nnunet_dgplugins.methods.desam.grid import predict_grid
from nnunet_dgplugins.methods.desam.network import build_decoder
from nnunet_dgplugins.methods.desam.prompts import EncodedPrompts, encode_points, grid_points
from nnunet_dgplugins.methods.desam.selection import SelectionRule, select_masks
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
from nnunet_dgplugins.sam.models import MODELS
from nnunet_dgplugins.system import keep_freed_memory

POINTS_PER_BATCH = 9
Row = tuple[str, str, str, str, str]
Result = TypeVar("Result")

# random weights give scores and masks without meaning, so the rule makes the two cases: every point passes, and either
# every mask is clean (the first one decides) or none is (all have to be decoded)
CLEAR_WINNER = SelectionRule(iou_threshold=float("-inf"), min_region_area=0)
WORST_CASE = replace(CLEAR_WINNER, min_region_area=2 * 256**2)


@dataclass(frozen=True)
class Slice:
    """One slice's features with the decoder and the prompts for it."""

    decoder: DeSAMDecoder
    taps: list[torch.Tensor]
    neck: torch.Tensor
    prompts: EncodedPrompts


def make_slice(model_name: str) -> Slice:
    """Return a decoder with random weights and random features of one slice."""
    model = MODELS[model_name]
    torch.manual_seed(0)
    encoder = build_prompt_encoder(model.prompt_dim, model.grid, model.image_size)
    points = grid_points(9, (model.image_size, model.image_size), model.image_size)
    *taps, neck = (torch.randn(1, *shape) for shape in model.feature_shapes)
    return Slice(build_decoder(model).requires_grad_(False), taps, neck, encode_points(encoder, points))


@torch.no_grad()
def published(given: Slice, rule: SelectionRule) -> np.ndarray:
    """Segment in the published order of work and return the mask."""
    decoder, logits, scores = given.decoder, [], []
    fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    for sparse in given.prompts.sparse.split(POINTS_PER_BATCH):
        count = len(sparse)
        taps = [tap.repeat(count, 1, 1, 1) for tap in given.taps]
        image = given.neck.repeat(count, 1, 1, 1) + given.prompts.dense
        tokens = torch.cat([fixed.expand(count, -1, -1), sparse], 1)
        queries, keys = decoder.transformer(image, given.prompts.dense_pe.repeat(count, 1, 1, 1), tokens)
        mask_embedding = keys.transpose(1, 2).reshape(image.shape)
        scores.append(decoder.iou_prediction_head(queries[:, 0])[:, 0])
        logits.append(decoder.pimm(mask_embedding, decoder.pimm.contexts(taps))[:, 0])
    return select_masks(torch.cat(logits), torch.cat(scores), rule).selected


def ours(given: Slice, rule: SelectionRule) -> tuple[np.ndarray, int]:
    """Segment our way; return the mask and how many masks were decoded."""
    found = predict_grid(given.decoder, given.taps, given.neck, given.prompts, rule)
    return found.logits[0].numpy() > 0, found.stats.masks_decoded


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Return how long one call takes, in seconds, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def grid_rows(model_name: str = "vit_tiny", repeats: int = 5) -> list[Row]:
    """Measure and return rows (what, published, ours, ratio, note).

    The published order takes the same time whatever the masks are like, so it stands against both of our cases.
    """
    allocator = keep_freed_memory()
    given = make_slice(model_name)
    cases = {"one clear winner": CLEAR_WINNER, "worst case, no clean mask": WORST_CASE}
    reference: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in cases}
    decoded: dict[str, int] = {}
    for _ in range(repeats):
        reference.append(timed(partial(published, given, CLEAR_WINNER))[0])
        for name, rule in cases.items():
            elapsed, (_, decoded[name]) = timed(partial(ours, given, rule))
            times[name].append(elapsed)
    rows = []
    for name in cases:
        theirs, mine = statistics.median(reference), statistics.median(times[name])
        what = f"grid inference per slice, {model_name}, {name}"
        threads = f"{torch.get_num_threads()} threads, median of {repeats}, {allocator}"
        note = f"{decoded[name]} of {len(given.prompts.sparse)} masks decoded; {threads}"
        rows.append((what, f"{theirs:.2f} s", f"{mine:.2f} s", f"{theirs / mine:.1f}x", note))
    return rows


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vit-b", action="store_true", help="at the size of SAM's vit_b (minutes), run once")
    options = parser.parse_args()
    rows = grid_rows("vit_b", repeats=1) if options.vit_b else grid_rows()
    for row in rows:
        print(" | ".join(row))


if __name__ == "__main__":
    main()
