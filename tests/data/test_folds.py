"""Folds as trainers read them: never a target site, never half a patient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_dgplugins.data.case_table import Case, CaseTable
from nnunet_dgplugins.data.folds import load_fold
from nnunet_dgplugins.errors import BadInput
from nnunet_dgplugins.files import read_json

NAMES = [f"{site}{number}" for site in "AB" for number in range(6)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    data = tmp_path / "Dataset520_Test" / "nnUNetPlans_2d"
    data.mkdir(parents=True)
    for name in NAMES:
        (data / f"{name}.pkl").touch()
    return data.parent


def _table(source: str | None) -> CaseTable:
    return CaseTable({name: Case(site=name[0], patient=str(int(name[1]) // 2)) for name in NAMES}, source=source)


@pytest.mark.parametrize("fold", [0, 2, "all"])
def test_only_the_source_is_trained_and_validated_on(base: Path, fold: int | str):
    table = CaseTable({name: Case(site=name[0]) for name in NAMES}, source="A")
    train, val, _ = load_fold(base, base / "nnUNetPlans_2d", fold, table)
    assert {name[0] for name in train + val} == {"A"}


def test_without_a_source_every_site_is_used(base: Path):
    train, val, _ = load_fold(base, base / "nnUNetPlans_2d", 0, _table(None))
    assert {name[0] for name in train + val} == {"A", "B"}


def test_a_list_that_parts_a_patient_is_refused(base: Path):
    (base / "splits_final.json").write_text(json.dumps([{"train": ["A0", "A2"], "val": ["A1"]}]))
    with pytest.raises(BadInput, match="patient 'A/0' trains and validates"):
        load_fold(base, base / "nnUNetPlans_2d", 0, _table("A"))


def test_a_fold_may_validate_on_its_training_cases_when_it_says_so(base: Path):
    fold = {"train": ["A0", "A2"], "val": ["A0", "A2"]}
    (base / "splits_final.json").write_text(json.dumps([fold, {**fold, "validates_on": "training cases"}]))
    with pytest.raises(BadInput, match="'A0' trains and validates"):
        load_fold(base, base / "nnUNetPlans_2d", 0, _table("A"))
    assert load_fold(base, base / "nnUNetPlans_2d", 1, _table("A"))[:2] == (["A0", "A2"], ["A0", "A2"])


@pytest.mark.parametrize("fold", [0, "all"])
def test_a_trainer_of_tags_takes_tagged_cases_and_no_other_trainer_does(base: Path, fold: int | str):
    cases = {name: Case(labelled=False, tags=[0, 1]) for name in NAMES}
    (base / "splits_final.json").write_text(json.dumps([{"train": NAMES[1:], "val": NAMES[:1]}]))
    folder = base / "nnUNetPlans_2d"
    train, val, _ = load_fold(base, folder, fold, CaseTable(cases), tags=True)
    assert sorted({*train, *val}) == NAMES
    without = {**cases, "A3": Case()}
    if fold == "all":
        assert "A3" not in load_fold(base, folder, fold, CaseTable(without), tags=True)[0]
        assert load_fold(base, folder, fold, CaseTable(without))[0] == ["A3"]
        return
    with pytest.raises(BadInput, match="'A3' has no tags"):
        load_fold(base, folder, fold, CaseTable(without), tags=True)
    with pytest.raises(BadInput, match="'A0' is not labelled"):
        load_fold(base, folder, fold, CaseTable(without))


def test_tagged_cases_are_split_by_patient_where_no_list_is_there(base: Path):
    cases = {name: Case(labelled=False, tags=[0, 1]) for name in NAMES}
    train, val, _ = load_fold(base, base / "nnUNetPlans_2d", 0, CaseTable(cases), tags=True)
    assert sorted([*train, *val]) == NAMES
    assert len(read_json(base / "splits_final.json")) == 5


def test_a_fold_that_says_so_must_have_the_same_cases_on_both_sides(base: Path):
    fold = {"train": ["A0", "A2"], "val": ["A0"], "validates_on": "training cases"}
    (base / "splits_final.json").write_text(json.dumps([fold]))
    with pytest.raises(BadInput, match="'A0' trains and validates"):
        load_fold(base, base / "nnUNetPlans_2d", 0, _table("A"))
