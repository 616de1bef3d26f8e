"""Reads a list of cases and their sites: CSV with a header, or JSON. Importable without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_dgplugins.data.csv_table import named_twice, read_csv
from nnunet_dgplugins.errors import Problem, nearest
from nnunet_dgplugins.files import read_json

SITE_COLUMNS = ("site", "center", "centre")
PATIENT = "patient"


@dataclass(frozen=True)
class Row:
    """One line of the list.

    Args:
        case: case as named in the file.
        site: its site.
        patient: its patient, None where the file does not say.
        where: file and line, for messages.
    """

    case: str
    site: str
    patient: str | None
    where: str


def read_site_list(path: Path, case_columns: Sequence[str] = ("case",)) -> tuple[list[Row], list[Problem]]:
    """Read a list of sites.

    CSV: a header with a case column, a column ``site`` (or ``center``, ``centre``) and, if wanted, ``patient``; comma,
    semicolon or tab. JSON: ``{case: site}`` or ``{case: {"site": ..., "patient": ...}}``.

    Args:
        path: the file.
        case_columns: accepted names of the case column.

    Returns:
        One row per case, and what is wrong: missing columns, empty fields, cases listed twice. No rows at all means
        that the file is not such a list.

    Raises:
        UserError: no such file, or neither UTF-8 nor JSON.
    """
    problems: list[Problem] = []
    if path.suffix.lower() == ".json":
        rows = list(_from_json(read_json(path, as_object=_Pairs), path, problems))
    else:
        rows = list(_from_csv(path, case_columns, problems))
    first: dict[str, Row] = {}
    for row in rows:
        if row.case in first:
            problems.append(Problem(row.where, f"case '{row.case}' is listed twice, first at {first[row.case].where}"))
        elif not row.site:
            problems.append(Problem(row.where, f"case '{row.case}' has no site"))
        first.setdefault(row.case, row)
    if not rows and not problems:
        problems.append(Problem(str(path), "no cases in it"))
    return list(first.values()), problems


class _Pairs(dict[str, Any]):
    """An object of JSON that knows which of its keys were there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = sorted({name for name in names if names.count(name) > 1}) if len(self) < len(names) else []


def _from_json(content: Any, path: Path, problems: list[Problem]) -> Iterable[Row]:
    if not isinstance(content, _Pairs):
        problems.append(Problem(str(path), f"a {type(content).__name__}", "an object from case to site"))
        return
    problems += [Problem(str(path), f"case '{case}' is listed twice") for case in content.twice]
    for case, value in content.items():
        entry = {"site": value} if isinstance(value, str) else value
        where = f"{path}, case {case}"
        if not isinstance(entry, dict) or not isinstance(entry.get("site"), str):
            problems.append(Problem(where, repr(value), 'a site, or {"site": ..., "patient": ...}'))
            continue
        unknown = sorted(set(entry) - {"site", "patient"})
        if unknown:
            problems.append(Problem(where, f"unknown key '{unknown[0]}'{nearest(unknown[0], ('site', 'patient'))}"))
        patient = entry.get("patient")
        yield Row(str(case), entry["site"].strip(), None if patient is None else str(patient), where)


def _from_csv(path: Path, case_columns: Sequence[str], problems: list[Problem]) -> Iterable[Row]:
    table = read_csv(path)
    problems += named_twice(path, table, {*case_columns, *SITE_COLUMNS, PATIENT}.__contains__)
    case = next((name for name in case_columns if name in table.columns), None)
    site = next((name for name in SITE_COLUMNS if name in table.columns), None)
    for found, names in ((case, case_columns), (site, SITE_COLUMNS)):
        if found is None:
            wanted = f"a column called {' or '.join(names)}"
            problems.append(Problem(str(path), f"columns {', '.join(filter(None, table.columns)) or 'none'}", wanted))
    if case is None or site is None:
        return
    problems += table.unclear
    for number, line in table.lines:
        where = f"{path}, line {number}"
        if not line[case]:
            problems.append(Problem(where, "no case"))
            continue
        yield Row(line[case], line[site], line.get(PATIENT) or None, where)
