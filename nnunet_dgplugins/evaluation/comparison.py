"""Methods compared on the same cases: the source x target matrix, intervals, paired tests, wins per site.

All of it works on one tidy table with columns :data:`COLUMNS` and ``split``, one value a line: of a study, or of
several folders of predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nnunet_dgplugins.evaluation import dcam_protocol, samsdg_protocol

if TYPE_CHECKING:
    import pandas

COLUMNS = ["method", "dataset", "source", "target", "ratio", "seed", "case", "patient", "class", "metric", "value"]
UNSEEN, VALIDATION, TRAINING = "unseen", "validation", "training"
UNSEEN_AVERAGES = ("mean unseen", "pooled unseen")
#: protocol of ``dgplugins evaluate`` -> the number that tables compare
TABLE_METRICS = {"standard": "dice", "desam": "dice_desam", "samsdg": "dice_samsdg", "dcam": "miou"}
TIE = 0.005  # two numbers of a case closer than this are a tie
_RESAMPLES = 2000
_GROUP = ["dataset", "ratio", "source"]


def told_apart(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the table with another target name for a source's own cases where its unseen cases have the same site.

    Sites that are unseen from another source alone keep their name: they are the matrix's diagonal.
    """
    unseen = table["split"] == UNSEEN
    met = unseen.groupby([table[key] for key in (*_GROUP, "target")], dropna=False).transform("any")
    both = ~unseen & met
    return table.assign(target=table["target"].where(~both, table["target"] + " (" + table["split"] + ")"))


def cell(values: pandas.DataFrame, target: str) -> str:
    """Return one cell of a matrix as text: mean ± standard deviation over seeds, the source's own cases in brackets.

    Args:
        values: lines of :func:`matrix` of one source and method, indexed by target.
        target: a site or average.
    """
    if target not in values.index:
        return "-"
    row = values.loc[target]
    if row["mean"] != row["mean"]:  # no case of the site has the number
        return "-"
    text = f"{row['mean']:.3f}" + (f" ± {row['sd']:.3f}" if row["seeds"] > 1 else "")
    return text if row["split"] == UNSEEN else f"({text})"


def gain_text(row: Mapping[str, Any]) -> str:
    """Return a line of :func:`differences` as text; without the interval where patients are not known."""
    text = f"{row['difference']:+.3f}"
    return text if row["low"] != row["low"] else f"{text} [{row['low']:+.3f}, {row['high']:+.3f}]"


