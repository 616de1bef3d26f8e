"""Folds by site and patient, derived from the case table.

Only labelled cases are listed, so that stock trainers may use the folds; of a weak dataset, which has image tags in
place of masks, those with tags. Importable without torch and without nnunetv2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nnunet_dgplugins.data.case_table import Case, CaseTable
from nnunet_dgplugins.data.names import near
from nnunet_dgplugins.errors import Problem, UserError, nearest

SPLITS = "splits_final.json"
SEED = 12345  # nnU-Net's own
# "train" and "val": lists of cases. A fold of a single source adds "source": the site; leave-one-site-out adds
# "held_out". Both keep unlabelled cases of other sites out, which no list names.
Split = dict[str, Any]
MASKS, TAGS, ANY = "masks", "tags", "masks or tags"  # what cases of a fold must have
VALIDATES_ON, TRAINING = "validates_on", "training cases"  # marks a fold whose few labelled cases do both on purpose
# marks the fold of a download whose own parts hold patches of the same patients on both sides
PATIENTS, SHARED = "patients", "on both sides, as published"


def k_fold(table: CaseTable, names: Sequence[str], k: int = 5, seed: int = SEED) -> list[Split]:
    """Split the labelled (or tagged) cases of ``names`` into ``k`` folds by patient, each site spread evenly over them.

    Args:
        table: sites, patients and whether a case is labelled; a case it does not list is a labelled patient of its own.
        names: cases to split.
        k: number of folds, at least 2.
        seed: of the shuffling.

    Raises:
        UserError: fewer patients than folds, or ``k`` below 2.
    """
    groups = _patients(table, names)
    if k < 2:
        raise UserError(f"{k} folds asked for; at least 2 are needed, or nothing would be left to validate on.")
    if len(groups) < k:
        raise UserError(f"{k} folds need {k} labelled patients, there are {len(groups)}. Ask for fewer folds.")
    by_site: dict[str, list[str]] = {}
    for patient, cases in groups.items():
        by_site.setdefault(table.site_of(cases[0]) or "", []).append(patient)
    rng = np.random.RandomState(seed)  # its stream is frozen for ever: the same folds in ten years
    dealt = [patients[i] for _, patients in sorted(by_site.items()) for i in rng.permutation(len(patients))]
    folds = []
    for fold in range(k):
        val = set(dealt[fold::k])
        folds.append(
            {
                "train": sorted(case for patient, cases in groups.items() if patient not in val for case in cases),
                "val": sorted(case for patient, cases in groups.items() if patient in val for case in cases),
            }
        )
    return folds


def single_source(table: CaseTable, site: str, names: Sequence[str], k: int = 5, seed: int = SEED) -> list[Split]:
    """Split one site's cases of ``names`` into ``k`` folds by patient; no other site is trained or validated on.

    The extra key ``source`` names the site.

    Raises:
        UserError: the site is unknown or has too few patients.
    """
    check_site(table, site, names)
    folds = k_fold(table, [name for name in names if table.site_of(name) == site], k, seed)
    return [{**fold, "source": site} for fold in folds]


def leave_one_site_out(table: CaseTable, names: Sequence[str], k: int = 5, seed: int = SEED) -> list[Split]:
    """Return one fold per site, which trains and validates on the other sites only.

    One part in ``k`` of the other sites' patients validates, so that no checkpoint is chosen by the held-out site.
    Fold i holds out the i-th site by name; the extra key ``held_out`` says which.

    Raises:
        UserError: fewer than two sites, or too few patients.
    """
    present = [name for name in names if table.site_of(name) is not None]
    sites = sorted({str(table.site_of(name)) for name in present})
    if len(sites) < 2:
        raise UserError(f"Leaving one site out needs two sites, the training cases have {len(sites)}.")
    folds = []
    for site in sites:
        rest = [name for name in present if table.site_of(name) != site]
        count = min(k, len(_patients(table, rest)))
        folds.append({**k_fold(table, rest, count, seed)[0], "held_out": site})
    return folds


def first_fraction(table: CaseTable, names: Sequence[str], fraction: float = 0.9) -> list[Split]:
    """Return DeSAM's published split: the first ``int(fraction * n)`` cases train, the rest validate; one fold.

    A patient whose cases would be parted trains with all of them.

    Raises:
        UserError: one side would be empty.
    """
    patients = list(_patients(table, names).values())
    total = sum(map(len, patients))
    train: list[str] = []
    val: list[str] = []
    for number, cases in enumerate(patients, 1):
        (train if len(train) < int(fraction * total) and number < len(patients) else val).extend(cases)
    if not train or not val:
        raise UserError(f"{total} cases are too few for a split of {fraction:g} to {1 - fraction:.2g}.")
    return [{"train": train, "val": val}]


def check(
    splits: Iterable[Split], table: CaseTable | None, known_cases: Iterable[str], first: int = 0, supervision: str = ANY
) -> list[Problem]:
    """Return everything wrong with a list of folds.

    Args:
        splits: content of ``splits_final.json``.
        table: case table, None if the dataset has none.
        known_cases: cases of imagesTr.
        first: number of the first fold of the list.
        supervision: what every case must have: ``masks``, ``tags``, or any of them.
    """
    known = set(known_cases)
    problems = []
    for number, split in enumerate(splits, first):
        at = f"fold {number}"
        for side in ("train", "val"):
            if not split.get(side):
                problems.append(Problem(at, f"no {side} cases", "at least one"))
            for name in split.get(side, []):
                if name not in known:
                    problems.append(Problem(f"{at}, {side}", f"unknown case '{name}'{near(name, known)}"))
                elif table is not None and _lacks(table, name, supervision):
                    found = "has no tags" if supervision == TAGS else "is not labelled"
                    problems.append(Problem(f"{at}, {side}", f"'{name}' {found}", f"cases with {supervision} only"))
        train, val = set(split.get("train", [])), set(split.get("val", []))
        if split.get(VALIDATES_ON) == TRAINING and train == val:
            continue
        problems += [Problem(at, f"'{name}' trains and validates") for name in sorted(train & val)]
        if table is not None and split.get(PATIENTS) != SHARED:
            both = {table.patient_of(name) for name in train - val} & {table.patient_of(name) for name in val - train}
            problems += [Problem(at, f"patient '{patient}' trains and validates") for patient in sorted(both)]
    return problems


def _lacks(table: CaseTable, name: str, supervision: str) -> bool:
    case = table.cases.get(name, Case())
    return not {MASKS: case.labelled, TAGS: case.tags is not None, ANY: table.can_train(name)}[supervision]


def check_site(table: CaseTable, site: str, names: Sequence[str]) -> None:
    """Refuse a site that none of ``names`` comes from.

    Raises:
        UserError: no case of that site.
    """
    sites = {str(table.site_of(name)) for name in names if table.site_of(name) is not None}
    if site not in sites:
        raise UserError(f"No training case of site '{site}'{nearest(site, sites)}")


def _patients(table: CaseTable, names: Sequence[str]) -> dict[str, list[str]]:
    """Return patient to labelled cases, in the order of ``names``; to tagged ones where none is labelled."""
    labelled = [name for name in names if table.cases.get(name, Case()).labelled]
    groups: dict[str, list[str]] = {}
    for name in labelled or [name for name in names if table.can_train(name)]:
        groups.setdefault(table.patient_of(name), []).append(name)
    return groups
