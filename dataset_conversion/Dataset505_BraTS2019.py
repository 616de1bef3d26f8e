"""BraTS 2019, brain tumours in four MR modalities (Menze et al., TMI 2015; Bakas et al., Scientific Data 2017).

Tree: ``MICCAI_BraTS_2019_Data_Training/{HGG,LGG}/<ID>/<ID>_{t1,t1ce,t2,flair,seg}.nii.gz``, or ``.nii`` in mirrors;
``BraTS19_<centre>_<number>_1`` is an ID. Masks hold 1 = necrotic or non-enhancing core, 2 = oedema, 4 = enhancing; 3 is
no value of this year. BraTS 2015 had 1 = necrosis and 3 = non-enhancing core. The target is the whole tumour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from dataset_conversion import _tags
from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import Facts, Listing, Request, SourceCase, Trouble, entries, is_volume, stem
from nnunet_dgplugins.data.names import safe_name
from nnunet_dgplugins.errors import Problem, UserError

MODALITIES = ("T1", "T2", "T1c", "Flair")  # names and order of Patel and Dolz
MASK = "seg"
SUFFIXES = {"T1": ("t1",), "T2": ("t2",), "T1c": ("t1ce", "t1c"), "Flair": ("flair",), MASK: ("seg",)}
DEFAULT = "T1,T2"
CODES = {"brats2019": {0: 0, 1: 1, 2: 1, 4: 1}, "brats2015": {0: 0, 1: 1, 2: 1, 3: 1, 4: 1}}
FACTS = Facts(
    command="brats",
    dataset_id=505,
    name="BraTS2019",
    sites=(),
    channel_names={"0": "T1", "1": "T2"},
    labels={"background": 0, "tumour": 1},
    mapping=CODES["brats2019"],
    splits=("shares",),
    tags=True,
    reference="https://www.med.upenn.edu/cbica/brats2019.html",
    licence="registration at the challenge; research use",
)
SITE = re.compile(r"BraTS\d\d_(?P<site>2013|CBICA|TCIA\d+|TMC)_.+", re.IGNORECASE)
FILE = re.compile(r".*_(?P<suffix>t1ce|t1c|t1|t2|flair|seg)", re.IGNORECASE)
REPEATED = re.compile(r"(?P<patient>brats_(tcia|2013)_pat\d+)_\d+", re.IGNORECASE)  # names of BraTS 2015
GRADES = ("HGG", "LGG")
INNER = re.compile(r".*brats.*|train(ing)?", re.IGNORECASE)


def chosen_facts(request: Request) -> Facts:
    """Return what the options make of the converter's facts."""
    channels = _tags.modalities(request.modalities or DEFAULT, MODALITIES)
    return replace(
        FACTS,
        name=f"{FACTS.name}_{'-'.join(channels)}",
        channel_names={str(index): name for index, name in enumerate(channels)},
        mapping=CODES[request.label_code or "brats2019"],
    )


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Take each patient folder below the grades."""
    listing.facts = chosen_facts(request)
    channels = list(listing.facts.channel_names.values())
    for grade, folder in _grades(root):
        for path in entries(folder):
            if not path.is_dir():
                listing.warnings.append(f"{path}: no patient folder, left out")
                continue
            name, match = safe_name(path.name), SITE.fullmatch(path.name)
            site = match["site"].upper() if match else ""
            try:
                files = _files(path, [*channels, MASK])
            except _Unusable as error:
                problem = Problem(str(path), str(error), fix=f"Leave the patient out with --exclude {name}.")
                listing.troubles.append(Trouble(problem, site or None, name))
                continue
            images = tuple(files[channel] for channel in channels)
            original = path.relative_to(root).as_posix()
            listing.cases.append(
                SourceCase(name, images, files[MASK], site, _patient(path.name), original, stratum=grade)
            )


def _patient(folder: str) -> str:
    """Return the patient; BraTS 2015 has several scans of some, numbered at the end of the folder's name."""
    match = REPEATED.fullmatch(folder)
    return match["patient"] if match else folder


class _Unusable(Exception):
    """A patient's files are not as they should be; the text says how."""


def _grades(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the folders of high- and low-grade tumours, looked for in ``root`` and in the folders archives add.

    Raises:
        UserError: there is none.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder.")
    places, found = [root], False
    for place in places:
        for path in (path for path in entries(place) if path.is_dir()):
            if path.name.upper() in GRADES:
                found = True
                yield path.name.upper(), path
            elif INNER.fullmatch(path.name) and SITE.fullmatch(path.name) is None:
                places.append(path)
    if not found:
        raise UserError(f"{root}: neither HGG nor LGG in it. Name the folder MICCAI_BraTS_2019_Data_Training.")


def _files(folder: Path, wanted: list[str]) -> dict[str, Path]:
    """Return the file of each modality and of the mask.

    Raises:
        _Unusable: one is missing or there twice.
    """
    names = {suffix: name for name, suffixes in SUFFIXES.items() for suffix in suffixes}
    found: dict[str, list[Path]] = {name: [] for name in names.values()}
    for path in entries(folder):
        match = FILE.fullmatch(stem(path)) if is_volume(path) else None
        if match is not None:
            found[names[match["suffix"].lower()]].append(path)
    wrong = [f"no {name} (*_{SUFFIXES[name][0]}.nii.gz)" for name in wanted if not found[name]]
    wrong += [
        f"{' and '.join(path.name for path in found[name])}: two files for {name}"
        for name in wanted
        if len(found[name]) > 1
    ]
    if wrong:
        raise _Unusable("; ".join(wrong))
    return {name: found[name][0] for name in wanted}


command = make_command(
    FACTS,
    list_cases,
    "Convert BraTS 2019 at ROOT (the folder of HGG and LGG, or one above): one case per patient, whole tumour.",
    click.option("--modalities", default=DEFAULT, show_default=True, metavar="A,B,...",
                 help=f"Channels in their order, of {', '.join(MODALITIES)}."),
    click.option("--labels", "label_code", type=click.Choice(list(CODES)), default="brats2019", show_default=True,
                 help="Values of the masks: 0 1 2 4, or the older 0 1 2 3 4."),
    click.option("--val", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.1, show_default=True,
                 help="Share of each grade's patients that validates."),
    click.option("--folds", type=click.IntRange(2), metavar="K",
                 help="K folds in place of --val: every patient validates once, and its mask is kept for that."),
    click.option("--test", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True,
                 help="Share that is kept in imagesTs."),
    click.option("--seed", type=click.IntRange(0), help="Seed of that draw. [default: nnU-Net's]"),
)  # fmt: skip

if __name__ == "__main__":
    run_as_script(command)
