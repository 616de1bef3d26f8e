"""Real slices with outlined objects for the zero-shot evaluation: none of them was ever used in training.

Volumes are turned to axial slices (rows from front to back, columns from right to left, as most files store them) and
given the intensities nnU-Net would give: MR cropped to its non-zero part and z-scored over the volume, skull-stripped
MR over the brain with zeros outside. CT is clipped to a soft-tissue window first, in place of the foreground
percentiles that a data set of one crop cannot give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nnunet_dgplugins.errors import BadInput, Problem, UserError

Mask = npt.NDArray[np.bool_]
Image = npt.NDArray[np.float32]

MIN_PIXELS = 30
MOST_SLICES = 40
CT_WINDOW = (-160.0, 240.0)  # Hounsfield units
_EIGHT = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Target:
    """What to segment in a volume.

    Args:
        row: line of the table.
        path: label map on the image's grid.
        values: labels that are objects of their own; none: everything above 0 is one object.
    """

    row: str
    path: Path
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scan:
    """One volume with its targets.

    Args:
        source: group of rows; sources weigh equally in the end.
        name: volume, unique within the source.
        image: NIfTI file.
        targets: what is outlined in it.
        slices: how many slices are taken from it.
        kind: ``mr``, ``brain`` (skull-stripped MR) or ``ct``.
    """

    source: str
    name: str
    image: Path
    targets: tuple[Target, ...]
    slices: int
    kind: str = "mr"


@dataclass(frozen=True)
class Object:
    """The largest connected part of one label in one slice: its row, label and mask (H, W)."""

    row: str
    label: int
    mask: Mask


@dataclass(frozen=True)
class Slice:
    """One slice: where it is from, its intensities (H, W), and the objects in it."""

    source: str
    scan: str
    index: int
    image: Image
    objects: list[Object] = field(default_factory=list)


def _cardiac(folder: Path) -> Iterator[Scan]:
    for truth in sorted(folder.glob("cardiac/ACDC/training/patient*/*_gt.nii.gz")):
        stem = truth.name.removesuffix("_gt.nii.gz")
        rows = (("right ventricle", 1), ("myocardium", 2), ("left ventricle", 3))
        targets = tuple(Target(row, truth, (value,)) for row, value in rows)
        yield Scan("cardiac", stem, truth.with_name(f"{stem}.nii.gz"), targets, slices=3)


def _prostate(folder: Path) -> Iterator[Scan]:
    masks = folder / "prostate" / "picai_labels" / "anatomical_delineations"
    for image in sorted(folder.glob("prostate/ProstateX/ProstateX-0000/*/*_t2w.nii.gz")):
        file = "11373_1001396.nii.gz"  # this case's name in PI-CAI (ProstateX-mapping.json)
        zones = masks / "zonal_pz_tz" / "AI" / "HeviAI23" / file
        targets = (
            Target("whole gland", masks / "whole_gland" / "AI" / "Bosma22b" / file),
            Target("peripheral zone", zones, (1,)),
            Target("transition zone", zones, (2,)),
        )
        yield Scan("prostate", "ProstateX-0000", image, targets, slices=MOST_SLICES)


def _spinal(folder: Path) -> Iterator[Scan]:
    root = folder / "spinal" / "sct_testing_data"
    if not root.is_dir():
        return
    t2s, mt, t2 = root / "t2s", root / "mt", root / "t2"
    cord_and_grey = (
        Target("T2* cord", t2s / "t2s_seg.nii.gz"),
        Target("T2* grey matter", t2s / "t2s_gmseg_manual.nii.gz"),
    )
    yield Scan("spinal", "t2s", t2s / "t2s.nii.gz", cord_and_grey, slices=12)
    for name in ("mt0", "mt1"):
        cord = (Target("MT cord", mt / f"{name}_seg.nii.gz"),)
        yield Scan("spinal", name, mt / f"{name}.nii.gz", cord, slices=12)
    # one healthy cord at 1 mm: neighbouring slices look alike
    yield Scan("spinal", "t2", t2 / "t2.nii.gz", (Target("T2 cord", t2 / "t2_seg-manual.nii.gz"),), slices=12)


# TotalSegmentator's numbers (its classes "total" and "total_mr"); what is always under MIN_PIXELS is left out
_CT = {
    "liver, spleen, kidneys": (1, 2, 3, 5),
    "other organs": (4, 6, 7, 11, 13, 14, 18, 19, 20),
    "vessels": (52, 63, 64),
    "muscles": (86, 87, 88, 89),
    "bones": (30, 31, 32, 33, 117),
}
_MR = {
    "liver, spleen, kidneys": (1, 2, 3, 5),
    "other organs": (4, 6, 7, 13, 14, 15),
    "vessels": (23, 24, 25),
    "muscles": (46, 47, 48, 49),
    "bones and discs": (19, 20),
}


def _abdomen(folder: Path, kind: str) -> Iterator[Scan]:
    root = folder / "abdomen" / "totalsegmentator_reference_files"
    if not root.is_dir():
        return
    truth = root / ("example_seg.nii.gz" if kind == "ct" else "example_seg_mr.nii.gz")
    rows = _CT if kind == "ct" else _MR
    targets = tuple(Target(row, truth, values) for row, values in rows.items())
    yield Scan(f"abdomen {kind.upper()}", kind, root / f"example_{kind}_sm.nii.gz", targets, slices=10, kind=kind)


def _brain(folder: Path) -> Iterator[Scan]:
    cases = [
        (truth.parent.name, truth, {"FLAIR": "Flair_subtrMeanDivStd", "T1c": "T1c_subtrMeanDivStd"})
        for truth in sorted(folder.glob("brats/brats2015TrainingData/*/*/OTMultiClass.nii.gz"))
    ]
    for truth in sorted(folder.glob("brats/tcga_lgg_brats_space/*/fusion/simple.nii.gz")):
        stem = f"../raw_bet/{truth.parent.parent.name.removesuffix('_brainles')}"
        cases.append(("TCGA", truth, {"FLAIR": f"{stem}_fla_bet", "T1c": f"{stem}_t1c_bet"}))
    for case, truth, images in cases:
        for contrast, stem in images.items():
            image = truth.parent / f"{stem}.nii.gz"
            yield Scan("brain", f"{case} {contrast}", image, (Target(f"tumour, {contrast}", truth),), 10, "brain")


SOURCES = {
    "cardiac": _cardiac,
    "prostate": _prostate,
    "spinal": _spinal,
    "abdomen CT": lambda folder: _abdomen(folder, "ct"),
    "abdomen MR": lambda folder: _abdomen(folder, "mr"),
    "brain": _brain,
}


def find_scans(folder: Path, only: Sequence[str] = ()) -> list[Scan]:
    """Return the volumes of every source, or of the sources named.

    Raises:
        UserError: there is no such folder, a source has no images in it, or files are missing; all are listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give the folder with the real images by --data, or set "
                        "DGPLUGINS_SAMPLE_DATA.")  # fmt: skip
    scans, problems = [], []
    for source in only or SOURCES:
        found = list(SOURCES[source](folder))
        if not found:
            problems.append(Problem(source, f"no images in {folder}", fix="Choose the sources you have by --only."))
        scans += found
    files = [path for scan in scans for path in (scan.image, *(target.path for target in scan.targets))]
    problems += [Problem(str(path), "no such file") for path in dict.fromkeys(files) if not path.is_file()]
    if problems:
        raise BadInput(str(folder), problems)
    return scans


