"""Which patients of the source sites keep their labels, when few labels are asked for.

The first patients by name are labelled, so that a larger share always holds the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from dataset_conversion._facts import Request, SourceCase
from nnunet_dgplugins.errors import UserError

HONEST, PUBLISHED = "honest", "published"


def check(request: Request) -> None:
    """Refuse options that contradict each other.

    Raises:
        UserError: says which.
    """
    if request.ratio is not None and request.labelled is not None:
        raise UserError("--ratio and --labelled both say how many patients are labelled; give one of them.")
    if request.ratio is not None and not 0 < request.ratio <= 1:
        raise UserError(f"--ratio {request.ratio:g}: expected a share above 0, at most 1 (0.02 for 2 %).")
    if request.labelled is not None and request.labelled < 1:
        raise UserError(f"--labelled {request.labelled}: expected at least one patient per source site.")
    if request.count != HONEST and request.ratio is None:
        raise UserError(f"--protocol {request.count} says how to count a share; give the share with --ratio.")


def count(patients: int, request: Request) -> int:
    """Return how many of a group's annotated patients are labelled.

    ``ceil(N * ratio)``; ``published`` is ``ceil(N * ratio + 1)``, at most N, as the released code of Yao et al.
    (AAAI 2022) has it: one more than the ratio says.

    Args:
        patients: N, those with annotation.
        request: with ``ratio`` or ``labelled``; all are labelled with neither.
    """
    if request.labelled is not None:
        return min(patients, request.labelled)
    if request.ratio is None:
        return patients
    share = patients * Fraction(str(request.ratio))  # 0.07 of 100 are 7; binary fractions make it 8
    return min(patients, math.ceil(share + 1 if request.count == PUBLISHED else share))


def choose(cases: Sequence[SourceCase], sources: Collection[str], request: Request) -> list[SourceCase]:
    """Return the cases to convert; a source case that is not to be labelled has lost its masks.

    Args:
        cases: all cases of source and target sites, each site in its own order.
        sources: the source sites; of the others only annotated cases are kept.
        request: how many patients are labelled.
    """
    labelled = {patient for _, patients, number in groups(cases, sources, request) for patient in patients[:number]}
    annotated = {(case.site, case.patient) for case in cases if case.masks}
    chosen = []
    for case in cases:
        patient = (case.site, case.patient)
        if case.site not in sources:
            keep = bool(case.masks)
        elif patient in labelled:
            keep = not case.spare
        else:
            keep = patient in annotated or request.unannotated
            case = replace(case, label=None, raters=())
        if keep:
            chosen.append(case)
    return chosen


def groups(
    cases: Sequence[SourceCase], sources: Collection[str], request: Request
) -> Iterator[tuple[str, list[tuple[str, str]], int]]:
    """Yield each group of annotated source patients that is counted by itself: name, patients, how many are labelled.

    A group is a site; ``published`` counts the centres of a site apart (vendor B of M&Ms has two).
    """
    found: dict[str, dict[tuple[str, str], None]] = {}
    for case in cases:
        if case.site in sources and case.masks:
            centre = f" centre {case.centre}" if request.count == PUBLISHED and case.centre else ""
            found.setdefault(case.site + centre, {})[case.site, case.patient] = None
    for name, patients in found.items():
        yield name, list(patients), count(len(patients), request)
