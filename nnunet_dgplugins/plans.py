"""nnU-Net's plans made smaller, for a quick study or a small machine: smaller batches, patches, networks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from nnunet_dgplugins.errors import BadInput, Problem


def shrink(
    configuration: dict[str, Any],
    batch_size: int | None = None,
    patch_size: Sequence[int] = (),
    width_divisor: int = 1,
    where: str = "plans",
) -> None:
    """Change a plans configuration in place; the data need no new preprocessing.

    Args:
        configuration: one of the plans' ``configurations`` with all its keys.
        batch_size: patches per step; None keeps the planned number.
        patch_size: pixels per axis; each a multiple of what the network's poolings divide by. Empty: as planned.
        width_divisor: channels of every stage of the planned network are divided by it.
        where: for error messages.

    Raises:
        BadInput: a patch that the poolings cannot divide or of the wrong dimension, or too large a divisor.
    """
    network = configuration["architecture"]["arch_kwargs"]
    problems = []
    if patch_size:
        strides = [prod(steps) for steps in zip(*network["strides"], strict=True)]
        if len(patch_size) != len(strides) or any(
            size < 2 * step or size % step for size, step in zip(patch_size, strides, strict=True)
        ):
            expected = f"{len(strides)} multiples, twice at least, of {', '.join(map(str, strides))} (the poolings)"
            problems.append(Problem(f"{where}, patch size", " ".join(map(str, patch_size)), expected))
        configuration["patch_size"] = list(patch_size)
    widths = network["features_per_stage"]
    if any(width % width_divisor for width in widths):
        problems.append(Problem(f"{where}, width divisor", str(width_divisor), f"a divisor of {widths}"))
    network["features_per_stage"] = [width // width_divisor for width in widths]
    if batch_size is not None:
        configuration["batch_size"] = batch_size
    if problems:
        raise BadInput("The plans cannot be made smaller this way", problems)
