"""SAM-SDG: search of components, training step, inference and prediction, published order of work against ours.

    python scripts/benchmark_samsdg.py                        on the CPU (minutes)
    python scripts/benchmark_samsdg.py --vit-b                also at the size of SAM's vit_b, run once
    python scripts/benchmark_samsdg.py --canvases 1 --repeats 1     quick look that it works

Published: components are searched pixel by pixel in a tensor; every box's mask is made and enlarged on the whole canvas
and its own tile cut out, canvas by canvas. Ours: see ``nnunet_dgplugins/methods/samsdg``. Weights and embeddings are
random, they do not change the work; the decoder's rows leave the encoder's work out, which is the same in both. Whole
steps and predictions have it: groupings of slices embedded anew (published) or kept, and a slice alone on its canvas
(what stock nnU-Net's prediction can do) or four together (published).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from benchmark_sam import random_encoder
from measure import Row, in_turn

from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
from nnunet_dgplugins.methods.samsdg.boxes import GRID, component_boxes
from nnunet_dgplugins.methods.samsdg.canvas import TILES, on_canvas
from nnunet_dgplugins.methods.samsdg.coarse import CoarseNetwork
from nnunet_dgplugins.methods.samsdg.decoder import BoxDecoder, build_mask_decoder, trainable_parameters
from nnunet_dgplugins.methods.samsdg.losses import canvas_loss
from nnunet_dgplugins.methods.samsdg.segmenter import SAMSDGSegmenter
from nnunet_dgplugins.sam.encoder import TappedEncoder
from nnunet_dgplugins.sam.models import MODELS, SamModel
from nnunet_dgplugins.system import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "methods"))
from samsdg_published import search

#: side of the images of the published coarse network, pixels
COARSE_SIDE = 512


def made_masks(side: int = GRID) -> dict[str, np.ndarray]:
    """Return one mask of each kind: an organ with two islands, as the coarse network makes them, and noise."""
    rows, columns = (places / side for places in np.ogrid[:side, :side])
    organ = ((rows - 0.5) / 0.18) ** 2 + ((columns - 0.48) / 0.22) ** 2 < 1
    for row, column in ((0.2, 0.3), (0.8, 0.75)):
        organ |= (rows - row) ** 2 + (columns - column) ** 2 < 0.03**2
    return {"an organ and two islands": organ, "noise": np.random.default_rng(0).random((side, side)) < 0.4}


def search_rows(repeats: int = 5, side: int = GRID) -> list[Row]:
    """Time the box of one mask."""
    rows = []
    for name, mask in made_masks(side).items():
        tensor, batch = torch.from_numpy(mask), mask[None].repeat(100, 0)
        found = in_turn({"published": lambda t=tensor: search(t), "ours": lambda b=batch: component_boxes(b)}, repeats)
        theirs, mine = found["published"], found["ours"] / len(batch)
        if component_boxes(batch[:1])[0][0].tolist() != search(tensor).tolist():
            raise RuntimeError("The searches disagree.")
        what = f"box of the largest component, {side} x {side}, {name}"
        ratio = f"{theirs / mine:,.0f}x"
        rows.append(
            (what, f"{1000 * theirs:.0f} ms", f"{1e6 * mine:.0f} us", ratio, f"one thread, median of {repeats}")
        )
    return rows


def random_decoder(model_name: str) -> tuple[SamModel, BoxDecoder, torch.optim.Optimizer]:
    """Seed torch and return SAM's sizes, a decoder of random weights and its optimiser."""
    torch.manual_seed(0)
    model = MODELS[model_name]
    prompts = build_prompt_encoder(model.prompt_dim, model.grid, model.image_size)
    decoder = BoxDecoder(prompts, build_mask_decoder(model))
    return model, decoder, torch.optim.Adam(trainable_parameters(decoder.mask_decoder), 1e-4)


