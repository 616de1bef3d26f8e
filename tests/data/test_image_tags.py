from __future__ import annotations

import pytest

from nnunet_dgplugins.data.case_table import Case, CaseTable
from nnunet_dgplugins.data.tags import image_tags
from nnunet_dgplugins.errors import BadInput, UserError

LABELS = {"background": 0, "tumour": 1, "stroma": 2, "ignore": 3}


def described(tags: object) -> dict:
    return {"labels": LABELS, "dgplugins": {"format": 1, "cases": {"a": {"labelled": False, "tags": tags}}}}


def test_the_tags_of_a_picture_are_one_entry_with_a_number_per_class() -> None:
    table = CaseTable.from_dataset_json(described([[1, 0]]))
    assert table is not None
    assert image_tags(table, "a", 2).tolist() == [1, 0]
    assert image_tags(CaseTable({"a": Case(tags=[1])}), "a", 1).tolist() == [1]


@pytest.mark.parametrize("tags", [None, [[1, 0, 0]], [[1, 0], [0, 1]], [[2, 0]], [1]])
def test_other_tags_are_refused_with_the_case(tags: list | None) -> None:
    with pytest.raises(UserError, match="a: expected one entry in the case table with 0 or 1 for each of 2 classes"):
        image_tags(CaseTable({"a": Case(tags=tags)}), "a", 2)


@pytest.mark.parametrize("tags", [[[1, 0, 0]], [[1, 2]], [[1, 0], [1]]])
def test_a_table_with_another_number_of_classes_cannot_be_read(tags: list) -> None:
    with pytest.raises(BadInput, match="for each slice 0 or 1 for each of 2 classes"):
        CaseTable.from_dataset_json(described(tags))


def test_tags_by_slice_are_read_as_before() -> None:
    table = CaseTable.from_dataset_json(described([0, 1, 1]))
    assert table is not None
    assert table.cases["a"].tags == [0, 1, 1]
