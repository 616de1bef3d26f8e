"""The engine of the converters of patches: check every picture, refuse everything wrong at once, then write.

As for volumes, a dataset is built in a hidden folder and renamed at the end, and a killed conversion continues there.
One picture per worker is in memory at a time.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dataset_conversion._patches import TAGS, TEST, TRAIN, VAL, Patch, PatchRequest, PatchSet, some
from nnunet_dgplugins import __version__
from nnunet_dgplugins.data import staging
from nnunet_dgplugins.data.case_table import KEY, Case, CaseTable
from nnunet_dgplugins.data.splits import PATIENTS, SHARED, SPLITS, Split
from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.files import RAW, content_hash, human_bytes, nnunet_folder, require_disk, write_json

if TYPE_CHECKING:
    from dataset_conversion._pictures import Checked, Recipe

READER = "NaturalImage2DIO"
_ODD = {
    "palette": "masks have other colours in their palette than published; their indices count",
    "alpha": "pictures have an alpha channel, opaque everywhere; written without",
    "indexed": "images are palette pictures; written as RGB",
}


@dataclass(frozen=True)
class _Work:
    """Patches with what was found in them."""

    found: PatchSet
    request: PatchRequest
    patches: list[Patch]
    reports: list[Checked]

    @property
    def weak(self) -> bool:
        return self.request.supervision == TAGS

    @property
    def sources(self) -> list[str]:
        source = self.found.source
        return [source] if isinstance(source, str) else list(source or [])

    def tags(self, patch: Patch, report: Checked) -> list[int] | None:
        """Return 0 or 1 per class of a patch that training or validation sees; the mask says it where no list does."""
        if patch.part == TEST:
            return None
        if patch.tags is not None:
            return list(patch.tags)
        if patch.mask is None:
            return None
        return [int(report.pixels.get(label, 0) > 0) for label in range(1, len(self.found.classes) + 1)]

    def fold(self) -> Split:
        """Return the one fold: the source's own parts."""
        own = [patch for patch in self.patches if not self.sources or patch.site in self.sources]
        lists = {part: [patch.name for patch in own if patch.part == part] for part in (TRAIN, VAL)}
        patients = [
            {(p.site, p.patient) for p in own if p.part == part and p.patient is not None} for part in (TRAIN, VAL)
        ]
        return {**lists, PATIENTS: SHARED} if patients[0] & patients[1] else dict(lists)


def convert_patches(found: PatchSet, request: PatchRequest) -> Path:
    """Convert patches into an nnU-Net raw dataset.

    Args:
        found: the patches, closed by :meth:`dataset_conversion._patches.PatchSet.close`.
        request: what the user asked for.

    Returns:
        The dataset's folder in ``nnUNet_raw``.

    Raises:
        BadInput: every problem of the input; nothing is written.
        UserError: the id holds other content, a folder is missing, or an option makes no sense.
    """
    from nnunet_dgplugins import parallel

    started = time.perf_counter()
    final = nnunet_folder(RAW) / found.name
    staging.refuse_other_names(found.name)
    for note in found.notes:
        click.echo(f"Note: {note}", err=True)
    recipe = _recipe(found, request)
    files = [path for patch in found.patches for path in patch.files]
    size = sum(path.stat().st_size for path in files if path.is_file())
    click.echo(f"Checking {len(found.patches)} patches, {len(files)} files, {human_bytes(size)}.")
    from dataset_conversion._pictures import check_patch, write_patch

    reports = parallel.run("Checking", check_patch, [(patch, recipe) for patch in found.patches], request.jobs)
    work = _Work(found, request, found.patches, reports)
    problems = _problems(work, final.parent)
    for note in _notes(work):
        click.echo(f"Note: {note}", err=True)
    if problems:
        raise BadInput(f"{found.command}, {request.root}", problems)
    digest, described = _digest(work, truth=True), _digest(work, truth=False)
    if staging.is_done(final, digest):
        click.echo(f"{found.name} is there already, made from the same input: nothing to do.")
        return final
    staging.refuse_other_content(final, digest, request.overwrite, described)
    _show(work)
    folder = staging.start(final, digest)
    arguments = [(patch, report, recipe, folder) for patch, report in zip(work.patches, reports, strict=True)]
    try:
        parallel.run("Writing", write_patch, arguments, request.jobs)
    except OSError as error:
        raise UserError(f"{folder}: writing stopped ({error}). Run the same command again, it continues.") from error
    _describe(work, described, folder)
    staging.finish(folder, final, digest)
    seconds = time.perf_counter() - started
    count = len(work.patches)
    click.echo(
        f"Wrote {final}: {count} patches in {seconds:.0f} s, {count / seconds:.0f} per second\n"
        f"Next: nnUNetv2_plan_and_preprocess -d {found.name[7:10]} -c 2d --verify_dataset_integrity"
    )
    return final


