"""Reads the information table of M&Ms in each spelling it was published in; columns are found by name."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dataset_conversion._facts import Facts, Listing, Site, Trouble, entries
from nnunet_dgplugins.errors import BadInput, Problem, UserError

NAME = re.compile(r".*M&Ms.*nformation.*\.csv", re.IGNORECASE)
#: our name of a column -> the published ones, without blanks, signs and capitals
COLUMNS = {
    "code": ("externalcode", "code"),
    "vendor": ("vendor",),
    "vendor name": ("vendorname",),
    "centre": ("centre", "center"),
    "ed": ("ed",),
    "es": ("es",),
}
NEEDED = ("code", "centre", "ed", "es")  # and one of the vendor columns


@dataclass(frozen=True)
class Row:
    """What the table says of a patient.

    Args:
        site: vendor.
        centre: number of the hospital.
        ed: end-diastolic frame, counted from 0; None where the table is blank.
        es: end-systolic frame; may be earlier than ``ed``.
        where: file and line, for messages.
    """

    site: str
    centre: str
    ed: int | None
    es: int | None
    where: str


def find_table(root: Path) -> Path:
    """Return the information table in ``root`` or in the folder OpenDataset in it.

    Raises:
        UserError: there is none, or more than one.
    """
    places = [root, *(path for path in entries(root) if path.is_dir() and path.name.casefold() == "opendataset")]
    found = [path for place in places for path in entries(place) if NAME.fullmatch(path.name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"{root}: no information table (*M&Ms*nformation*.csv); it says vendor and frames of each patient. "
            "Put it there, or name it with --info; an Excel file must be saved as CSV."
        )
    names = " and ".join(path.name for path in found)
    raise UserError(f"{root}: {names}: which one? Say it with --info, or remove the others.")


def read_table(path: Path, facts: Facts, listing: Listing) -> tuple[dict[str, Row], set[str]]:
    """Return the row of each patient by code, and the codes whose rows are wrong and were reported to the listing.

    Raises:
        UserError: the file cannot be read.
        BadInput: columns are missing.
    """
    columns, lines = _lines(path)
    missing = [name for name in NEEDED if name not in columns]
    if missing or not {"vendor", "vendor name"} & set(columns):
        seen = ", ".join(columns.values()) or "none of the columns"
        wanted = "External code, Vendor or VendorName, Centre, ED and ES"
        raise BadInput(f"The information table {path}", [Problem(str(path), f"found {seen}", wanted)])
    rows: dict[str, Row] = {}
    first: dict[str, str] = {}  # code -> where it was first listed
    unclear: set[str] = set()
    for number, line in lines:
        values = {name: (line.get(column) or "").strip() for name, column in columns.items()}
        code = values["code"].upper()
        if not code:
            continue  # an empty line, or the sums that spreadsheets end with
        where = f"{path.name}, line {number}"
        problems = [f"{code} is listed twice, first at {first[code]}"] if code in first else []
        first.setdefault(code, where)
        site, problem = _vendor(code, values, columns, facts)
        problems += [problem] if problem else []
        frames = {}
        for name in ("ed", "es"):
            try:
                frames[name] = _frame(values[name])
            except ValueError:
                problems.append(f"{code}: {name.upper()} is '{values[name]}', expected the number of a frame")
        for text in problems:
            # of a code listed twice, either line may say the right vendor
            known = site.name if site and first[code] == where else None
            entry = Problem(f"{path}, line {number}", text, fix=f"Correct it, or use --exclude {code}.")
            listing.troubles.append(Trouble(entry, known, code))
        if problems:
            unclear.add(code)
        elif site is not None:
            centre = re.sub(r"\.0*$", "", values["centre"])
            rows[code] = Row(site.name, centre, frames["ed"], frames["es"], where)
    return {code: row for code, row in rows.items() if code not in unclear}, unclear


def _vendor(code: str, values: Mapping[str, str], columns: Mapping[str, str], facts: Facts) -> tuple[Site | None, str]:
    """Return the one site that the vendor columns mean, or None and what is wrong with them."""
    said = {columns[name]: values[name] for name in ("vendor", "vendor name") if values.get(name)}
    meant = {site.name: site for text in said.values() for site in facts.sites if site.answers_to(text)}
    if len(meant) == 1:
        return next(iter(meant.values())), ""
    if not meant:
        return None, f"{code}: unknown vendor '{' '.join(said.values())}'"
    cells = " but ".join(f"{column} is '{text}'" for column, text in said.items())
    return None, f"{code}: {cells}, vendors {' and '.join(meant)}"


def _lines(path: Path) -> tuple[dict[str, str], list[tuple[int, dict[str, str]]]]:
    """Return our column names with the file's, and the lines with their numbers; the separator is found out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save it as CSV in UTF-8.") from error
    header = text.splitlines()[0] if text.strip() else ""
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
    plain = {re.sub(r"[^a-z]", "", (name or "").casefold()): name for name in reader.fieldnames or []}
    columns = {
        ours: plain[name] for ours, names in COLUMNS.items() for name in reversed(names) if name in plain
    }  # the first published name wins
    return columns, [(reader.line_num, line) for line in reader]


def _frame(text: str) -> int | None:
    """Return a frame; blank, NaN and -1 stand for none.

    Raises:
        ValueError: no whole number.
    """
    if not text or text.casefold() in ("nan", "none", "na", "n/a"):
        return None
    number = float(text)
    if math.isnan(number) or number == -1:
        return None
    if number < 0 or number != int(number):
        raise ValueError(text)
    return int(number)
