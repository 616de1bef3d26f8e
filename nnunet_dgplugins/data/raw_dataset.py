"""A dataset in nnU-Net's raw layout: its cases and files. Importable without torch and without nnunetv2."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import PREPROCESSED, RAW, dataset_name, read_json, write_bytes, write_json


@dataclass(frozen=True)
class RawCase:
    """Files of one case: an image per channel, and the label if there is one."""

    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class RawDataset:
    """A folder ``nnUNet_raw/DatasetXXX_Name``.

    Args:
        folder: the folder.
        content: its dataset.json.
    """

    folder: Path
    content: dict[str, Any]

    @classmethod
    def open(cls, dataset: int | str) -> RawDataset:
        """Open a dataset by id or name.

        Raises:
            UserError: it has no raw folder with a dataset.json.
        """
        name = dataset_name(dataset)
        root = os.environ.get(RAW)
        folder = Path(root or "") / name
        if not root or not (folder / "dataset.json").is_file():
            raise UserError(f"{name}: no dataset.json in {RAW} ({root or 'not set'}).")
        return cls(folder, read_json(folder / "dataset.json"))

    @property
    def preprocessed(self) -> Path | None:
        """The preprocessed folder of the same dataset, None if there is none yet."""
        root = os.environ.get(PREPROCESSED)
        folder = Path(root or "") / self.folder.name
        return folder if root and (folder / "dataset.json").is_file() else None

    @property
    def file_ending(self) -> str:
        """The ending of every image and label."""
        return str(self.content.get("file_ending", ".nii.gz"))

    @property
    def table(self) -> CaseTable | None:
        """The case table, None if the dataset was never annotated."""
        return CaseTable.from_dataset_json(self.content, str(self.folder / "dataset.json"))

    @cached_property
    def training(self) -> Mapping[str, RawCase]:
        """Cases of imagesTr, or those that dataset.json lists by file."""
        listed = self.content.get("dataset")
        if listed is None:
            return self._scan("Tr")
        return {
            name: RawCase(tuple(self._path(text) for text in files["images"]), self._path(files["label"]))
            for name, files in sorted(listed.items())
        }

    @cached_property
    def test(self) -> Mapping[str, RawCase]:
        """Cases of imagesTs."""
        return self._scan("Ts")

    def _path(self, text: str) -> Path:
        return self.folder / os.path.expandvars(text)  # an absolute path stays what it is

    def _scan(self, part: str) -> dict[str, RawCase]:
        folder = self.folder / f"images{part}"
        pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(self.file_ending)}")
        images: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            match = pattern.fullmatch(path.name)
            if match is not None and not path.name.startswith("."):
                images.setdefault(match[1], []).append(path)
        labels = {name: self.folder / f"labels{part}" / f"{name}{self.file_ending}" for name in images}
        return {
            name: RawCase(tuple(paths), labels[name] if labels[name].exists() else None)
            for name, paths in images.items()
        }


def write_together(files: Mapping[Path, Any]) -> list[Path]:
    """Write several JSON files, all or none of them; what they held before stays beside them as ``<name>.bak``.

    Args:
        files: path to new content. Files that hold it already are left alone.

    Returns:
        The files that changed.

    Raises:
        UserError: one could not be written; none was changed.
    """
    old = {path: path.read_bytes() if path.is_file() else None for path in files}
    changed = [path for path in files if old[path] is None or read_json(path) != files[path]]
    done: list[Path] = []
    try:
        for path in changed:
            _back_up(path, old[path])
        for path in changed:
            write_json(path, files[path])
            done.append(path)
    except OSError as error:
        for path in done:
            content = old[path]
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_bytes(path, content)
        raise UserError(f"{error}. Nothing was changed.") from error
    return changed


def _back_up(path: Path, content: bytes | None) -> None:
    if content is None:
        return
    number = 1
    while True:
        backup = path.with_name(f"{path.name}.bak{'' if number == 1 else number}")
        if not backup.exists():
            write_bytes(backup, content)
            return
        if backup.read_bytes() == content:
            return
        number += 1
