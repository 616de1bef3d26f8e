"""MXNet's ``.params`` files, read without MXNet: the start weights that ResNet-38 was published with.

The format (``NDArray::Save`` of MXNet 1.x, little-endian): list magic 0x112 and a reserved 0, both 64 bits; the number
of arrays and the arrays; the number of names and the names, each with its length. An array is a magic number (V2 and
V3 add a storage type), the number of dimensions, the dimensions of 64 bits, device type and number, a type code, and
the values. Before V1 the number of dimensions stands in the magic's place and dimensions have 32 bits.
"""

from __future__ import annotations

import math
import os
import re
import struct
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.files import replacing

LIST_MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
#: NumPy's types by MXNet's codes
TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
_MOST_DIMENSIONS = 32
_PUBLISHED = "ilsvrc-cls_rna-a1_cls1000_ep-0001.params, ImageNet weights of ResNet-38"

_TENSORS = {"weight": "weight", "beta": "bias", "gamma": "weight", "mean": "running_mean", "var": "running_var"}
_LAST = r"_(?:moving_)?(?P<tensor>weight|beta|gamma|mean|var)"
_UNIT = re.compile(r"(?P<kind>res|bn)(?P<stage>\d)(?P<unit>a|[b-z]\d)_(?P<branch>branch[0-9a-z]+)" + _LAST)
_FINAL_NORM = re.compile(r"bn[0-9a-z]*" + _LAST)


class _Foreign(Exception):
    """The bytes are not what the format wants; holds what was found and what is expected."""

    def __init__(self, found: str, expected: str):
        super().__init__(found)
        self.found, self.expected = found, expected


class _Reader:
    """Takes numbers, arrays and names off a file, and never asks beyond its end."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.left = os.fstat(file.fileno()).st_size

    def take(self, length: int, what: str) -> bytes:
        if length > self.left:
            raise _Foreign(f"ends within {what}: {self.left} bytes are left", f"{length} bytes")
        self.left -= length
        return self.file.read(length)

    def numbers(self, kinds: str, what: str) -> tuple[int, ...]:
        return struct.unpack("<" + kinds, self.take(struct.calcsize("<" + kinds), what))

    def array(self, what: str) -> npt.NDArray[np.generic]:
        (magic,) = self.numbers("I", what)
        versioned = magic in (V1, V2, V3)
        if magic in (V2, V3) and (storage := self.numbers("i", what)[0]) != 0:
            raise _Foreign(f"{what} has storage type {storage}", "0, a dense array")
        dimensions = self.numbers("i", what)[0] if versioned else magic
        least = 0 if magic == V3 else 1  # before V3, no dimensions meant that there is no array
        if not least <= dimensions <= _MOST_DIMENSIONS:
            raise _Foreign(f"{what} has {dimensions} dimensions", f"{least} to {_MOST_DIMENSIONS}")
        shape = self.numbers(f"{dimensions}{'q' if versioned else 'I'}", what)
        if any(size < 1 for size in shape):
            raise _Foreign(f"{what} has shape {shape}", "sizes of 1 and more")
        _device, _device_number, code = self.numbers("iii", what)
        if not 0 <= code < len(TYPES):
            raise _Foreign(f"{what} has type code {code}", f"0 to {len(TYPES) - 1}")
        kind = np.dtype(TYPES[code])
        return np.frombuffer(self.take(math.prod(shape) * kind.itemsize, what), kind).reshape(shape)

    def name(self, what: str) -> str:
        (length,) = self.numbers("Q", what)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Foreign(f"{what} is no text", "UTF-8") from error


def read_params(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[np.generic]]:
    """Return the arrays of a ``.params`` file by their names in it, such as ``arg:conv1a_weight``.

    Raises:
        UserError: there is no such file.
        BadInput: it is not of MXNet's format, or damaged.
    """
    try:
        with open(path, "rb") as file:
            return _parsed(_Reader(file))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except _Foreign as error:
        problem = Problem(str(path), error.found, error.expected, "Is the download complete?")
        raise _refused(path, [problem]) from error


def _parsed(reader: _Reader) -> dict[str, npt.NDArray[np.generic]]:
    magic, reserved, count = reader.numbers("QQQ", "the header")
    if (magic, reserved) != (LIST_MAGIC, 0):
        raise _Foreign(f"starts with {magic:#x}, {reserved:#x}", f"{LIST_MAGIC:#x}, 0x0, a list of MXNet arrays")
    arrays = [reader.array(f"array {number} of {count}") for number in range(1, count + 1)]
    (named,) = reader.numbers("Q", "the number of names")
    if named != count:
        raise _Foreign(f"names {named} of {count} arrays", "a name for each")
    names = [reader.name(f"name {number} of {count}") for number in range(1, count + 1)]
    if reader.left:
        raise _Foreign(f"goes on for {reader.left} bytes behind the last name", "its end")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise _Foreign(f"names twice: {', '.join(repeated)}", "each name once")
    return dict(zip(names, arrays, strict=True))


def released_name(name: str) -> str | None:
    """Return the classifier's name of a tensor of the published file, None for the ImageNet head, which is dropped.

    A unit's first letter tells its place: ``res4a`` is b4, ``res4b3`` is b4_3.

    Raises:
        ValueError: the name is none of the published file's.
    """
    bare = name.removeprefix("arg:").removeprefix("aux:")
    if bare.startswith("linear1000"):
        return None
    if bare == "conv1a_weight":
        return "conv1a.weight"
    if match := _UNIT.fullmatch(bare):
        kind = "conv" if match["kind"] == "res" else "bn"
        if (kind == "conv") == (match["tensor"] == "weight"):
            place = match["stage"] if match["unit"] == "a" else f"{match['stage']}_{match['unit'][-1]}"
            return f"b{place}.{kind}_{match['branch']}.{_TENSORS[match['tensor']]}"
    elif (match := _FINAL_NORM.fullmatch(bare)) and match["tensor"] != "weight":
        return f"bn7.{_TENSORS[match['tensor']]}"
    raise ValueError(f"no tensor of ResNet-38 is called {name}")


def classifier_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return a published ``.params`` file as the classifier's state dict, float32.

    Raises:
        UserError: there is no such file.
        BadInput: it is not of MXNet's format, or holds another network; every foreign name is listed.
    """
    state: dict[str, Tensor] = {}
    problems: list[Problem] = []
    for name, values in read_params(path).items():
        try:
            released = released_name(name)
        except ValueError:
            problems.append(Problem(name, f"{values.dtype} {values.shape}", "a tensor of ResNet-38"))
            continue
        if released in state:
            problems.append(Problem(name, f"is {released} a second time", "each tensor once"))
        elif released is not None:
            state[released] = torch.from_numpy(values.astype(np.float32))
    problems += [Problem(name, "is missing") for name in ("conv1a.weight", "bn7.running_var") if name not in state]
    if problems:
        raise _refused(path, problems)
    return state


def convert_params(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
    """Write a published ``.params`` file as safetensors under the classifier's names.

    Args:
        source: the ``.params`` file.
        target: the ``.safetensors`` file.

    Returns:
        The number of tensors written; the ImageNet head is not among them.

    Raises:
        UserError: there is no such file.
        BadInput: see :func:`classifier_state`; nothing is written.
    """
    from safetensors.torch import save_file

    state = classifier_state(source)
    with replacing(target) as temporary:
        save_file(state, temporary)
    return len(state)


def _refused(path: str | os.PathLike[str], problems: list[Problem]) -> BadInput:
    return BadInput(f"{path} as {_PUBLISHED}", problems)
