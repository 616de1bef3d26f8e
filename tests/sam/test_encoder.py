"""The tapped encoder gives SAM's own features."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sam_helpers import TINY
from torch import nn

from nnunet_dgplugins.sam import encoder
from nnunet_dgplugins.sam.encoder import TappedEncoder
from nnunet_dgplugins.sam.weights import load_parts

VECTORS = Path(os.environ.get("DGPLUGINS_VECTORS") or Path(__file__).parents[1] / "vectors") / "desam"


def _sam_encoder(**sizes: object) -> nn.Module:
    """Return a small encoder of SAM's own class, all of whose tensors are random."""
    from segment_anything.modeling import ImageEncoderViT

    base: dict[str, object] = {"img_size": 80, "embed_dim": 16, "depth": 4, "num_heads": 2, "out_chans": 12}
    base |= {"window_size": 3, "use_rel_pos": True, "global_attn_indexes": (1, 3)}
    model = ImageEncoderViT(**(base | sizes), norm_layer=partial(nn.LayerNorm, eps=1e-6))
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.2
    return model.eval()


def _theirs(model: nn.Module, taps: tuple[int, ...], x: torch.Tensor) -> list[torch.Tensor]:
    """Features by SAM's own forward pass."""
    found: list[torch.Tensor] = []
    hooks = [
        model.blocks[i].register_forward_hook(lambda _m, _i, out: found.append(out.permute(0, 3, 1, 2))) for i in taps
    ]
    with torch.no_grad():
        found.append(model(x))
    for hook in hooks:
        hook.remove()
    return found


def _worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_features_equal_the_released_code():
    stored = np.load(VECTORS / "encoder_taps.npz")
    model = _sam_encoder(depth=8, mlp_ratio=2, global_attn_indexes=(1, 3, 5, 7))
    prefix = "param/image_encoder."
    model.load_state_dict({k[len(prefix) :]: torch.from_numpy(stored[k]) for k in stored.files if k.startswith(prefix)})
    taps = tuple(int(i) for i in stored["in/global_attn_indexes"][:-1])
    ours = TappedEncoder(model, taps)(torch.from_numpy(stored["in/x"]))
    theirs = [torch.from_numpy(stored[f"out/{name}"]) for name in ("tap0", "tap1", "tap2", "neck")]
    assert _worst(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (2, 3, 80, 80)),  # 5x5 tokens in windows of 3: padding right and below
        ({"window_size": 5}, (1, 3, 80, 80)),
        ({"img_size": 64, "window_size": 8}, (1, 3, 64, 64)),  # a window larger than the map
        ({"use_abs_pos": False}, (2, 3, 64, 112)),  # not square; positions interpolated
        ({"use_abs_pos": False}, (1, 3, 112, 48)),
        ({"num_heads": 1, "patch_size": 8, "img_size": 40}, (1, 3, 40, 40)),
    ],
)
def test_features_equal_segment_anything(sizes: dict[str, object], shape: tuple[int, ...]):
    model = _sam_encoder(**sizes)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert _worst(TappedEncoder(model, (0, 1, 2))(x), _theirs(model, (0, 1, 2), x)) < 1e-5


@pytest.mark.parametrize("size", [1, 4000, 30000])
def test_bands_of_any_size_give_the_same(size: int, monkeypatch: pytest.MonkeyPatch):
    model = _sam_encoder()
    x = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(encoder, "_BIAS_BYTES", size)
    monkeypatch.setattr(encoder, "_MLP_TOKENS", 7)
    assert _worst(TappedEncoder(model, (1,))(x), _theirs(model, (1,), x)) < 1e-5


def test_vit_tiny_equals_segment_anything():
    parts = load_parts("vit_tiny")
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    ours = TappedEncoder(parts.image_encoder, TINY.taps)(x)
    assert _worst(ours, _theirs(parts.image_encoder, TINY.taps, x)) < 1e-5
    assert tuple(tuple(x.shape[1:]) for x in ours) == TINY.feature_shapes


def test_bfloat16_is_close_and_returns_float32():
    parts = load_parts("vit_tiny")
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    ours = TappedEncoder(parts.image_encoder, TINY.taps, torch.bfloat16)(x)
    assert all(x.dtype == torch.float32 for x in ours)
    assert _worst(ours, _theirs(parts.image_encoder, TINY.taps, x)) < 0.03


def test_sams_modules_are_left_as_they_were():
    model = _sam_encoder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    forwards = {type(module): type(module).forward for module in model.modules()}
    x = torch.randn(1, 3, 80, 80)
    TappedEncoder(model, (1,))(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(kind.forward is forward for kind, forward in forwards.items())


def test_the_same_call_gives_the_same_bits():
    parts = load_parts("vit_tiny")
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    first, second = (TappedEncoder(parts.image_encoder, TINY.taps)(x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_cuda_gives_the_features_of_the_cpu(dtype: torch.dtype, bound: float):
    parts = load_parts("vit_tiny")
    x = torch.randn(8, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    theirs = _theirs(parts.image_encoder, TINY.taps, x)
    ours = TappedEncoder(parts.image_encoder.cuda(), TINY.taps, dtype)(x.cuda())
    assert _worst([x.cpu() for x in ours], theirs) < bound