def read_axial(path: Path) -> npt.NDArray[np.float32]:
    """Return a NIfTI volume as (z, y, x): y from front to back, x from right to left."""
    canonical: Any = nibabel.as_closest_canonical(nibabel.load(path))  # axes to the right, front and top
    values = np.asarray(canonical.dataobj, dtype=np.float32)
    return np.ascontiguousarray(values[::-1, ::-1].transpose(2, 1, 0))


def normalise(volume: Image, kind: str) -> tuple[Image, tuple[slice, ...]]:
    """Return what nnU-Net would train on, and the part of the volume it is (see the module's text)."""
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    data, seg, box = crop_to_nonzero(volume[None])
    image = data[0].astype(np.float32)
    if kind == "ct":
        image = np.clip(image, *CT_WINDOW)
    inside = seg[0] >= 0 if kind == "brain" else np.ones(image.shape, dtype=bool)
    mean, deviation = image[inside].mean(dtype=np.float64), image[inside].std(dtype=np.float64)
    image = np.where(inside, (image - mean) / max(deviation, 1e-8), 0).astype(np.float32)
    return image, tuple(slice(low, high) for low, high in box)


def largest_part(mask: Mask) -> Mask:
    """Return the largest connected part (diagonal neighbours count); the first of equals; an empty mask as it is."""
    parts, count = ndimage.label(mask, _EIGHT)
    return mask if count < 2 else parts == 1 + int(np.bincount(parts.ravel())[1:].argmax())


