from __future__ import annotations

import pytest

from nnunet_dgplugins.data.case_table import Case, CaseTable
from nnunet_dgplugins.data.splits import check, first_fraction, k_fold, leave_one_site_out, single_source
from nnunet_dgplugins.errors import UserError


def make(**sites: int) -> CaseTable:
    """Each patient has two frames."""
    return CaseTable(
        {f"{s}{p}_{f}": Case(site=s, patient=f"p{p}") for s, n in sites.items() for p in range(n) for f in range(2)}
    )


def patients(table: CaseTable, names: list[str]) -> set[str]:
    return {table.patient_of(name) for name in names}


def test_frames_of_one_patient_stay_together() -> None:
    table = make(A=7, B=4)
    for fold in k_fold(table, list(table.cases), 5):
        assert not patients(table, fold["train"]) & patients(table, fold["val"])
        assert sorted(fold["train"] + fold["val"]) == sorted(table.cases)


def test_every_patient_validates_exactly_once() -> None:
    table = make(A=7, B=4)
    validated = [name for fold in k_fold(table, list(table.cases), 5) for name in fold["val"]]
    assert sorted(validated) == sorted(table.cases)


def test_each_site_is_spread_evenly_over_the_folds() -> None:
    table = make(A=10, B=5)
    for fold in k_fold(table, list(table.cases), 5):
        assert [sum(name.startswith(site) for name in fold["val"]) for site in "AB"] == [4, 2]


def test_fold_sizes_differ_by_one_patient_at_most() -> None:
    table = make(A=3, B=3, C=3, D=2)
    sizes = [len(patients(table, fold["val"])) for fold in k_fold(table, list(table.cases), 4)]
    assert max(sizes) - min(sizes) <= 1


def test_the_same_number_in_two_hospitals_is_two_patients() -> None:
    table = make(A=1, B=1)
    assert len(k_fold(table, list(table.cases), 2)) == 2


def test_the_seed_decides_and_the_order_of_names_does_not_change_who_stays_together() -> None:
    table = make(A=9)
    names = list(table.cases)
    assert k_fold(table, names, 3, seed=1) == k_fold(table, names, 3, seed=1)
    assert k_fold(table, names, 3, seed=1) != k_fold(table, names, 3, seed=2)


def test_the_default_folds_never_change_between_versions() -> None:
    table = CaseTable({f"c{number}": Case(site="A") for number in range(6)})
    assert [fold["val"] for fold in k_fold(table, list(table.cases), 3)] == [["c0", "c5"], ["c1", "c3"], ["c2", "c4"]]


def test_unlabelled_cases_are_never_listed() -> None:
    cases = dict(make(A=6).cases)
    cases["A0_0"] = Case(site="A", patient="p0", labelled=False)
    table = CaseTable(cases)
    for folds in (
        k_fold(table, list(cases), 5),
        single_source(table, "A", list(cases)),
        first_fraction(table, list(cases)),
    ):
        assert all("A0_0" not in fold["train"] + fold["val"] for fold in folds)


def test_cases_the_table_does_not_know_are_patients_of_their_own() -> None:
    assert len(k_fold(CaseTable(), ["x", "y", "z"], 3)) == 3


def test_a_single_source_leaves_every_other_site_alone() -> None:
    table = make(A=5, B=5)
    for fold in single_source(table, "A", list(table.cases)):
        assert {name[0] for name in fold["train"] + fold["val"]} == {"A"}
        assert fold["source"] == "A"


def test_leaving_one_site_out_validates_on_the_sites_that_train() -> None:
    table = make(A=5, B=5, C=5)
    folds = leave_one_site_out(table, list(table.cases))
    assert [fold["held_out"] for fold in folds] == ["A", "B", "C"]
    for fold in folds:
        rest = {"A", "B", "C"} - {fold["held_out"]}
        assert {name[0] for name in fold["train"]} == {name[0] for name in fold["val"]} == rest


def test_the_published_first_nine_tenths_are_kept_in_order() -> None:
    table = CaseTable()
    names = [f"{number:02d}" for number in range(30)]
    assert first_fraction(table, names) == [{"train": names[:27], "val": names[27:]}]
    two_frames = make(A=5)
    (fold,) = first_fraction(two_frames, list(two_frames.cases), 0.7)  # the seventh case is a patient's first
    assert (len(fold["train"]), len(fold["val"])) == (8, 2)
    (fold,) = first_fraction(two_frames, list(two_frames.cases))  # the last patient is not taken from validation
    assert (len(fold["train"]), len(fold["val"])) == (8, 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t: k_fold(t, list(t.cases), 6), "there are 5"),
        (lambda t: k_fold(t, list(t.cases), 1), "at least 2"),
        (lambda t: single_source(t, "AB", list(t.cases)), "did you mean"),
        (lambda t: leave_one_site_out(t, list(t.cases)), "needs two sites"),
        (lambda t: first_fraction(t, ["A0_0"]), "too few"),
    ],
)
def test_impossible_requests_are_refused(call: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(make(A=5))  # type: ignore[operator]


def test_checking_finds_every_fault_at_once() -> None:
    cases = dict(make(A=3).cases)
    cases["A2_0"] = Case(site="A", patient="p2", labelled=False)
    table = CaseTable(cases)
    known = list(cases)
    faults = check(
        [
            {"train": ["A0_0", "A1_0"], "val": ["A0_1"]},
            {"train": ["A0_0", "A2_0"], "val": ["A0_0", "nobody"]},
            {"train": ["A0_0"], "val": []},
        ],
        table,
        known,
    )
    text = "\n".join(map(str, faults))
    for part in (
        "fold 0: patient 'A/p0' trains and validates",
        "fold 1, train: 'A2_0' is not labelled",
        "fold 1, val: unknown case 'nobody'",
        "fold 1: 'A0_0' trains and validates",
        "fold 2: no val cases",
    ):
        assert part in text
    assert len(faults) == 5


def test_good_folds_have_no_faults() -> None:
    table = make(A=6, B=6)
    assert check(leave_one_site_out(table, list(table.cases)), table, table.cases) == []
