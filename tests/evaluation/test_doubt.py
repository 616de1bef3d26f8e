"""The ranking by doubt and its rank correlation with Dice."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest

from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.evaluation import show
from nnunet_dgplugins.evaluation.doubt import FILE, Doubt, rank_correlation, read_doubt, to_json


def _doubts(**values: float) -> list[Doubt]:
    return [Doubt(case, value, {}, []) for case, value in values.items()]


def _table(**dice: float) -> pandas.DataFrame:
    rows = [{"case": case, "class": "organ", "metric": "dice", "value": value} for case, value in dice.items()]
    return pandas.DataFrame(rows)


def test_the_most_doubtful_case_comes_first_and_ties_by_name(tmp_path: Path):
    content = {
        "b": {"doubt": 0.4, "per_class": {"organ": 0.4}, "slices": [0.1, None, 0.9, 0.9]},
        "c": {"doubt": 0.7},
        "a": {"doubt": 0.4},
    }
    (tmp_path / FILE).write_text(json.dumps(content))
    found = read_doubt(tmp_path)
    assert [item.case for item in found] == ["c", "a", "b"]
    assert found[2].worst_slice == 2
    assert found[0].worst_slice is None


def test_a_missing_file_names_the_option_that_writes_it(tmp_path: Path):
    with pytest.raises(UserError, match="--model") as caught:
        read_doubt(tmp_path)
    assert "DeSAM" not in str(caught.value)  # other trainers doubt too


@pytest.mark.parametrize("value", [1.5, -0.1, "high", None, True])
def test_a_doubt_outside_of_0_to_1_is_refused(tmp_path: Path, value: object):
    (tmp_path / FILE).write_text(json.dumps({"a": {"doubt": value}, "b": {"doubt": 0.1}}))
    with pytest.raises(BadInput, match="case a: doubt"):
        read_doubt(tmp_path)


def test_doubt_that_falls_with_dice_is_a_perfect_ranking():
    found = rank_correlation(_doubts(a=0.9, b=0.5, c=0.4, d=0.1), _table(a=0.2, b=0.5, c=0.6, d=0.95))
    assert found.rho == pytest.approx(-1.0)
    assert found.n == 4


def test_the_rank_correlation_is_the_one_computed_by_hand():
    # ranks of doubt 4 3 2 1, of Dice 1 3 2 4: differences 3 0 0 3, rho = 1 - 6 * 18 / (4 * 15)
    found = rank_correlation(_doubts(a=0.9, b=0.5, c=0.4, d=0.1), _table(a=0.2, b=0.7, c=0.6, d=0.95))
    assert found.rho == pytest.approx(1 - 6 * 18 / 60)


def test_cases_without_label_or_without_defined_dice_do_not_count():
    found = rank_correlation(_doubts(a=0.9, b=0.5, c=0.4, d=0.1, e=0.0), _table(a=0.2, b=0.5, c=float("nan"), d=0.9))
    assert found.n == 3


def test_two_cases_and_constant_doubt_have_no_correlation():
    assert rank_correlation(_doubts(a=0.9, b=0.5), _table(a=0.2, b=0.5)).rho is None
    assert rank_correlation(_doubts(a=0.5, b=0.5, c=0.5), _table(a=0.2, b=0.5, c=0.6)).rho is None


def test_the_ranking_is_printed_and_given_as_json(capsys: pytest.CaptureFixture[str]):
    doubts = [Doubt("first", 0.8, {"x": 0.8, "y": 0.1}, [0.2, 0.9]), Doubt("second", 0.1, {"x": 0.1, "y": 0.0}, [])]
    correlation = rank_correlation(doubts, _table(first=0.1, second=0.9))
    show.show_doubt(doubts, correlation)
    text = capsys.readouterr().out
    assert "Look at these first" in text
    assert text.index("first ") < text.index("second")
    assert "not defined (n = 2)" in text
    content = json.loads(json.dumps(to_json(doubts, correlation), allow_nan=False))
    assert [item["rank"] for item in content["ranking"]] == [1, 2]
    assert content["ranking"][0]["worst_slice"] == 1
    assert content["rank_correlation_with_dice"] == {"rho": None, "p_value": None, "n": 2}
