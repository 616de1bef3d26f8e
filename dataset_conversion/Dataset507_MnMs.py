"""M&Ms, cardiac cine MRI of four vendors (Campello et al., TMI 2021), as the challenge publishes it.

Tree: ``OpenDataset/{Training/Labeled, Training/Unlabeled, Validation, Testing}/<CODE>/<CODE>_sa.nii.gz`` (a series of
volumes) and ``<CODE>_sa_gt.nii.gz`` (filled at end-diastole and end-systole only), with an information table
(``*M&Ms*nformation*.csv``) that says vendor, centre and the two frames, counted from 0, of each patient.
Labels are 1 left ventricle, 2 myocardium, 3 right ventricle; ACDC has 1 and 3 the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import Facts, Listing, Request, Site, SourceCase, Trouble, entries, is_volume, stem
from dataset_conversion._mnms_table import Row, find_table, read_table
from nnunet_dgplugins.errors import Problem, UserError

FACTS = Facts(
    command="mnms",
    dataset_id=507,
    name="MnMs",
    sites=(
        Site("A", ("Siemens",)),
        Site("B", ("Philips",)),
        Site("C", ("GE", "General Electric", "GE MEDICAL SYSTEMS")),
        Site("D", ("Canon", "Toshiba")),
    ),
    channel_names={"0": "cine_MR"},
    labels={"background": 0, "LV": 1, "MYO": 2, "RV": 3},
    mapping={0: 0, 1: 1, 2: 2, 3: 3},
    splits=("kfold", "labelled"),
    few_labels=True,
    counts=("honest", "published"),
    reference="https://www.ub.edu/mnms/",
    licence="registration at the challenge; CC BY-NC-SA 4.0 as far as known",
)
CODE = re.compile(r"[A-Z]\d[A-Z]\d[A-Z]\d", re.IGNORECASE)
INNER = {"opendataset", "mnms", "m&ms", "training", "labeled", "labelled", "unlabeled", "unlabelled", "validation",
         "testing"}  # fmt: skip
UNANNOTATED = {"unlabeled", "unlabelled"}


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Give each patient folder its row of the table, and each annotated patient two cases."""
    step = _step(request.frames)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder.")
    folders = _patients(root, listing)
    rows, unclear = read_table(request.site_map or find_table(root), FACTS, listing)
    for code, folder in sorted(folders.items()):
        if code in unclear:
            continue
        row = rows.pop(code, None)
        if row is None:
            problem = Problem(str(folder), f"{code} is not in the information table", fix=f"Use --exclude {code}.")
            listing.troubles.append(Trouble(problem, case=code))
            continue
        try:
            listing.cases += list(_cases(root, code, folder, row, step, listing))
        except _Unusable as error:
            problem = Problem(str(folder), str(error), fix=f"Leave the patient out with --exclude {row.site}_{code}.")
            listing.troubles.append(Trouble(problem, row.site, f"{row.site}_{code}"))
    if rows:
        some = ", ".join(sorted(rows)[:5]) + (", ..." if len(rows) > 5 else "")
        listing.warnings.append(f"{len(rows)} patients of the information table have no folder ({some})")


class _Unusable(Exception):
    """The patient's files or its row are not as they should be; the text says how."""


def _step(frames: str) -> int | None:
    """Return every how many frames an unlabelled patient gives, None for end-diastole and end-systole only.

    Raises:
        UserError: neither ``edes`` nor ``all`` nor ``every=N``.
    """
    match = re.fullmatch(r"every=([1-9]\d*)", frames)
    if frames not in ("edes", "all") and match is None:
        raise UserError(f"--frames {frames}: expected edes, all or every=N (every=5 for each fifth frame).")
    return int(match[1]) if match else (1 if frames == "all" else None)


