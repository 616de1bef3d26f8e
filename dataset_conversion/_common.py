"""The one engine of every converter: check everything, refuse everything wrong at once, then write.

A dataset is built in a hidden folder beside its final place and renamed at the end, so nnU-Net never sees half of it.
A killed conversion continues there; every file is written in one step, a stamp with the input's hash comes last.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dataset_conversion import _labelled, _tags
from dataset_conversion._facts import Facts, ListCases, Listing, Request, SourceCase
from dataset_conversion._plan import Plan, make_plan
from dataset_conversion._protocols import PROTOCOLS, cross_validation, shares
from nnunet_dgplugins import __version__
from nnunet_dgplugins.data import staging
from nnunet_dgplugins.data.case_table import KEY, Case, CaseTable
from nnunet_dgplugins.data.splits import SPLITS, Split
from nnunet_dgplugins.data.splits import check as check_folds
from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.files import RAW, content_hash, human_bytes, nnunet_folder, require_disk, write_json

if TYPE_CHECKING:
    from dataset_conversion._volumes import Checked


def convert(facts: Facts, list_cases: ListCases, request: Request) -> Path:
    """Convert a download into an nnU-Net raw dataset.

    Args:
        facts: what the converter knows about its source.
        list_cases: fills a listing with the cases under the root.
        request: what the user asked for.

    Returns:
        The dataset's folder in ``nnUNet_raw``.

    Raises:
        BadInput: every problem of the input; nothing is written.
        UserError: the id holds other content, a folder is missing, or an option makes no sense.
    """
    listing = Listing()
    with listing.resources:
        return _convert(facts, list_cases, request, listing)


def _convert(facts: Facts, list_cases: ListCases, request: Request, listing: Listing) -> Path:
    """Convert while the listing's resources are there."""
    final, plan, problems = _prepare(facts, list_cases, request, listing)
    reports = _check(plan)
    problems += _problems(plan, reports, final.parent)
    for report in reports:
        for warning in report.warnings:
            click.echo(f"Note: {warning}", err=True)
    if problems:
        raise BadInput(f"{facts.command}, {request.root}", problems)
    folds, test = _split(plan, reports)
    val = {name for fold in folds for name in fold["val"]}
    digest = _digest(plan, reports, folds, test, test | val)
    described = _digest(plan, reports, folds, test) if plan.weak else digest  # dataset.json tells nothing of masks
    if staging.is_done(final, digest):
        click.echo(f"{plan.name} is there already, made from the same input: nothing to do.")
        return final
    staging.refuse_other_content(final, digest, request.overwrite, described)
    _show_sites(plan, reports)
    if plan.weak:
        click.echo(_tags.summary(reports, test, val))
    folder = staging.start(final, digest)
    _write(plan, reports, test, val, folder)
    _describe(plan, _table(plan, reports, test, described), folds, len(plan.cases) - len(test), folder)
    staging.finish(folder, final, digest)
    number = plan.name[7:10]
    click.echo(f"Wrote {final}\nNext: nnUNetv2_plan_and_preprocess -d {number} -c 2d --verify_dataset_integrity")
    return final


def _prepare(
    facts: Facts, list_cases: ListCases, request: Request, listing: Listing
) -> tuple[Path, Plan, list[Problem]]:
    """List the cases and say what lies ahead; returns the final folder, the plan and the tree's problems."""
    raw = nnunet_folder(RAW)
    _labelled.check(request)
    _tags.check(facts, request)
    list_cases(request.root, request, listing)
    plan = make_plan(listing.facts or facts, request, listing)
    staging.refuse_other_names(plan.name)
    for warning in listing.warnings:
        click.echo(f"Note: {warning}", err=True)
    paths = {path for case in plan.cases for path in case.files}
    size = sum(path.stat().st_size for path in paths if path.is_file())
    click.echo(f"Checking {len(plan.cases)} cases, {len(paths)} files, {human_bytes(size)}.")
    chosen = {*plan.sources, *plan.targets}
    problems = [
        trouble.problem
        for trouble in listing.troubles
        if (trouble.site is None or trouble.site in chosen) and trouble.case not in request.exclude
    ]
    return raw / plan.name, plan, problems


