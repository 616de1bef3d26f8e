"""Which cases a fold trains and validates on. Stricter than nnU-Net, which invents a split for a missing fold."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.splits import MASKS, SEED, SPLITS, TAGS, check, k_fold
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.files import PREPROCESSED, read_json, write_json

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
    base: Path, data_folder: Path, fold: int | str, table: CaseTable | None, tags: bool = False
) -> tuple[list[str], list[str], str]:
    """Return training cases, validation cases and where they come from.

    Args:
        base: preprocessed folder of the dataset, which holds ``splits_final.json``.
        data_folder: preprocessed data of one configuration.
        fold: fold number, or ``all`` (train and validate on every labelled case of the source).
        table: case table; unlabelled cases and sites other than the source are left out of ``all`` and of new splits.
        tags: train on tags: cases with tags take the place of labelled ones.

    Raises:
        BadInput: the fold names cases that are not there or neither labelled nor tagged, parts a patient, or has none.
        UserError: too few cases for the default folds.
    """
    present = sorted(path.name[: -len(".pkl")] for path in data_folder.glob("*.pkl"))
    usable = tagged(present, table) if tags else trainable(present, table)
    if fold == "all":
        return usable, usable, f"all {'tagged' if tags else 'labelled'} cases of the source"
    path = base / SPLITS
    if not path.is_file():
        write_json(path, _default(usable, table))
    check_fold(base.name, fold)
    split = read_json(path)[int(fold)]
    problems = check([split], table, present, int(fold), TAGS if tags else MASKS)
    if problems:
        raise BadInput(f"Fold {fold} of {path} cannot be trained", problems)
    return list(split["train"]), list(split["val"]), str(path)


def trainable(names: list[str], table: CaseTable | None) -> list[str]:
    """Return the labelled cases of the source sites; those of every site where no source is named."""
    if table is None:
        return names
    labelled = [name for name in names if is_labelled(table, name)]
    return [name for name in labelled if not table.sources or table.site_of(name) in table.sources]


def has_tags(table: CaseTable | None, name: str) -> bool:
    """Return whether the table knows tags of a case."""
    return table is not None and name in table.cases and table.cases[name].tags is not None


def tagged(names: Iterable[str], table: CaseTable | None) -> list[str]:
    """Return the cases with tags of the source sites; of every site where no source is named."""
    if table is None:
        return []
    return [
        name for name in names if has_tags(table, name) and (not table.sources or table.site_of(name) in table.sources)
    ]


def tagged_elsewhere(names: Iterable[str], table: CaseTable) -> list[str]:
    """Return the cases with tags of sites that are no source."""
    return [name for name in names if has_tags(table, name) and table.site_of(name) not in table.sources]


def is_labelled(table: CaseTable | None, name: str) -> bool:
    """Return whether a case has masks; one that the table does not list has."""
    return table is None or name not in table.cases or table.cases[name].labelled


def without_masks(names: Iterable[str], table: CaseTable | None) -> list[str]:
    """Return the unlabelled cases of the source sites; every unlabelled case where no source is named."""
    if table is None:
        return []
    hidden = [name for name in names if not is_labelled(table, name)]
    return [name for name in hidden if not table.sources or table.site_of(name) in table.sources]


def _default(labelled: list[str], table: CaseTable | None) -> list[dict[str, list[str]]]:
    if table is not None and any(name in table.cases for name in labelled):
        return k_fold(table, labelled, DEFAULT_FOLDS, seed=SEED)
    if len(labelled) < DEFAULT_FOLDS:
        raise UserError(
            f"nnU-Net's {DEFAULT_FOLDS} folds need {DEFAULT_FOLDS} cases, there are {len(labelled)}. "
            "Make other folds with `dgplugins splits --k-fold`, or train on all (fold `all`)."
        )
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    # without a table every case is a patient of its own, and nnU-Net's own folds are what users expect
    return generate_crossval_split(labelled, seed=SEED, n_splits=DEFAULT_FOLDS)
