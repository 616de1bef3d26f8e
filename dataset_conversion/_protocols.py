"""Ways to split the source cases: which validate, and which are kept aside for testing.

Each takes the case table and the source cases in the source's own order, and returns test cases and folds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from nnunet_dgplugins.data import splits
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UserError

Outcome = tuple[list[str], list[splits.Split]]


def five_fold(table: CaseTable, names: Sequence[str]) -> Outcome:
    """Five folds by patient, fewer where there are fewer patients, none for a single one."""
    patients = len({table.patient_of(name) for name in names})
    return [], splits.k_fold(table, names, min(5, patients)) if patients > 1 else []


def desam(table: CaseTable, names: Sequence[str]) -> Outcome:
    """One fold as in DeSAM's released code: the first ``int(0.9 n)`` cases train, the rest validate.

    Raises:
        UserError: too few cases.
    """
    return [], splits.first_fraction(table, names)


def cross_modality(table: CaseTable, names: Sequence[str]) -> Outcome:
    """Split as in the cross-modality papers' code: first 20 % test, next 10 % validate, last 70 % train; one fold."""
    val = int(0.1 * len(names))
    test = len(names) - round(0.7 * len(names)) - val
    rest = names[test:]
    if not val:
        return list(names[:test]), five_fold(table, rest)[1]
    return list(names[:test]), [{"train": list(rest[val:]), "val": list(rest[:val])}]


def every_labelled_case(table: CaseTable, names: Sequence[str]) -> Outcome:
    """One fold that trains on every labelled case and validates on the same ones: none can be spared (Yao et al.)."""
    labelled = sorted(name for name in names if table.cases[name].labelled)
    return [], [{"train": labelled, "val": labelled, splits.VALIDATES_ON: splits.TRAINING}]


def shares(
    table: CaseTable, names: Sequence[str], strata: Mapping[str, str], val: float, test: float, seed: int = splits.SEED
) -> Outcome:
    """Draw one fold and the test cases by patient, each stratum giving its share of both, rounded.

    Args:
        table: patients.
        names: cases to split.
        strata: case to stratum, for instance the grade of its tumour.
        val: share of the patients that validates; at least one does.
        test: share that is kept aside; at least one unless it is 0.
        seed: of the draw.

    Raises:
        UserError: no patient is left to train on.
    """
    parts: dict[str, list[list[str]]] = {"test": [], "val": [], "train": []}
    for patients in _shuffled(table, names, strata, seed):
        dealt = patients
        for part, share in (("test", test), ("val", val)):
            count = math.floor(len(patients) * share + 0.5)
            parts[part] += dealt[:count]
            dealt = dealt[count:]
        parts["train"] += dealt
    for part, share in (("val", val), ("test", test)):
        if share and not parts[part] and parts["train"]:
            parts[part].append(parts["train"].pop())
    if not parts["train"] or not parts["val"]:
        raise UserError(f"{len(names)} cases are too few for shares of {val:g} to validate and {test:g} to test.")
    lists = {part: sorted(name for patient in patients for name in patient) for part, patients in parts.items()}
    return lists["test"], [{"train": lists["train"], "val": lists["val"]}]


def cross_validation(
    table: CaseTable, names: Sequence[str], strata: Mapping[str, str], count: int, test: float, seed: int = splits.SEED
) -> Outcome:
    """Draw ``count`` folds and the test cases by patient; the patients of a stratum take turns.

    Args:
        table: patients.
        names: cases to split.
        strata: case to stratum, for instance the grade of its tumour.
        count: number of folds; every patient that is not kept aside validates in one of them.
        test: share of each stratum that is kept aside, rounded.
        seed: of the draw.

    Raises:
        UserError: fewer patients than folds, or one fold only.
    """
    held_out, turns, turn = [], [list[str]() for _ in range(count)], 0
    for patients in _shuffled(table, names, strata, seed):
        aside = math.floor(len(patients) * test + 0.5)
        held_out += [name for patient in patients[:aside] for name in patient]
        for patient in patients[aside:]:
            turns[turn % count] += patient
            turn += 1
    if count < 2 or turn < count:
        raise UserError(f"{turn} patients cannot be split into {count} folds: 2 folds or more, a patient in each.")
    rest = {name for own in turns for name in own}
    return sorted(held_out), [{"train": sorted(rest - {*own}), "val": sorted(own)} for own in turns]


def _shuffled(
    table: CaseTable, names: Sequence[str], strata: Mapping[str, str], seed: int
) -> Iterator[list[list[str]]]:
    """Yield the patients of each stratum in a drawn order, each as a list of its cases."""
    groups: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names):
        groups.setdefault(strata.get(name, ""), {}).setdefault(table.patient_of(name), []).append(name)
    rng = np.random.RandomState(seed)  # its stream is frozen for ever
    for _, patients in sorted(groups.items()):
        yield [list(patients.values())[index] for index in rng.permutation(len(patients))]


PROTOCOLS = {"kfold": five_fold, "labelled": every_labelled_case, "desam": desam, "published": cross_modality}
