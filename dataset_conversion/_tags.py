"""Weak datasets: image tags, one per slice, in place of masks.

Training cases carry slices constant at their tag, only for nnU-Net's planner; trainers read the case table. Nothing
that training sees, hashes included, depends on a mask beyond its tags.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_conversion._facts import Facts, Request, SourceCase
from nnunet_dgplugins.data.case_table import Case
from nnunet_dgplugins.errors import Problem, UserError, nearest
from nnunet_dgplugins.files import write_json

if TYPE_CHECKING:
    from dataset_conversion._volumes import Checked

TAGS, MASKS = "tags", "masks"
IMAGE_TAGS = "image_tags.json"


def check(facts: Facts, request: Request) -> None:
    """Refuse options that contradict each other.

    Raises:
        UserError: says which.
    """
    if request.supervision == TAGS and request.zones == "keep":
        raise UserError("--zones keep: a slice's tag says gland or none, no zones; add --supervision masks.")
    if not request.folds and request.val + request.test >= 1:
        raise UserError(f"--val {request.val:g} and --test {request.test:g} leave no patient to train on.")


def modalities(text: str, known: Sequence[str]) -> list[str]:
    """Return the modalities that ``text`` lists with commas, in its order; all of ``known`` if it is empty.

    Raises:
        UserError: an unknown name, one named twice, or fewer than two.
    """
    names = [part.strip() for part in text.split(",") if part.strip()] or list(known)
    spelt = {name.casefold(): name for name in known}
    for name in names:
        if name.casefold() not in spelt:
            raise UserError(f"--modalities: unknown modality '{name}'{nearest(name, known)}")
    found = [spelt[name.casefold()] for name in names]
    if len(set(found)) < max(2, len(found)):
        raise UserError(f"--modalities {text}: expected two or more different ones of {', '.join(known)}.")
    return found


def table_entry(case: SourceCase, report: Checked, test: bool) -> Case:
    """Return what the case table says of a case of a weak dataset; tags of test cases would tell of their masks."""
    tags = None if test else list[int | list[int]](report.tags)
    return Case(case.site or None, case.patient, labelled=test, tags=tags, original=case.original)


def evidence(case: SourceCase, report: Checked, test: bool, mask: bool) -> list[Any]:
    """Return what a hash may hold of a case.

    Args:
        case: the case.
        report: hashes of its files, and its tags.
        test: whether it is a test case, which has no tags.
        mask: whether the mask itself counts; else a mask is known by its tags only.
    """
    images = len(case.images)
    return [*report.files[:images], None if test else report.tags, report.files[images:] if mask else None]


def problems(root: Path, reports: Sequence[Checked], min_pixels: int) -> list[Problem]:
    """Return what is wrong with the tags of all training cases together."""
    if any(any(report.tags) for report in reports):
        return []
    found = f"no slice of {len(reports)} cases has {min_pixels} foreground pixel{'s' if min_pixels > 1 else ''}"
    return [Problem(str(root), found, "slices with and without the target", "Look at the masks, or at --min-pixels.")]


def summary(reports: Sequence[Checked], test: Collection[str], val: Collection[str]) -> str:
    """Return one line on how many slices are positive."""
    training = [report for report in reports if report.name not in test]
    positive, slices = sum(sum(report.tags) for report in training), sum(len(report.tags) for report in training)
    return (
        f"Tags: {positive} of {slices} slices of {len(training)} cases are positive. Masks are written of "
        f"{len(set(val))} cases that validate and {len(test)} that test."
    )


def write_image_tags(folder: Path, cases: dict[str, Case]) -> None:
    """Write ``{case: {slice: tag}}`` for other tools."""
    content = {
        name: {str(index): tag for index, tag in enumerate(case.tags)}
        for name, case in cases.items()
        if case.tags is not None
    }
    write_json(folder / IMAGE_TAGS, content)