def objects_of(labels: npt.NDArray[np.integer], target: Target) -> list[Object]:
    """Return the target's objects of at least ``MIN_PIXELS`` in one slice of its label map."""
    found = []
    for value in target.values or (0,):
        mask = largest_part(labels == value if target.values else labels > 0)
        if mask.sum() >= MIN_PIXELS:
            found.append(Object(target.row, value, mask))
    return found


def spread(count: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` of ``count`` places, evenly spread, in order."""
    if wanted >= count:
        return list(range(count))
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]


def choose_slices(areas: Sequence[int], wanted: int) -> list[int]:
    """Return at most ``wanted`` of the slices that show something: the largest, the others evenly spread.

    Args:
        areas: pixels of all objects, per slice.
        wanted: how many.
    """
    largest = int(np.argmax(areas))
    others = [i for i, area in enumerate(areas) if area and i != largest]
    chosen = [others[i] for i in spread(len(others), wanted - 1)]
    return sorted([largest, *chosen]) if areas[largest] else []


def read_scan(scan: Scan) -> list[Slice]:
    """Return the chosen slices of one volume.

    Raises:
        UserError: a label map does not lie on the image's grid.
    """
    volume = read_axial(scan.image)
    whole = {target.path: read_axial(target.path) for target in scan.targets}
    wrong = [f"{path}: {labels.shape}" for path, labels in whole.items() if labels.shape != volume.shape]
    if wrong:
        raise UserError(f"Label maps of another shape than {scan.image} {volume.shape}: {'; '.join(wrong)}.")
    image, part = normalise(volume, scan.kind)
    maps = {path: np.rint(labels[part]).astype(np.int32) for path, labels in whole.items()}
    slices = []
    for i in range(len(image)):
        objects = [thing for target in scan.targets for thing in objects_of(maps[target.path][i], target)]
        slices.append(Slice(scan.source, scan.name, i + part[0].start, image[i], objects))
    chosen = choose_slices([sum(int(o.mask.sum()) for o in s.objects) for s in slices], scan.slices)
    return [slices[i] for i in chosen]


def read_slices(scans: Sequence[Scan], most: int = MOST_SLICES, progress: Any = iter) -> list[Slice]:
    """Return the slices of all volumes, at most ``most`` for each row of a source.

    Args:
        scans: of :func:`find_scans`.
        most: slices per row; evenly spread over all volumes that have the row.
        progress: wraps the volumes, such as ``tqdm``.
    """
    groups: dict[tuple[str, ...], list[Slice]] = {}
    for scan in progress(scans):
        rows = (scan.source, *(target.row for target in scan.targets))
        groups.setdefault(rows, []).extend(read_scan(scan))
    return [group[i] for group in groups.values() for i in spread(len(group), most)]
