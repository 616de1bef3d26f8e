"""Unpacks a tar file so that nothing in it can write outside its folder."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath

from nnunet_dgplugins.errors import BadInput, Problem, UserError


def unpack(archive: Path, folder: Path, endings: Collection[str]) -> None:
    """Write the files of an archive below ``folder``; only plain files, by name and content.

    Args:
        archive: the tar file, compressed or not.
        folder: where to.
        endings: of file names that are wanted, in lower case; all others are left out.

    Raises:
        BadInput: members with absolute paths or ``..``, links or devices; nothing is written.
        UserError: no tar file, or a damaged one.
    """
    try:
        with tarfile.open(archive) as file:
            members = file.getmembers()
            problems = [
                Problem(f"{archive}, member {member.name}", found, "plain files below the archive's top folder")
                for member in members
                if (found := _unsafe(member))
            ]
            if problems:
                raise BadInput(f"{archive} is not unpacked", problems)
            for member in members:
                content = file.extractfile(member) if member.isfile() else None
                if content is None or PurePosixPath(member.name).suffix.lower() not in endings:
                    continue
                target = folder.joinpath(*PurePosixPath(member.name).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as written:
                    shutil.copyfileobj(content, written)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}). Download it again.") from error


def _unsafe(member: tarfile.TarInfo) -> str:
    """Return what is wrong with a member, nothing if it may be written."""
    if PurePosixPath(member.name).is_absolute() or PureWindowsPath(member.name).anchor:
        return "an absolute path"
    if ".." in PureWindowsPath(member.name).parts:  # takes both kinds of slashes for separators
        return "a path that leaves the folder"
    if not (member.isfile() or member.isdir()):
        return "a link or a device"
    return ""
