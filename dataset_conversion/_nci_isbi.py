"""NCI-ISBI 2013, two hospitals: a DICOM folder per subject, an NRRD mask per subject in the challenge's archives.

Masks have axes and slices of their own; ``ProstateDx-01-0055`` has 23 slices where its image has 34. The challenge says
that they lie in the right place, so all are put on the image's grid by physical coordinates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dataset_conversion._dicom import Series, axial_t2, find_series
from dataset_conversion._facts import Listing, SourceCase, Trouble
from dataset_conversion._folders import walk
from dataset_conversion._nifti import Unreadable
from dataset_conversion._sources import Scan
from nnunet_dgplugins.errors import Problem

SITES = {"prostate3t": "RUNMC", "prostatedx": "BMC"}
SUBJECT = re.compile(r"(?P<collection>Prostate3T|ProstateDx)-(?P<number>\d{2}-\d{4})", re.IGNORECASE)
CORRECTED = "_correctedLabels"  # one mask was replaced after the challenge
TRUTH = "_truth"  # masks of the challenge's test subjects, which came later
MASK = re.compile(rf"(?P<subject>{SUBJECT.pattern})({CORRECTED}|{TRUTH})?\.nrrd", re.IGNORECASE)


def list_cases(root: Path, listing: Listing) -> None:
    """Give each mask its subject's axial T2."""
    folders, masks = _walk(root, listing)
    for subject in sorted({*masks, *folders}):
        match = SUBJECT.fullmatch(subject)
        assert match is not None  # the keys are written by _walk
        site = SITES[match["collection"].casefold()]
        case = f"{site}_{subject}"
        if subject not in masks:
            continue
        problem: Problem | None = None
        leave_out = f"Leave the case out with --exclude {case}."
        mask = _mask(masks[subject], listing)
        if mask is None:
            found = " and ".join(str(path) for path in masks[subject])
            problem = Problem(found, f"two masks of {subject}", "one", f"Remove one. {leave_out}")
        elif subject not in folders:
            fix = f"Download the collection of {match['collection']}. {leave_out}"
            problem = Problem(str(mask), f"no folder {subject} with DICOM images", fix=fix)
        else:
            scan, problem = choose(folders[subject], case, listing)
        if problem is not None or mask is None or scan is None:
            assert problem is not None
            listing.troubles.append(Trouble(problem, site, case))
            continue
        original = scan.files[0].parent.relative_to(root).as_posix()
        listing.cases.append(
            SourceCase(case, (scan,), Scan((mask,)), site, subject, original, (0, subject), own_grid=True)
        )
    without = sorted(set(folders) - set(masks))
    if masks and without:
        some = ", ".join(without[:5]) + (", ..." if without[5:] else "")
        listing.warnings.append(f"{len(without)} subjects of NCI-ISBI 2013 without mask, left out: {some}")


def _walk(root: Path, listing: Listing) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return the image folders and the masks of each subject."""
    folders: dict[str, list[Path]] = {}
    masks: dict[str, list[Path]] = {}
    for place, inner, files in walk(root):
        if not any(SUBJECT.fullmatch(part) for part in place.parts):
            for name in filter(SUBJECT.fullmatch, inner):
                folders.setdefault(_spelled(name), []).append(place / name)
        for name in files:
            match = MASK.fullmatch(name)
            if match:
                masks.setdefault(_spelled(match["subject"]), []).append(place / name)
            elif name.lower().endswith(".nrrd"):
                listing.warnings.append(f"{place / name}: not called as the masks of NCI-ISBI 2013, left out")
    return folders, masks


def _spelled(subject: str) -> str:
    """Return a subject as the collections spell it."""
    match = SUBJECT.fullmatch(subject)
    assert match is not None
    collection = "Prostate3T" if match["collection"].casefold() == "prostate3t" else "ProstateDx"
    return f"{collection}-{match['number']}"


def _mask(paths: Sequence[Path], listing: Listing) -> Path | None:
    """Return the mask of a subject, the corrected one where there is one; None where there are two."""
    corrected = [path for path in paths if CORRECTED.casefold() in path.name.casefold()]
    if corrected and len(corrected) < len(paths):
        listing.warnings.append(f"{corrected[0]}: used in place of the mask that it corrects")
    wanted = corrected or paths
    return wanted[0] if len(wanted) == 1 else None


def choose(folders: Sequence[Path], case: str, listing: Listing) -> tuple[Scan | None, Problem | None]:
    """Return the axial T2 series below the folders of a patient, or the problem that there is with finding it."""
    where, leave_out = str(folders[0]), f"or leave the case out with --exclude {case}."
    series: list[Series] = []
    try:
        for folder in folders:
            series += find_series(folder)
    except Unreadable as error:
        return None, Problem(where, str(error), fix=f"Download it again, {leave_out}")
    if not series:
        return None, Problem(where, "no DICOM files below it", fix=f"Download it again, {leave_out}")
    one = axial_t2(series)
    if one is None:
        found = "several series, and not clear which is the axial T2: " + "; ".join(map(str, series))
        return None, Problem(where, found, "one", f"Move the others away, {leave_out}")
    if len(series) > 1:
        others = "; ".join(str(other) for other in series if other is not one)
        listing.warnings.append(f"{case}: axial T2 {one}; left out: {others}")
    return Scan(one.files), None