def _patients(root: Path, listing: Listing) -> dict[str, Path]:
    """Return the folder of each patient.

    Raises:
        UserError: there is none.
    """
    found: dict[str, Path] = {}
    above, strange = [root], []
    for place in above:
        for folder in (path for path in entries(place) if path.is_dir()):
            code = folder.name.upper()
            if folder.name.casefold() in INNER:
                above.append(folder)
            elif CODE.fullmatch(code) is None:
                strange.append(folder.relative_to(root).as_posix())
            elif code in found:
                problem = Problem(str(folder), f"a second folder of {code}, beside {found[code]}", fix="Remove one.")
                listing.troubles.append(Trouble(problem))
            else:
                found[code] = folder
    if not found:
        raise UserError(f"{root}: no patient folder such as A0S9V9 in it. Name the folder OpenDataset.")
    if strange:
        listing.warnings.append(f"no patient folders, left out: {', '.join(strange)}")
    return found


def _cases(root: Path, code: str, folder: Path, row: Row, step: int | None, listing: Listing) -> Iterator[SourceCase]:
    """Yield a patient's cases.

    Raises:
        _Unusable: files are missing or double, or the table does not say which frames are annotated.
    """
    image, mask = _files(code, folder)
    if folder.parent.name.casefold() in UNANNOTATED:
        if mask is not None:
            listing.warnings.append(f"{mask}: a mask among the unlabelled patients, not used")
        mask, phases = None, {}
    elif mask is None:
        raise _Unusable(f"no {code}_sa_gt.nii.gz, and this is not the folder of unlabelled patients")
    else:
        phases = _phases(row)
    original = image.relative_to(root).as_posix()

    def case(suffix: str, frame: int, label: Path | None, spare: bool = False) -> SourceCase:
        source, order = f"{original}, frame {frame}", (0, f"{code} {frame:04d}")
        name = f"{row.site}_{code}_{suffix}"
        return SourceCase(
            name, (image,), label, row.site, code, source, order, frame=frame, centre=row.centre, spare=spare
        )

    for phase, frame in phases.items():
        yield case(phase, frame, mask)
    # labelled patients give their other frames under "all" only
    rest = set(range(0, _length(image), step)) if step else set() if phases else {0}
    for frame in sorted(rest - set(phases.values())):
        yield case(f"f{frame:02d}", frame, None, spare=step != 1)


def _files(code: str, folder: Path) -> tuple[Path, Path | None]:
    found: dict[str, list[Path]] = {"_sa": [], "_sa_gt": []}
    for path in entries(folder):
        ending = stem(path)[len(code) :].casefold()
        if is_volume(path) and stem(path).upper().startswith(code) and ending in found:
            found[ending].append(path)
    for ending, paths in found.items():
        if len(paths) > 1:
            raise _Unusable(f"{' and '.join(path.name for path in paths)}: two files for one {code}{ending}")
    if not found["_sa"]:
        raise _Unusable(f"no {code}_sa.nii.gz")
    return found["_sa"][0], next(iter(found["_sa_gt"]), None)


def _phases(row: Row) -> dict[str, int]:
    """Return the annotated frames; a patient with masks must have two (0 and 0 stands for no annotation)."""
    phases = {"ED": row.ed, "ES": row.es}
    known = {phase: frame for phase, frame in phases.items() if frame is not None}
    if len(known) < 2 or known["ED"] == known["ES"]:
        said = ", ".join(f"{phase} {'blank' if frame is None else frame}" for phase, frame in phases.items())
        raise _Unusable(f"has a mask, but the information table ({row.where}) says {said}")
    return known


def _length(image: Path) -> int:
    from dataset_conversion._nifti import Unreadable, count_frames

    try:
        return count_frames(image)
    except Unreadable as error:
        raise _Unusable(f"{image.name}: {error}") from error


command = make_command(
    FACTS,
    list_cases,
    "Convert the M&Ms challenge at ROOT (OpenDataset, or the folder above), as --target D: trained on A, B and C.",
    click.option("--frames", default="edes", show_default=True, metavar="edes|every=N|all",
                 help="Frames of unlabelled patients: end-diastole and end-systole, each N-th too, or all; "
                      "all takes the other frames of labelled patients as well."),
    click.option("--unannotated", is_flag=True, help="Take the patients without masks (vendor C) as unlabelled ones."),
    click.option("--info", "site_map", type=click.Path(path_type=Path, dir_okay=False),
                 help="The information table. [default: *M&Ms*nformation*.csv in ROOT]"),
)  # fmt: skip

if __name__ == "__main__":
    run_as_script(command)
