"""Spinal Cord Grey Matter Challenge 2016 (Prados et al., NeuroImage 2017): cervical cord of four sites, four raters.

Tree: two flat folders. Training: ``site<S>-sc<NN>-image.nii.gz`` (sc01 to sc10 of each site), the raters'
``site<S>-sc<NN>-mask-r<R>.nii.gz`` (0 background, 1 grey, 2 white matter) and ``-levels.txt``; testing: sc11 to sc20,
images only. The raters are fused: a voxel belongs to what more than half of them say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import (
    Facts,
    Listing,
    Raters,
    Request,
    Site,
    SourceCase,
    Trouble,
    entries,
    is_volume,
    stem,
)
from nnunet_dgplugins.errors import Problem, UserError

if TYPE_CHECKING:
    import numpy.typing as npt


def fuse(masks: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return what most raters say: 0 background, 1 grey matter, 2 white matter."""
    import numpy as np  # here, so that --help stays fast

    from nnunet_dgplugins.methods.epl.raters import fuse_raters

    return fuse_raters(np.stack(masks)).labels(white_matter=True)


FACTS = Facts(
    command="scgm",
    dataset_id=508,
    name="SCGM",
    sites=(
        Site("site1", ("1", "A", "UCL")),
        Site("site2", ("2", "B", "Montreal", "EPM")),
        Site("site3", ("3", "C", "Zurich", "UHZ")),
        Site("site4", ("4", "D", "Vanderbilt", "VU")),
    ),
    channel_names={"0": "T2star"},
    labels={"background": 0, "GM": 1},
    mapping={0: 0, 1: 1, 2: 0},
    zone_labels={"background": 0, "GM": 1, "WM": 2},
    zone_mapping={0: 0, 1: 1, 2: 2},
    zones_flag="--white-matter",
    splits=("kfold", "labelled"),
    few_labels=True,
    raters=Raters(4, fuse),
    reference="http://niftyweb.cs.ucl.ac.uk/challenge/",
    licence="registration at the challenge; see the licence file of the download",
)
FILE = re.compile(r"site(?P<site>[1-4])-sc(?P<subject>\d{2})-(?:image|mask-r(?P<rater>[1-4]))", re.IGNORECASE)
IGNORED = re.compile(r"site[1-4]-sc\d{2}-levels\.txt|.*licen[cs]e.*|readme.*", re.IGNORECASE)
PARTS = re.compile(r"(train|test).*", re.IGNORECASE)  # training-data-gm-sc-challenge-..., test-data-...
LAST_ANNOTATED = 10  # subjects above it were the challenge's test


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Collect the image and the raters' masks of each subject."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder.")
    subjects: dict[tuple[int, int], dict[int, Path]] = {}
    strange = []
    for path in _files(root):
        match = FILE.fullmatch(stem(path)) if is_volume(path) else None
        if match is None:
            strange += [] if IGNORED.fullmatch(path.name) else [path.relative_to(root).as_posix()]
            continue
        site, number, rater = int(match["site"]), int(match["subject"]), int(match["rater"] or 0)
        found = subjects.setdefault((site, number), {}).setdefault(rater, path)
        if found != path:
            problem = Problem(str(path), f"the same as {found}", fix="Remove one of them.")
            listing.troubles.append(Trouble(problem, f"site{site}", f"site{site}_sc{number:02d}"))
    if not subjects:
        raise UserError(f"{root}: no file such as site1-sc01-image.nii.gz in it, nor in a folder train or test.")
    if strange:
        listing.warnings.append(f"neither image nor mask, left out: {', '.join(strange)}")
    for (site, number), files in sorted(subjects.items()):
        name = f"site{site}_sc{number:02d}"
        masks = tuple(path for rater, path in sorted(files.items()) if rater)
        missing = "image" if 0 not in files else "rater's mask" if not masks and number <= LAST_ANNOTATED else ""
        if missing:
            where = next(iter(files.values())).parent / f"site{site}-sc{number:02d}"
            fix = f"Download it again, or leave the subject out with --exclude {name}."
            listing.troubles.append(Trouble(Problem(str(where), f"no {missing}", fix=fix), f"site{site}", name))
            continue
        original = files[0].relative_to(root).as_posix()
        listing.cases.append(
            SourceCase(name, (files[0],), masks[0] if masks else None, f"site{site}", f"sc{number:02d}", original,
                       order=(number, ""), raters=masks[1:])
        )  # fmt: skip


def _files(root: Path) -> Iterator[Path]:
    """Yield the files of ``root`` and of the folders of training and testing in it, at any depth of such folders."""
    for path in entries(root):
        if path.is_dir() and PARTS.fullmatch(path.name):
            yield from _files(path)
        elif path.is_file():
            yield path


command = make_command(
    FACTS,
    list_cases,
    "Convert the Spinal Cord Grey Matter Challenge at ROOT (the folder of the training and the test folder).",
    click.option("--unannotated", is_flag=True, help="Take the test subjects (sc11 to sc20) as unlabelled ones."),
)

if __name__ == "__main__":
    run_as_script(command)
