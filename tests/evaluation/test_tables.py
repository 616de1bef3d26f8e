"""Per-site numbers by hand, the JSON schema, CSV."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
from made_dataset import bar, evaluated, make, write

from nnunet_dgplugins.evaluation import show
from nnunet_dgplugins.evaluation.evaluate import COLUMNS, Dataset, Evaluation, evaluate
from nnunet_dgplugins.evaluation.tables import (
    MEAN_OF_CLASSES,
    described,
    matrix,
    sites_table,
    summary,
    target_sites,
    to_json,
    write_csv,
)


@pytest.fixture
def result(nnunet_folders: Path) -> Evaluation:
    return evaluated(nnunet_folders)


def _dice_row(result: Evaluation, name: str = "prostate") -> dict:
    return next(row for row in matrix(result) if row["metric"] == "dice" and row["class"] == name)


def test_the_source_target_row_is_what_one_computes_by_hand(result: Evaluation):
    row = _dice_row(result)
    assert row["source"] == "RUNMC"
    # A: 0.9, 0.7; B: 0.6; C: 0.2, 0.4, 0.6
    assert row["sites"]["A"] == {"mean": pytest.approx(0.8), "std": pytest.approx(np.sqrt(0.02)), "n": 2}
    assert row["sites"]["B"] == {"mean": pytest.approx(0.6), "std": None, "n": 1}
    assert row["sites"]["C"] == {"mean": pytest.approx(0.4), "std": pytest.approx(0.2), "n": 3}
    assert row["mean_of_sites"] == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert row["pooled"]["mean"] == pytest.approx((0.9 + 0.7 + 0.6 + 0.2 + 0.4 + 0.6) / 6)
    assert row["pooled"]["n"] == 6


def test_source_cases_are_shown_but_are_no_unseen_site(nnunet_folders: Path):
    result = evaluated(nnunet_folders, source="B")
    assert target_sites(result) == ["A", "C"]
    row = _dice_row(result)
    assert row["mean_of_sites"] == pytest.approx(0.6)
    assert row["pooled"]["n"] == 5
    roles = {item["site"]: item["role"] for item in sites_table(result)}
    assert roles == {"A": "target", "B": "source", "C": "target"}


def test_several_classes_get_a_mean_of_classes(nnunet_folders: Path):
    predictions = make(nnunet_folders, labels={"background": 0, "gland": [1, 2], "zone": 2})
    result = evaluate(Dataset.load(501), predictions, jobs=1)
    # the zone occurs nowhere: undefined, and the mean of classes is that of the gland
    assert _dice_row(result, "zone")["pooled"] == {"mean": None, "std": None, "n": 0}
    assert _dice_row(result, "mean of classes")["mean_of_sites"] == pytest.approx(0.6)
    raw = nnunet_folders / "nnUNet_raw/Dataset501_Bars/labelsTs"
    both = bar(2)
    both[:, :, 2:7] *= 2
    for folder in (raw, predictions):
        write(both, folder / "B_1.nii.gz")
    wrong = np.where(both == 2, 1, both)
    write(wrong.astype(np.uint8), predictions / "B_1.nii.gz")
    row = _dice_row(evaluate(Dataset.load(501), predictions, jobs=1), "mean of classes")
    assert row["sites"]["B"]["mean"] == pytest.approx((1.0 + 0.0) / 2)


def test_undefined_values_do_not_count():
    table = pandas.DataFrame({"site": ["A", "A", "B"], "value": [0.5, np.nan, np.nan]})
    found = summary(table, ["site"]).set_index("site")
    assert found.loc["A", "n"] == 1
    assert found.loc["A", "mean"] == 0.5
    assert found.loc["B", "n"] == 0
    assert np.isnan(found.loc["B", "mean"])


def test_the_json_schema_is_stable(result: Evaluation):
    content = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert list(content) == [
        "format", "dataset", "source", "targets", "predictions", "labels", "protocol", "metrics", "matrix", "sites",
        "cases", "notes", "doubt",
    ]  # fmt: skip
    assert content["format"] == 1
    assert content["targets"] == ["A", "B", "C"]
    assert list(content["metrics"]) == [
        "dice", "hd95", "assd", "nsd", "volume_error_ml", "volume_error_relative", "reference_ml", "prediction_ml",
    ]  # fmt: skip
    assert list(content["metrics"]["hd95"]) == ["title", "unit", "better", "definition"]
    assert list(content["matrix"][0]) == ["source", "class", "metric", "sites", "mean_of_sites", "pooled"]
    assert list(content["sites"][0]) == ["site", "role", "class", "metric", "mean", "std", "n"]
    assert list(content["cases"][0]) == ["case", "site", "patient", "class", "metrics"]
    assert content["cases"][0]["metrics"]["dice"] == pytest.approx(0.9)
    assert content["doubt"] is None


def test_the_json_of_samsdg_has_one_entry_per_canvas(nnunet_folders: Path):
    result = evaluated(nnunet_folders, protocol="samsdg")
    content = to_json(result)
    assert [(item["site"], item["case"]) for item in content["cases"]][:3] == [
        ("A", "canvas 001"), ("A", "canvas 002"), ("B", "canvas 001"),
    ]  # fmt: skip
    assert content["cases"][0]["patient"] is None


def test_the_mean_of_classes_of_canvases_is_that_of_the_classes_means():
    rows = [("organ", 0.8)] * 10 + [("lesion", 0.2)] * 2
    canvases = pandas.DataFrame(
        [(f"canvas {n % 10:03d}", "A", None, name, "dice_samsdg", value) for n, (name, value) in enumerate(rows)],
        columns=COLUMNS,
    )
    assert described(canvases, "samsdg")[MEAN_OF_CLASSES, "dice_samsdg"]["mean"] == pytest.approx(0.5)


def test_the_csv_is_tidy_and_reads_back(result: Evaluation, tmp_path: Path):
    write_csv(result, tmp_path / "sub" / "values.csv")
    back = pandas.read_csv(tmp_path / "sub" / "values.csv")
    assert back.columns.tolist() == ["case", "site", "patient", "class", "metric", "value"]
    assert len(back) == 6 * 8
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["values.csv"]


def test_the_printed_table_names_source_and_every_target(result: Evaluation, capsys: pytest.CaptureFixture[str]):
    show.show(result)
    text = capsys.readouterr().out
    for part in ("RUNMC", "0.800 ± 0.141", "0.600", "0.400 ± 0.200", "mean of sites", "pooled", "3 cases", "C_3"):
        assert part in text, part
    for line in ("Dice: 2|P∩R|", "HD95, mm:", "NSD 1 mm:", "Empty masks:"):
        assert line in text, line
    assert max(map(len, text.splitlines()[1:])) <= show.WIDTH  # the first line names folders


def test_many_cases_are_cut_to_the_lowest(nnunet_folders: Path, capsys: pytest.CaptureFixture[str]):
    cases = {f"A_{number:02d}": ("A", 1 + number % 9) for number in range(30)}
    result = evaluated(nnunet_folders, cases=cases)
    show.show(result)
    text = capsys.readouterr().out
    assert "The 8 lowest" in text
    assert "A_00" in text
    assert "A_08" not in text
    show.show(result, all_cases=True)
    assert "A_08" in capsys.readouterr().out
