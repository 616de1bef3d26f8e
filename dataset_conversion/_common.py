"""The one engine of every converter: check everything, refuse everything wrong at once, then write.

A dataset is built in a hidden folder beside its final place and renamed at the end, so nnU-Net never sees half of it.
A killed conversion continues there; every file is written in one step, a stamp with the input's hash comes last.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dataset_conversion import _labelled
from dataset_conversion._facts import WITHOUT, Facts, ListCases, Listing, Request, SourceCase
from dataset_conversion._protocols import PROTOCOLS
from nnunet_dgplugins import __version__
from nnunet_dgplugins.data import staging
from nnunet_dgplugins.data.case_table import KEY, Case, CaseTable
from nnunet_dgplugins.data.names import near
from nnunet_dgplugins.data.splits import SPLITS, Split
from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.files import RAW, content_hash, human_bytes, nnunet_folder, require_disk, write_json

if TYPE_CHECKING:
    from dataset_conversion._volumes import Checked


@dataclass(frozen=True)
class _Plan:
    """Everything decided before a file is written."""

    facts: Facts
    request: Request
    sources: list[str]
    targets: list[str]
    name: str
    cases: list[SourceCase]
    shares: list[tuple[str, int, int]]  # group of source patients, how many are labelled, how many are annotated
    keep_zones: bool

    @property
    def labels(self) -> Mapping[str, int]:
        labels = (self.facts.zone_labels or {}) if self.keep_zones else self.facts.labels
        return {**labels, "ignore": self.ignore} if any(case.label is None for case in self.cases) else labels

    @property
    def ignore(self) -> int:
        """Value that fills the labels of unlabelled cases; nnU-Net wants the one after the last label."""
        return 1 + max(self.mapping.values())

    @property
    def split(self) -> str:
        return self.request.split or ("labelled" if self.request.few_labels else self.facts.splits[0])

    @property
    def mapping(self) -> Mapping[int, int]:
        return (self.facts.zone_mapping or {}) if self.keep_zones else self.facts.mapping


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
    final, plan, listing = _prepare(facts, list_cases, request)
    reports = _check(plan)
    problems = listing + _problems(plan, reports, final.parent)
    for report in reports:
        for warning in report.warnings:
            click.echo(f"Note: {warning}", err=True)
    if problems:
        raise BadInput(f"{facts.command}, {request.root}", problems)
    digest = _digest(plan, reports)
    if staging.is_done(final, digest):
        click.echo(f"{plan.name} is there already, made from the same input: nothing to do.")
        return final
    table = _table(plan, digest)
    labelled = [case.name for case in plan.cases if case.site in plan.sources and case.label is not None]
    if not labelled:
        raise UserError(f"{request.root}: no annotated case of {', '.join(plan.sources)} is left to train on.")
    held_out, folds = PROTOCOLS[plan.split](table, labelled)
    test = {case.name for case in plan.cases if case.site not in plan.sources or case.name in held_out}
    staging.refuse_other_content(final, digest, request.overwrite)
    _show_sites(plan, reports)
    folder = staging.start(final, digest)
    _write(plan, reports, test, folder)
    _describe(plan, table, folds, len(plan.cases) - len(test), folder)
    staging.finish(folder, final, digest)
    number = plan.name[7:10]
    click.echo(f"Wrote {final}\nNext: nnUNetv2_plan_and_preprocess -d {number} -c 2d --verify_dataset_integrity")
    return final


def _prepare(facts: Facts, list_cases: ListCases, request: Request) -> tuple[Path, _Plan, list[Problem]]:
    """List the cases and say what lies ahead; returns the final folder, the plan and the tree's problems."""
    raw = nnunet_folder(RAW)
    _labelled.check(request)
    listing = Listing()
    list_cases(request.root, request, listing)
    plan = _plan(facts, request, listing)
    staging.refuse_other_names(plan.name)
    for warning in listing.warnings:
        click.echo(f"Note: {warning}", err=True)
    paths = {path for case in plan.cases for path in (*case.images, *case.masks)}
    size = sum(path.stat().st_size for path in paths)
    click.echo(f"Checking {len(plan.cases)} cases, {len(paths)} files, {human_bytes(size)}.")
    chosen = {*plan.sources, *plan.targets}
    problems = [
        trouble.problem
        for trouble in listing.troubles
        if (trouble.site is None or trouble.site in chosen) and trouble.case not in request.exclude
    ]
    return raw / plan.name, plan, problems


