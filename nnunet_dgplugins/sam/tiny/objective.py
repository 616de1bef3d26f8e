"""What ``vit_tiny`` learns: any region from points and boxes, and features that do not change with the contrast.

Kirillov et al., Segment Anything, ICCV 2023, appendix A: focal + Dice + IoU losses, points sampled where the mask is
still wrong, the best of three masks for a single point. What differs: the focal loss weighs 5 instead of 20 (without
pretraining, 20 keeps every mask empty for longer); a box is jittered by up to 10 % of its side, at most 8 % of the
canvas (SAM: 10 %, at most 2 %), each by a share of its own; the IoU head learns from all four masks, so that they can
be ranked; one or two rounds per mask instead of eleven. Beside it a self-supervised term: two renderings of one map are
to have the same features where they show the same part (a supervised InfoNCE over token pairs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from nnunet_dgplugins.sam.models import SamModel

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder

FOCAL_WEIGHT = 5.0
DICE_WEIGHT = 1.0
IOU_WEIGHT = 1.0
TEMPERATURE = 0.1
_PROJECTION = 32
_TOKENS = 256  # pairs per image in the contrast term
_BOX_JITTER = 0.1  # at most, of the box's side; every box draws its own share, so that exact boxes are known too
_MAX_JITTER = 0.08  # of the canvas
_HALF = 0.5  # SAM adds half a pixel to every coordinate


@dataclass
class Prompts:
    """Prompts of N masks, in pixels of the model's canvas.

    Args:
        points: (N, P, 2) x, y.
        labels: (N, P): 1 inside, 0 outside, -1 no point, 2 and 3 the corners of a box.
    """

    points: torch.Tensor
    labels: torch.Tensor

    def add(self, points: torch.Tensor, labels: torch.Tensor) -> Prompts:
        """Return the prompts with one more point (N, 2) with its labels (N,)."""
        return Prompts(torch.cat([self.points, points[:, None]], 1), torch.cat([self.labels, labels[:, None]], 1))


class TinySam(nn.Module):
    """SAM's three parts as one trainable network, for images of any whole number of windows.

    Forward passes of its own over SAM's modules: with gradients and taps (SAM's encoder has none), and with many
    prompts for many images at once (SAM's decoder takes one image). The tests hold them to SAM's answers.

    A canvas smaller than the model's is taken as the same field of view at a lower resolution: the absolute positions
    are interpolated, the relative ones by SAM itself.

    Args:
        model: sizes.
        image_encoder: SAM's encoder.
        prompt_encoder: SAM's prompt encoder.
        mask_decoder: SAM's mask decoder.
    """

    def __init__(
        self,
        model: SamModel,
        image_encoder: ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
    ):
        super().__init__()
        self.model = model
        self.image_encoder, self.prompt_encoder, self.mask_decoder = image_encoder, prompt_encoder, mask_decoder

    def encode(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the taps (B, C, g, g) and the neck's output (B, P, g, g) of (B, 3, S, S), with gradients."""
        encoder = self.image_encoder
        tokens = encoder.patch_embed(images)
        positions = encoder.pos_embed
        if positions.shape[1] != tokens.shape[1]:
            size = tokens.shape[1:3]
            positions = F.interpolate(positions.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True)
            positions = positions.permute(0, 2, 3, 1)
        tokens = tokens + positions
        found = []
        for index, block in enumerate(encoder.blocks):
            tokens = block(tokens)
            if index in self.model.taps:
                found.append(tokens.permute(0, 3, 1, 2))
        found.append(encoder.neck(tokens.permute(0, 3, 1, 2)))
        return found

    def decode(
        self, neck: torch.Tensor, image: torch.Tensor, prompts: Prompts, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (N, 4, 4g, 4g) and IoU predictions (N, 4) of N prompts.

        Args:
            neck: (B, P, g, g).
            image: (N,) which image each prompt looks at.
            prompts: N prompts.
            mask: logits (N, 1, 4g, 4g) of the round before, None in the first.
        """
        sam, decoder = self.prompt_encoder, self.mask_decoder
        sparse = self._embed(prompts)
        dense = sam.no_mask_embed.weight[:, :, None, None] if mask is None else sam.mask_downscaling(mask)
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(len(sparse), -1, -1), sparse], 1)
        source = neck[image] + dense
        position = sam.pe_layer(neck.shape[-2:])[None].expand(len(source), -1, -1, -1)
        queries, keys = decoder.transformer(source, position, tokens)
        keys = keys.transpose(1, 2).reshape(source.shape)
        upscaled = decoder.output_upscaling(keys)
        hyper = torch.stack(
            [mlp(queries[:, 1 + index]) for index, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1
        )
        masks = torch.einsum("nkc,nchw->nkhw", hyper, upscaled)
        return masks, decoder.iou_prediction_head(queries[:, 0])

    def _embed(self, prompts: Prompts) -> torch.Tensor:
        """Embed prompts as SAM's own encoder does: (N, P, C)."""
        sam, labels = self.prompt_encoder, prompts.labels[..., None]
        embedded = sam.pe_layer.forward_with_coords(prompts.points + _HALF, sam.input_image_size)
        embedded = torch.where(labels == -1, sam.not_a_point_embed.weight, embedded)
        for index, kind in enumerate(sam.point_embeddings):  # outside, inside, first corner, second corner
            embedded = torch.where(labels == index, embedded + kind.weight, embedded)
        return embedded


class ContrastTerm(nn.Module):
    """Two renderings of one map: tokens of the same part are alike, all others are not.

    Args:
        channels: of each feature map.
    """

    def __init__(self, channels: list[int]):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(count, _PROJECTION, 1) for count in channels)

    def forward(
        self, features: list[torch.Tensor], parts: torch.Tensor, generator: torch.Generator, projected: bool = True
    ) -> torch.Tensor:
        """Return the mean loss over features and pairs.

        Args:
            features: maps (B, C, g, g); images 2i and 2i + 1 are renderings of one map.
            parts: (B, S, S) part of each pixel; the token's is that of its middle.
            generator: on the CPU, chooses the tokens.
            projected: compare projections; False: the features themselves, each token about its mean.
        """
        grid = features[0].shape[-1]
        step = parts.shape[-1] // grid
        part = parts[0::2, step // 2 :: step, step // 2 :: step].flatten(1).long()
        chosen = torch.randperm(grid * grid, generator=generator)[:_TOKENS].to(parts.device)
        same = (part[:, chosen, None] == part[:, None, chosen]).float()
        wanted = same / same.sum(2, keepdim=True)
        total = features[0].new_zeros(())
        for projection, feature in zip(self.projections, features, strict=True):
            tokens = (projection(feature) if projected else feature).flatten(2)[:, :, chosen].float()
            code = F.normalize(tokens if projected else tokens - tokens.mean(1, keepdim=True), dim=1)
            score = code[0::2].transpose(1, 2) @ code[1::2] / TEMPERATURE
            for way in (score, score.transpose(1, 2)):
                total = total - (wanted * way.log_softmax(2)).sum(2).mean() / (2 * len(features))
        return total


def first_prompts(masks: torch.Tensor, canvas: int, generator: torch.Generator) -> tuple[Prompts, torch.Tensor]:
    """Return a point inside or a jittered box for each mask, each for about half of them.

    Args:
        masks: (N, m, m) bool, none empty.
        canvas: side of the model's canvas in pixels.
        generator: on the CPU.

    Returns:
        Prompts with two slots (a point and no point, or two corners), and (N,) bool: prompted by a box.
    """
    count, side = masks.shape[0], masks.shape[-1]
    scale = canvas / side
    point = _random_pixel(masks, generator) * scale - _HALF
    rows, columns = masks.any(2), masks.any(1)
    low = torch.stack([columns.float().argmax(1), rows.float().argmax(1)], 1).float()
    high = side - torch.stack([columns.flip(1).float().argmax(1), rows.flip(1).float().argmax(1)], 1).float()
    jitter = torch.randn((count, 2, 2), generator=generator) * torch.rand((count, 1, 1), generator=generator)
    jitter = jitter.to(masks.device)
    sigma = ((high - low) * _BOX_JITTER).clamp_max(_MAX_JITTER * side)
    low, high = low + jitter[:, 0] * sigma, high + jitter[:, 1] * sigma
    box = torch.stack([low, high], 1).clamp(0, side) * scale - _HALF
    boxed = (torch.rand(count, generator=generator) < 0.5).to(masks.device)
    points = torch.where(boxed[:, None, None], box, torch.stack([point, torch.zeros_like(point)], 1))
    labels = torch.where(
        boxed[:, None], torch.tensor([2, 3], device=masks.device), torch.tensor([1, -1], device=masks.device)
    )
    return Prompts(points, labels), boxed


def next_points(
    masks: torch.Tensor, logits: torch.Tensor, canvas: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one pixel per mask out of the error region, (N, 2) in canvas pixels, and its label (N,).

    Without an error the pixel is any of the mask.
    """
    found = logits > 0
    wrong = found != masks
    wrong = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, masks)
    place = _random_pixel(wrong, generator)
    column, row = place.long().unbind(1)
    labels = masks[torch.arange(len(masks), device=masks.device), row, column].long()
    return place * (canvas / masks.shape[-1]) - _HALF, labels


def _random_pixel(masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the middle (x, y) of a random pixel of each mask, from the corner of the mask."""
    draw = torch.rand(masks.shape, generator=generator).to(masks.device)
    index = (draw * masks).flatten(1).argmax(1)
    side = masks.shape[-1]
    return torch.stack([index % side, index // side], 1) + 0.5


def mask_losses(logits: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the focal + Dice loss (N, K) of K candidates each, and their true IoU (N, K).

    Args:
        logits: (N, K, m, m).
        masks: (N, m, m) bool.
    """
    logits, target = logits.float().flatten(2), masks[:, None].flatten(2).float().expand(-1, logits.shape[1], -1)
    chance = logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    right = chance * target + (1 - chance) * (1 - target)
    alpha = 0.25 * target + 0.75 * (1 - target)
    focal = (alpha * (1 - right) ** 2 * cross).mean(2)
    dice = 1 - (2 * (chance * target).sum(2) + 1) / (chance.sum(2) + target.sum(2) + 1)
    with torch.no_grad():
        found = logits > 0
        true = target > 0
        iou = (found & true).sum(2) / (found | true).sum(2).clamp_min(1)
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice, iou


def promptable_loss(
    network: TinySam,
    neck: torch.Tensor,
    image: torch.Tensor,
    masks: torch.Tensor,
    rounds: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt, look where the mask is wrong, prompt again.

    Args:
        network: gives the decoder.
        neck: (B, P, g, g).
        image: (N,) which image a mask belongs to.
        masks: (N, 4g, 4g) bool.
        rounds: decodes per mask; from the second on with one more point and the mask before.
        generator: on the CPU.

    Returns:
        The mean loss over masks and rounds, and the mean IoU of the first round (what it would answer at once).
    """
    canvas = network.model.image_size
    prompts, boxed = first_prompts(masks, canvas, generator)
    total, first, before = neck.new_zeros((), dtype=torch.float32), neck.new_zeros(()), None
    for number in range(rounds):
        logits, predicted = network.decode(neck, image, prompts, before)
        losses, iou = mask_losses(logits, masks)
        # one point may mean several things: the best of three masks; otherwise SAM's first mask
        ambiguous = ~boxed if number == 0 else torch.zeros_like(boxed)
        best = losses[:, 1:].argmin(1) + 1
        used = torch.where(ambiguous, best, torch.zeros_like(best))[:, None]
        iou_loss = ((predicted.float() - iou) ** 2).mean()  # of all four, so that they can be ranked
        total = total + (losses.gather(1, used).mean() + IOU_WEIGHT * iou_loss) / rounds
        if number == 0:
            first = iou.gather(1, used).mean()
        if number + 1 < rounds:
            before = logits.detach().gather(1, used[..., None, None].expand(-1, -1, *logits.shape[2:]))
            prompts = prompts.add(*next_points(masks, before[:, 0], canvas, generator))
    return total, first
