"""docs/support.md says of every trainer what works, and names the tests for it, one per method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nnunet_dgplugins.registry import TRAINERS

HERE = Path(__file__).parent
SHARED = HERE / "test_support_features.py"  # of every trainer
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (HERE.parent.parent / "docs" / "support.md").read_text().splitlines()
    if line.startswith("| ")
]
STARTS = [number for number, row in enumerate(ROWS) if row[0] == "Feature"]
TABLES = [ROWS[start:stop] for start, stop in zip(STARTS, [*STARTS[1:], len(ROWS)], strict=True)]
VALUES = re.compile(r"works(, without effect|, not yet run on a GPU)?|refused|stops")
METHODS = sorted({info.module.rpartition(".")[2] for info in TRAINERS.values()})


def named(row: list[str]) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", row[-1]))


def test_every_trainer_has_a_column():
    assert [name for table in TABLES for name in table[0][1:-1]] == list(TRAINERS)


def test_every_cell_is_one_of_the_known_values():
    assert [c for table in TABLES for row in table[1:] for c in row[1:-1] if not VALUES.fullmatch(c)] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_row_names_one_test_of_every_method_that_runs_for_all_its_trainers(method: str):
    sources = [path.read_text() for path in (*HERE.glob(f"test_{method}_*.py"), SHARED)]
    trainers = {name for name, info in TRAINERS.items() if info.module.endswith(f".{method}")}
    several = len(trainers) > 1
    (table,) = [table for table in TABLES if trainers <= {*table[0]}]
    for row in table[1:]:
        found = re.findall(rf"^def ({'|'.join(named(row))})\((.*?)\)", "\n".join(sources), re.MULTILINE | re.DOTALL)
        assert len(found) == 1, (method, row[0], found)
        assert "trainer: str" in found[0][1] or not several, row[0]


def test_every_name_is_a_test():
    source = "\n".join(path.read_text() for path in HERE.glob("test_*.py"))
    assert {name for row in ROWS for name in named(row) if f"def {name}(" not in source} == set()


@pytest.mark.parametrize("method", [*METHODS, "support"])
def test_every_test_of_the_features_is_in_the_table(method: str):
    names = set(re.findall(r"^def (test_\w+)\(", (HERE / f"test_{method}_features.py").read_text(), re.MULTILINE))
    assert names - {name for row in ROWS for name in named(row)} <= {
        "test_a_bundled_encoder_travels_in_a_zip_to_an_empty_results_folder",
        "test_continuing_without_a_checkpoint_starts_as_a_fresh_run_would",
        "test_a_training_begins_with_its_start_weights_or_not_at_all_and_goes_on_without_the_file",
        "test_pretrained_weights_win_over_start_weights",
        "test_start_weights_reach_both_networks_and_what_fits_is_said",
        "test_deeplab_trains_and_is_rebuilt_by_the_predictor_from_the_plans",
        "test_deeplab_in_3d_and_a_batch_of_one_are_refused",
    }
