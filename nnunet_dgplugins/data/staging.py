"""The hidden folder a dataset is built in, its stamp, and what must not be overwritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from nnunet_dgplugins.data.case_table import KEY
from nnunet_dgplugins.data.splits import SPLITS
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import PREPROCESSED, RAW, RESULTS, read_json, write_json

STAMP = "dgplugins_conversion.json"
FORMAT = 1  # raised when the same input would be written differently
_EDITABLE = (STAMP, "dataset.json", SPLITS)  # `annotate` and `splits` may change these afterwards


def refuse_other_names(name: str, option: str = "--id") -> None:
    """Refuse an id that another dataset has anywhere; nnU-Net cannot work with two names for one id.

    Args:
        name: ``DatasetXXX_Name`` that is to be made.
        option: of the command, which chooses the id.

    Raises:
        UserError: the id is taken.
    """
    for variable in (RAW, PREPROCESSED, RESULTS):
        root = os.environ.get(variable)
        if not root or not Path(root).is_dir():
            continue
        for path in sorted(Path(root).iterdir()):
            if path.name.startswith(name[:11]) and path.name != name and path.is_dir():
                raise UserError(
                    f"Id {name[7:10]} is taken by {path}. Choose another with {option}, or remove that folder."
                )


def is_done(final: Path, digest: str) -> bool:
    """Return whether ``final`` is complete and was made from the input with this hash."""
    stamp = _stamp(final)
    if stamp.get("input") != digest or not (final / "dataset.json").is_file():
        return False
    if stamp.get("folds") and not (final / SPLITS).is_file():  # nnU-Net would draw others, by case
        return False
    return all(_size(final / name) == size for name, size in stamp["files"].items())


def refuse_other_content(final: Path, digest: str, overwrite: bool | None, described: str | None = None) -> None:
    """Refuse to mix with, or silently replace, a dataset of the same name that was made from something else.

    Args:
        final: the dataset's folder.
        digest: hash of everything that is written.
        overwrite: replace it; None: the command has no such option.
        described: hash that dataset.json carries, where it is another one.

    Raises:
        UserError: raw, preprocessed or results hold something else.
    """
    stamp = _stamp(final)
    if final.is_dir() and any(final.iterdir()):
        if not stamp:
            raise UserError(f"{final} was not made by this command and is left alone. Choose another id.")
        if stamp["input"] != digest and not overwrite:
            remedy = "Remove it" if overwrite is None else "Replace it with --overwrite"
            raise UserError(f"{final} was made from other input or options. {remedy}, or choose another id.")
    for variable in (PREPROCESSED, RESULTS):
        root = os.environ.get(variable)
        other = Path(root or "") / final.name
        if not root or not other.is_dir() or not any(other.iterdir()):
            continue
        known = list(_inputs_of(other)) or [stamp.get("input")]
        if all(value in (digest, described) for value in known):
            continue
        if not overwrite:
            remedy = "or choose another id" if overwrite is None else "choose another id, or say --overwrite"
            raise UserError(
                f"{other} belongs to other content of the same name. Remove it, {remedy} "
                "(and run nnUNetv2_plan_and_preprocess and the training again)."
            )
        click.echo(f"Note: {other} was made from other content and is out of date now.", err=True)


def _inputs_of(folder: Path) -> Iterator[str | None]:
    """Yield the input hash in each dataset.json of a preprocessed or results folder."""
    for path in [folder / "dataset.json", *folder.glob("*/dataset.json")]:
        if path.is_file():
            yield read_json(path).get(KEY, {}).get("protocol", {}).get("input")


def start(final: Path, digest: str) -> Path:
    """Return the folder to work in: a new one, or what an earlier run of the same input left."""
    folder = final.with_name(f".dgplugins-{final.name}")
    if _stamp(final).get("input") == digest and not folder.exists():
        os.rename(final, folder)  # a finished dataset that lost files: what is left is kept, the rest comes back
    if folder.exists():
        stamp = _stamp(folder)
        if stamp.get("input") != digest:
            shutil.rmtree(folder)
        else:
            for name, size in stamp["files"].items():
                if _size(folder / name) != size:
                    (folder / name).unlink(missing_ok=True)
            for path in folder.rglob(".tmp-*"):
                path.unlink()
            click.echo("Continuing an earlier run that did not finish.")
    write_json(folder / STAMP, {"format": FORMAT, "input": digest, "files": {}})
    return folder


def finish(folder: Path, final: Path, digest: str) -> None:
    """Write the stamp and give the folder its name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sizes = {name: _size(folder / name) for name in names if name not in _EDITABLE}
    folds = (folder / SPLITS).is_file()
    write_json(folder / STAMP, {"format": FORMAT, "input": digest, "files": sizes, "folds": folds})
    old = final.with_name(f".dgplugins-old-{final.name}")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        os.rename(final, old)
    os.rename(folder, final)
    if old.exists():
        shutil.rmtree(old)


def _stamp(folder: Path) -> dict[str, Any]:
    path = folder / STAMP
    content: dict[str, Any] = read_json(path) if path.is_file() else {}
    return content


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
