"""How a feature map is kept on disk: whole numbers of 12 or 8 bits within blocks of 8x8 tokens, then blosc2.

Each channel of each block has its own offset and step (two half-precision numbers), so neither a channel nor a token
of unusual size costs the others precision, and the size has a bound whatever the data.
Measurements: docs/embedding_store.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from nnunet_dgplugins.errors import UserError

BITS = {"half": 12, "compact": 8}
BLOCK = 8
_CHANNELS_AT_A_TIME = 64  # 1 MiB of float32 at 64x64 tokens: stays in the processor's cache


@dataclass(frozen=True)
class Packed:
    """One feature map, compressed.

    Args:
        shape: (C, H, W).
        bits: precision of a value.
        block: side of a block, in tokens.
        exponent: power of two by which the stored offsets and steps are multiplied.
        values: compressed whole numbers, uint8 or int16.
        scales: compressed float16 (2, C, H / block, W / block): offsets, then steps.
    """

    shape: tuple[int, int, int]
    bits: int
    block: int
    exponent: int
    values: bytes
    scales: bytes


def pack(features: torch.Tensor, bits: int, block: int = BLOCK) -> Packed:
    """Compress one feature map; the same numbers give the same bytes, whatever the thread count.

    Args:
        features: (C, H, W), any device, any floating type.
        bits: up to 14; the store uses 8 and 12.
        block: side of a block in tokens; a map it does not divide gets the largest that divides both.

    Raises:
        UserError: a value is not finite.
    """
    x = features.detach().to("cpu", torch.float32).contiguous()
    channels, height, width = x.shape
    block = math.gcd(block, math.gcd(height, width))
    rows, columns = height // block, width // block
    low, high = torch.aminmax(x)
    largest = max(abs(float(low)), abs(float(high)))
    if not math.isfinite(largest):
        raise UserError("The SAM encoder's features are not finite; its weights or its precision are at fault.")
    exponent = math.frexp(largest)[1] - 14 if largest else 0  # offsets end up within 2**14 of float16's 2**16
    values = torch.empty(x.shape, dtype=torch.uint8 if bits <= 8 else torch.int16)
    scales = torch.empty((2, channels, rows, columns), dtype=torch.float16)
    for start in range(0, channels, _CHANNELS_AT_A_TIME):
        part = x[start : start + _CHANNELS_AT_A_TIME]
        grouped = part.view(-1, rows, block, columns, block).transpose(2, 3)  # (c, rows, columns, block, block)
        whole, offset, step = _quantise(grouped.reshape(-1, block * block), bits, exponent)
        target = values[start : start + _CHANNELS_AT_A_TIME].view(-1, rows, block, columns, block)
        target.transpose(2, 3).copy_(whole.view(grouped.shape))
        scales[0, start : start + _CHANNELS_AT_A_TIME] = offset.view(-1, rows, columns)
        scales[1, start : start + _CHANNELS_AT_A_TIME] = step.view(-1, rows, columns)
    return Packed(
        shape=(channels, height, width),
        bits=bits,
        block=block,
        exponent=exponent,
        values=_compress(values.numpy(), bitwise=bits <= 8),
        scales=_compress(scales.numpy(), bitwise=False),
    )


def _quantise(groups: torch.Tensor, bits: int, exponent: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise each row; offset is rounded down and step up, so that no value falls outside.

    Args:
        groups: (n, block * block) float32.
        bits: precision.
        exponent: power of two of the stored scales.

    Returns:
        Whole numbers as float32 (not yet truncated), offset and step (n, 1) float16.
    """
    largest = 2**bits - 1
    low, high = torch.aminmax(groups, dim=1, keepdim=True)
    low, high = low * 2.0**-exponent, high * 2.0**-exponent
    offset = (low - low.abs() * 2.0**-11 - 2.0**-25).half()
    step = ((high - offset.float()) * ((1 + 2.0**-10) / largest) + 2.0**-25).half()
    inverse = torch.where(step > 0, 2.0**-exponent / step.float(), 0.0)
    return (groups - offset.float() * 2.0**exponent).mul_(inverse).add_(0.5), offset, step


def unpack(packed: Packed, device: torch.device | str = "cpu", out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the feature map (C, H, W), float32, written into ``out`` if given; the arithmetic runs on ``device``."""
    channels, height, width = packed.shape
    block = packed.block
    rows, columns = height // block, width // block
    kind = np.dtype(np.uint8 if packed.bits <= 8 else np.int16)
    values = torch.from_numpy(_decompress(packed.values, kind)).view(packed.shape).to(device)
    scales = (
        torch.from_numpy(_decompress(packed.scales, np.dtype(np.float16))).to(device).float() * 2.0**packed.exponent
    )
    offset, step = scales.view(2, channels * rows, 1, columns, 1)
    if out is None:
        out = torch.empty(packed.shape, dtype=torch.float32, device=device)
    by_block = out.view(channels * rows, block, columns, block)
    source = values.view(channels * rows, block, columns, block)
    size = channels * rows if by_block.is_cuda else _CHANNELS_AT_A_TIME * rows
    for start in range(0, channels * rows, size):
        part = slice(start, start + size)
        torch.addcmul(offset[part], source[part].float(), step[part], out=by_block[part])
    return out


def _compress(array: np.ndarray, bitwise: bool) -> bytes:
    import blosc2

    # one thread: with more, blosc2 writes blocks in the order they finish and the bytes are no longer the same
    return blosc2.compress2(
        array,
        typesize=array.itemsize,
        codec=blosc2.Codec.ZSTD,
        clevel=1,
        filters=[blosc2.Filter.BITSHUFFLE if bitwise else blosc2.Filter.SHUFFLE],
        nthreads=1,
    )


def _decompress(content: bytes, kind: np.dtype) -> np.ndarray:
    import blosc2

    size = int.from_bytes(content[4:8], "little")  # uncompressed bytes, from blosc2's chunk header
    array = np.empty(size // kind.itemsize, dtype=kind)
    blosc2.decompress2(content, dst=array, nthreads=1)
    return array
