"""A clean dataset made of links into a mixed one: source sites to imagesTr, every other case to imagesTs.

Planning and normalisation statistics of the new dataset never see a target site.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_dgplugins.data import staging
from nnunet_dgplugins.data.case_table import KEY, Case, CaseTable
from nnunet_dgplugins.data.raw_dataset import RawCase, RawDataset
from nnunet_dgplugins.data.splits import SPLITS, Split
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import VALIDATION_MASKS, content_hash, write_json


def make_linked_dataset(
    dataset: RawDataset, table: CaseTable, sources: Sequence[str], folds: list[Split], name: str
) -> Path:
    """Write the linked dataset, whole or not at all; the same call a second time changes nothing.

    Args:
        dataset: the mixed dataset.
        table: its case table.
        sources: sites whose training cases are trained on.
        folds: written as splits_final.json.
        name: ``DatasetXXX_Name`` of the new dataset.

    Returns:
        The new dataset's folder.

    Raises:
        UserError: the id holds other content, or no case of the source sites is there.
    """
    staging.refuse_other_names(name)
    train = {case: files for case, files in dataset.training.items() if table.site_of(case) in sources}
    # labels of cases without masks (the ignore value, slabs for planning) are no truth to test against
    masks = {case: path for case in dataset.training if (path := _validation_mask(dataset, case)).is_file()}
    held_out = {
        case: files if table.cases.get(case, Case()).labelled else RawCase(files.images, masks.get(case))
        for case, files in dataset.training.items()
        if case not in train
    }
    test = {**held_out, **dataset.test}
    if not train:
        raise UserError(f"{dataset.folder.name}: no training case of {', '.join(sources)}.")
    masks = {case: path for case, path in masks.items() if case in train}
    content = {key: value for key, value in dataset.content.items() if key not in ("dataset", KEY)}
    content["numTraining"] = len(train)
    new_table = replace(
        table,
        cases={
            **{case: table.cases[case] for case in [*train, *test] if case in table.cases},
            **{
                case: replace(table.cases[case], labelled=files.label is not None, tags=None)
                for case, files in held_out.items()
                if case in table.cases and not table.cases[case].labelled
            },
        },
        source=sources[0] if len(sources) == 1 else list(sources),
    )
    digest = content_hash(
        {
            "name": name,
            "json": content,
            "table": new_table.to_dict(),
            "folds": folds,
            "train": file_list(train),
            "test": file_list(test),
            **({"masks": file_list({case: RawCase((path,), None) for case, path in masks.items()})} if masks else {}),
        }
    )
    protocol = {**table.protocol, "linked_from": dataset.folder.name, "input": digest}
    content[KEY] = replace(new_table, protocol=protocol).to_dict()
    final = dataset.folder.with_name(name)
    if staging.is_done(final, digest):
        return final
    staging.refuse_other_content(final, digest, overwrite=None)
    folder = staging.start(final, digest)
    for part, cases in (("Tr", train), ("Ts", test)):
        for case, files in cases.items():
            for channel, image in enumerate(files.images):
                link(image, folder / f"images{part}" / f"{case}_{channel:04d}{dataset.file_ending}")
            if files.label is not None:
                link(files.label, folder / f"labels{part}" / f"{case}{dataset.file_ending}")
    for path in masks.values():
        link(path, folder / VALIDATION_MASKS / path.name)
    write_json(folder / SPLITS, folds)
    write_json(folder / "dataset.json", content)
    staging.finish(folder, final, digest)
    return final


def _validation_mask(dataset: RawDataset, case: str) -> Path:
    return dataset.folder / VALIDATION_MASKS / f"{case}{dataset.file_ending}"


def file_list(cases: Mapping[str, RawCase]) -> list[list[str]]:
    """Return names, sizes and times: enough to notice that a linked file was replaced."""
    return [
        [case, *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in _paths(files))]
        for case, files in sorted(cases.items())
    ]


def _paths(files: RawCase) -> list[Path]:
    return [*files.images, *([] if files.label is None else [files.label])]


def link(source: Path, target: Path) -> None:
    """Link a file, relative to the new place; copy it where links are not allowed. One that is there stays."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # relative: nnU-Net's raw folder can be moved or mounted elsewhere as a whole
        os.symlink(os.path.relpath(source.absolute(), target.parent.resolve()), target)
    except (OSError, NotImplementedError):  # systems where users may not make links
        shutil.copyfile(source, target)