def _recipe(plan: Plan, case: SourceCase) -> Any:
    from dataset_conversion._volumes import Recipe

    window = plan.facts.window if case.site in plan.facts.window_sites else None
    drop = plan.request.drop_empty_slices
    pixels = plan.request.min_pixels if plan.weak else 0
    neighbours = plan.request.neighbours and len(case.images) == 1  # others bring them along
    return Recipe(
        dict(plan.mapping), window, drop, plan.request.link, plan.ignore, plan.facts.raters, pixels, neighbours
    )


def _check(plan: Plan) -> list[Checked]:
    """Return the report of each case, in the plan's order."""
    from dataset_conversion import _volumes
    from nnunet_dgplugins import parallel

    arguments = [(case, _recipe(plan, case)) for case in plan.cases]
    return parallel.run("Checking", _volumes.check_case, arguments, plan.request.jobs)


def _problems(plan: Plan, reports: list[Checked], raw: Path) -> list[Problem]:
    """Return the problems of the cases and those that only show between cases."""
    problems = [problem for report in reports for problem in report.problems]
    for name, count in Counter(case.name for case in plan.cases).items():
        if count > 1:
            paths = " and ".join(case.original for case in plan.cases if case.name == name)
            problems.append(Problem(paths, f"{count} cases would all be called {name}", fix="Rename or remove one."))
    same: dict[str, list[SourceCase]] = defaultdict(list)
    for case, report in zip(plan.cases, reports, strict=True):
        if report.voxels:
            same[report.voxels].append(case)
    for cases in same.values():
        of_one_series = all(case.frame is not None for case in cases) and len({case.images for case in cases}) == 1
        if len({case.name for case in cases}) > 1 and not of_one_series:
            paths = " and ".join(case.original for case in cases)
            fix = f"Leave all but one out, for instance with --exclude {cases[-1].name}."
            problems.append(Problem(paths, "the same image twice, a duplicate patient", fix=fix))
    if plan.keep_zones:
        problems += _zone_problems(plan, reports)
    if plan.weak and reports and not problems:
        problems += _tags.problems(plan.request.root, reports, plan.request.min_pixels)
    try:
        require_disk(raw, sum(report.bytes for report in reports), plan.name)
    except UserError as error:
        problems.append(Problem(str(raw), str(error)))
    return problems


def _zone_problems(plan: Plan, reports: list[Checked]) -> list[Problem]:
    zones = {value for value, written in plan.mapping.items() if written > 1}
    with_zones = {case.site for case, report in zip(plan.cases, reports, strict=True) if zones & set(report.values)}
    without = [site for site in dict.fromkeys(case.site for case in plan.cases) if site not in with_zones]
    others = " ".join(f"--target {site}" for site in sorted(with_zones - set(plan.sources)))
    return [
        Problem(
            site,
            "its labels hold the whole gland only, no zones",
            fix="Use --zones merge." if site in plan.sources or not others else f"Use --zones merge, or {others}.",
        )
        for site in without
    ]


def _split(plan: Plan, reports: list[Checked]) -> tuple[list[Split], set[str]]:
    """Return the folds and the names of the test cases."""
    labelled = [case.name for case in plan.cases if case.site in plan.sources and case.label is not None]
    if not labelled:
        named = ", ".join(filter(None, plan.sources)) or plan.facts.command
        raise UserError(f"{plan.request.root}: no annotated case of {named} is left to train on.")
    table = _table(plan, reports)
    held_out: list[str] = []
    if plan.folds is not None:
        kept = set(labelled)
        folds = [{side: [name for name in names if name in kept] for side, names in fold.items()}
                 for fold in plan.folds]  # fmt: skip
        if wrong := check_folds(folds, table, labelled):
            raise BadInput(f"The folds of {plan.request.root}", wrong)
    elif plan.split == "shares":
        strata, request = {case.name: case.stratum for case in plan.cases}, plan.request
        if request.folds:
            held_out, folds = cross_validation(table, labelled, strata, request.folds, request.test, plan.seed)
        else:
            held_out, folds = shares(table, labelled, strata, request.val, request.test, plan.seed)
    else:
        held_out, folds = PROTOCOLS[plan.split](table, labelled)
    return folds, {case.name for case in plan.cases if case.site not in plan.sources or case.name in held_out}


