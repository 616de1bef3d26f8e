"""The constant mask: what is reached without looking at the image. Any method has to beat it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.evaluate import Dataset
from nnunet_dgplugins.evaluation.label_maps import read_label_map
from nnunet_dgplugins.files import replacing

GRID = 128
"""In-plane size of the grid of relative positions; through-plane it is 32."""
_DEPTH = 32
Array = npt.NDArray[np.float32]


def constant_mask(dataset: int | str, out_folder: Path) -> list[Path]:
    """Predict one and the same mask, placed by relative position in the image, for every case of ``imagesTs``.

    The mask is where more than half of the source's labelled training cases have foreground, with the class most of
    them have there. If no place reaches a half, the threshold falls to the largest one that leaves something.

    Args:
        dataset: id or name of a raw dataset.
        out_folder: receives one label map per case, on the grid of its image.

    Returns:
        The files written.

    Raises:
        UserError: the dataset has no labelled training case or no test image.
    """
    data = Dataset.load(dataset)
    labels = [path for case, path in data.files(data.folder / "labelsTr").items() if _may_be_read(data, case)]
    if not labels:
        raise UserError(f"{data.folder / 'labelsTr'}: no labelled training case to take a mean mask from.")
    images = {case[:-5]: path for case, path in data.files(data.folder / "imagesTs").items() if case.endswith("_0000")}
    if not images:
        raise UserError(f"{data.folder / 'imagesTs'}: no image to place the mask on.")
    average = mean_masks((read_label_map(path).values for path in labels), data.classes.ignore)
    written = []
    for case, image in images.items():
        written.append(out_folder / f"{case}{data.file_ending}")
        _write(average, image, written[-1])
    return written


def _may_be_read(data: Dataset, case: str) -> bool:
    """Return whether a training case is labelled and of the source, as far as the case table says."""
    known = data.table.cases.get(case)
    return known is None or (known.labelled and (not data.table.sources or known.site in (None, *data.table.sources)))


def mean_masks(
    label_maps: Iterable[npt.NDArray[np.integer]], ignore: int | None = None
) -> dict[int, Array]:  # fmt: skip
    """Return for each label value the share of maps that hold it, on a common grid of relative positions.

    Args:
        label_maps: (z, y, x) or (y, x), of any size.
        ignore: value that counts as background.
    """
    total: dict[int, Array] = {}
    count = 0
    for labels in label_maps:
        count += 1
        shape = (_DEPTH, GRID, GRID)[-labels.ndim :]
        for value in np.unique(labels).tolist():
            if value not in (0, ignore):
                share = _resize((labels == value).astype(np.float32), shape)
                total[value] = total[value] + share if value in total else share
    return {value: (summed / count).astype(np.float32) for value, summed in sorted(total.items())}


def place(average: Mapping[int, Array], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return the constant mask on a grid of ``shape``; empty only if there is no foreground in any training case."""
    result = np.zeros(shape, np.uint8)
    if not average:
        return result
    shares = np.stack([_resize(share, shape) for share in average.values()])  # (class, *shape)
    foreground = shares.sum(axis=0)
    highest = float(foreground.max())
    # the half is strict; what falls short of it keeps its places of highest share, up to rounding
    inside = foreground > 0.5 if highest > 0.5 else foreground >= highest - 1e-6
    result[inside] = np.array(list(average))[shares.argmax(axis=0)][inside]
    return result


def _resize(volume: Array, shape: tuple[int, ...]) -> Array:
    """Linear interpolation by relative position: the outer edges of the first and last voxel coincide."""
    from skimage.transform import resize

    # averaging where the grid is coarser than the volume, so that small structures are not stepped over
    coarser = any(new < old for new, old in zip(shape, volume.shape, strict=True))
    resized: Array = resize(volume, shape, order=1, mode="edge", anti_aliasing=coarser, preserve_range=True)
    return resized.astype(np.float32)


def _write(average: Mapping[int, Array], image: Path, target: Path) -> None:
    import SimpleITK

    source = SimpleITK.ReadImage(str(image))
    mask = SimpleITK.GetImageFromArray(place(average, source.GetSize()[::-1]))
    mask.CopyInformation(source)
    with replacing(target) as temporary:
        SimpleITK.WriteImage(mask, str(temporary), useCompression=True)
