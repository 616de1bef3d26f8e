"""Statistics of compared methods, held against hand-made numbers and other libraries."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from scipy.stats import wilcoxon

from nnunet_dgplugins.evaluation.comparison import (
    COLUMNS,
    by_class,
    cell,
    differences,
    gain_text,
    holm,
    intervals,
    matrix,
    paired_tests,
    sites_of_one,
    told_apart,
    wins,
)


def table(gains: dict[str, list[float]], patients_of: int = 1, metric: str = "dice") -> pandas.DataFrame:
    """Stock has 0.5 everywhere; ``gains`` of each other method, one per patient, half of them at each site."""
    rows = []
    count = len(next(iter(gains.values())))
    for method, values in {"stock": [0.0] * count, **gains}.items():
        for patient, gain in enumerate(values):
            site = "B" if patient < count // 2 else "C"
            for case in range(patients_of):
                for seed, noise in ((0, -0.01), (1, 0.01)):
                    name = f"{site}{patient}_{case}"
                    rows.append((method, "d", "A", site, None, seed, name, f"{site}/{patient}", "organ", metric,
                                 0.5 + gain + noise, "unseen"))  # fmt: skip
    return pandas.DataFrame(rows, columns=[*COLUMNS, "split"])


def test_holm_steps_down_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_paired_test_counts_patients_and_is_corrected_for_the_number_of_methods():
    gains = {"ours": [0.1, 0.2, 0.15, 0.05, 0.3, 0.12, 0.11, -0.02], "other": [0.01, -0.01, 0.02, -0.02] * 2}
    found = paired_tests(table(gains, patients_of=3), "stock").set_index("method")
    raw = wilcoxon(gains["ours"]).pvalue
    assert found.loc["ours", "patients"] == 8  # not 24 cases
    assert found.loc["ours", "p"] == pytest.approx(raw)
    assert found.loc["ours", "p_holm"] == pytest.approx(2 * raw)
    assert found.loc["other", "p_holm"] == found.loc["other", "p"]


def test_methods_that_never_differ_have_p_1_not_an_error():
    (row,) = paired_tests(table({"same": [0.0] * 6}), "stock").to_dict("records")
    assert (row["p"], row["p_holm"]) == (1.0, 1.0)


def test_wins_are_counted_per_site_and_close_calls_are_level():
    found = wins(table({"ours": [0.1, 0.004, -0.1, 0.2]}), "stock").set_index("target")
    assert found.loc["B", ["ahead", "level", "behind"]].tolist() == [1, 1, 0]
    assert found.loc["C", ["ahead", "level", "behind"]].tolist() == [1, 0, 1]


def test_an_interval_holds_the_mean_and_widens_with_the_spread_of_patients():
    random = np.random.default_rng(0)
    narrow, wide = (list(random.normal(0, spread, 40)) for spread in (0.01, 0.1))
    found = intervals(table({"narrow": narrow, "wide": wide})).set_index(["method", "target"])
    ends = found.loc[("wide", "mean unseen")]
    middle = 0.5 + (np.mean(wide[:20]) + np.mean(wide[20:])) / 2
    assert ends["low"] < middle < ends["high"]
    # of a mean of 40: about 2 x 1.96 standard errors
    assert ends["high"] - ends["low"] == pytest.approx(2 * 1.96 * np.std(wide) / 40**0.5, rel=0.25)
    assert ends["high"] - ends["low"] > 5 * np.diff(found.loc[("narrow", "mean unseen"), ["low", "high"]])[0]
    assert found.loc[("stock", "B"), ["low", "high"]].tolist() == pytest.approx([0.5, 0.5])


def test_a_source_without_the_baseline_is_left_out_and_no_error():
    whole = table({"ours": [0.1] * 4})
    lone = whole[(whole["method"] == "ours")].assign(source="Z")
    both = pandas.concat([whole, lone], ignore_index=True)
    for function in (paired_tests, wins, differences):
        assert set(function(both, "stock")["source"]) == {"A"}
    assert set(intervals(both)["source"]) == {"A", "Z"}


def test_a_site_of_one_patient_has_no_interval_of_its_own():
    whole = table({"ours": [0.1, 0.2, 0.3, 0.4]}, patients_of=2)
    one = whole[whole["patient"] != "B/1"]
    assert sites_of_one(whole) == []
    assert sites_of_one(one) == ["B"]
    found = intervals(one).set_index(["method", "target"])
    assert ("ours", "B") not in found.index
    ends = found.loc[("ours", "mean unseen")]  # of what C's two patients differ
    assert (ends["low"], ends["high"]) == (pytest.approx(0.5 + (0.1 + 0.3) / 2), pytest.approx(0.5 + (0.1 + 0.4) / 2))
    alone = one[one["patient"] != "C/3"]
    assert intervals(alone).empty
    (row,) = differences(alone, "stock").to_dict("records")
    assert gain_text(row) == "+0.200"


def test_classes_are_told_apart_by_site_with_their_spread_over_seeds():
    organ = table({"ours": [0.1, 0.3, 0.2, 0.4]})
    both = pandas.concat([organ, organ.assign(**{"class": "lesion"}, value=organ["value"] - 0.2)], ignore_index=True)
    lines = by_class(both, ["dice"]).set_index(["method", "target", "class"])
    assert len(lines) == 2 * 2 * 2
    assert lines.loc[("ours", "B", "organ"), "mean"] == pytest.approx(0.7)
    assert lines.loc[("ours", "C", "lesion"), "mean"] == pytest.approx(0.6)
    assert lines.loc[("ours", "C", "lesion"), "sd"] == pytest.approx(0.02 / 2**0.5)
    assert set(lines["seeds"]) == {2}


def test_without_known_patients_there_is_a_difference_and_no_interval():
    canvases = table({"ours": [0.1, 0.3, 0.2, 0.2]}).assign(patient=None)
    (row,) = differences(canvases, "stock").to_dict("records")
    assert row["difference"] == pytest.approx(0.2)
    assert gain_text(row) == "+0.200"
    assert paired_tests(canvases, "stock").empty
    assert intervals(canvases).empty


def test_canvases_of_two_classes_count_by_class_and_not_by_their_number():
    rows = [
        (
            method,
            "d",
            "A",
            site,
            None,
            0,
            f"{name}, canvas {number:03d}",
            None,
            name,
            "dice_samsdg",
            value + gain,
            "unseen",
        )
        for method, gain in (("stock", 0.0), ("ours", 0.1))
        for site, name, count, value in (("B", "organ", 10, 0.8), ("B", "lesion", 2, 0.2), ("C", "organ", 5, 0.5))
        for number in range(count)
    ]
    canvases = pandas.DataFrame(rows, columns=[*COLUMNS, "split"])
    lines = matrix(canvases, "dice_samsdg").set_index(["method", "target"])
    assert lines.loc[("stock", "B"), "mean"] == pytest.approx(0.5)
    assert lines.loc[("stock", "mean unseen"), "mean"] == pytest.approx(0.5)
    assert lines.loc[("stock", "pooled unseen"), "mean"] == pytest.approx(((10 * 0.8 + 5 * 0.5) / 15 + 0.2) / 2)
    uneven = canvases.assign(value=canvases["value"].where(canvases["class"] != "lesion", 0.2))
    (row,) = differences(uneven, "stock", "dice_samsdg").to_dict("records")
    assert row["difference"] == pytest.approx((0.05 + 0.1) / 2)  # B: half of its classes; C
    assert row["cases"] == 17
    ahead = wins(uneven, "stock", "dice_samsdg").set_index("target")
    assert ahead.loc["B", ["ahead", "level", "behind"]].tolist() == [10, 2, 0]


def test_a_site_without_the_number_shows_a_dash():
    lines = table({"ours": [0.1, 0.3, 0.2, 0.4]})
    lines.loc[lines["target"] == "B", "value"] = float("nan")
    own = matrix(lines).query("method == 'ours'").set_index("target")
    assert cell(own, "B") == "-"
    assert cell(own, "C").startswith("0.800")


def test_own_cases_of_a_site_that_is_unseen_too_are_told_apart():
    whole = table({"ours": [0.1] * 4})
    own = whole.assign(split="validation", case=whole["case"] + "_own")
    apart = told_apart(pandas.concat([whole, own], ignore_index=True))
    lines = matrix(apart).set_index(["method", "target"])
    assert cell(lines.loc["ours"], "B") == "0.600 ± 0.014"
    assert cell(lines.loc["ours"], "B (validation)") == "(0.600 ± 0.014)"
    assert told_apart(own)["target"].tolist() == own["target"].tolist()


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_source_keeps_its_name_where_only_other_sources_have_it_unseen(ratio: float | None):
    one = table({"ours": [0.1] * 4}).assign(ratio=ratio)
    first = one.assign(split=one["target"].map({"B": "validation", "C": "unseen"}), source="B")
    second = one.assign(split=one["target"].map({"B": "unseen", "C": "validation"}), source="C")
    apart = told_apart(pandas.concat([first, second], ignore_index=True))
    assert set(apart["target"]) == {"B", "C"}
    lines = matrix(apart).set_index(["method", "source", "target"])["split"]
    assert lines.loc[("ours", "B", "B")] == lines.loc[("ours", "C", "C")] == "validation"
    assert lines.loc[("ours", "B", "C")] == lines.loc[("ours", "C", "B")] == "unseen"


def test_numbers_over_pixels_have_no_values_of_patients_to_test():
    pixels = table({"ours": [0.1] * 4}, metric="pixels_right")
    assert all(function(pixels, "stock", "miou").empty for function in (paired_tests, wins))
    assert intervals(pixels, "miou").empty
