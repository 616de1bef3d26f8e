"""SAM's mask decoder asked by boxes: four tiles' boxes on one embedding of their canvas.

SAM-SDG (arXiv 2401.02076), section 3.4. Every box gives a mask of the whole canvas, of which only its own tile counts:
everything else is discarded and gets no gradient. SAM's upscaling works on each token alone, so the other three
quarters need not be made at all; :meth:`BoxDecoder.forward` makes a tile and one token around it, the border that
bilinear resizing looks at, and gives the numbers of the whole way, which is kept in :meth:`BoxDecoder.low_resolution`.

With one class the decoder is SAM's. Every further class has a token and a hypernetwork of its own beside SAM's four,
which start as copies of the first: two organs may have nearly the same box (a ventricle and the wall around it).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.sam_parts import DecoderSizes, disabled_autocast
from nnunet_dgplugins.methods.samsdg.canvas import SIDE, TILES
from nnunet_dgplugins.methods.two_way import two_way

PREFIX = "mask_decoder."
SAM_TOKENS = 4  # one mask, or three for an ambiguous prompt
_UPSCALED = 4  # pixels of a mask per token and axis
_HALO = 1  # token


class BoxDecoder(nn.Module):
    """Frozen prompt encoder and trained mask decoder, names as in SAM's files.

    Args:
        prompt_encoder: SAM's.
        mask_decoder: SAM's, with ``4 + K - 1`` mask tokens.
        num_classes: K.
        folded: run SAM's transformer in the form of :mod:`nnunet_dgplugins.methods.two_way`, equal in masks and
            gradients up to rounding and in a half of the time; False: as SAM does.
    """

    def __init__(
        self, prompt_encoder: nn.Module, mask_decoder: nn.Module, num_classes: int = 1, *, folded: bool = True
    ):
        super().__init__()
        self.prompt_encoder = prompt_encoder.requires_grad_(False)
        self.mask_decoder: Any = mask_decoder  # SAM's class is imported inside functions only
        self.num_classes = num_classes
        self.folded = folded

    @property
    def canvas(self) -> int:
        """Side of the canvas in pixels."""
        return int(self.prompt_encoder.input_image_size[0])  # type: ignore[index]

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return self.canvas // SIDE

    def forward(self, embeddings: Tensor, boxes: Tensor) -> Tensor:
        """Return the logits of each tile, made in that tile only.

        Args:
            embeddings: of N canvases, (N, P, g, g).
            boxes: (4N, K, 4) in pixels of the canvas, four tiles per canvas, one box per class.

        Returns:
            (4N, K, S / 2, S / 2), bilinear; S is the side of the canvas.
        """
        tokens, image = self._transformed(embeddings, boxes)
        image = image.unflatten(0, (-1, self.num_classes))
        weights = self._hypernetworks(tokens).unflatten(0, (-1, self.num_classes))
        tiles = []
        by_place = zip(
            image.unflatten(0, (-1, TILES)).unbind(1), weights.unflatten(0, (-1, TILES)).unbind(1), strict=True
        )
        for place, (shown, weight) in enumerate(by_place):
            (rows, columns), (top, left) = _window(embeddings.shape[-1], *divmod(place, SIDE), self.canvas)
            maps = self.mask_decoder.output_upscaling(shown[..., rows, columns].flatten(0, 1))
            masks = torch.einsum("nc,nchw->nhw", weight.flatten(0, 1), maps)
            size = [side * self.canvas // (_UPSCALED * embeddings.shape[-1]) for side in masks.shape[-2:]]
            large = F.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
            own = large[:, top : top + self.tile, left : left + self.tile]
            tiles.append(own.unflatten(0, (-1, self.num_classes)))
        return torch.stack(tiles, 1).flatten(0, 1)

    def low_resolution(self, embeddings: Tensor, boxes: Tensor) -> Tensor:
        """Return each box's mask of the whole canvas as SAM decodes it, (4N, K, 4g, 4g); arguments as for forward."""
        tokens, image = self._transformed(embeddings, boxes)
        maps = self.mask_decoder.output_upscaling(image)
        masks = torch.einsum("nc,nchw->nhw", self._hypernetworks(tokens), maps)
        return masks.unflatten(0, (-1, self.num_classes))

    def whole_canvas(self, embeddings: Tensor, boxes: Tensor) -> Tensor:
        """Return what forward returns in the published order of work: whole masks enlarged, their own tile cut out."""
        masks = self.low_resolution(embeddings, boxes)
        large = F.interpolate(masks, size=(self.canvas, self.canvas), mode="bilinear", align_corners=False)
        tiles = large.unflatten(-1, (SIDE, self.tile)).unflatten(-3, (SIDE, self.tile))  # (4N, K, row, h, column, w)
        place = torch.arange(len(tiles), device=tiles.device) % TILES
        return tiles[torch.arange(len(tiles), device=tiles.device), :, place // SIDE, :, place % SIDE]

    def _transformed(self, embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask token of each box's class (4NK, P) and the image as each box sees it (4NK, P, g, g)."""
        decoder, per_canvas = self.mask_decoder, TILES * self.num_classes
        fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        encoded = encode_boxes(self.prompt_encoder, boxes.reshape(-1, 4))
        sparse, dense, position = (part.to(fixed.dtype) for part in encoded)
        tokens = torch.cat([fixed.expand(len(sparse), -1, -1), sparse], dim=1)
        if self.folded:  # a canvas is never copied per box
            fold = partial(two_way, decoder.transformer)
            found = [
                fold(canvas[None] + dense, position, own)
                for canvas, own in zip(embeddings, tokens.split(per_canvas), strict=True)
            ]
            queries, keys = (torch.cat(parts) for parts in zip(*found, strict=True))
        else:
            image = embeddings.repeat_interleave(per_canvas, 0) + dense
            queries, keys = decoder.transformer(image, position.expand(len(image), -1, -1, -1), tokens)
        image = keys.transpose(1, 2).unflatten(2, tuple(embeddings.shape[-2:]))
        classes = torch.arange(self.num_classes, device=queries.device)
        # token 0 is the IoU's
        chosen = 1 + torch.tensor(class_tokens(self.num_classes), device=queries.device)
        return queries.unflatten(0, (-1, self.num_classes))[:, classes, chosen].flatten(0, 1), image

    def _hypernetworks(self, tokens: Tensor) -> Tensor:
        """Return the weights (4NK, c) that turn the upscaled image into masks; every class has its own network."""
        by_class = tokens.unflatten(0, (-1, self.num_classes)).unbind(1)
        networks = [self.mask_decoder.output_hypernetworks_mlps[index] for index in class_tokens(self.num_classes)]
        return torch.stack([net(own) for net, own in zip(networks, by_class, strict=True)], 1).flatten(0, 1)


def class_tokens(num_classes: int) -> list[int]:
    """Return which mask token each class reads: SAM's first, then those behind SAM's four."""
    return [0, *range(SAM_TOKENS, SAM_TOKENS + num_classes - 1)]


def _window(grid: int, row: int, column: int, canvas: int) -> tuple[tuple[slice, slice], tuple[int, int]]:
    """Return the tokens of a tile with its border (rows, columns), and where in their enlarged mask the tile begins."""
    windows, starts = [], []
    tokens = grid // SIDE
    for place in (row, column):
        start, stop = max(0, place * tokens - _HALO), min(grid, (place + 1) * tokens + _HALO)
        windows.append(slice(start, stop))
        starts.append((place * tokens - start) * (canvas // grid))
    return (windows[0], windows[1]), (starts[0], starts[1])


@torch.no_grad()
def encode_boxes(prompt_encoder: nn.Module, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode boxes (n, 4) of the canvas.

    Returns:
        Corners (n, 2, P), the absence of a mask prompt (1, P, g, g), and the positions of the image's tokens
        (1, P, g, g).
    """
    with disabled_autocast(boxes.device):
        sparse, dense = prompt_encoder(points=None, boxes=boxes.float(), masks=None)
        position = prompt_encoder.get_dense_pe()  # type: ignore[operator]
    return sparse, dense[:1], position


def build_mask_decoder(model: DecoderSizes, num_classes: int = 1) -> nn.Module:
    """Return SAM's mask decoder for K classes, with initial weights."""
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    return MaskDecoder(
        transformer_dim=model.prompt_dim,
        transformer=TwoWayTransformer(
            depth=2, embedding_dim=model.prompt_dim, num_heads=model.decoder_num_heads, mlp_dim=model.decoder_mlp_dim
        ),
        num_multimask_outputs=SAM_TOKENS - 1 + num_classes - 1,
        iou_head_depth=3,
        iou_head_hidden_dim=model.iou_head_hidden,
    )


def load_mask_decoder(decoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the decoder SAM's weights, ``mask_decoder.*``; tokens and hypernetworks of further classes copy the first.

    Raises:
        UserError: tensors are missing, unknown, or belong to another SAM size.
    """
    own = decoder.state_dict()
    given = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    further = {
        key for key in own if key.startswith("output_hypernetworks_mlps.") and int(key.split(".")[1]) >= SAM_TOKENS
    }
    wrong = sorted(set(given) ^ (set(own) - further))
    for key in own if not wrong else ():
        value = given[f"output_hypernetworks_mlps.0.{key.split('.', 2)[2]}" if key in further else key]
        if _per_token(key) and len(value) == SAM_TOKENS:
            value = torch.cat([value, value[:1].expand(len(own[key]) - SAM_TOKENS, *value.shape[1:])])
        if value.shape != own[key].shape:
            wrong.append(f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}")
        own[key] = value
    if wrong:
        raise UserError(
            f"The weights do not fit SAM's mask decoder: {len(wrong)} tensors are missing, unknown or of another shape "
            f"(such as {wrong[0]}). Do they belong to another SAM size? Choose the matching `sam=`."
        )
    decoder.load_state_dict(own, strict=True)


def untrained_names(decoder: nn.Module, num_classes: int = 1) -> list[str]:
    """Return the decoder's parameters that no gradient reaches: the IoU head and hypernetworks of no class.

    The released code hands them to Adam, whose weight decay then shrinks the hypernetworks towards 0. So it is with the
    biases of attention keys: they add the same to all scores of a query, which softmax ignores.
    """
    read = {f"output_hypernetworks_mlps.{index}." for index in class_tokens(num_classes)}
    return [
        name
        for name, _ in decoder.named_parameters()
        if name.startswith("iou_prediction_head.")
        or name.endswith("k_proj.bias")
        or (name.startswith("output_hypernetworks_mlps.") and not name.startswith(tuple(read)))
    ]


def trainable_parameters(decoder: nn.Module, num_classes: int = 1) -> list[nn.Parameter]:
    """Freeze what is never trained and return the rest, for the optimiser."""
    untrained = set(untrained_names(decoder, num_classes))
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name not in untrained)
    return [parameter for parameter in decoder.parameters() if parameter.requires_grad]


def _per_token(key: str) -> bool:
    return key == "mask_tokens.weight" or key.startswith("iou_prediction_head.layers.2.")
