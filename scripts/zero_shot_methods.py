"""Answers to a point or a box: SAM's, and those of simple rules that see the same prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from zero_shot_data import Image, Mask, largest_part

from nnunet_dgplugins.content import Box, content_box, from_canvas
from nnunet_dgplugins.sam.models import SamModel
from nnunet_dgplugins.sam.preprocess import to_canvas

# out of 0.03..0.3 and 1/8..1/128 those that did best on the very images of the evaluation, which flatters the rules
GROWING_TOLERANCE = 0.05  # of the slice's range between its 1 and 99 percentile
GROWING_BLUR = 1.0  # pixels
DISC_SHARE = 1 / 64  # of the slice's content box


def centre_point(mask: Mask) -> tuple[int, int]:
    """Return the (row, column) farthest from the mask's border, the image's edge included; the middlemost of equals."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    candidates = np.argwhere(distance == distance.max())
    middle = np.argwhere(mask).mean(axis=0)
    row, column = candidates[((candidates - middle) ** 2).sum(axis=1).argmin()]
    return int(row), int(column)


def true_box(mask: Mask) -> Box:
    """Return (top, bottom, left, right) of a mask that is not empty; bottom and right exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def dice(truth: Mask, guess: Mask) -> float:
    """Return the Dice of two masks; ``truth`` is not empty."""
    return float(2 * (truth & guess).sum() / (truth.sum() + guess.sum()))


# ---------------------------------------------------------------- simple rules


def filled_box(image: Image, box: Box) -> Mask:
    """Return everything in the box."""
    found = np.zeros(image.shape, dtype=bool)
    found[box[0] : box[1], box[2] : box[3]] = True
    return found


def ellipse_in_box(image: Image, box: Box) -> Mask:
    """Return the ellipse that touches the box's sides."""
    top, bottom, left, right = box
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    down = (rows + 0.5 - (top + bottom) / 2) / ((bottom - top) / 2)
    across = (columns + 0.5 - (left + right) / 2) / ((right - left) / 2)
    found: Mask = down**2 + across**2 <= 1
    return found


