"""Reads the tables of your own patches: tags by file, and which mask value means which class."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset_conversion._patches import TEST, TRAIN, VAL, Code, Colour
from nnunet_dgplugins.data.csv_table import named_twice, read_csv
from nnunet_dgplugins.errors import BadInput, Problem, nearest

FILE, TAGS, PATIENT, SITE, PART = "file", "tags", "patient", "site", "part"
BACKGROUND, IGNORE = NO_CLASSES = "background", "ignore"
_COLOUR = re.compile(r"#?([0-9a-fA-F]{6})")


@dataclass(frozen=True)
class Row:
    """One patch of the table.

    Args:
        file: path relative to the root, without ``.`` and doubled slashes.
        tags: names of the classes that occur.
        patient: None where the table does not say.
        site: likewise.
        part: ``train``, ``val`` or ``test``; None where the table does not say.
        where: file and line, for messages.
    """

    file: str
    tags: frozenset[str]
    patient: str | None
    site: str | None
    part: str | None
    where: str


@dataclass(frozen=True)
class Tags:
    """What a table of tags says.

    Args:
        rows: one per patch.
        classes: in the order of their columns, or sorted where a column ``tags`` lists them.
        by_column: each class has a column, so that what has none is known of no patch.
    """

    rows: list[Row]
    classes: list[str]
    by_column: bool


def read_tags(path: Path) -> Tags:
    """Read ``file`` and tags: a column per class with 0 or 1, or one column ``tags`` with names between semicolons.

    Columns ``patient``, ``site`` and ``part`` (train, val, test) may be there as well. Comma, semicolon or tab.

    Raises:
        BadInput: missing columns, other values, more cells than columns, unknown parts, files listed twice, a class
            called background or ignore.
        UserError: no such file, or no UTF-8 text.
    """
    table = read_csv(path, _plain)
    columns, problems = table.columns, named_twice(path, table)
    if FILE not in columns:
        problems.append(Problem(str(path), f"no column {FILE}; there are {', '.join(columns)}"))
    known = (FILE, TAGS, PATIENT, SITE, PART)
    classes = [name for name in columns if name.casefold() not in known and name]
    if TAGS in columns and classes:
        found = f"a column {TAGS}, and also {', '.join(classes)}"
        problems.append(Problem(str(path), found, f"{TAGS} or one column per class"))
    if TAGS not in columns and not classes:
        problems.append(Problem(str(path), "no tags", f"one column per class, or a column {TAGS}"))
    rows: list[Row] = []
    first: dict[str, str] = {}
    lines = [] if problems else table.lines  # without its columns no line says anything
    problems += table.unclear if lines else []
    for number, line in lines:
        where = f"{path}, line {number}"
        # two spellings of one path are one patch
        name, part = line.get(FILE, "") and posixpath.normpath(line[FILE]), line.get(PART, "").casefold() or None
        if not name:
            problems.append(Problem(where, "no file"))
            continue
        if name in first:
            problems.append(Problem(where, f"{name} is listed twice, first at {first[name]}"))
        first.setdefault(name, where)
        if part is not None and part not in (TRAIN, VAL, TEST):
            problems.append(Problem(where, f"{PART} '{part}'", f"{TRAIN}, {VAL} or {TEST}"))
        if TAGS in columns:
            tags = {text.strip() for text in line[TAGS].split(";") if text.strip()}
        else:
            odd = [f"{name} is '{line[name]}'" for name in classes if line[name] not in ("0", "1", "0.0", "1.0")]
            if odd:
                problems.append(Problem(where, "; ".join(odd), "0 or 1"))
            tags = {name for name in classes if line[name] in ("1", "1.0")}
        rows.append(Row(name, frozenset(tags), line.get(PATIENT) or None, line.get(SITE) or None, part, where))
    classes = classes or sorted({tag for row in rows for tag in row.tags})
    for name in classes:
        if name.casefold() in NO_CLASSES:
            fix = "Tags name classes only. What masks call background or ignore, --classes-file says."
            problems.append(Problem(str(path), f"a class called {name}", fix=fix))
    if not rows and not problems:
        problems.append(Problem(str(path), "no patches in it"))
    if problems:
        raise BadInput(f"The tags {path}", problems)
    return Tags(rows, classes, TAGS not in columns)


def read_code(path: Path) -> tuple[list[str], dict[str, list[int]], dict[int, Colour]]:
    """Read which value of the masks means which class: columns ``class``, ``value`` and, for RGB masks, ``colour``.

    Rows called ``background`` and ``ignore`` say which values are no class; a class may have several values.

    Returns:
        The classes in the order of the file, the values of each name, and the colour of each value.

    Raises:
        BadInput: missing columns, values that are no whole numbers or there twice, odd colours.
        UserError: no such file, or no UTF-8 text.
    """
    table = read_csv(path, _plain)
    if not {"class", "value"} <= set(table.columns):
        found = f"columns {', '.join(table.columns)}"
        raise BadInput(f"The classes {path}", [Problem(str(path), found, "class and value")])
    values: dict[str, list[int]] = {}
    colours: dict[int, Colour] = {}
    problems, seen = [*named_twice(path, table), *table.unclear], set()
    for number, line in table.lines:
        where = f"{path}, line {number}"
        name, value, colour = line["class"], line["value"], line.get("colour") or line.get("color") or ""
        name = name.casefold() if name.casefold() in NO_CLASSES else name
        match = _COLOUR.fullmatch(colour)
        if not name or not value.isdecimal() or int(value) in seen:
            problems.append(Problem(where, f"class '{name}', value '{value}'", "a name and a whole number of its own"))
            continue
        if colour and match is None:
            problems.append(Problem(where, f"colour '{colour}'", "six digits such as #FF0000"))
        seen.add(int(value))
        values.setdefault(name, []).append(int(value))
        if match:
            red, green, blue = bytes.fromhex(match[1])
            colours[int(value)] = (red, green, blue)
    if colours and len(colours) < len(seen):
        found = f"colours for {len(colours)} of {len(seen)} values"
        problems.append(Problem(str(path), found, "one for each, or none"))
    classes = [name for name in values if name not in NO_CLASSES]
    if not classes:
        problems.append(Problem(str(path), "no class"))
    if problems:
        raise BadInput(f"The classes {path}", problems)
    return classes, values, colours


def make_code(
    classes: Sequence[str], values: Mapping[str, Sequence[int]] | None, colours: Mapping[int, Colour]
) -> Code:
    """Return how masks become labels; without a list of values 1, 2, ... are the classes, 0 and 255 count nowhere."""
    ignore = len(classes) + 1
    if values is None:
        return Code({0: ignore, 255: ignore, **{label: label for label in range(1, ignore)}})
    labels = {BACKGROUND: 0, IGNORE: ignore, **{name: label for label, name in enumerate(classes, 1)}}
    return Code({value: labels[name] for name, own in values.items() for value in own}, dict(colours))


def check_classes(path: Path, table: Tags, classes: Sequence[str]) -> None:
    """Refuse tags that are no class, and classes that have no column beside those that have.

    Raises:
        BadInput: says where.
    """
    problems = [
        Problem(row.where, f"unknown class '{tag}'{nearest(tag, classes)}")
        for row in table.rows
        for tag in sorted(row.tags - set(classes))
    ]
    for name in [name for name in classes if name not in table.classes] if table.by_column else ():
        problems.append(Problem(str(path), f"no column {name}{nearest(name, table.classes)}", "one per class"))
    if problems:
        raise BadInput(f"The tags {path}", problems)


def _plain(name: str) -> str:
    """Return a column's name; ours count in any case, those of classes keep theirs."""
    text = name.strip()
    ours = (FILE, TAGS, PATIENT, SITE, PART, "class", "value", "colour", "color")
    return text.casefold() if text.casefold() in ours else text
