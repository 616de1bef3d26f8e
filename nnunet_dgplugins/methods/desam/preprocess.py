"""The released code's preprocessing of a volume, for its vectors and for imports.

Training and prediction here use one torch function per slice instead (``nnunet_dgplugins.sam``), which sees no labels.
This one follows ``precompute_embeddings.py``: percentiles over the volume, slices with foreground only, stretched to a
square, and a label that scikit-image's anti-aliasing erodes slightly when it shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERCENTILES = (0.5, 99.5)
SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class OfficialSlices:
    """Slices of one case.

    Args:
        index: (N,) z of each slice in the volume.
        images: (N, S, S, 3) uint8, three equal channels.
        labels: (N, S, S) uint8, 0 or 1.
    """

    index: np.ndarray
    images: np.ndarray
    labels: np.ndarray


def rescale_volume(volume: np.ndarray) -> np.ndarray:
    """Return a volume (z, y, x) clipped to its 0.5 and 99.5 percentiles and stretched to uint8; exact zeros stay 0."""
    volume = np.asarray(volume)
    low, high = np.percentile(volume, PERCENTILES)
    clipped = np.clip(volume, low, high)
    span = clipped.max() - clipped.min()
    scaled = (clipped - clipped.min()) / (span if span > 0 else 1) * 255.0
    scaled[volume == 0] = 0
    return scaled.astype(np.uint8)


def preprocess_volume(
    volume: np.ndarray, label: np.ndarray, size: int = 256, *, label_id: int = 1, drop_last_slice: bool = False
) -> OfficialSlices:
    """Return the slices of a case that the released code would train on.

    Args:
        volume: (z, y, x) raw intensities.
        label: (z, y, x); the organ is ``label_id``.
        size: side S of the square slices; oblong slices are stretched.
        label_id: value of the organ.
        drop_last_slice: leave out the last slice with foreground, as the released loop does by an off-by-one.
    """
    from skimage.transform import resize

    truth = (np.asarray(label) == label_id).astype(np.uint8)
    found = np.flatnonzero(truth.any(axis=(1, 2)))
    grey = rescale_volume(volume)
    index, images, labels = [], [], []
    stop = (found[-1] + (0 if drop_last_slice else 1)) if len(found) else 0
    for z in range(found[0] if len(found) else 0, stop):
        mask = resize(truth[z], (size, size), order=0, mode="constant", preserve_range=True, anti_aliasing=True).astype(
            np.uint8
        )
        if not mask.any():
            continue
        image = resize(grey[z], (size, size), order=3, mode="constant", preserve_range=True, anti_aliasing=True)
        index.append(z)
        images.append(np.repeat(image.astype(np.uint8)[..., None], 3, axis=-1))
        labels.append(mask)
    return OfficialSlices(
        index=np.array(index, dtype=np.int64),
        images=np.array(images, dtype=np.uint8).reshape(-1, size, size, 3),
        labels=np.array(labels, dtype=np.uint8).reshape(-1, size, size),
    )


def to_canvas(image: np.ndarray, canvas: int = 1024) -> np.ndarray:
    """Resize (H, W, 3) uint8 by SAM's rule: longest side to ``canvas``, PIL's bilinear filter."""
    from segment_anything.utils.transforms import ResizeLongestSide

    # only its NumPy road: the tensor road of the packaged version 1.0 passes a wrong argument
    return np.asarray(ResizeLongestSide(canvas).apply_image(image))


def normalise(image: np.ndarray, canvas: int = 1024) -> np.ndarray:
    """Return (1, 3, canvas, canvas) float32 in SAM's normalisation, padded with zeros to the right and the bottom."""
    values = (image.astype(np.float32) - np.array(SAM_MEAN, np.float32)) / np.array(SAM_STD, np.float32)
    height, width = image.shape[:2]
    padded = np.pad(values, ((0, canvas - height), (0, canvas - width), (0, 0)))
    return padded.transpose(2, 0, 1)[None]
