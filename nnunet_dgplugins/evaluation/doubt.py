"""Which predictions to look at first, from what the method knows about its own doubt; no labels needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.files import read_json

if TYPE_CHECKING:
    import pandas

FILE = "dgplugins_doubt.json"


@dataclass(frozen=True)
class Doubt:
    """Doubt about one predicted case.

    Args:
        case: case identifier.
        doubt: 0 (sure) to 1.
        per_class: doubt of each class, where the method tells them apart.
        slices: doubt of each slice in the reader's order, where the method works by slice; None: nothing to doubt.
    """

    case: str
    doubt: float
    per_class: dict[str, float]
    slices: list[float | None]

    @property
    def worst_slice(self) -> int | None:
        """Index of the slice with the highest doubt, counted from 0."""
        known = [(value, -index) for index, value in enumerate(self.slices) if value is not None]
        return -max(known)[1] if known else None


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of doubt with Dice over cases; -1 would be a perfect ranking.

    Args:
        rho: coefficient, None if there are fewer than three cases or one side is constant.
        p_value: of the two-sided test.
        n: cases with a defined Dice and a doubt.
    """

    rho: float | None
    p_value: float | None
    n: int


def read_doubt(predictions: Path) -> list[Doubt]:
    """Return the doubt of each case of a predictions folder, highest first (look at these first).

    Raises:
        UserError: the folder has no doubt file.
        BadInput: the file does not hold what it should.
    """
    path = predictions / FILE
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, so nothing is known of the method's doubt. Give `dgplugins evaluate` the model "
            "folder of a trainer of this package (--model FOLDER, and --images DIR if these are not the cases of "
            "imagesTs): it then writes the file first."
        )
    content = read_json(path)
    problems = list(_problems(content, path))
    if problems:
        raise BadInput(f"{path} cannot be used", problems)
    found = [
        Doubt(case, float(item["doubt"]), dict(item.get("per_class") or {}), list(item.get("slices") or []))
        for case, item in content.items()
    ]
    return sorted(found, key=lambda item: (-item.doubt, item.case))


def rank_correlation(doubts: list[Doubt], table: pandas.DataFrame) -> Correlation:
    """Correlate doubt with Dice (mean over the classes of a case).

    Args:
        doubts: from :func:`read_doubt`.
        table: tidy table of the standard protocol.
    """
    import warnings

    from scipy.stats import spearmanr

    dice = table[table["metric"] == "dice"].groupby("case")["value"].mean()
    pairs = [(d.doubt, float(dice[d.case])) for d in doubts if d.case in dice and math.isfinite(dice[d.case])]
    if len(pairs) < 3:
        return Correlation(None, None, len(pairs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant input gives NaN, which is said as None
        found = spearmanr([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    rho, p_value = float(found.statistic), float(found.pvalue)
    known = math.isfinite(rho) and math.isfinite(p_value)
    return Correlation(rho if known else None, p_value if known else None, len(pairs))


def to_json(doubts: list[Doubt], correlation: Correlation | None) -> dict[str, Any]:
    """Return ranking and correlation as plain JSON values."""
    ranking = [asdict(item) | {"rank": rank, "worst_slice": item.worst_slice} for rank, item in enumerate(doubts, 1)]
    return {"ranking": ranking, "rank_correlation_with_dice": asdict(correlation) if correlation else None}


def _problems(content: Any, path: Path) -> list[Problem]:
    if not isinstance(content, Mapping) or not content:
        return [Problem(str(path), "no cases", "an object from case identifier to doubt")]
    found = []
    for case, item in content.items():
        value = item.get("doubt") if isinstance(item, Mapping) else None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            found.append(Problem(f"{path}, case {case}", f"doubt {value!r}", "a number from 0 to 1"))
    return found
