"""EPL: Fourier mixing against NumPy, and one training step in the published order against the batched form.

    python scripts/benchmark_epl.py                                  on the CPU (minutes)
    python scripts/benchmark_epl.py --device cuda                    on the GPU, float32 and AMP
    python scripts/benchmark_epl.py --size 48 --image 60 --repeats 1    quick look that it works

A step is: the forwards of both networks (DeepLabV3+, random weights, batch statistics), the losses, one backward, two
AdamW steps, at 2 labelled and 2+2 unlabelled images. Published: 14 forwards one by one, contiguous memory. Memory on
the CPU is the peak of a process of its own for each variant, libraries included; on the GPU what torch allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import numpy as np
import torch
from measure import Row, gpu_peak, in_turn, own_peak, peak_of_process, place

from nnunet_dgplugins.methods.epl.cutmix import sample_masks
from nnunet_dgplugins.methods.epl.deeplab import DeepLabV3Plus
from nnunet_dgplugins.methods.epl.losses import cross_pseudo_supervision, supervised_dice
from nnunet_dgplugins.methods.epl.step import UnlabelledImages, batched_passes, full_resolution, published_passes
from nnunet_dgplugins.methods.spectral import full_mix, half_width, window_swap
from nnunet_dgplugins.system import keep_freed_memory

LABELLED, UNLABELLED, CLASSES = 2, 2, 4
FORMS = {"14 forwards": published_passes, "4 forwards": batched_passes}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
PUBLISHED = ("14 forwards", "contiguous")
VARIANTS = [(form, layout) for form in FORMS for layout in LAYOUTS]


# ---------------------------------------------------------------- Fourier


def numpy_way(image: np.ndarray, partner: np.ndarray, half: int | None, strength: float, mirror: bool) -> np.ndarray:
    """Mix one image (C, H, W) in the published order of work.

    Args:
        image: whose phases are kept.
        partner: whose amplitudes are borrowed.
        half: half-width of the window; None: the whole spectrum.
        strength: share of the partner's amplitude.
        mirror: also make the partner in the image's style, which the published code does and does not use.
    """
    axes = (-2, -1)
    spectra = [np.fft.fft2(x, axes=axes) for x in (image, partner)]
    amplitudes = [np.fft.fftshift(np.abs(x), axes=axes) for x in spectra]
    phases = [np.angle(x) for x in spectra]
    window = (slice(None),) * 3
    if half is not None:
        window = (slice(None), *(slice(side // 2 - half, side // 2 + half + 1) for side in image.shape[1:]))
    first, second = (a.copy() for a in amplitudes)
    first[window] = (1 - strength) * amplitudes[0][window] + strength * amplitudes[1][window]
    second[window] = (1 - strength) * amplitudes[1][window] + strength * amplitudes[0][window]

    def back(amplitude: np.ndarray, phase: np.ndarray) -> np.ndarray:
        spectrum = np.fft.ifftshift(amplitude, axes=axes) * np.exp(1j * phase)
        return np.real(np.fft.ifft2(spectrum, axes=axes))

    if mirror:
        back(second, phases[1])
    return back(first, phases[0])


def fourier_rows(side: int = 300, batch: int = 4, repeats: int = 20, device_name: str = "cpu") -> list[Row]:
    """Time both mixes per image, each one alone in NumPy as in the published loader, ours as one batch and alone."""
    device = torch.device(device_name)
    images, partners = (torch.rand(batch, 1, side, side) for _ in range(2))
    ours = images.to(device), partners.to(device)
    kinds: dict[str, tuple[int | None, float, Callable, int]] = {
        "window swap": (half_width(side, side, 0.01), 1.0, partial(window_swap, strength=1.0), 10),
        "full mix": (None, 0.2, partial(full_mix, strength=0.2), 4),
    }
    rows = []
    for name, (half, strength, mix, bound) in kinds.items():

        def loop(mirror: bool, half: int | None = half, strength: float = strength) -> None:
            for image, partner in zip(images.numpy(), partners.numpy(), strict=True):
                numpy_way(image, partner, half, strength, mirror)

        variants = {
            "published": partial(loop, True),
            "no mirror": partial(loop, False),
            "batch": partial(mix, *ours),
            "alone": partial(mix, ours[0][:1], ours[1][:1]),
        }
        found = in_turn(variants, repeats, device)
        ms = {key: 1000 * value / (1 if key == "alone" else batch) for key, value in found.items()}
        off = np.abs(
            mix(*ours)[0].cpu().numpy() - numpy_way(images[0].numpy(), partners[0].numpy(), half, strength, False)
        ).max()
        note = (
            f"bound {bound}x; without the unused mirror image {ms['no mirror']:.2f} ms in NumPy; ours alone "
            f"{ms['alone']:.3f} ms; results differ by {off:.0e}; {place(device)}, median of {repeats}"
        )
        rows.append((
            f"Fourier {name} per {side}x{side} image, batch {batch}, {device.type}",
            f"{ms['published']:.2f} ms (NumPy)", f"{ms['batch']:.3f} ms", f"{ms['published'] / ms['batch']:.1f}x", note,
        ))  # fmt: skip
    return rows


# ---------------------------------------------------------------- step


def training_steps(layout: str, size: int, device: torch.device, amp: bool = False) -> dict[str, Callable[[], None]]:
    """Return for each form a function that makes one whole training step; the forms share networks and optimisers."""
    torch.manual_seed(0)
    memory = LAYOUTS[layout]
    networks = [DeepLabV3Plus(1, CLASSES).to(device, memory_format=memory) for _ in range(2)]
    optimizers = [torch.optim.AdamW(network.parameters(), 1e-4, weight_decay=0.01) for network in networks]
    scaler = torch.amp.GradScaler(device.type, enabled=amp)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, 1, size, size, device=device).contiguous(memory_format=memory)

    masks = sample_masks(UNLABELLED, (size, size)).to(device)
    images = UnlabelledImages(*(draw(UNLABELLED) for _ in range(4)), masks)
    labelled = draw(LABELLED)
    target = torch.randint(0, CLASSES, (LABELLED, size, size), device=device)

    def step(form: str) -> None:
        with torch.autocast(device.type, enabled=amp):
            passes = FORMS[form](networks, images, labelled)
            assert passes.labelled is not None
            supervised = [supervised_dice(full_resolution(output), target) for output in passes.labelled]
            loss = supervised[0] + supervised[1]
            loss = loss + cross_pseudo_supervision(passes.plain, passes.styled, passes.labels)["total"]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

    return {form: partial(step, form) for form in FORMS}


def step_rows(size: int = 288, repeats: int = 5, device_name: str = "cpu", amp: bool = False) -> list[Row]:
    """Time the variants in turn and measure the memory of each."""
    device = torch.device(device_name)
    allocator = keep_freed_memory() if device.type == "cpu" else "AMP" if amp else "float32"
    both = {layout: training_steps(layout, size, device, amp) for layout in LAYOUTS}
    seconds = in_turn({(form, layout): both[layout][form] for form, layout in VARIANTS}, repeats, device)
    del both
    peaks = {variant: _peak(*variant, size, device, amp) for variant in VARIANTS}
    what = f"EPL step, DeepLabV3+, {LABELLED}+{2 * UNLABELLED} images of {size}x{size}, {device.type}"
    said = f"{place(device)}, median of {repeats}, {allocator}"
    return [
        (
            f"{what}, {', '.join(variant)}",
            f"{seconds[PUBLISHED]:.3f} s, {peaks[PUBLISHED]:.2f} GB",
            f"{seconds[variant]:.3f} s, {peaks[variant]:.2f} GB",
            f"{seconds[PUBLISHED] / seconds[variant]:.2f}x",
            said,
        )
        for variant in VARIANTS
        if variant != PUBLISHED
    ]


def _peak(form: str, layout: str, size: int, device: torch.device, amp: bool) -> float:
    """Return the peak memory of two steps in GB: of a process of its own on the CPU, allocated by torch on the GPU."""
    if device.type == "cuda":
        step = training_steps(layout, size, device, amp)[form]
        return gpu_peak(lambda: (step(), step()))
    return peak_of_process(__file__, "--peak", form, layout, "--size", size)


def rows_on_the_cpu() -> list[Row]:
    """Return what the benchmark page shows of the CPU."""
    return fourier_rows() + step_rows()


def rows_on_the_gpu() -> list[Row]:
    """Return what the benchmark page shows of the GPU."""
    return fourier_rows(device_name="cuda") + step_rows(device_name="cuda") + step_rows(device_name="cuda", amp=True)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--size", default=288, show_default=True, help="Side of the images of a step.")
@click.option("--image", default=300, show_default=True, help="Side of the images that are mixed.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--peak", nargs=2, hidden=True, help="Form and layout: print the memory of two steps.")
def main(device: str, size: int, image: int, repeats: int, peak: tuple[str, str] | None) -> None:
    """Print the rows."""
    if peak:
        keep_freed_memory()
        step = training_steps(peak[1], size, torch.device("cpu"))[peak[0]]
        step(), step()
        click.echo(own_peak())
        return
    rows = fourier_rows(image, repeats=4 * repeats, device_name=device) + step_rows(size, repeats, device)
    if device == "cuda":
        rows += step_rows(size, repeats, device, amp=True)
    for row in rows:
        click.echo(" | ".join(row))


if __name__ == "__main__":
    main()
