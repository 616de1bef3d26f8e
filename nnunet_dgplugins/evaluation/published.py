"""The papers' result tables as data: what was published, by whom, and why it may not be comparable.

One CSV file per method's paper, one value per line; their README.md says how to read them, and ``docs/published`` leads
to them. Importable without torch.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_dgplugins.errors import BadInput, Problem, UserError, nearest

if TYPE_CHECKING:
    import pandas

COLUMNS = [
    "paper",
    "table",
    "dataset",
    "protocol",
    "method",
    "source",
    "target",
    "setting",
    "class",
    "metric",
    "unit",
    "value",
    "sd",
    "caveat",
    "where",
]
KEY = ["paper", "table", "dataset", "method", "source", "target", "setting", "class", "metric"]
"""Columns that together name one value."""
PROTOCOLS = {
    "standard": "this package's own; no paper reports it",
    "desam": "3-D Dice per case as in DeSAM's released code (`dgplugins evaluate --protocol desam`)",
    "samsdg": "2-D Dice per canvas as in SAM-SDG's released code (`dgplugins evaluate --protocol samsdg`)",
    "dcam": "one confusion matrix over all pixels of the set",
    "epl": "2-D Dice per slice, classes together, mean over a patient's slices",
    "other": "another definition, or one that is not known",
}
UNITS = {"percent": 100.0, "fraction": 1.0}
"""Unit -> its largest value."""

_TABLES = Path(__file__).parent / "published_tables"
# four releases of the same six sites; what is built from the public sources is other data
_SAME_DATA = dict.fromkeys(("prostatesaml", "prostatemaxstyle", "prostatedesam", "prostatenpy"), "prostate")
_REQUIRED = ["paper", "table", "dataset", "protocol", "method", "metric", "unit", "value", "where"]


def published(dataset: str, protocol: str | None = None, *, folder: Path | None = None) -> pandas.DataFrame:
    """Return the published values on a dataset.

    The name alone is compared: made or simulated images that were converted under the name of a public download
    get that download's numbers, so the caller has to know that the data are the real ones.

    Args:
        dataset: as in the column ``dataset``, or the name of a dataset of this package, with or without number and
            source: ``Prostate``, ``ProstateSAML``, ``Dataset501_ProstateSAML_RUNMC``. Case does not matter.
        protocol: one of :data:`PROTOCOLS`; every one if not given.
        folder: where the CSV files lie; the package's own if not given.

    Returns:
        Columns :data:`COLUMNS`, in the files' order; ``value`` and ``sd`` (NaN where none is given) are numbers in the
        row's ``unit``, the rest is text, empty where it does not apply. No rows if nothing is known on the dataset.

    Raises:
        UserError: unknown protocol, or no folder with CSV files.
        BadInput: a file is not as it should be; all problems of all files are listed.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise UserError(f"No protocol '{protocol}' among the published values{nearest(protocol, PROTOCOLS)}")
    table = read_folder(folder or _TABLES)
    chosen = table["dataset"].map(_family) == _family(dataset)
    if protocol is not None:
        chosen &= table["protocol"] == protocol
    return table[chosen].reset_index(drop=True)


def read_folder(folder: Path) -> pandas.DataFrame:
    """Return every value of every CSV file of a folder, files by name.

    Raises:
        UserError: the folder has no CSV file.
        BadInput: a file is not as it should be; all problems of all files are listed.
    """
    import pandas

    files = sorted(Path(folder).glob("*.csv"))
    if not files:
        raise UserError(f"{folder}: no CSV files with published values.")
    problems: list[Problem] = []
    rows = [row for path in files for row in _read(path, problems)]
    problems += _repeated(rows)
    if problems:
        raise BadInput(f"Published values in {folder}", problems)
    table = pandas.DataFrame(rows, columns=COLUMNS)
    return table.assign(**{name: table[name].map(_number).astype(float) for name in ("value", "sd")})


def _family(dataset: str) -> str:
    """Return the name under which the values of a dataset are kept, in lower case."""
    name = re.sub(r"^dataset\d{3}_", "", dataset.casefold()).split("_")[0]
    return _SAME_DATA.get(name, name)


def _read(path: Path, problems: list[Problem]) -> list[dict[str, str]]:
    """Return one file's lines that are in order, with the keys ``file`` and ``line``; add the rest to ``problems``."""
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            reader = csv.reader(handle, strict=True)
            header = next(reader, [])
            lines = [(reader.line_num, cells) for cells in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        problems.append(Problem(str(path), f"not readable as CSV ({error})"))
        return []
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        problems.append(Problem(str(path), f"no column {', '.join(missing)}", f"the columns {', '.join(COLUMNS)}"))
        return []
    found = []
    for number, cells in lines:
        row = dict(zip(header, cells, strict=False))
        wrong = _wrong(row) if len(cells) == len(header) else [(f"{len(cells)} fields", f"{len(header)}")]
        problems += [Problem(f"{path}, line {number}", *what) for what in wrong]
        if not wrong:
            found.append({**row, "file": path.name, "line": str(number)})
    return found


def _wrong(row: dict[str, str]) -> list[tuple[str, str]]:
    """Return what is found and what is expected for everything wrong with one line."""
    wrong = [(f"no {name}", "a text or number") for name in _REQUIRED if not row[name]]
    for column, known in (("protocol", PROTOCOLS), ("unit", UNITS)):
        if row[column] and row[column] not in known:
            wrong.append((f"{column} '{row[column]}'", " or ".join(known)))
    largest = UNITS.get(row["unit"], max(UNITS.values()))
    for column in ("value", "sd"):
        if row[column] and not 0 <= _number(row[column]) <= largest:  # NaN is never in the range
            wrong.append((f"{column} '{row[column]}'", f"a number from 0 to {largest:g}"))
    return wrong


def _number(text: str) -> float:
    """Return the number, NaN for an empty field and for what is no number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _repeated(rows: list[dict[str, str]]) -> list[Problem]:
    first: dict[tuple[str, ...], str] = {}
    problems = []
    for row in rows:
        place = f"{row['file']}, line {row['line']}"
        earlier = first.setdefault(tuple(row[name] for name in KEY), place)
        if earlier != place:
            expected = f"one line for each {', '.join(KEY)}"
            problems.append(Problem(place, f"what {earlier} gives already", expected))
    return problems
