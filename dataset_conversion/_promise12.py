"""PROMISE12 (Litjens et al., MedIA 2014): MetaImage files of four hospitals; which case is whose is not said."""

from __future__ import annotations

import re
from pathlib import Path

from dataset_conversion._facts import Facts, Listing, SourceCase, Trouble
from dataset_conversion._folders import walk
from dataset_conversion._sources import Scan
from nnunet_dgplugins.data.site_list import read_site_list
from nnunet_dgplugins.errors import BadInput, Problem

SITE = "PROMISE12"
FILE = re.compile(r"case(?P<number>\d{2,3})(?P<mask>_segmentation)?\.(mhd|mha)", re.IGNORECASE)
VOXELS = (".raw", ".zraw")
# the hospital of NCI-ISBI's Prostate-3T, too; SAML's site A is without these cases
KEPT_APART = {"RUNMC": "RUNMC-PROMISE12"}


def list_cases(root: Path, site_map: Path | None, facts: Facts, listing: Listing) -> None:
    """Pair images and masks by number within their folder; a folder without any mask is test data."""
    folders: dict[Path, dict[str, dict[int, list[Path]]]] = {}
    for place, _, files in walk(root):
        for name in files:
            match = FILE.fullmatch(name)
            if match:
                parts = folders.setdefault(place, {"image": {}, "mask": {}})
                part = parts["mask" if match["mask"] else "image"]
                part.setdefault(int(match["number"]), []).append(place / name)
    pairs: dict[int, tuple[Path, dict[str, list[Path]]]] = {}
    for folder, parts in folders.items():
        if not parts["mask"]:
            listing.warnings.append(f"{folder}: {len(parts['image'])} images without masks (test data?), left out")
            continue
        for number in sorted({*parts["image"], *parts["mask"]}):
            own = {what: part.get(number, []) for what, part in parts.items()}
            if number in pairs:
                found = f"Case{number:02d} once more, first in {pairs[number][0]}"
                listing.troubles.append(Trouble(Problem(str(folder), found, fix="Remove one of them.")))
                continue
            pairs[number] = folder, own
    sites = _sites(site_map, facts, set(pairs), listing) if pairs or site_map else {}
    for number, (folder, own) in sorted(pairs.items()):
        if number in sites:
            _add(root, folder, number, sites[number], own, listing)


def _add(root: Path, folder: Path, number: int, site: str, own: dict[str, list[Path]], listing: Listing) -> None:
    patient = f"Case{number:02d}"
    case = f"{site}_{patient}"
    for what, paths in own.items():
        if len(paths) != 1:
            found = f"{' and '.join(path.name for path in paths)}: two files for one {what}" if paths else f"no {what}"
            fix = f"Download it again, or leave the case out with --exclude {case}."
            listing.troubles.append(Trouble(Problem(str(folder / patient), found, fix=fix), site, case))
            return
    image, mask = (_scan(own[what][0]) for what in ("image", "mask"))
    original = image.files[0].relative_to(root).as_posix()
    listing.cases.append(SourceCase(case, (image,), mask, site, patient, original, (number, ""), own_grid=True))


def _scan(header: Path) -> Scan:
    """Return a MetaImage with the file of its voxels, which changes when the image does."""
    voxels = (header.with_suffix(ending) for ending in VOXELS) if header.suffix.lower() == ".mhd" else ()
    return Scan((header, *(path for path in voxels if path.is_file())))


def _sites(site_map: Path | None, facts: Facts, numbers: set[int], listing: Listing) -> dict[int, str]:
    """Return the site of each case; cases whose site is not said are reported and left out.

    Raises:
        BadInput: the map is no list of cases and sites.
    """
    if site_map is None:
        listing.warnings.append(
            "PROMISE12 does not say which of its four hospitals a case is from: all cases are one site, PROMISE12. "
            "Some are from the hospital of site RUNMC, so it is no unseen site to a model of RUNMC. Name a list with "
            "--site-map to tell UCL, BIDMC, HK and RUNMC apart."
        )
        return dict.fromkeys(numbers, SITE)
    rows, problems = read_site_list(site_map, ("case", "patientid"))
    if not rows:
        raise BadInput(f"The list of sites {site_map}", problems)
    listing.troubles += [Trouble(problem) for problem in problems]
    sites: dict[int, str] = {}
    where: dict[int, str] = {}
    for row in rows:
        match = re.fullmatch(r"(?:case)?(\d+)(?:\.0)?", row.case, re.IGNORECASE)  # spreadsheets turn 17 into 17.0
        site = next((site for site in facts.sites if site.answers_to(row.site)), None)
        if match is None:
            listing.troubles.append(Trouble(Problem(row.where, f"case '{row.case}'", "CaseNN or a number")))
        elif int(match[1]) not in numbers:
            listing.warnings.append(f"{row.where}: there is no Case{int(match[1]):02d}")
        elif int(match[1]) in where:  # spelled in another way; the reader of the list compares spellings
            number = int(match[1])
            problem = Problem(row.where, f"Case{number:02d} is listed twice, first at {where[number]}")
            listing.troubles.append(Trouble(problem, case=f"{SITE}_Case{number:02d}"))
        elif site is None:
            known = ", ".join(site.name for site in facts.sites)
            if row.site:  # an empty one is reported by the reader of the list
                problem = Problem(row.where, f"unknown site '{row.site}'", known)
                listing.troubles.append(Trouble(problem, case=f"{SITE}_Case{int(match[1]):02d}"))
            sites[int(match[1])], where[int(match[1])] = "", row.where
        else:
            sites[int(match[1])], where[int(match[1])] = KEPT_APART.get(site.name, site.name), row.where
    for number in sorted(numbers - set(sites)):
        case = f"{SITE}_Case{number:02d}"
        problem = Problem(
            str(site_map), f"no site for Case{number:02d}", fix=f"Add it, or leave it out: --exclude {case}."
        )
        listing.troubles.append(Trouble(problem, case=case))
    return {number: site for number, site in sites.items() if site}
