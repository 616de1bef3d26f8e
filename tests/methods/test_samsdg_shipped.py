"""SAM-SDG on the SAM encoder that ships with the package, put together as a trainer does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
from nnunet_dgplugins.methods.samsdg.canvas import merge
from nnunet_dgplugins.methods.samsdg.decoder import BoxDecoder, build_mask_decoder, load_mask_decoder
from nnunet_dgplugins.methods.samsdg.segmenter import SAMSDGSegmenter
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.sam.models import MODELS
from nnunet_dgplugins.sam.preprocess import PIXEL_MEAN, PIXEL_STD
from nnunet_dgplugins.sam.weights import hash_state, load_parts

MODEL = MODELS["vit_tiny"]


class Middle(nn.Module):
    """Coarse network that sees an organ in the middle of every image."""

    def __init__(self):
        super().__init__()
        self.height = nn.Parameter(torch.tensor(9.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(images[:, :1], -9)
        side = images.shape[-1]
        logits[..., side // 4 : side // 2, side // 4 : 3 * side // 4] = self.height
        return logits


def built() -> SAMSDGSegmenter:
    prompts = build_prompt_encoder(MODEL.prompt_dim, MODEL.grid, MODEL.image_size)
    decoder = BoxDecoder(prompts, build_mask_decoder(MODEL))
    return SAMSDGSegmenter(FrozenEncoder(MODEL), decoder, Middle(), 64, pixels=(PIXEL_MEAN, PIXEL_STD)).eval()


@pytest.fixture(scope="module")
def trained() -> SAMSDGSegmenter:
    """A network with SAM's own weights."""
    net, parts = built(), load_parts(MODEL)
    net.image_encoder.adopt(parts)
    net.decoder.prompt_encoder.load_state_dict(parts.prompt_encoder.state_dict())
    load_mask_decoder(net.decoder.mask_decoder, parts.mask_decoder_state)
    net.adopt_coarse(Middle().state_dict(), hash_state(Middle().state_dict()))
    return net


def slices(count: int) -> torch.Tensor:
    """Discs in the upper middle, where the box is, on dim noise."""
    rows, columns = torch.meshgrid(torch.arange(80) / 80, torch.arange(64) / 64, indexing="ij")
    disc = ((rows - 0.375) / 0.12) ** 2 + ((columns - 0.5) / 0.24) ** 2 < 1
    noise = torch.rand(count, 1, 80, 64, generator=torch.Generator().manual_seed(0))
    return noise + 4 * disc + 0.1


@pytest.mark.filterwarnings("ignore:A slice fills")
@torch.no_grad()
def test_sam_finds_what_stands_out_in_its_box_on_a_canvas_of_one_and_of_four(trained):
    x = slices(4)
    truth = slices(1)[0, 0] > 3
    for logits in (trained(x), trained.segment_four(x)[0]):
        for found in logits[:, 1] > 0:
            assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.5


@pytest.mark.filterwarnings("ignore:A slice fills")
@torch.no_grad()
def test_a_checkpoint_holds_all_that_prediction_needs(trained):
    other = built()
    other.load_state_dict(trained.state_dict(), strict=True)
    assert other.image_encoder.hash == trained.image_encoder.hash
    assert torch.equal(other.coarse_hash, trained.coarse_hash)
    x = slices(1)
    assert torch.equal(other(x), trained(x))


@torch.no_grad()
def test_a_canvas_is_embedded_with_sams_pixel_normalisation(trained):
    tiles, _ = trained.tiles(slices(4))
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (PIXEL_MEAN, PIXEL_STD))
    expected = trained.image_encoder((merge(tiles) * 255 - mean) / std)[-1]
    torch.testing.assert_close(trained.embed(tiles), expected, atol=1e-4, rtol=1e-4)


def test_another_sams_weights_are_refused_by_size():
    other = MODELS["vit_b"]
    with pytest.raises(UserError, match="another SAM size"):
        load_mask_decoder(build_mask_decoder(other), load_parts(MODEL).mask_decoder_state)
