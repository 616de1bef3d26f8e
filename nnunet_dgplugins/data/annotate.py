"""Gives an existing raw dataset a case table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_dgplugins.data import splits
from nnunet_dgplugins.data.case_table import KEY, Case, CaseTable
from nnunet_dgplugins.data.names import near
from nnunet_dgplugins.data.raw_dataset import RawDataset, write_together
from nnunet_dgplugins.data.site_list import Row, read_site_list
from nnunet_dgplugins.errors import BadInput, Problem, nearest
from nnunet_dgplugins.files import read_json

_SUGGESTIONS = 20  # unknown cases for which the nearest known one is looked for


def annotate(dataset: str, sites: Path, sources: Sequence[str] = ()) -> list[str]:
    """Write site and patient of every case into dataset.json, raw and preprocessed; what else a table says is kept.

    Args:
        dataset: id or name.
        sites: list of cases and sites (:func:`nnunet_dgplugins.data.site_list.read_site_list`).
        sources: the sites that are trained on; empty to leave that as it is.

    Returns:
        Lines for the user: what was written, and what to do next.

    Raises:
        BadInput: unknown, missing or doubled cases, unknown source sites; nothing is written.
    """
    raw = RawDataset.open(dataset)
    rows, problems = read_site_list(sites)
    known = [*raw.training, *raw.test]
    there = {*known}
    given = {row.case: row for row in rows}
    strange = [row for row in rows if row.case not in there]
    problems += [  # a suggestion takes long where there are many names
        Problem(row.where, f"unknown case '{row.case}'{near(row.case, known) if number < _SUGGESTIONS else ''}")
        for number, row in enumerate(strange)
    ]
    problems += _two_spellings(rows)
    problems += [
        Problem(str(sites), f"case '{name}' of {raw.folder.name} is not listed") for name in known if name not in given
    ]
    problems += [
        Problem(str(raw.folder), f"'{name}' is in imagesTr and in imagesTs")
        for name in raw.training
        if name in raw.test
    ]
    found = {row.site for row in rows if row.site}
    problems += [
        Problem("--source", f"unknown site '{site}'{nearest(site, found)}") for site in sources if site not in found
    ]
    old = raw.table or CaseTable()
    gone = [site for site in old.sources if site not in found] if not sources else []
    problems += [
        Problem("--source", f"the table's source {site} is no site of the list", f"one of {', '.join(sorted(found))}")
        for site in gone
    ]
    if problems:
        raise BadInput(f"The sites of {raw.folder.name}", problems)
    before = {name: old.cases.get(name, Case()) for name in known}
    kept = [name for name in known if given[name].patient is None and before[name].patient is not None]
    cases = {
        name: replace(case, site=given[name].site, patient=given[name].patient or case.patient)
        for name, case in before.items()
    }
    source = (sources[0] if len(sources) == 1 else list(sources)) if sources else old.source
    table = CaseTable(cases, source, old.protocol)
    files = {raw.folder / "dataset.json": {**raw.content, KEY: table.to_dict()}}
    if raw.preprocessed is not None:
        path = raw.preprocessed / "dataset.json"
        files[path] = {**read_json(path), KEY: table.to_dict()}
    changed = write_together(files)
    written = [f"Wrote {path}" for path in changed] or ["The table was there already."]
    written += [f"Patients of {len(kept)} cases are those of the table before: the list names none."] if kept else []
    return [*written, *_summary(raw, table)]


def _two_spellings(rows: Sequence[Row]) -> list[Problem]:
    """Return sites, and patients of one site, that differ in capital letters only: they would count as two."""
    problems = []
    first: dict[tuple[str, ...], tuple[str, str]] = {}
    for row in rows:
        for what, name in (("site", row.site), ("patient", row.patient or "")):
            site = row.site.casefold() if what == "patient" else ""
            spelled, where = first.setdefault((what, site, name.casefold()), (name, row.where))
            if spelled != name:
                problems.append(Problem(row.where, f"{what} '{name}'", f"'{spelled}', as in {where}"))
    return problems


def _summary(raw: RawDataset, table: CaseTable) -> Iterable[str]:
    for where, names in (("imagesTr", raw.training), ("imagesTs", raw.test)):
        counts = Counter(table.site_of(name) for name in names)
        if counts:
            yield f"{where}: " + ", ".join(f"{site} {count}" for site, count in sorted(counts.items(), key=str))
    path = (raw.preprocessed or raw.folder) / splits.SPLITS
    if not path.is_file():
        number = raw.folder.name[7:10]
        yield f"Next: dgplugins splits {number} --single-source SITE (or --leave-one-site-out, --k-fold 5)"
        return
    bad = splits.check(read_json(path), table, raw.training)
    if bad:
        yield f"Note: the folds in {path} do not go with this table ({bad[0]}). Write new ones with `dgplugins splits`."
