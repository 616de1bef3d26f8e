"""One training step of all modalities' networks: both branches, in the published order or one graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nnunet_dgplugins.methods.cam import normalise, standardise
from nnunet_dgplugins.methods.equivariant.losses import Branch, Terms, terms
from nnunet_dgplugins.methods.equivariant.network import UNetCAM
from nnunet_dgplugins.methods.equivariant.transforms import Transform

Pass = Callable[[Sequence[UNetCAM], Tensor], tuple[Tensor, Tensor]]


def branches(
    networks: Sequence[UNetCAM], images: Tensor, transform: Transform, run: Pass, memory_format: torch.memory_format
) -> tuple[Branch, Branch]:
    """Return what the networks say of the plain and of the transformed images, in one frame.

    A plain image's maps are normalised first and transformed then; the transformed image is standardised anew.

    Args:
        networks: one per modality.
        images: slices (N, M, H, W), not standardised.
        transform: shared by images and maps.
        run: ``separate_pass`` or ``grouped_pass``.
        memory_format: of the images that the networks see.
    """
    logits, maps = run(networks, standardise(images).to(memory_format=memory_format))
    plain = Branch(logits, transform(_present(maps).transpose(0, 1)).transpose(0, 1))
    logits, maps = run(networks, standardise(transform(images)).to(memory_format=memory_format))
    return plain, Branch(logits, _present(maps))


def one_graph_at_a_time(
    networks: Sequence[UNetCAM],
    images: Tensor,
    transform: Transform,
    run: Pass,
    memory_format: torch.memory_format,
    tags: Tensor,
    temperature: float,
    cmer_reduction: str,
) -> Iterator[Terms]:
    """Yield the terms of each modality with the graph of its own network only.

    All networks run once without a graph, which gives what crosses modalities and moves the running statistics; then
    each runs again with its graph. More forward passes, and memory for one network instead of all.

    Yields:
        For each modality in turn: the terms of all (M,), in which only its own outputs carry a gradient.
    """
    with torch.no_grad():
        known = branches(networks, images, transform, run, memory_format)
    for i, network in enumerate(networks):
        with _statistics_kept(network):
            own = branches([network], images[:, i : i + 1], transform, run, memory_format)
        joined = [_replaced(branch, i, mine) for branch, mine in zip(known, own, strict=True)]
        yield terms(joined[0], joined[1], tags, temperature, cmer_reduction)


def _present(maps: Tensor) -> Tensor:
    """Return the normalised maps of the class that says present, (M, N, H, W)."""
    return normalise(maps[:, :, 1])


def _replaced(branch: Branch, index: int, own: Branch) -> Branch:
    logits, maps = (
        torch.cat([known[:index], mine, known[index + 1 :]])
        for known, mine in ((branch.logits, own.logits), (branch.maps, own.maps))
    )
    return Branch(logits, maps)


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Let batch normalisation use the batch but leave its running statistics alone."""
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(layer.momentum, layer.get_buffer("num_batches_tracked").clone()) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.get_buffer("num_batches_tracked").copy_(count)