def _plan(facts: Facts, request: Request, listing: Listing) -> _Plan:
    """Choose source and target sites and the cases that go with them."""
    found = {case.site for case in listing.cases} | {trouble.site for trouble in listing.troubles if trouble.site}
    if not found and not listing.troubles:
        raise UserError(f"{request.root}: no cases found for {facts.command}; docs/data.md shows the expected tree.")
    sources, targets, title = _sites(facts, request, found)
    for site in [*sources, *targets]:
        if site not in found:
            raise UserError(f"{request.root}: no cases of {site}; found {', '.join(sorted(found))}.")
    both = sorted(set(sources) & set(targets))
    if both:
        raise UserError(f"{', '.join(both)}: named as source and as target.")
    if request.zones == "keep" and facts.zone_labels is None:
        raise UserError(f"{facts.command}: this source has no zones to keep; use --zones merge.")
    names = {case.name for case in listing.cases} | {trouble.case for trouble in listing.troubles if trouble.case}
    names |= {f"{case.site}_{case.patient}" for case in listing.cases}
    for name in request.exclude:
        if name not in names:
            raise UserError(f"--exclude {name}: no such case{near(name, names)}")
    rank = {site.name: index for index, site in enumerate(facts.sites)}
    chosen = {*sources, *targets}
    cases = [case for case in listing.cases if case.site in chosen and not case.answers_to(request.exclude)]
    cases.sort(key=lambda case: (rank[case.site], case.order, case.name))
    shares = [(name, count, len(patients)) for name, patients, count in _labelled.groups(cases, sources, request)]
    cases = _labelled.choose(cases, sources, request)
    number = facts.dataset_id if request.dataset_id is None else request.dataset_id
    name = f"Dataset{number:03d}_{facts.name}_{title}"
    return _Plan(facts, request, sources, targets, name, cases, shares, request.zones == "keep")


def _sites(facts: Facts, request: Request, found: set[str]) -> tuple[list[str], list[str], str]:
    """Return source sites, target sites and how the dataset's name says it; what the user left open is the rest."""
    named = list(dict.fromkeys(facts.site(text).name for text in request.sources))
    targets = [facts.site(text).name for text in request.targets]
    without = [name for name in named if name.startswith(WITHOUT)]
    if without and (len(named) > 1 or targets):
        raise UserError(f"--source {without[0]} says all there is to say; leave out the other --source and --target.")
    targets = [name[len(WITHOUT) :] for name in without] or targets
    sources = [name for name in named if name not in without]
    rest = [site.name for site in facts.sites if site.default and site.name in found - {*sources, *targets}]
    if sources:
        return sources, targets or rest, "-".join(sources)
    if not targets:
        raise UserError(f"{facts.command}: name the sites to train on (--source) or those to test on (--target).")
    if not rest:
        raise UserError(f"{request.root}: no site is left to train on; found {', '.join(sorted(found))}.")
    return rest, targets, WITHOUT + "-".join(targets)


def _recipe(plan: _Plan, case: SourceCase) -> Any:
    from dataset_conversion._volumes import Recipe

    window = plan.facts.window if case.site in plan.facts.window_sites else None
    drop = plan.request.drop_empty_slices
    return Recipe(dict(plan.mapping), window, drop, plan.request.link, plan.ignore, plan.facts.raters)


def _check(plan: _Plan) -> list[Checked]:
    """Return the report of each case, in the plan's order."""
    from dataset_conversion import _volumes
    from nnunet_dgplugins import parallel

    arguments = [(case, _recipe(plan, case)) for case in plan.cases]
    return parallel.run("Checking", _volumes.check_case, arguments, plan.request.jobs)


def _problems(plan: _Plan, reports: list[Checked], raw: Path) -> list[Problem]:
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
    try:
        require_disk(raw, sum(report.bytes for report in reports), plan.name)
    except UserError as error:
        problems.append(Problem(str(raw), str(error)))
    return problems


def _zone_problems(plan: _Plan, reports: list[Checked]) -> list[Problem]:
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


