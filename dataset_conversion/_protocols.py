"""Ways to split the source cases: which validate, and which are kept aside for testing.

Each takes the case table and the source cases in the source's own order, and returns test cases and folds.
"""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_dgplugins.data import splits
from nnunet_dgplugins.data.case_table import CaseTable

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


PROTOCOLS = {"kfold": five_fold, "labelled": every_labelled_case, "desam": desam, "published": cross_modality}
