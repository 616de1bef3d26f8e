"""The histology papers' numbers: one confusion matrix per site, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
from click.testing import CliRunner
from PIL import Image

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation import show
from nnunet_dgplugins.evaluation.dcam_protocol import COUNTS, case_counts, pooled, score
from nnunet_dgplugins.evaluation.evaluate import Dataset, Evaluation, evaluate
from nnunet_dgplugins.evaluation.tables import matrix, sites_table, to_json, write_csv

#: case: site, truth, prediction; 3 is excluded
PATCHES = {
    "B_1": ("B", [1, 1, 1, 1, 2, 3], [1, 1, 1, 2, 2, 1]),
    "B_2": ("B", [2, 2, 2, 3, 3, 3], [2, 1, 1, 1, 2, 2]),
    "C_1": ("C", [1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2]),
}


def make(root: Path, background: bool = False, labels: dict | None = None) -> Path:
    raw, predictions = root / "nnUNet_raw" / "Dataset501_Patches", root / "predictions"
    for case, (_, truth, guess) in PATCHES.items():
        for folder, values in ((raw / "labelsTs", truth), (predictions, guess)):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.array(values, np.uint8).reshape(2, 3)).save(folder / f"{case}.png")
    cases = {name: {"site": site, "patient": name, "labelled": True} for name, (site, *_) in PATCHES.items()}
    content = {
        "channel_names": {"0": "rgb_to_0_1"}, "file_ending": ".png", "numTraining": 0,
        "labels": labels or {"background": 0, "tumour": 1, "stroma": 2, "ignore": 3},
        "dgplugins": {"format": 1, "source": "A", "cases": cases, "protocol": {"background": background}},
    }  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(content))
    return predictions


@pytest.fixture
def result(nnunet_folders: Path) -> Evaluation:
    return evaluate(Dataset.load(501) if make(nnunet_folders) else None, nnunet_folders / "predictions",
                    protocol="dcam", jobs=1)  # fmt: skip


def number(result: Evaluation, name: str, metric: str) -> dict:
    return next(row for row in matrix(result) if (row["class"], row["metric"]) == (name, metric))


def test_the_numbers_of_a_site_are_those_of_all_its_pixels(result: Evaluation):
    # site B, 8 known pixels: tumour 3 right of 4, 5 predicted; stroma 2 right of 4, 3 predicted
    tumour, stroma = 3 / (4 + 5 - 3), 2 / (4 + 3 - 2)
    assert number(result, "tumour", "iou")["sites"]["B"] == {"mean": pytest.approx(tumour), "std": None, "n": 2}
    assert number(result, "stroma", "iou")["sites"]["B"]["mean"] == pytest.approx(stroma)
    for metric, value in (
        ("miou", (tumour + stroma) / 2), ("fwiou", (tumour + stroma) / 2), ("acc", 5 / 8),
        ("class_acc", (3 / 4 + 2 / 4) / 2),
    ):  # fmt: skip
        assert number(result, "all classes", metric)["sites"]["B"]["mean"] == pytest.approx(value), metric
        assert number(result, "all classes", metric)["sites"]["C"]["mean"] == 1.0
    whole = number(result, "all classes", "miou")
    assert whole["mean_of_sites"] == pytest.approx(((tumour + stroma) / 2 + 1) / 2)
    assert whole["pooled"]["mean"] == pytest.approx((5 / 8 + 6 / 9) / 2)  # tumour 5/(6+7-5), stroma 6/(8+7-6)
    assert whole["pooled"]["n"] == 3


def test_excluded_pixels_do_not_count_whatever_is_predicted_there(nnunet_folders: Path, result: Evaluation):
    before = sites_table(result)
    path = nnunet_folders / "predictions" / "B_2.png"
    changed = np.asarray(Image.open(path)).copy()
    changed[1] = [2, 1, 1]
    Image.fromarray(changed).save(path)
    again = evaluate(Dataset.load(501), path.parent, protocol="dcam", jobs=1)
    assert sites_table(again) == before


def test_background_is_a_class_where_the_dataset_says_so_and_a_miss_where_it_does_not():
    truth, guess = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 0]])
    tissue = case_counts(truth, guess, {"tumour": (1,)})
    assert list(tissue["tumour"].values()) == [1, 2, 1]  # one true pixel is predicted as nothing
    with_background = case_counts(truth, guess, {"background": (0,), "tumour": (1,)})
    assert list(with_background["background"].values()) == [1, 2, 2]
    assert list(with_background["tumour"].values()) == [1, 2, 2]


def test_a_dataset_with_background_counts_it(nnunet_folders: Path):
    predictions = make(nnunet_folders, background=True)
    found = evaluate(Dataset.load(501), predictions, protocol="dcam", jobs=1)
    assert set(found.table["class"]) == {"background", "tumour", "stroma"}


def test_regions_are_refused(nnunet_folders: Path):
    predictions = make(nnunet_folders, labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    with pytest.raises(UserError, match="not regions"):
        evaluate(Dataset.load(501), predictions, protocol="dcam", jobs=1)


def test_the_score_of_many_groups_is_that_of_each(result: Evaluation):
    parts = [part for _, part in result.table.groupby("case", sort=False)]
    counts = np.stack(
        [part.pivot_table(index="class", columns="metric", values="value", sort=False)[list(COUNTS)].to_numpy()
         for part in parts]
    )  # fmt: skip
    for metric in ("miou", "fwiou", "acc", "class_acc"):
        singly = [pooled(part)["all classes", metric] for part in parts]
        assert score(counts, metric).tolist() == pytest.approx(singly)


def test_csv_and_json_hold_the_counts_of_cases_and_the_numbers_of_sites(result: Evaluation, tmp_path: Path):
    write_csv(result, tmp_path / "values.csv")
    back = pandas.read_csv(tmp_path / "values.csv")
    assert back.columns.tolist() == ["case", "site", "patient", "class", "metric", "value"]
    counts, sites = back[back["case"].notna()], back[back["case"].isna()]
    assert len(counts) == 3 * 2 * 3
    assert len(sites) == 2 * (4 + 2)
    assert sites[(sites["site"] == "C") & (sites["metric"] == "miou")]["value"].tolist() == [1.0]
    content = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert list(content["metrics"]) == ["miou", "fwiou", "acc", "class_acc", "iou"]
    assert content["cases"][0]["metrics"] == {"pixels_right": 3.0, "pixels_truth": 4.0, "pixels_predicted": 3.0}
    assert {item["metric"] for item in content["sites"]} == set(content["metrics"])


def test_the_definition_stands_beside_the_numbers(result: Evaluation, capsys: pytest.CaptureFixture[str]):
    show.show(result)
    text = capsys.readouterr().out
    for part in ("mIoU, all pixels of a site's patches", "0.450", "2 patches", "mIoU: one confusion matrix", "ignored",
                 "FwIoU: mean of IoU weighted", "Not averages over patches"):  # fmt: skip
        assert part in text, part
    assert "±" not in text


def test_the_command_takes_the_protocol(nnunet_folders: Path, tmp_path: Path):
    predictions = make(nnunet_folders)
    words = ["evaluate", "501", str(predictions), "--protocol", "dcam", "--json", "--csv", str(tmp_path / "out.csv")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["protocol"] == "dcam"
    assert (tmp_path / "out.csv").is_file()