def _digest(plan: _Plan, reports: list[Checked]) -> str:
    """Return the hash of everything the written bytes depend on."""
    return content_hash(
        {
            "format": staging.FORMAT,
            "name": plan.name,
            "options": _options(plan),
            "cases": [
                # a file of several frames stays the same when the frame wanted from it is another
                [case.name, case.site, case.patient, *([] if case.frame is None else [case.frame]), *report.files]
                for case, report in zip(plan.cases, reports, strict=True)
            ],
        }
    )


def _options(plan: _Plan) -> dict[str, Any]:
    request = plan.request
    options = {
        "converter": plan.facts.command,
        "zones": request.zones,
        "split": plan.split,
        "drop_empty_slices": request.drop_empty_slices,
        "excluded": sorted(request.exclude),
    }
    # said where they were given, so that what was converted without them is still known as the same
    few: dict[str, Any] = {
        "ratio": request.ratio,
        "labelled": request.labelled,
        "unannotated": request.unannotated or None,
    }
    few["protocol"] = request.count if request.ratio is not None and len(plan.facts.counts) > 1 else None
    few["frames"] = request.frames if any(case.frame is not None for case in plan.cases) else None
    return {**options, **{key: value for key, value in few.items() if value is not None}}


def _show_sites(plan: _Plan, reports: list[Checked]) -> None:
    """Print what the user should glance at: cases, sizes, spacing and labels of each site."""
    click.echo(f"{'site':8} {'part':6} {'cases':>5}  {'size (x, y, slices)':24} {'spacing in mm':24} label values")
    for site in dict.fromkeys(case.site for case in plan.cases):
        own = [report for case, report in zip(plan.cases, reports, strict=True) if case.site == site]
        part = "train" if site in plan.sources else "test"
        values = " ".join(map(str, sorted({value for report in own for value in report.values})))
        shapes = ", ".join(_range([report.shape[axis] for report in own]) for axis in range(3))
        spacing = ", ".join(_range([round(report.spacing[axis], 3) for report in own]) for axis in range(3))
        click.echo(f"{site:8} {part:6} {len(own):5}  {shapes:24} {spacing:24} {values}")
    unlabelled = sum(case.label is None for case in plan.cases)
    if unlabelled:
        for name, count, patients in plan.shares:
            click.echo(f"{name}: {count} of {patients} annotated patients labelled")
        click.echo(f"{unlabelled} training cases are unlabelled; their labels are filled with the ignore value.")
    files = sum(len(case.images) + 1 for case in plan.cases)
    click.echo(f"Writing {files} files, about {human_bytes(sum(report.bytes for report in reports))}.")


def _range(numbers: list[Any]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}-{high}"


def _table(plan: _Plan, digest: str) -> CaseTable:
    return CaseTable(
        cases={
            case.name: Case(case.site, case.patient, labelled=case.label is not None, original=case.original)
            for case in plan.cases
        },
        source=plan.sources[0] if len(plan.sources) == 1 else plan.sources,
        protocol={
            **_options(plan),
            **({"simulated": True} if plan.facts.simulated else {}),
            "input": digest,
            "version": __version__,
        },
    )


def _write(plan: _Plan, reports: list[Checked], test: set[str], folder: Path) -> None:
    from dataset_conversion import _volumes
    from nnunet_dgplugins import parallel

    arguments = [
        (case, _recipe(plan, case), report, folder, "Ts" if case.name in test else "Tr")
        for case, report in zip(plan.cases, reports, strict=True)
    ]
    try:
        parallel.run("Writing", _volumes.write_case, arguments, plan.request.jobs)
    except OSError as error:
        raise UserError(f"{folder}: writing stopped ({error}). Run the same command again, it continues.") from error


def _describe(plan: _Plan, table: CaseTable, folds: list[Split], count: int, folder: Path) -> None:
    """Write the folds and dataset.json; a repaired dataset keeps those it has, they may have been edited."""
    if not folds:
        click.echo("Note: one patient only, so there are no folds; train with fold 'all'.", err=True)
    elif not (folder / SPLITS).exists():
        write_json(folder / SPLITS, folds)
    if not (folder / "dataset.json").exists():
        content = {
            "name": plan.name[11:],
            "channel_names": dict(plan.facts.channel_names),
            "labels": dict(plan.labels),
            "numTraining": count,
            "file_ending": ".nii.gz",
            "reference": plan.facts.reference,
            "licence": plan.facts.licence,
            KEY: table.to_dict(),
        }
        write_json(folder / "dataset.json", content)