def _recipe(found: PatchSet, request: PatchRequest) -> Recipe:
    from dataset_conversion._pictures import Recipe

    return Recipe(len(found.classes) + 1, request.supervision == TAGS, request.resize, request.link)


def _problems(work: _Work, raw: Path) -> list[Problem]:
    problems = [trouble.problem for trouble in work.found.troubles]
    problems += [problem for report in work.reports for problem in report.problems]
    labels = [report.pixels for patch, report in zip(work.patches, work.reports, strict=True) if patch.mask is not None]
    if labels and not problems and not any(found.get(label) for found in labels for label in _classes(work)):
        fix = "Say with --classes-file which value is which class, or look at the masks."
        problems.append(
            Problem(str(work.request.root), f"no mask of {len(labels)} shows a pixel of any class", fix=fix)
        )
    for part in (TRAIN, VAL):
        if not work.fold()[part] and not problems:
            where, fix = str(work.request.root), "See docs/data.md for the expected tree."
            problems.append(Problem(where, f"no patch to {'train' if part == TRAIN else 'validate'} on", fix=fix))
    try:
        require_disk(raw, sum(report.bytes for report in work.reports), work.found.name)
    except UserError as error:
        problems.append(Problem(str(raw), str(error)))
    return problems


def _classes(work: _Work) -> range:
    return range(1, len(work.found.classes) + 1)


def _notes(work: _Work) -> list[str]:
    """Return what the user should know of files that were put right, copies and patients on two sides."""
    notes = []
    for kind, text in _ODD.items():
        names = [patch.original for patch, report in zip(work.patches, work.reports, strict=True) if kind in report.odd]
        notes += [f"{len(names)} {text}: {some(names, 3)}"] if names else []
    same: dict[str, list[Patch]] = defaultdict(list)
    for patch, report in zip(work.patches, work.reports, strict=True):
        same[report.image].append(patch)
    copies = [patches for image, patches in same.items() if image and len(patches) > 1]
    parted = [patches for patches in copies if len({patch.part for patch in patches}) > 1]
    for groups, text in ((copies, "there more than once"), (parted, f"in two of {TRAIN}, {VAL} and {TEST}")):
        names = [" = ".join(patch.name for patch in patches) for patches in groups]
        notes += [f"{len(names)} pictures are {text}: {some(names, 3)}"] if names else []
    patients: dict[str, set[tuple[str | None, str]]] = defaultdict(set)
    for patch in work.patches:
        if patch.patient is not None:
            patients[patch.part].add((patch.site, patch.patient))
    for one, other in ((TRAIN, VAL), (TRAIN, TEST)):
        both = patients[one] & patients[other]
        if both:
            names = sorted(patient for _, patient in both)
            notes.append(f"{len(names)} patients are in {one} and {other}, kept as published: {some(names, 3)}")
    sites: dict[str, set[str | None]] = defaultdict(set)
    for site, patient in patients[TRAIN] | patients[VAL]:
        sites[patient].add(site)
    alike = sorted({patient for site, patient in patients[TEST] if sites[patient] - {site}})
    if alike:
        notes.append(
            f"{len(alike)} patient names of training occur at a test site, too: {some(alike, 3)}; if these are "
            "the same people, that site is no unseen one"
        )
    unknown = [patch.name for patch in work.patches if patch.patient is None]
    if unknown:
        notes.append(f"{len(unknown)} names tell no patient, so each such patch counts as one: {some(unknown, 3)}")
    return notes


