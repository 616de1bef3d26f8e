"""Ways to split the source cases: which validate, and which are kept aside for testing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nnunet_dgplugins.data import splits
from nnunet_dgplugins.data.case_table import CaseTable


@dataclass(frozen=True)
class Protocol:
    """One way to split.

    Args:
        folds: table and training cases in the source's own order to folds; empty if there is a single patient.
        held_out: source cases in their own order to those that become test cases.
    """

    folds: Callable[[CaseTable, Sequence[str]], list[splits.Split]]
    held_out: Callable[[Sequence[str]], Sequence[str]] = lambda names: ()


def _k_fold(table: CaseTable, names: Sequence[str]) -> list[splits.Split]:
    patients = len({table.patient_of(name) for name in names})
    return splits.k_fold(table, names, min(5, patients)) if patients > 1 else []


def _cross_modality_counts(count: int) -> tuple[int, int]:
    """Return how many sorted cases test and validate in the published cross-modality code (the rest trains)."""
    train, val = round(0.7 * count), int(0.1 * count)
    return count - train - val, val


def _cross_modality_held_out(names: Sequence[str]) -> Sequence[str]:
    return names[: _cross_modality_counts(len(names))[0]]


def _cross_modality_folds(table: CaseTable, names: Sequence[str]) -> list[splits.Split]:
    # names are what is left without the test cases, so the number of all cases is recovered by counting up
    total = next(n for n in range(len(names), 2 * len(names) + 2) if n - _cross_modality_counts(n)[0] == len(names))
    val = _cross_modality_counts(total)[1]
    if not 0 < val < len(names):
        return _k_fold(table, names)
    return [{"train": list(names[val:]), "val": list(names[:val])}]


PROTOCOLS = {
    "kfold": Protocol(_k_fold),
    "desam": Protocol(splits.first_fraction),
    "published": Protocol(_cross_modality_folds, _cross_modality_held_out),
}
