"""What nnU-Net's augmentation needs to give the same image for the same seed."""

from __future__ import annotations

from typing import Any


def without_timing(transform: Any) -> Any:
    """Keep a transform, and those inside it, from choosing between two computations by a clock; returns it.

    nnU-Net's blur times convolution and FFT once per size and keeps the faster. Both give the same image, but other
    last bits, so that the same seed would give other weights by chance. Convolution remains.

    Args:
        transform: of batchgeneratorsv2, usually what ``get_training_transforms`` returns; changed in place.
    """
    from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

    if hasattr(transform, "benchmark"):
        transform.benchmark = False
    for value in vars(transform).values():
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, BasicTransform):
                without_timing(part)
    return transform
