"""I2CVB (Lemaitre et al., 2015), two scanners: a DICOM series of each patient and one of the mask."""

from __future__ import annotations

import re
from pathlib import Path

from dataset_conversion._dicom import find_series
from dataset_conversion._facts import Listing, SourceCase, Trouble, entries
from dataset_conversion._folders import walk
from dataset_conversion._nci_isbi import choose
from dataset_conversion._nifti import Unreadable
from dataset_conversion._sources import Scan
from nnunet_dgplugins.data.names import safe_name
from nnunet_dgplugins.errors import Problem

SIEMENS, GE = "I2CVB", "I2CVB-GE"
PATIENT = re.compile(r"patient[ _-]*(?P<number>\d+)", re.IGNORECASE)
GE_FOLDER = re.compile(r"ge([ _-].*)?", re.IGNORECASE)  # GE, ge-1-5t
IMAGES, MASKS = ("T2W",), ("GT", "prostate")
UNUSABLE = {428260: "a slice of its mask is missing in the release"}


def list_cases(root: Path, listing: Listing) -> None:
    """Pair the T2 and the mask of each patient; whatever lies below a folder GE is of the other scanner."""
    for folder in _patients(root):
        match = PATIENT.fullmatch(folder.name)
        assert match is not None  # _patients looks for it
        number = int(match["number"])
        above = (root.resolve().name, *folder.relative_to(root).parts[:-1])
        site = GE if any(GE_FOLDER.fullmatch(name) for name in above) else SIEMENS
        case = f"{site}_{safe_name(folder.name)}"
        if number in UNUSABLE:
            listing.warnings.append(f"{folder}: left out, {UNUSABLE[number]}")
            continue
        image, label, problem = _pair(folder, case, listing)
        if problem is not None or image is None or label is None:
            assert problem is not None
            listing.troubles.append(Trouble(problem, site, case))
            continue
        original = image.files[0].parent.relative_to(root).as_posix()
        listing.cases.append(
            SourceCase(case, (image,), label, site, folder.name, original, (number, folder.name), own_grid=True)
        )


def _patients(root: Path) -> list[Path]:
    found = []
    for place, inner, _ in walk(root):
        for name in list(inner):
            if PATIENT.fullmatch(name):
                inner.remove(name)
                found.append(place / name)
    return found


def _pair(folder: Path, case: str, listing: Listing) -> tuple[Scan | None, Scan | None, Problem | None]:
    """Return image and mask of a patient, or what is wrong with them."""
    leave_out = f"or leave the case out with --exclude {case}."
    places = {names: _inside(folder, names) for names in (IMAGES, MASKS)}
    missing = ["/".join(names) for names, place in places.items() if place is None]
    images, masks = places[IMAGES], places[MASKS]
    if images is None or masks is None:
        found = f"no folder {' and no folder '.join(missing)}"
        return None, None, Problem(str(folder), found, fix=f"Unpack it again, {leave_out}")
    image, problem = choose([images], case, listing)
    if problem is not None:
        return None, None, problem
    try:
        series = find_series(masks)
    except Unreadable as error:
        return None, None, Problem(str(masks), str(error), fix=f"Unpack it again, {leave_out}")
    if len(series) != 1:
        found = f"{len(series)} DICOM series" + "".join(f"; {one}" for one in series)
        return None, None, Problem(str(masks), found, "one", f"Move the others away, {leave_out}")
    return image, Scan(series[0].files, mask=True), None


def _inside(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the folder that is called so, whatever the case of its letters."""
    for name in names:
        inner = (path for path in entries(folder) if path.is_dir() and path.name.casefold() == name.casefold())
        found = next(inner, None)
        if found is None:
            return None
        folder = found
    return folder