def _digest(work: _Work, truth: bool) -> str:
    """Return the hash of everything the written bytes depend on; of a weak dataset without its masks if wanted.

    dataset.json carries the second kind: nothing that training sees depends on a mask beyond its tags.
    """
    masks = truth or not work.weak
    said = {"background": work.found.background, "mask_code": masks and work.found.mask_code}
    return content_hash(
        {
            **{key: value for key, value in said.items() if value},
            "format": staging.FORMAT,
            "name": work.found.name,
            "options": work.found.options,
            "patches": [
                [p.name, p.part, p.site, p.patient, report.image, work.tags(p, report), report.mask if masks else None]
                for p, report in zip(work.patches, work.reports, strict=True)
            ],
        }
    )


def _show(work: _Work) -> None:
    """Print what the user should glance at: patches, sizes and tags or pixels of each site and part."""
    classes = work.found.classes
    click.echo(f"{'site':14} {'part':6} {'patches':>7}  {'size (w x h)':18} share of patches with each class")
    pairs = list(zip(work.patches, work.reports, strict=True))
    for site, part in dict.fromkeys(sorted((p.site or "-", p.part) for p in work.patches)):
        own = [(p, report) for p, report in pairs if (p.site or "-", p.part) == (site, part)]
        size = " x ".join(_range([report.size[axis] for _, report in own]) for axis in (1, 0))
        # of a test patch the mask tells; this line is all that becomes of it
        present = Counter(
            name
            for p, report in own
            for label, name in enumerate(classes, 1)
            if (p.tags[label - 1] if p.tags is not None else report.pixels.get(label, 0))
        )
        shares = "  ".join(f"{name} {100 * present[name] / len(own):.0f} %" for name in classes)
        click.echo(f"{site:14} {part:6} {len(own):7}  {size:18} {shares}")
    tagged = [(p, work.tags(p, report)) for p, report in pairs if p.part == TRAIN]
    empty = sum(tags is not None and not any(tags) for _, tags in tagged)
    if empty:
        click.echo(f"{empty} training patches show none of these classes; they are kept, with empty tags.")
    if work.weak:
        click.echo(
            f"{sum(p.part != TEST for p in work.patches)} training and validation patches get labels of the ignore "
            f"value alone; masks are written of {sum(p.part == VAL and p.mask is not None for p in work.patches)} that "
            f"validate and {sum(p.part == TEST and p.mask is not None for p in work.patches)} that test."
        )
    click.echo(f"Writing about {human_bytes(sum(report.bytes for report in work.reports))}.")


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}-{high}"


def _table(work: _Work, digest: str) -> CaseTable:
    def entry(patch: Patch, report: Checked) -> Case:
        tags = work.tags(patch, report) if work.weak else None
        labelled = patch.mask is not None and (patch.part == TEST or not work.weak)
        # one slice, and one number for each class of it
        return Case(patch.site, patch.patient, labelled, None if tags is None else [tags], patch.original)

    options: dict[str, Any] = {**work.found.options, "background": work.found.background}
    return CaseTable(
        cases={p.name: entry(p, report) for p, report in zip(work.patches, work.reports, strict=True)},
        source=work.found.source,
        protocol={**options, "input": digest, "version": __version__},
    )


def _describe(work: _Work, digest: str, folder: Path) -> None:
    """Write the fold and dataset.json; a repaired dataset keeps those it has, they may have been edited."""
    if not (folder / SPLITS).exists():
        write_json(folder / SPLITS, [work.fold()])
    if (folder / "dataset.json").exists():
        return
    classes = work.found.classes
    labels = {"background": 0, **{name: label for label, name in enumerate(classes, 1)}, "ignore": len(classes) + 1}
    content = {
        "name": work.found.name[11:],
        "channel_names": dict.fromkeys(("0", "1", "2"), "rgb_to_0_1"),
        "labels": labels,
        "numTraining": sum(patch.part != TEST for patch in work.patches),
        "file_ending": ".png",
        "overwrite_image_reader_writer": READER,
        "reference": work.found.reference,
        "licence": work.found.licence,
        KEY: _table(work, digest).to_dict(),
    }
    write_json(folder / "dataset.json", content)
