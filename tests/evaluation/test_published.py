"""The published tables: complete, consistent with themselves, and refused when damaged."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.evaluation.evaluate import PROTOCOLS as EVALUATED
from nnunet_dgplugins.evaluation.published import COLUMNS, KEY, PROTOCOLS, UNITS, published, read_folder

FOLDER = Path(__file__).parents[2] / "docs" / "published"
SITES = ["RUNMC", "BMC", "I2CVB", "UCL", "BIDMC", "HK"]
METHODS = {
    "desam": {"DeSAM-P", "CSDG"},
    "samsdg": {
        *("ERM", "Cutout", "RSC", "MixStyle", "AdvBias", "RandConv", "CSDG", "ACSDG", "SAM-SDG"),
        *("SAM + ground-truth boxes", "SAM + full-tile boxes", "SAM + coarse boxes", "ResNet coarse masks"),
        *("SAM-SDG + reconstruction", "SAM, one slice resized to 1024", "SAM, box variant not recorded"),
    },
    "dcam": {"D-CAM"},
    "pistoseg": {"PistoSeg"},
    "esfan": {"ESFAN"},
    "wsss4luad": {"WSSS4LUAD challenge winner"},
    "ostrowski2023": {"WSS-CMER", "SEAM", "all-background predictor", "Ostrowski et al.", "fully supervised"},
    "epl": {"nnU-Net", "SDNet+Aug", "LDDG", "SAML", "Meta", "EPL"},
    "dgnet": {"Meta"},
}
# printed averages that are not the mean of their rows; README.md and their caveats say so
PRINTED_WRONG = {("Table 1", "LDDG"), ("Table 2", "LDDG"), ("reconstruct_results.txt", "SAM-SDG + reconstruction")}
ROUNDING = {"percent": 0.0101, "fraction": 0.000101}  # half a last digit for the mean, half for the rows


@pytest.fixture(scope="module")
def table() -> pandas.DataFrame:
    return read_folder(FOLDER)


@pytest.fixture
def lines() -> list[str]:
    return (FOLDER / "desam.csv").read_text(encoding="utf-8").splitlines()


def _refused(folder: Path, lines: list[str]) -> list[str]:
    """Return the problems of a folder with one good file and one of these lines."""
    (folder / "good.csv").write_bytes((FOLDER / "epl.csv").read_bytes())
    (folder / "tried.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_folder(folder)
    return [str(problem) for problem in caught.value.problems]


def _means(table: pandas.DataFrame, over: str) -> pandas.DataFrame:
    """Return the printed means over sources or targets beside mean and population sd of the rows they come from."""
    same = ["paper", "table", "dataset", "method", "setting", "class", "metric", "unit"]
    if over == "target":
        same.append("source")
    found = []
    for _, part in table[table[over] != ""].groupby(same, sort=False):
        printed, rows = part[part[over] == "mean"], part[part[over] != "mean"]
        if len(printed) and len(rows):
            assert len(printed) == 1
            computed = {"computed": rows["value"].mean(), "computed_sd": rows["value"].std(ddof=0), "rows": len(rows)}
            found.append({**printed.iloc[0], **computed})
    return pandas.DataFrame(found)


def test_there_is_one_file_for_each_method_with_all_columns_in_order():
    names = ["dcam.csv", "desam.csv", "epl.csv", "equivariant.csv", "samsdg.csv"]
    assert sorted(path.name for path in FOLDER.glob("*.csv")) == names
    for name in names:
        assert (FOLDER / name).read_text(encoding="utf-8").splitlines()[0] == ",".join(COLUMNS)


def test_values_are_numbers_in_their_unit_and_the_rest_is_text(table: pandas.DataFrame):
    assert list(table.columns) == COLUMNS
    assert table["value"].dtype == table["sd"].dtype == float
    assert table["value"].notna().all()
    for column in set(COLUMNS) - {"value", "sd"}:
        assert table[column].map(type).eq(str).all(), column
    percent = table["unit"] == "percent"
    assert table.loc[percent, "value"].between(1, 100).all()  # below 1 it would be a fraction with a wrong unit
    assert table.loc[~percent, "value"].between(0, 1).all()


def test_no_value_is_there_twice(table: pandas.DataFrame):
    assert not table.duplicated(KEY).any()


def test_every_value_says_why_it_may_not_be_comparable_and_where_it_stands(table: pandas.DataFrame):
    assert (table["caveat"].str.len() > 10).all()
    assert (table["where"].str.len() > 5).all()


def test_papers_methods_protocols_and_units_are_the_known_ones(table: pandas.DataFrame):
    assert {paper: set(part["method"]) for paper, part in table.groupby("paper")} == METHODS
    assert set(table["protocol"]) == set(PROTOCOLS) - {"standard"}
    assert set(table["unit"]) <= set(UNITS)


def test_every_protocol_of_evaluate_can_be_asked_for():
    for protocol in EVALUATED:
        assert set(published("Prostate", protocol)["protocol"]) <= {protocol}
    assert published("Prostate", "standard").empty


def test_prostate_sites_are_spelled_as_the_converters_spell_them(table: pandas.DataFrame):
    from dataset_conversion.Dataset501_ProstateSAML import FACTS

    sites = {site.name for site in FACTS.sites}
    assert sites == set(SITES)
    prostate = table[table["dataset"] == "Prostate"]
    assert set(prostate["source"]) | set(prostate["target"]) == {*sites, "mean"}
    # no value is for a source tested on itself
    assert not ((prostate["source"] == prostate["target"]) & (prostate["source"] != "mean")).any()


def test_sam_sdgs_first_table_has_every_source_of_every_method(table: pandas.DataFrame):
    first = table[(table["paper"] == "samsdg") & (table["table"] == "Table 1")]
    for method, part in first.groupby("method"):
        assert part["source"].tolist() == (["mean"] if method == "ACSDG" else [*SITES, "mean"]), method


@pytest.mark.parametrize(("over", "tables"), [("target", 9), ("source", 29)])
def test_printed_means_are_the_means_of_their_rows(table: pandas.DataFrame, over: str, tables: int):
    means = _means(table, over)
    assert len(means) == tables
    assert set(means["rows"]) <= ({5} if over == "target" else {4, 6})
    wrong = (means["value"] - means["computed"]).abs() > means["unit"].map(ROUNDING)
    assert set(zip(means["table"][wrong], means["method"][wrong], strict=True)) == (
        PRINTED_WRONG if over == "source" else set()
    )
    assert means["caveat"][wrong].str.contains("not the mean of the").all()


def test_the_spread_of_epls_averages_is_that_of_the_four_domains(table: pandas.DataFrame):
    means = _means(table[table["paper"] == "epl"], "source")
    assert len(means) == 12
    assert ((means["sd"] - means["computed_sd"]).abs() < 0.051).all()


def test_mean_iou_is_the_mean_of_the_class_ious(table: pandas.DataFrame):
    for paper, classes in (("pistoseg", 4), ("wsss4luad", 3)):
        part = table[table["paper"] == paper]
        single = part.loc[part["metric"] == "iou", "value"]
        assert len(single) == classes
        assert part.loc[part["metric"] == "miou", "value"].item() == pytest.approx(single.mean(), abs=1e-4)


def test_sam_sdgs_main_result_is_the_same_in_all_four_places(table: pandas.DataFrame):
    own = table[(table["method"] == "SAM-SDG") & (table["target"] == "mean") & (table["source"] != "mean")]
    found = {
        name: [round(100 * value if unit == "fraction" else value, 2) for value, unit in part[["value", "unit"]].values]
        for name, part in own[~own["setting"].str.contains("theta2 0.[79]")].groupby("table")
    }
    assert set(found) == {"Table 1", "Table 2", "Table 3", "4_bbox_results.txt"}
    assert all(values == found["Table 1"] for values in found.values())


def test_a_dataset_is_found_by_every_name_it_has():
    rows = published("Prostate")
    assert len(rows) > 100
    for name in (
        "prostate",
        "ProstateSAML",
        "ProstateDeSAM",
        "Dataset501_ProstateSAML_RUNMC",
        "Dataset502_ProstateMaxStyle",
        "Dataset512_ProstateNPY_RUNMC",
    ):
        pandas.testing.assert_frame_equal(published(name), rows)
    assert set(published("MnMs")["paper"]) == {"epl", "dgnet"}
    assert published("Dataset901_Mine").empty


def test_a_protocol_narrows_and_a_wrong_one_is_refused():
    assert set(published("Prostate", "samsdg")["method"]).isdisjoint({"ERM", "DeSAM-P"})
    with pytest.raises(UserError, match=r"did you mean 'samsdg'\?"):
        published("Prostate", "samsgd")


def test_a_folder_without_files_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no CSV files"):
        published("Prostate", folder=tmp_path)


def test_missing_columns_are_named(tmp_path: Path, lines: list[str]):
    header = lines[0].replace(",sd,", ",spread,").replace("paper,", "")
    assert _refused(tmp_path, [header, *lines[1:]]) == [
        f"{tmp_path / 'tried.csv'}: no column paper, sd; expected the columns {', '.join(COLUMNS)}"
    ]


def test_all_problems_of_a_file_come_in_one_error(tmp_path: Path, lines: list[str]):
    lines[1] = lines[1].replace("79.02", "79,02")  # one field too many
    lines[2] = lines[2].replace("70.06", "seventy")
    lines[3] = lines[3].replace("82.80", "nan").replace("percent", "per mille")
    lines[4] = lines[4].replace("86.68", "8668").replace("DeSAM-P", "")
    lines.append(lines[5])
    place = f"{tmp_path / 'tried.csv'}, line"
    assert _refused(tmp_path, lines) == [
        f"{place} 2: 16 fields; expected 15",
        f"{place} 3: value 'seventy'; expected a number from 0 to 100",
        f"{place} 4: unit 'per mille'; expected percent or fraction",
        f"{place} 4: value 'nan'; expected a number from 0 to 100",
        f"{place} 5: no method; expected a text or number",
        f"{place} 5: value '8668'; expected a number from 0 to 100",
        f"tried.csv, line 7: what tried.csv, line 6 gives already; expected one line for each {', '.join(KEY)}",
    ]


@pytest.mark.parametrize("content", [b"", b"paper,\xff\n", b'paper,"table\n'])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "tried.csv").write_bytes(content)
    with pytest.raises(BadInput, match=r"tried\.csv"):
        read_folder(tmp_path)
