"""The six prostate sites as ``.npy`` slices, the release of RAM-DSIR (Zhou et al., ECCV 2022) that SAM-SDG trains on.

Tree: ``prostate/Domain{1..6}/{image,mask}/<volume>_<slice>.npy``, the same name in both folders. An image is an array
(rows, columns, 3): the slice with its neighbours below and above, scaled to [-1, 1] (or [0, 1]) per volume; a mask is
(rows, columns) with 0 and 1. The first and last slice of a volume, and those without prostate, are not there. Domain1
to Domain6 are RUNMC, BMC, I2CVB, UCL, BIDMC and HK, the order of RAM-DSIR's test script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dataset_conversion._array_slices import chained
from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import Facts, Listing, Request, Site, SourceCase, Trouble, entries, site_folders
from dataset_conversion._sources import Arrays
from nnunet_dgplugins.data.names import safe_name
from nnunet_dgplugins.errors import Problem

FACTS = Facts(
    command="prostate-npy",
    dataset_id=512,
    name="ProstateNPY",
    sites=(
        Site("RUNMC", ("Domain1", "A", "ISBI", "A-ISBI")),
        Site("BMC", ("Domain2", "B", "ISBI_1.5", "B-ISBI_1.5")),
        Site("I2CVB", ("Domain3", "C", "C-I2CVB")),
        Site("UCL", ("Domain4", "D", "D-UCL")),
        Site("BIDMC", ("Domain5", "E", "E-BIDMC")),
        Site("HK", ("Domain6", "F", "F-HK")),
    ),
    channel_names={"0": "T2"},
    labels={"background": 0, "prostate": 1},
    mapping={0: 0, 1: 1, 2: 1},
    splits=("kfold", "desam"),
    neighbours=True,
    ends_left_out=True,
    reference="https://github.com/zzzqzhou/RAM-DSIR",
    licence="as the public sources (NCI-ISBI 2013, I2CVB, PROMISE12): research use",
)
IMAGE, MASK = "image", "mask"
BELOW, MIDDLE, ABOVE = 0, 1, 2  # an array's channels
STRAY = 0.05  # share of the names that may be of another kind before names are not trusted
FILE = re.compile(r"(?P<volume>.+)[_-](?P<slice>\d+)")


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Stack the slices of each volume; both folders of a site must hold the same files."""
    for site, folder in site_folders(root, FACTS, ("data", "prostate"), listing).items():
        folders = {path.name.casefold(): path for path in entries(folder) if path.is_dir()}
        missing = [name for name in (IMAGE, MASK) if name not in folders]
        others = [path.name for path in entries(folder) if path.name.casefold() not in (IMAGE, MASK)]
        if others:
            listing.warnings.append(f"{folder}: neither image nor mask, left out: {', '.join(others)}")
        if missing:
            problem = Problem(str(folder), f"no folder {' and no folder '.join(missing)}", fix="Download it again.")
            listing.troubles.append(Trouble(problem, site))
            continue
        images, masks = _files(folders[IMAGE], listing), _files(folders[MASK], listing)
        gaps = []
        for volume, paths in _volumes(sorted({*images, *masks}), images, folder, listing).items():
            case = f"{site}_{safe_name(volume)}"
            if not _paired(folder, paths, images, masks, site, case, listing):
                continue
            if _has_gaps(paths):
                gaps.append(case)
            listing.cases.append(_case(root, site, volume, [images[p] for p in paths], [masks[p] for p in paths],
                                       request.neighbours))  # fmt: skip
        if gaps:
            some = ", ".join(gaps[:5]) + (", ..." if gaps[5:] else "")
            listing.warnings.append(f"slices are missing inside {len(gaps)} volumes ({some}); the others are stacked")
    listing.warnings.append("arrays carry no spacing; 1 mm is written in all directions")


def _files(folder: Path, listing: Listing) -> dict[str, Path]:
    """Return name without ending to file."""
    found = {}
    for path in entries(folder):
        if path.suffix.lower() == ".npy" and path.is_file():
            found[path.stem] = path
        else:
            listing.warnings.append(f"{path}: no .npy file, left out")
    return found


def _volumes(names: Sequence[str], images: dict[str, Path], folder: Path, listing: Listing) -> dict[str, list[str]]:
    """Return volume to the names of its slices in order: by name, or where that fails, by what the slices show."""
    found: dict[str, dict[int, str]] = {}
    strange = []
    for name in names:
        match = FILE.fullmatch(name)
        slices = found.setdefault(match["volume"], {}) if match else {}
        if match is None:
            strange.append(name)
        elif int(match["slice"]) in slices:
            break
        else:
            slices[int(match["slice"])] = name
    else:
        # "slice_17" of one volume only may be a running number over many
        if (len(found) > 1 and len(strange) <= max(1, STRAY * len(names))) or (len(names) < 2 and not strange):
            if strange:
                left_out = ", ".join(strange[:5]) + (", ..." if strange[5:] else "")
                listing.warnings.append(f"{folder}: {len(strange)} not called <volume>_<slice>, left out: {left_out}")
            return {volume: [slices[number] for number in sorted(slices)] for volume, slices in found.items()}
    chains = chained([images.get(name, folder / name) for name in names])
    listing.warnings.append(
        f"{folder}: names such as {name}.npy do not tell volumes apart; slices were joined where they show each "
        f"other's neighbours: {len(names)} slices, {len(chains)} volumes, taken for as many patients"
    )
    return {chain[0].stem: [path.stem for path in chain] for chain in chains}


def _has_gaps(names: Sequence[str]) -> bool:
    numbers = [int(match["slice"]) for name in names if (match := FILE.fullmatch(name))]
    return bool(numbers) and numbers[-1] - numbers[0] + 1 > len(numbers)


def _paired(
    folder: Path,
    names: Sequence[str],
    images: dict[str, Path],
    masks: dict[str, Path],
    site: str,
    case: str,
    listing: Listing,
) -> bool:
    """Return whether each slice of a volume has image and mask; those that have not become a problem."""
    complete = True
    for what, there in ((IMAGE, images), (MASK, masks)):
        missing = [f"{name}.npy" for name in names if name not in there]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if missing[5:] else "")
            fix = f"Download it again, or leave the volume out with --exclude {case}."
            problem = Problem(str(folder / what), f"no {listed}", "the same names as in the other folder", fix)
            listing.troubles.append(Trouble(problem, site, case))
            complete = False
    return complete


def _case(
    root: Path, site: str, volume: str, images: Sequence[Path], masks: Sequence[Path], neighbours: bool
) -> SourceCase:
    first, last = images[0].relative_to(root).as_posix(), images[-1].name
    wanted = (BELOW, MIDDLE, ABOVE) if neighbours else (MIDDLE,)  # the release's own neighbours, true ones at gaps too
    numbers = re.findall(r"\d+", volume)
    return SourceCase(
        name=f"{site}_{safe_name(volume)}",
        images=tuple(Arrays(tuple(images), channel=channel) for channel in wanted),
        label=Arrays(tuple(masks)),
        site=site,
        patient=volume,
        original=first if len(images) == 1 else f"{first} to {last}",
        order=(int(numbers[-1]) if numbers else 0, volume),
    )


command = make_command(
    FACTS,
    list_cases,
    "Convert the .npy slices at ROOT (the folder of Domain1 to Domain6, or one above): a case per volume.",
)

if __name__ == "__main__":
    run_as_script(command)
