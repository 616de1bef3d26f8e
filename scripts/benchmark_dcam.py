"""D-CAM: training steps of both stages, and pseudo masks in the published order of work against ours.

    python scripts/benchmark_dcam.py                     on the CPU (minutes)
    python scripts/benchmark_dcam.py --device cuda       on the GPU
    python scripts/benchmark_dcam.py --divisor 32 --size 48 --repeats 1    quick look that it works

Stage 1's step: forward with attention, tag loss, backward, SGD. Stage 2's: DeepLabV3+ on ResNet-101, three masks,
backward, SGD. Pseudo masks, published: one image at a time, and for each layer and class a whole forward and backward
pass; ours: one forward and one partial backward pass per class for a whole batch. Both end at masks (white rule too).
Memory on the CPU is the peak of a process of its own for each variant, libraries included; on the GPU what torch
allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click
import torch
from benchmark_epl import LAYOUTS
from measure import Row, gpu_peak, in_turn, own_peak, peak_of_process, place

from nnunet_dgplugins.methods.dcam import optimisation
from nnunet_dgplugins.methods.dcam.deeplab import DeepLab
from nnunet_dgplugins.methods.dcam.losses import layered_loss, tag_loss
from nnunet_dgplugins.methods.dcam.maps import LAYERS, enlarge, published_grad_cam
from nnunet_dgplugins.methods.dcam.masks import pseudo_masks, tagged_mask, white_pixels
from nnunet_dgplugins.methods.dcam.resnet38 import ResNet38
from nnunet_dgplugins.system import keep_freed_memory

PUBLISHED, OURS = "published", "ours"


@dataclass(frozen=True)
class Sizes:
    """What is measured: one set of sizes for time and memory."""

    device: str
    divisor: int = 1
    classes: int = 4
    side: int = 224
    step_batch: int = 2
    mask_batch: int = 4

    def __str__(self) -> str:
        width = "full width" if self.divisor == 1 else f"width 1/{self.divisor}"
        return f"{width}, {self.classes} classes, {self.side}x{self.side}, {self.device}"


def pictures(sizes: Sizes, count: int) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, 3, sizes.side, sizes.side), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255


def tags(sizes: Sizes, count: int) -> torch.Tensor:
    return (torch.arange(count * sizes.classes).view(count, -1) % 3 != 1).float()


def classifier(sizes: Sizes, pcnorm: str, layout: str = "contiguous") -> ResNet38:
    torch.manual_seed(0)
    network = ResNet38(sizes.classes, width_divisor=sizes.divisor, pcnorm=pcnorm)
    return network.to(sizes.device, memory_format=LAYOUTS[layout])


def classifier_step(sizes: Sizes, pcnorm: str, layout: str) -> Callable[[], None]:
    """Return a function that makes one step of stage 1, attention on, nothing frozen."""
    network = classifier(sizes, pcnorm, layout).train()
    optimizer = torch.optim.SGD(optimisation.classifier_groups(network, 0.01), momentum=optimisation.MOMENTUM)
    images = pictures(sizes, sizes.step_batch).to(sizes.device, memory_format=LAYOUTS[layout])
    target = tags(sizes, sizes.step_batch).to(sizes.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        tag_loss(network(images, gamma=0.9), target).backward()
        optimizer.step()

    return step


def deeplab_step(sizes: Sizes, layout: str) -> Callable[[], None]:
    """Return a function that makes one step of stage 2 with the published network."""
    torch.manual_seed(0)
    network = DeepLab(sizes.classes).to(sizes.device, memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(optimisation.deeplab_groups(network, 0.01), momentum=optimisation.MOMENTUM)
    images = pictures(sizes, sizes.step_batch).to(sizes.device, memory_format=LAYOUTS[layout])
    target = (images.sum(1) * 10).long() % sizes.classes
    masks = dict.fromkeys(LAYERS, target)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        layered_loss(network(images), masks)["total"].backward()
        optimizer.step()

    return step


def published_masks(network: ResNet38, image: torch.Tensor, tag: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make the three masks of one image (1, 3, H, W) as the released code does."""
    device = network.fc8.weight.device
    background = white_pixels(image)
    made = {}
    for layer in LAYERS:
        one_by_one = [published_grad_cam(network, image.to(device), layer, c) for c in range(tag.shape[1])]
        mask = tagged_mask(enlarge(torch.stack(one_by_one)[None], (image.shape[-2], image.shape[-1])), tag).cpu()
        mask[background] = tag.shape[1]
        made[layer] = mask
    return made


def mask_makers(sizes: Sizes, pcnorm: str) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """Return the two orders of work; the published one makes the masks of the first image only."""
    network = classifier(sizes, pcnorm).eval()
    images, target = pictures(sizes, sizes.mask_batch), tags(sizes, sizes.mask_batch)
    return {
        PUBLISHED: partial(published_masks, network, images[:1], target[:1]),
        OURS: partial(pseudo_masks, network, images, target, white=True, batch_size=sizes.mask_batch),
    }