def otsu_in_box(image: Image, box: Box) -> Mask:
    """Return the largest connected part of the box on the centre's side of Otsu's threshold.

    The centre is the middle fifth of the box each way, at least three pixels; a box of one grey value is filled.
    """
    from skimage.filters import threshold_otsu

    top, bottom, left, right = box
    inside = image[top:bottom, left:right]
    if inside.min() == inside.max():
        return filled_box(image, box)
    threshold = threshold_otsu(inside)
    middle = tuple(slice((n - k) // 2, (n - k) // 2 + k) for n in inside.shape for k in [min(n, max(3, n // 5))])
    bright = np.median(inside[middle]) > threshold
    found = np.zeros(image.shape, dtype=bool)
    found[top:bottom, left:right] = largest_part((inside > threshold) == bright)
    return found


def region_growing(image: Image, point: tuple[int, int], tolerance: float = GROWING_TOLERANCE) -> Mask:
    """Return what is connected to the point and differs from it by less than ``tolerance`` of the slice's range."""
    from skimage.segmentation import flood

    content = image[image != 0] if (image != 0).any() else image
    low, high = np.percentile(content, (1, 99))
    smooth = ndimage.gaussian_filter(image, GROWING_BLUR)
    found: Mask = flood(smooth, point, tolerance=float(tolerance * (high - low)))
    return found


def disc(image: Image, point: tuple[int, int], share: float = DISC_SHARE) -> Mask:
    """Return a disc around the point with ``share`` of the area of the slice's content box."""
    top, bottom, left, right = _content(torch.from_numpy(image))
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    area = share * (bottom - top) * (right - left)
    found: Mask = np.pi * ((rows - point[0]) ** 2 + (columns - point[1]) ** 2) <= area
    return found


POINT_RULES = {"region growing": region_growing, "disc": disc}
BOX_RULES = {"Otsu in box": otsu_in_box, "ellipse in box": ellipse_in_box, "filled box": filled_box}


# ---------------------------------------------------------------- SAM


@dataclass(frozen=True)
class Answers:
    """Masks for N objects.

    Args:
        point_masks: (N, 3, H, W), SAM's three proposals for a point.
        point_scores: (N, 3), the IoU it predicts for each.
        box_masks: (N, H, W), its single mask for a box.
        box_scores: (N,), its predicted IoU.
    """

    point_masks: Mask
    point_scores: npt.NDArray[np.float32]
    box_masks: Mask
    box_scores: npt.NDArray[np.float32]


def _content(image: torch.Tensor) -> Box:
    return content_box(image[None]) or (0, image.shape[0], 0, image.shape[1])


def canvas_points(points: npt.NDArray[np.floating], content: Box, canvas: int) -> torch.Tensor:
    """Bring pixels of the slice onto the canvas as SAM counts them.

    SAM adds half a pixel to what it is given, and the canvas is resized between pixel edges, so the centre of pixel x
    of a content box of width w lies at ``(x - left + 0.5) * canvas / w - 0.5``.

    Args:
        points: (N, 2) as (row, column).
        content: content box of the slice.
        canvas: side of the canvas.

    Returns:
        (N, 1, 2) float32 as (x, y).
    """
    top, bottom, left, right = content
    rows = (points[:, 0] - top + 0.5) * (canvas / (bottom - top)) - 0.5
    columns = (points[:, 1] - left + 0.5) * (canvas / (right - left)) - 0.5
    return torch.from_numpy(np.stack([columns, rows], axis=1).astype(np.float32))[:, None]


def canvas_boxes(boxes: npt.NDArray[np.floating], content: Box, canvas: int) -> torch.Tensor:
    """Bring boxes of the slice onto the canvas: the edges exactly, less the half pixel that SAM adds.

    Args:
        boxes: (N, 4) as (top, bottom, left, right), bottom and right exclusive.
        content: content box of the slice.
        canvas: side of the canvas.

    Returns:
        (N, 4) float32 as (x0, y0, x1, y1).
    """
    down, across = canvas / (content[1] - content[0]), canvas / (content[3] - content[2])
    y0, y1 = ((boxes[:, k] - content[0]) * down for k in (0, 1))
    x0, x1 = ((boxes[:, k] - content[2]) * across for k in (2, 3))
    return torch.from_numpy(np.stack([x0, y0, x1, y1], axis=1).astype(np.float32)) - 0.5


class Sam:
    """SAM with its own mask decoder, in float32: the image is encoded once, all prompts are decoded together.

    Args:
        model: sizes.
        image_encoder: canvas (1, 3, S, S) to features (1, P, g, g).
        prompt_encoder: SAM's.
        mask_decoder: SAM's.
    """

    def __init__(self, model: SamModel, image_encoder: Any, prompt_encoder: Any, mask_decoder: Any):
        self.model = model
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder

    @classmethod
    def load(cls, name: str) -> Sam:
        """Return a model with weights.

        Raises:
            UserError: no such model, or its file is missing or does not fit.
        """
        from nnunet_dgplugins.sam.weights import build_mask_decoder, load_parts

        parts = load_parts(name)
        decoder = build_mask_decoder(parts)
        state = {key.removeprefix("mask_decoder."): value for key, value in parts.mask_decoder_state.items()}
        decoder.load_state_dict(state, assign=True)
        decoder.requires_grad_(False).eval()
        return cls(parts.model, parts.image_encoder, parts.prompt_encoder, decoder)

    @torch.inference_mode()
    def __call__(self, image: Image, points: npt.NDArray[Any], boxes: npt.NDArray[Any]) -> Answers:
        """Segment.

        Args:
            image: slice (H, W).
            points: (N, 2) as (row, column).
            boxes: (N, 4) as (top, bottom, left, right), bottom and right exclusive.
        """
        plane = torch.from_numpy(image)[None]
        content, side = _content(plane[0]), self.model.image_size
        features = self.image_encoder(to_canvas(plane, self.model, [0])[None])
        xy = canvas_points(points, content, side)
        labels = torch.ones(xy.shape[:2], dtype=torch.int)
        by_point, no_mask = self.prompt_encoder(points=(xy, labels), boxes=None, masks=None)
        by_box, _ = self.prompt_encoder(points=None, boxes=canvas_boxes(boxes, content, side), masks=None)
        count = len(points)
        # a point comes with SAM's padding token, a box has two corners: both are two tokens, so one batch holds them
        logits, scores = self.mask_decoder.predict_masks(
            image_embeddings=features,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=torch.cat([by_point, by_box]),
            dense_prompt_embeddings=torch.cat([no_mask, no_mask]),
        )

        def masks(chosen: torch.Tensor) -> Mask:
            found: Mask = (from_canvas(chosen, content, (image.shape[0], image.shape[1])) > 0).numpy()
            return found

        three = masks(logits[:count, 1:].flatten(0, 1)).reshape(count, 3, *image.shape)
        return Answers(three, scores[:count, 1:].numpy(), masks(logits[count:, 0]), scores[count:, 0].numpy())