def records(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return rows as plain JSON values; what is not defined is null."""
    clean = table.astype(object).where(table.notna(), None)
    return [dict(row) for row in clean.to_dict("records")]


def by_seed(table: pandas.DataFrame, metric: str = "dice") -> pandas.DataFrame:
    """Return one number per method, source, target and seed: the mean over cases of the mean over classes.

    The target ``mean unseen`` is the unweighted mean over the unseen sites, ``pooled unseen`` that over their cases.
    Numbers of protocol ``dcam`` are those of all pixels of a site, or of all unseen sites, instead of means of cases.
    """
    import pandas

    keys = ["dataset", "ratio", "source", "method", "seed", "split", "target"]
    if metric in dcam_protocol.METRICS:
        unseen = table[table["split"] == UNSEEN]
        sites, pooled = _over_pixels(table, keys, metric), _over_pixels(unseen, keys[:-1], metric)
        seen = sites[sites["split"] == UNSEEN].groupby(keys[:-1], dropna=False, sort=False)["value"].mean()
        named = [
            part.assign(target=name) for part, name in zip((seen.reset_index(), pooled), UNSEEN_AVERAGES, strict=True)
        ]
        return pandas.concat([sites, *named], ignore_index=True)
    chosen = table[table["metric"] == metric]

    def means(part: pandas.DataFrame, by: list[str]) -> pandas.DataFrame:
        return part.groupby(by, dropna=False, sort=False)["value"].mean().reset_index()

    canvases = metric in samsdg_protocol.METRICS  # of one class each, so classes are what is averaged last
    cases = means(chosen, [*keys, "class" if canvases else "case"])
    sites, seen = means(cases, keys), (chosen if canvases else cases)
    pooled = means(seen[seen["split"] == UNSEEN], [*keys[:-1], "class"]) if canvases else seen[seen["split"] == UNSEEN]
    averages = [means(part, keys[:-1]) for part in (sites[sites["split"] == UNSEEN], pooled)]
    named = [part.assign(target=name) for part, name in zip(averages, UNSEEN_AVERAGES, strict=True)]
    return pandas.concat([sites, *named], ignore_index=True)


def _over_pixels(table: pandas.DataFrame, keys: list[str], metric: str) -> pandas.DataFrame:
    """Return the number over all pixels of each group of cases."""
    import pandas

    counts = dcam_protocol.counts_of(table, [*keys, "class"])
    rows = [
        (*values, float(dcam_protocol.score(part.to_numpy(), metric)))
        for values, part in counts.groupby(level=keys, dropna=False, sort=False)
    ]
    return pandas.DataFrame(rows, columns=[*keys, "value"])


def matrix(table: pandas.DataFrame, metric: str = "dice") -> pandas.DataFrame:
    """Return mean, standard deviation over seeds and their number for each method, source and target."""
    keys = ["dataset", "ratio", "source", "method", "split", "target"]
    grouped = by_seed(table, metric).groupby(keys, dropna=False, sort=False)["value"]
    return grouped.agg(mean="mean", sd="std", seeds="count").reset_index()


def differences(table: pandas.DataFrame, baseline: str, metric: str = "dice") -> pandas.DataFrame:
    """Compare every method with the baseline on the same unseen cases.

    A case's gain is its mean over classes and over the seeds that both methods have. Patients are drawn with
    replacement within each site, 2000 times; the interval is the middle 95 % of the mean difference over sites.
    Numbers of protocol ``dcam`` are taken over all pixels of the patients drawn, then over seeds and sites.

    Returns:
        Per dataset, ratio, source and method: ``difference``, ``low``, ``high``, ``cases``.
    """
    import pandas

    rows: list[dict[str, Any]] = []
    chosen = table[table["split"] == UNSEEN]
    gains = _pixel_gains if metric in dcam_protocol.METRICS else _case_gains
    for values, part in chosen.groupby(_GROUP, dropna=False, sort=False):
        where = dict(zip(_GROUP, values, strict=True))
        for method in part["method"].unique():
            if method != baseline and (found := gains(part, str(method), baseline, metric)):
                rows.append({**where, "method": method, **found})
    return pandas.DataFrame(rows, columns=[*_GROUP, "method", "difference", "low", "high", "cases"])


def _case_gains(table: pandas.DataFrame, method: str, baseline: str, metric: str) -> dict[str, float]:
    """Return a method's mean gain on the cases that both have, its interval, and their number; nothing without any."""
    gain = _gains(table, method, baseline, metric)
    if not len(gain):
        return {}
    alike = gain
    if metric in samsdg_protocol.METRICS:  # each class counts alike, as in by_seed, however many canvases it has
        alike = gain.rename(index=dict(zip(table["case"], table["class"], strict=True)), level="case")
        alike = alike.groupby(level=list(gain.index.names), dropna=False, sort=False).mean()
    return {**interval(alike), "cases": len(gain)}


def _gains(table: pandas.DataFrame, method: str, baseline: str, metric: str) -> pandas.Series:
    """Return each case's gain, indexed by target, patient and case; empty where the two have no case in common."""
    import pandas

    one = ["target", "patient", "case"]
    both = table[(table["metric"] == metric) & table["method"].isin([method, baseline])]
    wide = both.groupby([*one, "seed", "method"], dropna=False, sort=False)["value"].mean().unstack("method")
    if not {method, baseline} <= set(wide.columns):
        return pandas.Series(dtype=float, index=pandas.MultiIndex.from_arrays([[], [], []], names=one))
    return (wide[method] - wide[baseline]).dropna().groupby(level=one, dropna=False, sort=False).mean()


def _pixel_gains(table: pandas.DataFrame, method: str, baseline: str, metric: str) -> dict[str, float]:
    """Return the same of numbers over all pixels; cases of a seed that one of the two lacks do not count."""
    import numpy as np

    pair = [method, baseline]
    both = table[table["method"].isin(pair) & table["metric"].isin(dcam_protocol.COUNTS)]
    both = both[both.groupby(["target", "case", "seed"], dropna=False)["method"].transform("nunique") == len(pair)]
    if both.empty:
        return {}
    random = np.random.default_rng(0)
    middle: list[Any] = []
    drawn: list[Any] = []
    spread = False
    for _, part in both.groupby("target", sort=False):
        names = [part[key].unique() for key in ("patient", "seed", "class")]
        sums = dcam_protocol.counts_of(part, ["patient", "method", "seed", "class"])
        order = [(p, m, s, c) for p in names[0] for m in pair for s in names[1] for c in names[2]]
        counts = sums.reindex(order, fill_value=0.0).to_numpy().reshape(len(names[0]), 2, *map(len, names[1:]), 3)
        count = len(counts)
        spread |= count > 1
        weights = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
        for kept, times in ((middle, np.ones((1, count))), (drawn, weights)):
            scores = dcam_protocol.score(np.tensordot(times, counts, 1), metric).mean(-1)  # over seeds
            kept.append(scores[:, 0] - scores[:, 1])
    low, high = np.quantile(np.mean(drawn, 0), [0.025, 0.975]) if spread else (np.nan, np.nan)
    ends = {"low": float(low), "high": float(high)}
    return {"difference": float(np.mean(middle)), **ends, "cases": both["case"].nunique()}


def interval(gain: pandas.Series) -> dict[str, float]:
    """Return the mean over sites of the mean gain, with its interval; ``gain`` is indexed by target, patient, case.

    Where no patient is known (canvases of protocol ``samsdg``, in which patients meet), or no site has two, the
    interval is NaN. A site of one patient beside larger ones adds nothing to its width.
    """
    import numpy as np

    if gain.index.get_level_values("patient").isna().any() or not len(gain):
        sites_alone = gain.groupby(level="target").mean()
        return {"difference": float(sites_alone.mean()), "low": float("nan"), "high": float("nan")}
    random = np.random.default_rng(0)
    drawn = np.zeros(_RESAMPLES)
    spread = False
    middle = []
    sites = list(gain.groupby(level="target"))
    for _, part in sites:
        patients = part.groupby(level="patient")
        total, count = patients.sum().to_numpy(), patients.count().to_numpy()
        spread |= len(total) > 1
        chosen = random.integers(len(total), size=(_RESAMPLES, len(total)))
        drawn += total[chosen].sum(1) / count[chosen].sum(1) / len(sites)
        middle.append(total.sum() / count.sum())
    low, high = np.quantile(drawn, [0.025, 0.975]) if spread else (np.nan, np.nan)
    return {"difference": float(np.mean(middle)), "low": float(low), "high": float(high)}


def paired_tests(table: pandas.DataFrame, baseline: str, metric: str = "dice") -> pandas.DataFrame:
    """Test every method against the baseline: Wilcoxon's signed-rank test over the patients of the unseen sites.

    A patient's value is the mean gain over its cases, classes and the seeds that both methods have. Two-sided; Holm's
    correction over the methods of one source. Numbers over pixels (protocol ``dcam``) have no value per patient.

    Returns:
        Per dataset, ratio, source and method: ``patients``, ``p`` and ``p_holm``.
    """
    import pandas
    from scipy.stats import wilcoxon

    rows: list[dict[str, Any]] = []
    for where, part, methods in _against(table, baseline, metric):
        own = []
        for method in methods:
            gain = _gains(part, method, baseline, metric).groupby(level=["target", "patient"], sort=False).mean()
            if len(gain):  # patients that are known
                p = float(wilcoxon(gain).pvalue) if gain.any() else 1.0
                own.append({**where, "method": method, "patients": len(gain), "p": p})
        rows += [{**row, "p_holm": p} for row, p in zip(own, holm([row["p"] for row in own]), strict=True)]
    return pandas.DataFrame(rows, columns=[*_GROUP, "method", "patients", "p", "p_holm"])


def holm(p_values: list[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method, in their order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def wins(table: pandas.DataFrame, baseline: str, metric: str = "dice") -> pandas.DataFrame:
    """Count for every method and unseen site the cases in which it is ahead of the baseline, level with it, behind.

    A case's number is its mean over classes and seeds; closer than :data:`TIE` is level.

    Returns:
        Per dataset, ratio, source, method and target: ``ahead``, ``level``, ``behind``.
    """
    import pandas

    rows: list[dict[str, Any]] = []
    for where, part, methods in _against(table, baseline, metric):
        for method in methods:
            for target, gain in _gains(part, method, baseline, metric).groupby(level="target", sort=True):
                counts = {"ahead": gain > TIE, "level": gain.abs() <= TIE, "behind": gain < -TIE}
                found = {name: int(which.sum()) for name, which in counts.items()}
                rows.append({**where, "method": method, "target": target, **found})
    return pandas.DataFrame(rows, columns=[*_GROUP, "method", "target", "ahead", "level", "behind"])


def intervals(table: pandas.DataFrame, metric: str = "dice") -> pandas.DataFrame:
    """Return the 95 % interval of every method's mean at every unseen site, patients drawn with replacement.

    Not for numbers over pixels (protocol ``dcam``), nor for a site of one patient.

    Returns:
        Per dataset, ratio, source, method and target (``mean unseen`` too): ``low``, ``high``, ``cases``.
    """
    import pandas

    rows: list[dict[str, Any]] = []
    chosen = table[(table["split"] == UNSEEN) & (table["metric"] == metric)]
    if metric in dcam_protocol.METRICS:
        chosen = chosen[:0]
    for values, part in chosen.groupby([*_GROUP, "method"], dropna=False, sort=False):
        where = dict(zip([*_GROUP, "method"], values, strict=True))
        means = part.groupby(["target", "patient", "case"], dropna=False, sort=False)["value"].mean().dropna()
        parts = [(str(target), own) for target, own in means.groupby(level="target", sort=True)]
        for target, own in [*parts, (UNSEEN_AVERAGES[0], means)]:
            found = interval(own)
            if found["low"] != found["low"]:
                continue
            rows.append({**where, "target": target, "low": found["low"], "high": found["high"], "cases": len(own)})
    return pandas.DataFrame(rows, columns=[*_GROUP, "method", "target", "low", "high", "cases"])


def sites_of_one(table: pandas.DataFrame) -> list[str]:
    """Return the unseen sites that have one patient for some source: their patients have no spread to draw from."""
    unseen = table[table["split"] == UNSEEN]
    counts = unseen.groupby([*_GROUP, "target"], dropna=False, sort=False)["patient"].nunique()
    return sorted({str(where[-1]) for where, count in counts.items() if count == 1})


def by_class(table: pandas.DataFrame, metrics: Iterable[str]) -> pandas.DataFrame:
    """Return each class's numbers at every unseen site: means over cases, then over seeds.

    Args:
        table: tidy.
        metrics: of interest; of protocol ``dcam`` ``iou``, over all pixels of a site.

    Returns:
        Per dataset, ratio, source, method, target, class and metric: ``mean``, ``sd``, ``seeds``.
    """
    import pandas

    keys = [*_GROUP, "method", "target", "class", "metric"]
    unseen, metrics = table[table["split"] == UNSEEN], list(metrics)
    if "iou" in metrics:
        where = [*_GROUP, "method", "target", "seed"]
        rows = [
            (*values, name, metric, number)
            for values, part in unseen.groupby(where, dropna=False, sort=False)
            for (name, metric), number in dcam_protocol.pooled(part).items()
            if metric == "iou"
        ]
        seeds = pandas.DataFrame(rows, columns=[*where, "class", "metric", "value"])
    else:
        chosen = unseen[unseen["metric"].isin(metrics)]
        seeds = chosen.groupby([*keys, "seed"], dropna=False, sort=False)["value"].mean().reset_index()
    grouped = seeds.groupby(keys, dropna=False, sort=False)["value"]
    return grouped.agg(mean="mean", sd="std", seeds="count").reset_index()


def _against(
    table: pandas.DataFrame, baseline: str, metric: str
) -> Iterator[tuple[dict[str, Any], pandas.DataFrame, list[str]]]:
    """Yield each source's unseen cases and the methods beside the baseline there; nothing for numbers over pixels."""
    if metric in dcam_protocol.METRICS:
        return
    for values, part in table[table["split"] == UNSEEN].groupby(_GROUP, dropna=False, sort=False):
        methods = [str(name) for name in part["method"].unique() if name != baseline]
        yield dict(zip(_GROUP, values, strict=True)), part, methods