def work(sizes: Sizes, kind: str, *words: str) -> Callable[[], object]:
    """Return what one variant does, by name, for a process of its own."""
    if kind == "masks":
        return mask_makers(sizes, words[0])[words[1]]
    return classifier_step(sizes, *words) if kind == "classifier" else deeplab_step(sizes, *words)


def step_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """Time both stages' steps: memory layouts, and what PCNorm costs."""
    allocator = keep_freed_memory() if sizes.device == "cpu" else "float32"
    device = torch.device(sizes.device)
    rows: list[Row] = []
    for kind, variants in (
        ("classifier", [("official", "contiguous"), ("official", "channels-last"), ("instance", "contiguous")]),
        ("deeplab", [(layout,) for layout in LAYOUTS]),
    ):
        seconds = in_turn({words: work(sizes, kind, *words) for words in variants}, repeats, device)
        first, peaks = variants[0], {words: peak(sizes, kind, *words) for words in variants}
        for words in variants[1:]:
            rows.append((
                f"D-CAM {kind} step, {sizes}, batch {sizes.step_batch}, {', '.join(words)}",
                f"{seconds[first]:.3f} s, {peaks[first]:.2f} GB ({', '.join(first)})",
                f"{seconds[words]:.3f} s, {peaks[words]:.2f} GB", f"{seconds[first] / seconds[words]:.2f}x",
                f"{place(device)}, median of {repeats}, {allocator}",
            ))  # fmt: skip
    return rows


def mask_rows(sizes: Sizes, repeats: int) -> list[Row]:
    """Time the masks of three layers per image, and compare them."""
    allocator = keep_freed_memory() if sizes.device == "cpu" else "float32"
    device = torch.device(sizes.device)
    rows: list[Row] = []
    for pcnorm in ("official", "instance"):
        makers = mask_makers(sizes, pcnorm)
        seconds = in_turn(makers, repeats, device)
        published, ours = (make() for make in makers.values())
        equal = min(float((published[layer][0] == ours[layer][0]).float().mean()) for layer in LAYERS)
        each = seconds[OURS] / sizes.mask_batch
        peaks = {form: peak(sizes, "masks", pcnorm, form) for form in makers}
        rows.append((
            f"D-CAM pseudo masks of three layers, {sizes}, PCNorm {pcnorm}",
            f"{seconds[PUBLISHED]:.3f} s per image, {peaks[PUBLISHED]:.2f} GB (one at a time)",
            f"{each:.3f} s per image, {1 / each:.2f} images/s, {peaks[OURS]:.2f} GB (batch {sizes.mask_batch})",
            f"{seconds[PUBLISHED] / each:.1f}x",
            f"bound 8x; {100 * equal:.3f} % of the pixels equal; {place(device)}, median of {repeats}, {allocator}",
        ))  # fmt: skip
    return rows


def peak(sizes: Sizes, kind: str, *words: str) -> float:
    """Return the peak memory in GB of doing a variant's work twice."""
    if sizes.device == "cuda":
        once = work(sizes, kind, *words)
        return gpu_peak(lambda: (once(), once()))
    numbers = [sizes.divisor, sizes.classes, sizes.side, sizes.step_batch, sizes.mask_batch]
    return peak_of_process(__file__, "--peak", " ".join(map(str, [*numbers, kind, *words])))


def _print_peak(text: str) -> None:
    keep_freed_memory()
    words = text.split()
    once = work(Sizes("cpu", *map(int, words[:5])), *words[5:])
    once(), once()
    click.echo(own_peak())


def rows_on_the_cpu() -> list[Row]:
    """Return what the benchmark page shows of the CPU: the full-width tower at the published size of patches."""
    sizes = Sizes("cpu")
    return [*step_rows(sizes, 2), *mask_rows(sizes, 2)]


def rows_on_the_gpu() -> list[Row]:
    """Return what the benchmark page shows of the GPU: the published batch."""
    sizes = Sizes("cuda", step_batch=20, mask_batch=20)
    return [*step_rows(sizes, 5), *mask_rows(sizes, 5)]


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--divisor", default=1, show_default=True, help="Width divisor of the classifier.")
@click.option("--classes", default=4, show_default=True)
@click.option("--size", "side", default=224, show_default=True, help="Side of the patches.")
@click.option("--batch", "step_batch", default=2, show_default=True, help="Patches per training step.")
@click.option("--mask-batch", default=4, show_default=True, help="Patches at once for pseudo masks.")
@click.option("--repeats", default=2, show_default=True)
@click.option("--peak", "peak_of", hidden=True, help="Print the memory of one variant.")
def main(repeats: int, peak_of: str | None, **sizes: int | str) -> None:
    """Print the rows."""
    if peak_of:
        _print_peak(peak_of)
        return
    asked = Sizes(**sizes)  # type: ignore[arg-type]
    for row in step_rows(asked, repeats) + mask_rows(asked, repeats):
        click.echo(" | ".join(row))


if __name__ == "__main__":
    main()
