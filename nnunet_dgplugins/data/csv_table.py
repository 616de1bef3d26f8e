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
    """What a file says.

    Args:
        columns: their names, in order.
        lines: number and cells by column of each line that is not empty, blanks taken off.
        problems: columns of one name, and lines of more cells than the header has, whose columns nobody can tell.
    """

    columns: list[str]
    lines: list[tuple[int, dict[str, str]]]
    problems: list[Problem]


def read_csv(path: Path, plain: Callable[[str], str] = str.casefold) -> CsvTable:
    """Read a file.

    Args:
        path: the file.
        plain: gives a column its name from what the header says, blanks taken off.

    Raises:
        UserError: no such file, or no UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save it as CSV in UTF-8.") from error
    header = text.splitlines()[0] if text.strip() else ""
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    columns = [plain(name.strip()) for name in next(reader, [])]
    counts = Counter(name for name in columns if name)
    problems = [Problem(str(path), f"{count} columns {name}", "one") for name, count in counts.items() if count > 1]
    lines = []
    for cells in reader:
        values = [cell.strip() for cell in cells]
        if not any(values):
            continue
        if any(values[len(columns) :]):
            fix = f'Put a cell that contains "{delimiter}" between quotation marks.'
            found = f"{len(values)} cells, and the header has {len(columns)}"
            problems.append(Problem(f"{path}, line {reader.line_num}", found, fix=fix))
        values += [""] * (len(columns) - len(values))
        lines.append((reader.line_num, dict(zip(columns, values, strict=False))))
    return CsvTable(columns, lines, problems)
