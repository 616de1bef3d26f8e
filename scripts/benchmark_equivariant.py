"""Equivariant CAMs: one training step, network after network or grouped, and the export of maps.

    python scripts/benchmark_equivariant.py                     on the CPU (minutes)
    python scripts/benchmark_equivariant.py --device cuda       on the GPU
    python scripts/benchmark_equivariant.py --size 48 --batch 2 --repeats 1    quick look that it works

A step is: both branches of every modality, the four losses, backward, AdamW. Published: one network after the other,
contiguous memory. Export, published: for every slice and modality a forward pass, and a backward pass for Grad-CAM and
Grad-CAM++; ours: forward passes alone, over batches. Memory on the CPU is the peak of a process of its own for each
variant, libraries included; on the GPU what torch allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import torch
from benchmark_epl import LAYOUTS
from measure import Row, gpu_peak, in_turn, own_peak, peak_of_process, place

from nnunet_dgplugins.methods.cam import grad_cam, grad_cam_plus_plus, normalise, standardise
from nnunet_dgplugins.methods.equivariant.losses import KD_WEIGHT, TEMPERATURE, terms
from nnunet_dgplugins.methods.equivariant.maps import KINDS, foreground_maps
from nnunet_dgplugins.methods.equivariant.network import UNetCAM, grouped_pass, separate_pass
from nnunet_dgplugins.methods.equivariant.step import branches, one_graph_at_a_time
from nnunet_dgplugins.methods.equivariant.transforms import Transform
from nnunet_dgplugins.system import keep_freed_memory

PASSES = {"separate": separate_pass, "grouped": grouped_pass}
PUBLISHED = ("separate", "contiguous")
VARIANTS = [(form, layout) for form in PASSES for layout in LAYOUTS]
FLIP = Transform("flipping", flip_axis=-1)


def made(modalities: int, divisor: int, layout: str, device: torch.device) -> list[UNetCAM]:
    """Return random networks."""
    torch.manual_seed(0)
    return [UNetCAM(divisor).to(device, memory_format=LAYOUTS[layout]) for _ in range(modalities)]


def training_steps(
    modalities: int, divisor: int, layout: str, batch: int, size: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Return for each form a function that makes one whole training step."""
    networks = made(modalities, divisor, layout, device)
    optimizer = torch.optim.AdamW([p for one in networks for p in one.parameters()], 5e-5, weight_decay=0.5)
    images = torch.rand(batch, modalities, size, size, device=device)
    tags = torch.arange(batch, device=device) % 2
    memory = LAYOUTS[layout]

    def step(form: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        if form == "one graph":
            each = one_graph_at_a_time(networks, images, FLIP, separate_pass, memory, tags, TEMPERATURE, "mean")
            for i, found in enumerate(each):
                found.total(KD_WEIGHT)[i].backward()
        else:
            plain, transformed = branches(networks, images, FLIP, PASSES[form], memory)
            terms(plain, transformed, tags).total(KD_WEIGHT).sum().backward()
        optimizer.step()

    return {form: partial(step, form) for form in (*PASSES, "one graph")}


def step_rows(modalities: int, divisor: int, batch: int, size: int, repeats: int, device: torch.device) -> list[Row]:
    """Time the forms in turn and measure the memory of each."""
    allocator = keep_freed_memory() if device.type == "cpu" else "float32"
    sizes = (batch, size, device)
    both = {layout: training_steps(modalities, divisor, layout, *sizes) for layout in LAYOUTS}
    variants = [*VARIANTS, ("one graph", "channels-last")]
    seconds = in_turn({(form, layout): both[layout][form] for form, layout in variants}, repeats, device)
    del both
    peaks = {variant: _peak(*variant, modalities, divisor, *sizes) for variant in variants}
    width = f"width {64 // divisor}"
    what = f"Equivariant step, {modalities} modalities, {width}, {batch} slices of {size}x{size}, {device.type}"
    return [
        (
            f"{what}, {', '.join(variant)}",
            f"{seconds[PUBLISHED]:.3f} s, {peaks[PUBLISHED]:.2f} GB",
            f"{seconds[variant]:.3f} s, {peaks[variant]:.2f} GB",
            f"{seconds[PUBLISHED] / seconds[variant]:.2f}x",
            f"{place(device)}, median of {repeats}, {allocator}",
        )
        for variant in variants
        if variant != PUBLISHED
    ]


def published_export(networks: list[UNetCAM], images: torch.Tensor) -> None:
    """Make the three maps of each slice and modality as the released code does."""
    for index in range(len(images)):
        for i, network in enumerate(networks):
            shown = standardise(images[index : index + 1, i : i + 1])
            features = network.features(shown)
            features.retain_grad()
            maps = network.classifier(features)
            logits = maps.mean((2, 3))
            normalise(maps[:, 1].detach())
            network.zero_grad()
            logits[:, 1].sum().backward()
            assert features.grad is not None
            normalise(grad_cam(features.detach(), features.grad))
            normalise(grad_cam_plus_plus(features.detach(), features.grad, logits[:, 1].detach()))


def our_export(networks: list[UNetCAM], images: torch.Tensor) -> None:
    """Make the same maps of all slices by forward passes."""
    for kind in KINDS:
        foreground_maps(networks, images, kind)


def export_rows(modalities: int, divisor: int, batch: int, size: int, repeats: int, device: torch.device) -> list[Row]:
    """Time the export of one batch of slices; the CAM alone too, which is all that masks need."""
    allocator = keep_freed_memory() if device.type == "cpu" else "float32"
    plain, last = ([network.eval() for network in made(modalities, divisor, layout, device)] for layout in LAYOUTS)
    images = torch.rand(batch, modalities, size, size, device=device)
    found = in_turn({
        "published": partial(published_export, plain, images), "ours": partial(our_export, last, images),
        "cam": partial(foreground_maps, last, images),
    }, repeats, device)  # fmt: skip
    ms = {name: 1000 * value / batch for name, value in found.items()}
    what = f"{modalities} modalities, width {64 // divisor}, {batch} slices of {size}x{size}, {device.type}"
    note = f"{place(device)}, median of {repeats}, {allocator}"
    return [
        (f"CAM, Grad-CAM and Grad-CAM++ per slice, {what}", f"{ms['published']:.1f} ms (with backward passes)",
         f"{ms['ours']:.1f} ms", f"{ms['published'] / ms['ours']:.1f}x", note),
        (f"CAM alone per slice, {what}", f"{ms['published']:.1f} ms (all three are made)", f"{ms['cam']:.1f} ms",
         f"{ms['published'] / ms['cam']:.1f}x", f"bound 3x; {note}"),
    ]  # fmt: skip


def _peak(
    form: str, layout: str, modalities: int, divisor: int, batch: int, size: int, device: torch.device
) -> float:  # fmt: skip
    """Return the peak memory of two steps in GB."""
    if device.type == "cuda":
        step = training_steps(modalities, divisor, layout, batch, size, device)[form]
        return gpu_peak(lambda: (step(), step()))
    return peak_of_process(__file__, "--peak", form, layout, modalities, divisor, batch, size)


def rows_on_the_cpu() -> list[Row]:
    """Return what the benchmark page shows of the CPU: the prostate's width, and four modalities' memory."""
    cpu = torch.device("cpu")
    return [
        *step_rows(2, 4, 8, 160, 5, cpu), *step_rows(4, 4, 8, 160, 3, cpu), *export_rows(2, 4, 16, 160, 5, cpu),
    ]  # fmt: skip


def rows_on_the_gpu() -> list[Row]:
    """Return what the benchmark page shows of the GPU: the published sizes of BraTS."""
    gpu = torch.device("cuda")
    return [
        *step_rows(2, 1, 16, 240, 10, gpu),
        *step_rows(4, 1, 16, 240, 10, gpu),
        *export_rows(2, 1, 16, 240, 10, gpu),
    ]


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--modalities", default=2, show_default=True)
@click.option("--divisor", default=4, show_default=True, help="Width divisor.")
@click.option("--batch", default=8, show_default=True)
@click.option("--size", default=160, show_default=True, help="Side of the slices.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--peak", nargs=6, hidden=True, help="Print the memory of two steps.")
def main(
    device: str, modalities: int, divisor: int, batch: int, size: int, repeats: int, peak: tuple[str, ...] | None
) -> None:
    """Print the rows."""
    if peak:
        keep_freed_memory()
        numbers = [int(word) for word in peak[2:]]
        step = training_steps(numbers[0], numbers[1], peak[1], numbers[2], numbers[3], torch.device("cpu"))[peak[0]]
        step(), step()
        click.echo(own_peak())
        return
    sizes = (modalities, divisor, batch, size, repeats, torch.device(device))
    for row in step_rows(*sizes) + export_rows(*sizes):
        click.echo(" | ".join(row))


if __name__ == "__main__":
    main()
