"""docs/support.md says of every trainer what works, and names a test for it."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_dgplugins.registry import TRAINERS

HERE = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (HERE.parent.parent / "docs" / "support.md").read_text().splitlines()
    if line.startswith("| ")
]
VALUES = re.compile(r"works(, without effect|, not yet run on a GPU)?|refused")


def test_every_trainer_has_a_column():
    assert set(ROWS[0][1:-1]) == set(TRAINERS)


def test_every_cell_is_one_of_the_known_values():
    assert [cell for row in ROWS[1:] for cell in row[1:-1] if not VALUES.fullmatch(cell)] == []


def test_every_row_names_a_test_that_runs_for_every_trainer():
    for row in ROWS[1:]:
        name = row[-1].strip("`")
        (source,) = [path.read_text() for path in HERE.glob("test_*.py") if f"def {name}(" in path.read_text()]
        signature = source.split(f"def {name}(")[1].split(")")[0]
        assert "trainer: str" in signature, name


def test_every_test_of_the_features_is_in_the_table():
    names = set(re.findall(r"^def (test_\w+)\(", (HERE / "test_desam_features.py").read_text(), re.MULTILINE))
    assert names - {row[-1].strip("`") for row in ROWS} <= {
        "test_continuing_without_a_checkpoint_starts_as_a_fresh_run_would"
    }