def decoder_rows(model_name: str = "vit_tiny", canvases: int = 4, repeats: int = 5) -> list[Row]:
    """Time the decoder's training step and its inference."""
    allocator = keep_freed_memory()
    model, decoder, optimizer = random_decoder(model_name)
    embeddings = torch.randn(canvases, model.prompt_dim, model.grid, model.grid)
    corners = torch.rand(TILES * canvases, 1, 2, 2).sort(2).values * decoder.tile
    boxes = on_canvas(corners.flatten(2), decoder.tile)
    target = (torch.rand(TILES * canvases, 1, decoder.tile, decoder.tile) > 0.8).float()

    def step(way: str, folded: bool) -> None:
        decoder.folded = folded
        optimizer.zero_grad(set_to_none=True)
        canvas_loss(ask(way), target)["total"].backward()
        optimizer.step()

    def ask(way: str) -> torch.Tensor:
        parts = zip(embeddings.split(1), boxes.split(TILES), strict=True)
        return torch.cat([getattr(decoder, way)(*part) for part in parts])

    def inference(way: str, folded: bool) -> None:
        decoder.folded = folded
        with torch.no_grad():
            ask(way)

    note = f"{canvases} canvases; {torch.get_num_threads()} threads, median of {repeats}, {allocator}"
    rows = []
    for what, work in {"training step of the decoder": step, "inference of the decoder": inference}.items():
        found = in_turn(
            {
                "published": partial(work, "whole_canvas", False),
                "own tile only": partial(work, "forward", False),
                "own tile only, folded transformer": partial(work, "forward", True),
            },
            repeats,
        )
        theirs = found.pop("published")
        for name, mine in found.items():
            took, ratio = (f"{theirs:.3f} s", f"{mine:.3f} s"), f"{theirs / mine:.2f}x"
            rows.append((f"{what}, {model_name}, {name}", *took, ratio, note))
    return rows


def whole_rows(model_name: str = "vit_tiny", canvases: int = 4, repeats: int = 5) -> list[Row]:
    """Time a training step with the encoder and without, and both ways to predict."""
    allocator = keep_freed_memory()
    model, decoder, optimizer = random_decoder(model_name)
    encoder = TappedEncoder(random_encoder(model), model.taps)
    # full_box: every slice is asked about, whatever a coarse network of random weights says
    network = SAMSDGSegmenter(encoder, decoder, CoarseNetwork(), COARSE_SIDE, empty="full_box").eval()
    count = TILES * canvases
    tiles = torch.rand(count, 3, decoder.tile, decoder.tile)
    boxes = torch.rand(count, 1, 2, 2).sort(2).values.flatten(2) * decoder.tile
    target = (torch.rand(count, 1, decoder.tile, decoder.tile) > 0.8).float()
    kept = network.embed(tiles)

    def step(embed: bool) -> None:
        optimizer.zero_grad(set_to_none=True)
        embeddings = network.embed(tiles) if embed else kept
        canvas_loss(network.decode(embeddings, boxes), target)["total"].backward()
        optimizer.step()

    slices = torch.rand(count, 1, 256, 256)
    note = f"{count} slices; {torch.get_num_threads()} threads, median of {repeats}, {allocator}"
    steps = in_turn({"anew": partial(step, True), "kept": partial(step, False)}, repeats)
    with torch.no_grad():
        ways = in_turn(
            {"alone": lambda: network.segment(slices), "four": lambda: network.segment_four(slices)}, repeats
        )
    named = {
        f"training step, {model_name}, embeddings of kept groupings, in memory": (steps["anew"], steps["kept"]),
        f"prediction per slice, {model_name}, one slice per canvas, then four": (
            ways["alone"] / count, ways["four"] / count,
        ),
    }  # fmt: skip
    return [(what, f"{a:.3f} s", f"{b:.3f} s", f"{a / b:.1f}x", note) for what, (a, b) in named.items()]


def rows_on_the_cpu() -> list[Row]:
    """Measure everything."""
    rows = search_rows() + decoder_rows() + whole_rows()
    return rows + decoder_rows("vit_b", canvases=1, repeats=1) + whole_rows("vit_b", canvases=1, repeats=1)


@click.command()
@click.option("--vit-b", is_flag=True, help="Also at the size of SAM's vit_b, run once.")
@click.option("--canvases", default=4, show_default=True, help="Canvases per step.")
@click.option("--repeats", default=5, show_default=True)
def main(vit_b: bool, canvases: int, repeats: int) -> None:
    """Print the rows."""
    rows = search_rows(repeats)
    for name, many, times in [("vit_tiny", canvases, repeats), *([("vit_b", 1, 1)] if vit_b else [])]:
        rows += decoder_rows(name, many, times) + whole_rows(name, many, times)
    for row in rows:
        click.echo(" | ".join(row))


if __name__ == "__main__":
    main()
