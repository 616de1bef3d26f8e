"""Writes folds for a dataset that exists, or sets its target sites apart in a linked dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nnunet_dgplugins.data import splits
from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.linked_dataset import make_linked_dataset
from nnunet_dgplugins.data.names import safe_name
from nnunet_dgplugins.data.raw_dataset import RawDataset, write_together
from nnunet_dgplugins.errors import BadInput, UserError


@dataclass(frozen=True)
class SplitRequest:
    """What the user asked for; exactly one of the three kinds is set.

    Args:
        dataset: id or name.
        single_source: site to train and validate on.
        leave_one_site_out: one fold per held-out site.
        k_fold: folds over all training cases.
        folds: folds within a single source, or the validating part of the other sites.
        seed: of the shuffling.
        new_id: id of the (first) linked dataset; None to write folds into the dataset itself.
    """

    dataset: str
    single_source: str | None = None
    leave_one_site_out: bool = False
    k_fold: int | None = None
    folds: int = 5
    seed: int = splits.SEED
    new_id: int | None = None


def split_dataset(request: SplitRequest) -> list[str]:
    """Write the folds.

    Returns:
        Lines for the user.

    Raises:
        UserError: no case table, unknown site, too few patients, or the new id is taken.
        BadInput: the preprocessed copy lacks cases; nothing is written.
    """
    raw = RawDataset.open(request.dataset)
    table = raw.table
    if table is None:
        if request.k_fold is None:
            raise UserError(f"{raw.folder.name} has no case table. Give it one with `dgplugins annotate` first.")
        table = CaseTable()
    if request.new_id is not None:
        return list(_linked(request, raw, table, request.new_id))
    folds = _folds(request, table, list(raw.training))
    problems = splits.check(folds, table, raw.training)
    files = {raw.folder / splits.SPLITS: folds}
    if raw.preprocessed is not None:
        files[raw.preprocessed / splits.SPLITS] = folds
        labels = raw.preprocessed / "gt_segmentations"
        ending = raw.file_ending
        prepared = {path.name[: -len(ending)] for path in labels.glob(f"*{ending}")} if labels.is_dir() else set()
        if prepared:
            problems += splits.check(folds, None, prepared)
    if problems:
        raise BadInput(f"The folds of {raw.folder.name}", problems)
    changed = write_together(files)
    lines = [f"Wrote {path}" for path in changed] or ["The folds were there already."]
    lines += [_line(number, fold) for number, fold in enumerate(folds)]
    sites = {table.site_of(name) for name in raw.training}
    if request.k_fold is None and len(sites) > 1:
        lines.append(
            "Note: the target sites lie in imagesTr, so nnU-Net's planning (spacing, patch size, statistics) sees "
            "them. For numbers to publish use --as-dataset ID."
        )
    return lines


def _folds(request: SplitRequest, table: CaseTable, names: list[str]) -> list[splits.Split]:
    if request.single_source is not None:
        return splits.single_source(table, request.single_source, names, request.folds, request.seed)
    if request.leave_one_site_out:
        return splits.leave_one_site_out(table, names, request.folds, request.seed)
    return splits.k_fold(table, names, request.k_fold or request.folds, request.seed)


def _line(number: int, fold: splits.Split) -> str:
    held_out = f", {fold['held_out']} held out" if "held_out" in fold else ""
    return f"fold {number}: {len(fold['train'])} train, {len(fold['val'])} validate{held_out}"


def _linked(request: SplitRequest, raw: RawDataset, table: CaseTable, new_id: int) -> Iterator[str]:
    """Yield a line per linked dataset: one for a single source, one per held-out site otherwise."""
    names = list(raw.training)
    base = raw.folder.name[11:]
    if request.single_source is not None:
        folds = splits.single_source(table, request.single_source, names, request.folds, request.seed)
        plans = [([request.single_source], folds, f"Dataset{new_id:03d}_{base}_{safe_name(request.single_source)}")]
    else:
        plans = []
        sites = sorted({str(table.site_of(name)) for name in names if table.site_of(name) is not None})
        if len(sites) < 2:
            raise UserError(f"Leaving one site out needs two sites, the training cases have {len(sites)}.")
        for offset, site in enumerate(sites):
            others = [other for other in sites if other != site]
            rest = [name for name in names if table.site_of(name) in others]
            folds = splits.k_fold(table, rest, request.folds, request.seed)
            plans.append((others, folds, f"Dataset{new_id + offset:03d}_{base}_without_{safe_name(site)}"))
    for sources, folds, name in plans:
        path = make_linked_dataset(raw, table, sources, folds, name)
        yield f"{path}: {len(folds)} folds of {', '.join(sources)}; all other cases in imagesTs"
    yield f"Next: nnUNetv2_plan_and_preprocess -d {plans[0][2][7:10]} -c 2d --verify_dataset_integrity"
