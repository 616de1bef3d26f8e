"""Which cases a fold trains and validates on. Stricter than nnU-Net, which invents a split for a missing fold."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import BadInput, Problem, UserError
from nnunet_dgplugins.files import PREPROCESSED, read_json, write_json

SPLITS = "splits_final.json"
DEFAULT_FOLDS = 5  # nnU-Net's, made when a dataset has no list


def check_fold(dataset: str, fold: int | str) -> None:
    """Refuse a fold that the dataset's list of splits does not have, or would not have if there is none yet.

    Raises:
        UserError: the preprocessed ``splits_final.json`` is shorter.
    """
    root = os.environ.get(PREPROCESSED)
    if fold == "all" or not root:
        return
    path = Path(root) / dataset / SPLITS
    count = len(read_json(path)) if path.is_file() else DEFAULT_FOLDS
    if not 0 <= int(fold) < count:
        raise UserError(
            f"Fold {fold} does not exist: {path} has {count} (0 to {count - 1}). Add folds with `dgplugins splits`."
        )


def load_fold(
    base: Path, data_folder: Path, fold: int | str, table: CaseTable | None
) -> tuple[list[str], list[str], str]:
    """Return training cases, validation cases and where they come from.

    Args:
        base: preprocessed folder of the dataset, which holds ``splits_final.json``.
        data_folder: preprocessed data of one configuration.
        fold: fold number, or ``all`` (train and validate on every labelled case).
        table: case table; its unlabelled cases are left out of ``all`` and of new splits.

    Raises:
        BadInput: the fold names cases that are not there or not labelled, or has none.
        UserError: too few cases for the default folds.
    """
    present = sorted(path.name[: -len(".pkl")] for path in data_folder.glob("*.pkl"))
    labelled = [name for name in present if table is None or name not in table.cases or table.cases[name].labelled]
    if fold == "all":
        return labelled, labelled, "all labelled cases"
    path = base / SPLITS
    if not path.is_file():
        write_json(path, _default(labelled, table))
    check_fold(base.name, fold)
    split = read_json(path)[int(fold)]
    train, val = list(split["train"]), list(split["val"])
    problems = [
        Problem(f"{path}, fold {fold}, {side}", f"unknown case '{name}'", "a case of imagesTr")
        for side, names in (("train", train), ("val", val))
        for name in names
        if name not in present
    ]
    problems += [
        Problem(f"{path}, fold {fold}, {side}", f"'{name}' is not labelled (case table)", "labelled cases only")
        for side, names in (("train", train), ("val", val))
        for name in names
        if name in present and name not in labelled
    ]
    problems += [Problem(f"{path}, fold {fold}", f"'{name}' is in train and val") for name in train if name in val]
    problems += [
        Problem(f"{path}, fold {fold}", f"no {side} cases")
        for side, names in (("train", train), ("val", val))
        if not names
    ]
    if problems:
        raise BadInput(f"Fold {fold} cannot be trained", problems)
    return train, val, str(path)


def _default(labelled: list[str], table: CaseTable | None) -> list[dict[str, list[str]]]:
    if table is not None and any(name in table.cases for name in labelled):
        from nnunet_dgplugins.data.splits import k_fold

        return k_fold(table, labelled, DEFAULT_FOLDS, seed=12345)
    if len(labelled) < DEFAULT_FOLDS:
        raise UserError(
            f"nnU-Net's {DEFAULT_FOLDS} folds need {DEFAULT_FOLDS} cases, there are {len(labelled)}. "
            "Make other folds with `dgplugins splits --k-fold`, or train on all (fold `all`)."
        )
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    # without a table every case is a patient of its own, and nnU-Net's own folds are what users expect
    return generate_crossval_split(labelled, seed=12345, n_splits=DEFAULT_FOLDS)
