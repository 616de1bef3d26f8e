"""From the tidy table to numbers per class and site, the source x target table, CSV and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_dgplugins.evaluation import dcam_protocol
from nnunet_dgplugins.evaluation.evaluate import PROTOCOLS, UNKNOWN_SITE, Evaluation
from nnunet_dgplugins.files import write_bytes

if TYPE_CHECKING:
    import pandas

JSON_FORMAT = 1
MEAN_OF_CLASSES = "mean of classes"
MEAN_OF_SITES, POOLED = "mean of sites", "pooled"
_NOTHING: dict[str, Any] = {"mean": None, "std": None, "n": 0}


def with_class_mean(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the table with one more class, the mean over the classes of each case, if there are several."""
    import pandas

    if table["class"].nunique() < 2:
        return table
    keys = ["case", "site", "patient", "metric"]
    mean = table.groupby(keys, sort=False, dropna=False, as_index=False)["value"].mean()
    return pandas.concat([table, mean.assign(**{"class": MEAN_OF_CLASSES})], ignore_index=True)[list(table.columns)]


def summary(table: pandas.DataFrame, by: list[str]) -> pandas.DataFrame:
    """Return mean, std and n of the values, grouped by columns in order of appearance.

    The standard deviation is that of a sample (divided by n - 1), NaN for n = 1. Undefined values do not count.
    """
    grouped = table.groupby(by, sort=False)["value"]
    return grouped.agg(mean="mean", std="std", n="count").reset_index()


def target_sites(result: Evaluation) -> list[str]:
    """Return the sites that count as unseen, in alphabetical order: all that are not the source."""
    return sorted(site for site in result.table["site"].unique() if site not in result.dataset.table.sources)


def source_name(result: Evaluation) -> str:
    """Return the name of the source site; several are joined by a plus."""
    return " + ".join(result.dataset.table.sources) or UNKNOWN_SITE


def described(table: pandas.DataFrame, protocol: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return mean, std and n of a group of cases by class and metric; the mean is that over pixels under ``dcam``."""
    if protocol == "dcam":
        n = table["case"].nunique()
        return {key: _numbers(value, math.nan, n) for key, value in dcam_protocol.pooled(table).items()} if n else {}
    canvases = protocol == "samsdg"
    found = summary(table if canvases else with_class_mean(table), ["class", "metric"])
    numbers = {
        (str(row["class"]), str(row["metric"])): _numbers(row["mean"], row["std"], row["n"])
        for row in found.to_dict("records")
    }
    if canvases and len(found) > 1:  # those of two classes show other slices, and there may be more of one
        for metric, part in found.groupby("metric"):
            numbers[MEAN_OF_CLASSES, str(metric)] = _numbers(part["mean"].mean(), math.nan, part["n"].sum())
    return numbers


def sites_table(result: Evaluation) -> list[dict[str, Any]]:
    """Return mean, std and n for each site, class and metric."""
    return [
        {
            "site": site,
            "role": "source" if site in result.dataset.table.sources else "target",
            "class": name,
            "metric": metric,
            **numbers,
        }
        for site, part in result.table.groupby("site")
        for (name, metric), numbers in described(part, result.protocol).items()
    ]


def matrix(result: Evaluation) -> list[dict[str, Any]]:
    """Return one row of the source x target table for each class and metric.

    ``sites`` holds each unseen site by name; ``mean_of_sites`` is the unweighted mean of their means; ``pooled`` takes
    all their cases as one group. Cases of the source, if any were evaluated, are in neither.
    """
    targets, table = target_sites(result), result.table
    by_site = {site: described(table[table["site"] == site], result.protocol) for site in targets}
    together = described(table[table["site"].isin(targets)], result.protocol)
    rows = []
    for name, metric in _keys(result):
        sites = {site: found.get((name, metric), _NOTHING) for site, found in by_site.items()}
        means = [item["mean"] for item in sites.values() if item["mean"] is not None]
        rows.append(
            {
                "source": source_name(result),
                "class": name,
                "metric": metric,
                "sites": sites,
                "mean_of_sites": sum(means) / len(means) if means else None,
                "pooled": together.get((name, metric), _NOTHING),
            }
        )
    return rows


def _keys(result: Evaluation) -> list[tuple[str, str]]:
    """Return classes and metrics in the order of the table."""
    if result.protocol == "dcam":
        return list(dcam_protocol.pooled(result.table))
    classes = with_class_mean(result.table)["class"].unique()
    return [(str(name), metric) for name in classes for metric in PROTOCOLS[result.protocol]]


def to_json(result: Evaluation, doubt: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return everything as plain JSON values; a number that is not defined is null."""
    cases = []
    for (case, site, name), part in result.table.groupby(["case", "site", "class"], sort=False):
        patient = part["patient"].iloc[0]
        values = {m: _finite(v) for m, v in zip(part["metric"], part["value"], strict=True)}
        cases.append({"case": case, "site": site, "patient": patient, "class": name, "metrics": values})
    return {
        "format": JSON_FORMAT,
        "dataset": result.dataset.name,
        "source": source_name(result),
        "targets": target_sites(result),
        "predictions": str(result.predictions),
        "labels": str(result.labels),
        "protocol": result.protocol,
        "metrics": {name: asdict(metric) for name, metric in PROTOCOLS[result.protocol].items()},
        "matrix": matrix(result),
        "sites": sites_table(result),
        "cases": cases,
        "notes": result.notes,
        "doubt": doubt,
    }


def write_csv(result: Evaluation, path: Path) -> None:
    """Write the tidy table, one value per line, in one step; a number that is not defined is an empty field.

    Under ``dcam`` the sites' numbers follow the counts of the cases; their lines name no case.
    """
    import pandas

    table = result.table
    if result.protocol == "dcam":
        lines = [{**item, "case": "", "value": item["mean"]} for item in sites_table(result)]
        table = pandas.concat([table, pandas.DataFrame(lines, columns=table.columns)], ignore_index=True)
    write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode())


def _numbers(mean: float, std: float, n: int) -> dict[str, Any]:
    return {"mean": _finite(mean), "std": _finite(std), "n": int(n)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
