"""The six prostate sites as the DeSAM authors release them (Gao et al., MICCAI 2024): one flat list of cases.

Tree: ``raw_data/imagesTr/prostate_NNN_0000.nii.gz``, ``raw_data/labelsTr/prostate_NNN.nii.gz`` and
``raw_data/prostate_patientid.csv`` (columns ``center`` and ``patientid``, the latter being NNN). The download came
without the CSV for a long time, so any other list of case and site will do (``--site-map``).
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from dataset_conversion._command import make_command, run_as_script
from dataset_conversion._facts import Facts, Listing, Request, Site, SourceCase, Trouble, entries, is_volume, stem
from nnunet_dgplugins.data.site_list import Row, read_site_list
from nnunet_dgplugins.errors import BadInput, Problem, UserError

FACTS = Facts(
    command="prostate-desam",
    dataset_id=503,
    name="ProstateDeSAM",
    sites=(  # the number is that of the published --center
        Site("RUNMC", ("A-ISBI", "A", "ISBI", "1")),
        Site("BMC", ("B-ISBI_1.5", "B", "ISBI_1.5", "2")),
        Site("I2CVB", ("C-I2CVB", "C", "3")),
        Site("UCL", ("D-UCL", "D", "4")),
        Site("BIDMC", ("E-BIDMC", "E", "5")),
        Site("HK", ("F-HK", "F", "6")),
        Site("MSD", ("G-MedicalDecathlon", "G"), default=False),
    ),
    channel_names={"0": "T2"},
    labels={"background": 0, "prostate": 1},
    mapping={0: 0, 1: 1, 2: 1},
    splits=("kfold", "desam"),
    neighbours=True,
    reference="https://github.com/yifangao112/DeSAM",
    licence="as the public sources (NCI-ISBI 2013, I2CVB, PROMISE12): research use",
)
SITE_LIST = "prostate_patientid.csv"
IMAGE = re.compile(r"prostate_(\d{3,})_0000", re.IGNORECASE)
LABEL = re.compile(r"prostate_(\d{3,})", re.IGNORECASE)


def list_cases(root: Path, request: Request, listing: Listing) -> None:
    """Pair images and labels by number, and look up each number's site."""
    folder = _release(root)
    images, labels = _numbered(folder / "imagesTr", IMAGE, listing), _numbered(folder / "labelsTr", LABEL, listing)
    rows, unclear = _rows(folder, request, listing)
    for number in sorted({*images, *labels, *rows} - unclear):
        site = FACTS.site(rows[number].site).name if number in rows else None
        name = f"{site or 'prostate'}_{number:03d}"
        found = {"image": number in images, "label": number in labels, "site": site is not None}
        missing = [what for what, present in found.items() if not present]
        if missing:
            where = rows[number].where if number in rows else str(folder / f"prostate_{number:03d}")
            fix = f"Leave the case out with --exclude {name}."
            problem = Problem(where, f"case {number:03d} has no {' and no '.join(missing)}", fix=fix)
            listing.troubles.append(Trouble(problem, site, name))
            continue
        assert site is not None  # it would be missing
        original = images[number].relative_to(root).as_posix()
        patient = rows[number].patient or f"{number:03d}"
        listing.cases.append(
            SourceCase(name, (images[number],), labels[number], site, patient, original, order=(number, ""))
        )


def _release(root: Path) -> Path:
    for folder in (root, root / "raw_data"):
        if (folder / "imagesTr").is_dir() and (folder / "labelsTr").is_dir():
            return folder
    raise UserError(f"{root}: no folders imagesTr and labelsTr here or in raw_data. Name the folder that holds them.")


def _numbered(folder: Path, pattern: re.Pattern[str], listing: Listing) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in entries(folder):
        match = pattern.fullmatch(stem(path)) if is_volume(path) else None
        if match is None:
            listing.warnings.append(f"{path}: not called as the release calls its files, left out")
        elif int(match[1]) in found:
            problem = Problem(str(path), f"the same case as {found[int(match[1])].name}", fix="Remove one of them.")
            listing.troubles.append(Trouble(problem))
        else:
            found[int(match[1])] = path
    return found


def _rows(folder: Path, request: Request, listing: Listing) -> tuple[dict[int, Row], set[int]]:
    """Return case number to the row that says its site, and the numbers whose site is in doubt and reported."""
    path = request.site_map or folder / SITE_LIST
    if not path.is_file():
        raise UserError(
            f"{path}: no such file. It says which site each case comes from; the release's download lacked it (its "
            "authors posted it later). Put it there, or name with --site-map a CSV (columns case and site) or a JSON "
            "({case: site})."
        )
    listed, problems = read_site_list(path, ("patientid", "case"))
    if not listed:
        raise BadInput(f"The list of sites {path}", problems)
    listing.troubles += [Trouble(problem) for problem in problems]
    rows: dict[int, Row] = {}
    unclear: set[int] = set()
    for row in listed:
        match = re.fullmatch(r"(?:prostate_)?(\d+)(?:\.0)?", row.case, re.IGNORECASE)  # spreadsheets turn 17 into 17.0
        if match is None:
            problem = Problem(row.where, f"case '{row.case}'", "a number, or prostate_ and a number")
            listing.troubles.append(Trouble(problem))
            continue
        number = int(match[1])
        name = f"prostate_{number:03d}"
        if not any(site.answers_to(row.site) for site in FACTS.sites):
            unclear.add(number)
            if row.site:
                known = ", ".join(site.folders[0] for site in FACTS.sites)
                listing.troubles.append(Trouble(Problem(row.where, f"unknown site '{row.site}'", known), case=name))
        elif number in rows:
            problem = Problem(row.where, f"case {number} is listed twice, first at {rows[number].where}")
            listing.troubles.append(Trouble(problem, case=name))
        else:
            rows[number] = row
    return rows, unclear


command = make_command(
    FACTS,
    list_cases,
    "Convert the DeSAM release at ROOT (the folder raw_data, or the one above).",
    click.option(
        "--site-map",
        type=click.Path(path_type=Path, dir_okay=False),
        help=f"CSV or JSON with the site of each case. [default: {SITE_LIST} in the release]",
    ),
)

if __name__ == "__main__":
    run_as_script(command)