def _digest(plan: Plan, reports: list[Checked], folds: list[Split], test: set[str], seen: Collection[str] = ()) -> str:
    """Return the hash of everything the written bytes depend on; of a weak dataset, masks of ``seen`` cases only."""

    def content(case: SourceCase, report: Checked) -> list[Any]:
        if plan.weak:
            return _tags.evidence(case, report, case.name in test, case.name in seen)
        # a file of several frames stays the same when the frame wanted from it is another
        return [*([] if case.frame is None else [case.frame]), *report.files]

    return content_hash(
        {
            "format": staging.FORMAT,
            "name": plan.name,
            "options": plan.options(),
            **({"ends_left_out": True} if plan.facts.ends_left_out else {}),
            "cases": [
                [case.name, case.site, case.patient, *content(case, report)]
                for case, report in zip(plan.cases, reports, strict=True)
            ],
            **({"folds": folds, "test": sorted(test)} if plan.facts.tags else {}),  # the tree says them, not an option
        }
    )


def _show_sites(plan: Plan, reports: list[Checked]) -> None:
    """Print what the user should glance at: cases, sizes, spacing and labels of each site."""
    width = max([8, *(len(case.site) for case in plan.cases)])
    click.echo(
        f"{'site':{width}} {'part':6} {'cases':>5}  {'size (x, y, slices)':24} {'spacing in mm':24} label values"
    )
    for site in dict.fromkeys(case.site for case in plan.cases):
        own = [report for case, report in zip(plan.cases, reports, strict=True) if case.site == site]
        part = "all" if plan.facts.tags else "train" if site in plan.sources else "test"
        values = " ".join(map(str, sorted({value for report in own for value in report.values})))
        shapes = ", ".join(_range([report.shape[axis] for report in own]) for axis in range(3))
        spacing = ", ".join(_range([round(report.spacing[axis], 3) for report in own]) for axis in range(3))
        click.echo(f"{site or '-':{width}} {part:6} {len(own):5}  {shapes:24} {spacing:24} {values}")
    unlabelled = sum(case.label is None for case in plan.cases)
    if unlabelled:
        for name, count, patients in plan.shares:
            click.echo(f"{name}: {count} of {patients} annotated patients labelled")
        click.echo(f"{unlabelled} training cases are unlabelled; their labels are filled with the ignore value.")
    files = len(plan.cases) * (len(plan.channel_names) + 1)
    click.echo(f"Writing {files} files, about {human_bytes(sum(report.bytes for report in reports))}.")


def _range(numbers: list[Any]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}-{high}"


def _table(plan: Plan, reports: list[Checked], test: Collection[str] = (), digest: str = "") -> CaseTable:
    source = plan.sources[0] if len(plan.sources) == 1 else plan.sources
    return CaseTable(
        cases={
            case.name: _tags.table_entry(case, report, case.name in test)
            if plan.weak
            else Case(case.site or None, case.patient, labelled=case.label is not None, original=case.original)
            for case, report in zip(plan.cases, reports, strict=True)
        },
        source=None if plan.facts.tags else source,
        protocol={
            **plan.options(),
            **({"simulated": True} if plan.facts.simulated else {}),
            **({"ends_left_out": True} if plan.facts.ends_left_out else {}),
            "input": digest,
            "version": __version__,
        },
    )


def _write(plan: Plan, reports: list[Checked], test: set[str], val: set[str], folder: Path) -> None:
    from dataset_conversion import _volumes
    from nnunet_dgplugins import parallel

    arguments = [
        (case, _recipe(plan, case), report, folder, "Ts" if case.name in test else "Tr", case.name in val)
        for case, report in zip(plan.cases, reports, strict=True)
    ]
    try:
        parallel.run("Writing", _volumes.write_case, arguments, plan.request.jobs)
    except OSError as error:
        raise UserError(f"{folder}: writing stopped ({error}). Run the same command again, it continues.") from error


def _describe(plan: Plan, table: CaseTable, folds: list[Split], count: int, folder: Path) -> None:
    """Write the folds and dataset.json; a repaired dataset keeps those it has, they may have been edited."""
    if not folds:
        click.echo("Note: one patient only, so there are no folds; train with fold 'all'.", err=True)
    elif not (folder / SPLITS).exists():
        write_json(folder / SPLITS, folds)
    if plan.weak:
        _tags.write_image_tags(folder, dict(table.cases))
    if not (folder / "dataset.json").exists():
        content = {
            "name": plan.name[11:],
            "channel_names": plan.channel_names,
            "labels": dict(plan.labels),
            "numTraining": count,
            "file_ending": ".nii.gz",
            "reference": plan.facts.reference,
            "licence": plan.facts.licence,
            KEY: table.to_dict(),
        }
        write_json(folder / "dataset.json", content)
