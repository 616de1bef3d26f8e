"""The forward passes of one EPL iteration, in the published order and in batches (Yao et al., AAAI 2022).

Published: each network runs without gradients on U0, F(U0), U1, F(U1) (teacher), then with gradients on the CutMix of
U0 and U1 and on the CutMix of F(U0) and F(U1) (student), and on the labelled images: 14 forwards of two networks, 12
of them for the unlabelled part. :func:`batched_passes` joins them into one teacher and one student forward per
network: 4 in all.

Both give the same numbers wherever a sample does not see its neighbours: instance or layer normalisation, or batch
normalisation in evaluation mode, and no dropout. With batch normalisation in training mode they differ. The published
order normalises each of the seven forwards of a network by its own batch and moves the running statistics seven times
per iteration, three of them on Fourier images (the teacher runs in training mode too). In batches the teacher's
four groups share one set of statistics, the student's two groups and the labelled images another, and the running
statistics move twice, by the same mixture of plain and Fourier images. Dropout draws other masks in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nnunet_dgplugins.methods.epl.cutmix import mix
from nnunet_dgplugins.methods.epl.losses import pseudo_labels

#: logits (B, K, *space), or a list of them with the full resolution first (deep supervision)
Output: TypeAlias = "Tensor | Sequence[Tensor]"
Network: TypeAlias = Callable[[Tensor], "Tensor | Sequence[Tensor]"]


@dataclass(frozen=True)
class UnlabelledImages:
    """Two unlabelled batches, their Fourier versions and the CutMix masks.

    Args:
        first: U0, (B, C, ...).
        second: U1, same shape; taken where the mask is 1.
        first_styled: F(U0), pixel by pixel aligned with U0.
        second_styled: F(U1).
        masks: (B, 1, ...), used for plain and Fourier images alike.
    """

    first: Tensor
    second: Tensor
    first_styled: Tensor
    second_styled: Tensor
    masks: Tensor

    def mixed(self) -> tuple[Tensor, Tensor]:
        """Return the student's images: CutMix of the plain ones and of the Fourier versions."""
        return mix(self.first, self.second, self.masks), mix(self.first_styled, self.second_styled, self.masks)


@dataclass(frozen=True)
class Passes:
    """What the losses of one iteration need; each pair is (network 1, network 2).

    Args:
        plain: student logits on the CutMix image, full resolution, with gradients.
        styled: student logits on the CutMix of the Fourier versions, likewise.
        labels: pseudo-labels that each network made for the CutMix image, (B, ...) int64.
        labelled: outputs on the labelled images as the networks gave them (a list under deep supervision), or None.
    """

    plain: tuple[Tensor, Tensor]
    styled: tuple[Tensor, Tensor]
    labels: tuple[Tensor, Tensor]
    labelled: tuple[Output, Output] | None


def published_passes(networks: Sequence[Network], images: UnlabelledImages, labelled: Tensor | None = None) -> Passes:
    """Run the forwards one by one in the published order: 12, or 14 with labelled images.

    Args:
        networks: the two networks.
        images: unlabelled images.
        labelled: labelled images (B', C, ...), any number of them.
    """
    labels = [_published_labels(network, images) for network in networks]
    mixed = images.mixed()
    plain = [full_resolution(network(mixed[0])) for network in networks]
    styled = [full_resolution(network(mixed[1])) for network in networks]
    supervised = None if labelled is None else _pair([network(labelled) for network in networks])
    return Passes(_pair(plain), _pair(styled), _pair(labels), supervised)


def batched_passes(networks: Sequence[Network], images: UnlabelledImages, labelled: Tensor | None = None) -> Passes:
    """Run one teacher and one student forward per network; arguments and result as :func:`published_passes`.

    Labelled images join the student's batch, so they must have the unlabelled ones' size.
    """
    labels = [_batched_labels(network, images) for network in networks]
    count = len(images.first)
    groups = [*images.mixed(), *([] if labelled is None else [labelled])]
    outputs = [network(torch.cat(groups)) for network in networks]
    plain = [full_resolution(output)[:count] for output in outputs]
    styled = [full_resolution(output)[count : 2 * count] for output in outputs]
    supervised = None if labelled is None else _pair([_from_row(output, 2 * count) for output in outputs])
    return Passes(_pair(plain), _pair(styled), _pair(labels), supervised)


def full_resolution(output: Output) -> Tensor:
    """Return the logits of full resolution, the first of a list under deep supervision."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def _published_labels(network: Network, images: UnlabelledImages) -> Tensor:
    halves = ((images.first, images.first_styled), (images.second, images.second_styled))
    labels = [pseudo_labels(*(full_resolution(network(x)) for x in half)) for half in halves]
    _forget_cast_weights()
    return mix(labels[0], labels[1], images.masks)  # CutMix of labels equals the labels of mixed logits


@torch.no_grad()
def _batched_labels(network: Network, images: UnlabelledImages) -> Tensor:
    groups = torch.cat([images.first, images.first_styled, images.second, images.second_styled])
    u0, f0, u1, f1 = full_resolution(network(groups)).chunk(4)
    _forget_cast_weights()
    return mix(pseudo_labels(u0, f0), pseudo_labels(u1, f1), images.masks)


def _forget_cast_weights() -> None:
    """Drop autocast's copies of the weights: those made without gradients would cut the student's."""
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


def _from_row(output: Output, start: int) -> Output:
    return output[start:] if isinstance(output, Tensor) else [level[start:] for level in output]


def _pair(values: Sequence) -> tuple:
    first, second = values
    return first, second
