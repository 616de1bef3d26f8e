"""Reads a user's CSV: a header, UTF-8, comma, semicolon or tab. Importable without torch."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnunet_dgplugins.errors import Problem, UserError

_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class CsvTable:
    """What a file says. Empty lines are left out, above the header too.

    Args:
        columns: their names, in order; "" for a column without one.
        lines: number in the file and cells by column, blanks taken off.
        twice: names that several columns have; a line then has the last one's cell.
        unclear: lines with a cell that no named column holds, so that nobody can tell whose cells are whose. The first
            column may lack a name: tables of pandas number their rows there.
    """

    columns: list[str]
    lines: list[tuple[int, dict[str, str]]]
    twice: list[str]
    unclear: list[Problem]


def read_csv(path: Path, plain: Callable[[str], str] = str.casefold) -> CsvTable:
    """Read a file.

    Args:
        path: the file.
        plain: gives a column its name from what the header says, blanks taken off.

    Raises:
        UserError: no such file, no UTF-8 text, or a quotation mark without its pair.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save it as CSV in UTF-8.") from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            values = [cell.strip() for cell in cells]
            if any(values):
                rows.append((reader.line_num, values))
    except csv.Error as error:
        begun = rows[-1][0] + 1 if rows else 1
        raise UserError(
            f"{path}, line {begun}: a quotation mark has no pair, or text follows it ({error}). Nothing below was read."
        ) from error
    columns = [plain(name) for name in rows[0][1]] if rows else []
    unclear, lines = [], []
    for number, values in rows[1:]:
        nameless = [cell for cell, name in zip(values[1:], columns[1:], strict=False) if not name]
        stray = [cell for cell in [*nameless, *values[len(columns) :]] if cell]
        if stray:
            found = f"'{stray[0]}' stands in no column of the header"
            fix = f"Put a cell that contains '{delimiter}' between quotation marks, or give the column a name."
            unclear.append(Problem(f"{path}, line {number}", found, fix=fix))
        filled = values + [""] * (len(columns) - len(values))
        lines.append((number, dict(zip(columns, filled, strict=False))))
    counts = Counter(filter(None, columns))
    return CsvTable(columns, lines, [name for name, count in counts.items() if count > 1], unclear)


def named_twice(path: Path, table: CsvTable, wanted: Callable[[str], bool] = bool) -> list[Problem]:
    """Return a problem for each name that several columns have.

    Args:
        path: of the table.
        table: what it says.
        wanted: which names matter.
    """
    return [Problem(str(path), f"several columns {name}", "one") for name in table.twice if wanted(name)]
