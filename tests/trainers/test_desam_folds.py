"""Folds are read strictly: what does not exist is an error, and unlabelled cases are never drawn."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import World
from tiny_dataset import Recipe

from nnunet_dgplugins.data.case_table import Case, CaseTable
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.files import read_json

CASES = [f"case_{number}" for number in range(5)]


@pytest.fixture
def own(world: World) -> World:
    """The dataset as nnU-Net leaves it: no list of folds yet."""
    world.use(Recipe(), own=True)
    (world.preprocessed / "splits_final.json").unlink(missing_ok=True)
    return world


def annotate(world: World, **cases: Case) -> None:
    world.edit_json("dataset.json", lambda content: content.update(dgplugins=CaseTable(cases).to_dict()))


def drawn(world: World, **options: Any) -> set[str]:
    """Cases of all training and validation batches."""
    trainer = world.construct(**options)
    seen: set[str] = set()
    for name in ("train_step", "validation_step"):
        step = getattr(trainer, name)
        setattr(trainer, name, lambda batch, step=step: seen.update(key.case for key in batch["keys"]) or step(batch))
    trainer.run_training()
    return seen


def test_a_fold_beyond_the_list_is_refused_before_anything_is_written(own: World):
    own.write_splits([{"train": CASES[1:], "val": CASES[:1]}])
    with pytest.raises(UserError, match=r"Fold 1 does not exist: .*splits_final.json has 1 \(0 to 0\)"):
        own.construct(fold=1)
    assert not list(own.results.iterdir())


def test_without_a_list_a_sixth_fold_is_refused_before_anything_is_written(own: World):
    with pytest.raises(UserError, match=r"Fold 5 does not exist"):
        own.construct(fold=5)
    assert not list(own.results.iterdir())
    assert not (own.preprocessed / "splits_final.json").exists()


def test_an_unknown_case_and_one_on_both_sides_are_reported_together(own: World):
    own.write_splits([{"train": ["case_0", "case_77"], "val": ["case_0"]}])
    with pytest.raises(BadInput) as caught:
        own.train()
    assert len(caught.value.problems) == 2
    assert "unknown case 'case_77'" in str(caught.value)
    assert "'case_0' trains and validates" in str(caught.value)


def test_a_fold_without_validation_cases_is_refused(own: World):
    own.write_splits([{"train": CASES[1:], "val": CASES[:1]}, {"train": CASES, "val": []}])
    with pytest.raises(BadInput, match="fold 1: no val cases"):
        own.train(fold=1)


def test_unlabelled_cases_are_in_no_new_fold_and_never_drawn(own: World):
    annotate(own, **{name: Case(labelled=name != "case_1") for name in CASES})
    with pytest.raises(UserError, match="5 folds need 5 labelled patients, there are 4"):
        own.train()
    own.settings(iterations_per_epoch=None)
    assert drawn(own, fold="all") == {"case_0", "case_2", "case_3", "case_4"}


def test_a_list_that_names_an_unlabelled_case_is_refused(own: World):
    annotate(own, case_1=Case(labelled=False))
    own.write_splits([{"train": CASES[1:], "val": CASES[:1]}])
    with pytest.raises(BadInput, match="'case_1' is not labelled"):
        own.train()


def test_only_the_folds_own_cases_are_drawn(own: World):
    own.settings(iterations_per_epoch=None)
    own.write_splits([{"train": CASES[:2], "val": CASES[3:4]}])
    assert drawn(own) == {"case_0", "case_1", "case_3"}


def test_the_default_folds_without_a_table_are_nnunets(own: World):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    ours = own.construct()
    ours.initialize()
    found = ours.do_split()
    written = read_json(own.preprocessed / "splits_final.json")
    (own.preprocessed / "splits_final.json").unlink()
    ours.is_ddp = False
    expected = nnUNetTrainer.do_split(ours)
    assert read_json(own.preprocessed / "splits_final.json") == written
    assert ([*map(str, expected[0])], [*map(str, expected[1])]) == found


def test_the_default_folds_with_a_table_keep_patients_together(own: World):
    annotate(own, **{name: Case(patient="one" if name in CASES[:2] else name) for name in CASES})
    with pytest.raises(UserError, match="5 folds need 5 labelled patients, there are 4"):
        own.train()


def test_too_few_cases_for_the_default_folds_are_one_clear_error(own: World):
    for path in (own.preprocessed / "nnUNetPlans_2d").glob("case_4*"):
        path.unlink()
    with pytest.raises(UserError, match=r"5 folds need 5 cases, there are 4.*dgplugins splits"):
        own.train()
