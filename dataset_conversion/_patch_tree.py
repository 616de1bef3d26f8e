"""Reads the tree of a public set of tagged patches: names, flags, pairs of picture and mask, and what is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dataset_conversion._facts import Trouble, entries
from dataset_conversion._patches import TEST, TRAIN, VAL, Patch, PatchFacts, PatchSet, case_name, some
from nnunet_dgplugins.errors import Problem, UserError

#: share of a folder's files that may lack their partner: the public LUAD-HistoSeg has one such picture of 308
ORPHANS = 0.05
FLAGS = re.compile(r"[\s-]*\[(?P<flags>[^\[\]]*)\]\s*$")


def split_name(stem: str, tissues: int) -> tuple[str, tuple[int, ...] | None]:
    """Return a patch's name without its flags, and the flags: None where there are not exactly as many as tissues.

    The last square brackets hold them: ``[1 0 0 1]``, ``[1, 0, 0]`` or ``[1101]``.
    """
    match = FLAGS.search(stem)
    if match is None:
        return stem, None
    digits = re.sub(r"[\s,]", "", match["flags"])
    good = len(digits) == tissues and set(digits) <= {"0", "1"}
    return stem[: match.start()], tuple(map(int, digits)) if good else None


def add_tree(
    found: PatchSet, root: Path, facts: PatchFacts, training: bool, masks: Path | None = None, target: bool = False
) -> None:
    """Add the patches of a set's tree.

    Args:
        found: takes patches, troubles and notes.
        root: the set's folder, or one above it.
        facts: of the set.
        training: whether the training patches are wanted.
        masks: folder with the training patches' masks; None for training by tags.
        target: whether validation patches are test cases, too.

    Raises:
        UserError: a folder is missing or there twice.
    """
    tree, folders = _parts(root, facts, [TRAIN, VAL] if not target else [TRAIN] if training else [])
    if training:
        _add_training(found, tree, folders[TRAIN], facts, masks)
    for part in (VAL, TEST):
        if part in folders:
            _add_pairs(found, tree, folders[part], facts, TEST if target else part)
        else:
            found.notes.append(f"{tree}: no folder {facts.folders[part][0]}")


def _parts(root: Path, facts: PatchFacts, needed: Sequence[str]) -> tuple[Path, dict[str, Path]]:
    """Return the set's folder, ``root`` or one in it, and the folder of each part that is there."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder.")
    trees = {}
    for tree in [root, *(path for path in entries(root) if path.is_dir())]:
        there = {path.name.casefold(): path for path in entries(tree) if path.is_dir()}
        lists = {part: [there[name] for name in names if name in there] for part, names in facts.folders.items()}
        if any(lists.values()):
            trees[tree] = lists
        if root in trees:
            break
    if not trees:
        wanted = ", ".join(" or ".join(names) for names in facts.folders.values())
        raise UserError(
            f"{root}: none of the folders {wanted} is there. Name the folder of {facts.command} that has them."
        )
    named = [tree for tree in trees if _bare(tree.name) == _bare(facts.name)] if len(trees) > 1 else [*trees]
    if len(named) != 1:
        names = ", ".join(tree.name for tree in trees)
        raise UserError(f"{root}: several sets: {names}. Name the folder of {facts.command}.")
    tree = named[0]
    for part, paths in trees[tree].items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise UserError(f"{tree}: {names}: which one holds the {part} patches? Remove the other.")
        if part in needed and not paths:
            raise UserError(f"{tree}: no folder {' or '.join(facts.folders[part])}; {facts.command} needs it.")
    return tree, {part: paths[0] for part, paths in trees[tree].items() if paths}


def _bare(name: str) -> str:
    return "".join(filter(str.isalnum, name)).casefold()


def _add_training(found: PatchSet, tree: Path, folder: Path, facts: PatchFacts, masks: Path | None) -> None:
    code = facts.code(found.classes)
    position = {tissue.name: index for index, tissue in enumerate(facts.tissues)}
    truths = {} if masks is None else _by_name(pictures(masks, found), found, facts)
    paths = _by_name(pictures(folder, found), found, facts)
    if not paths:
        found.troubles.append(Trouble(Problem(str(folder), "no PNG file in it")))
    elif not any(map(facts.patient.match, paths)):  # another set's flags would be taken for this one's
        first = next(iter(paths.values())).name
        fix = "Is it another set? For patches of your own names there is patch-folder."
        problem = Problem(str(folder), f"no file is called as {facts.name}'s are, such as {first}", fix=fix)
        found.troubles.append(Trouble(problem))
    for bare, path in paths.items():
        name, (_, flags) = case_name(facts.site, bare), split_name(path.stem, len(facts.tissues))
        expected = f"{len(facts.tissues)} of 0 and 1 in the last square brackets"
        leave_out = f"Leave it out with --exclude {name}."
        if flags is None:
            problem = Problem(str(path), "its name has no such flags", expected, leave_out)
            found.troubles.append(Trouble(problem, case=name))
            continue
        if masks is not None and bare not in truths:
            problem = Problem(str(path), f"no mask {bare}.png in {masks}", fix=leave_out)
            found.troubles.append(Trouble(problem, case=name))
            continue
        tags = tuple(flags[position[name]] for name in found.classes)
        original = path.relative_to(tree).as_posix()
        found.patches.append(
            Patch(name, path, truths.get(bare), TRAIN, facts.site, _patient(bare, facts), original, tags, code)
        )


def _add_pairs(found: PatchSet, tree: Path, folder: Path, facts: PatchFacts, part: str) -> None:
    """Add the patches of ``img`` that have a mask of the same name in ``mask``."""
    there = {path.name.casefold(): path for path in entries(folder) if path.is_dir()}
    if "img" not in there or "mask" not in there:
        missing = " and ".join(name for name in ("img", "mask") if name not in there)
        text = f"{folder}: no folder {missing}"
        if part == VAL:
            found.troubles.append(Trouble(Problem(str(folder), f"no folder {missing}", "img and mask")))
        else:
            found.notes.append(f"{text}, left out: there is nothing to test against")
        return
    images, masks = (_by_name(pictures(there[name], found), found, facts) for name in ("img", "mask"))
    for kind, own, other in (("mask", images, masks), ("image", masks, images)):
        _report_orphans(found, folder, kind, sorted(set(own) - set(other)), len(own))
    code = facts.code(found.classes)
    for bare in sorted(set(images) & set(masks)):
        image = images[bare]
        original = image.relative_to(tree).as_posix()
        name, patient = case_name(facts.site, bare), _patient(bare, facts)
        found.patches.append(Patch(name, image, masks[bare], part, facts.site, patient, original, None, code))


def _report_orphans(found: PatchSet, folder: Path, lacking: str, stems: list[str], total: int) -> None:
    """Leave out files without partner where they are few; many mean that the download is not complete."""
    if not stems:
        return
    listed = ", ".join(stems)
    if len(stems) <= max(1, ORPHANS * total) and len(stems) < total:
        found.notes.append(f"{folder}: no {lacking} for {len(stems)} of {total} patches, left out: {listed}")
        return
    problem = Problem(
        str(folder), f"no {lacking} for {len(stems)} of {total} patches: {listed}",
        "img and mask with files of the same names", "Download the set again.",
    )  # fmt: skip
    found.troubles.append(Trouble(problem))


def pictures(folder: Path, found: PatchSet, endings: Sequence[str] = (".png",)) -> list[Path]:
    """Return the pictures of a folder, sorted by name; what else is there becomes one note."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    paths = entries(folder)
    good = [path for path in paths if path.suffix.casefold() in endings and (path.is_file() or path.is_symlink())]
    others = [path.name for path in paths if path.suffix.casefold() not in endings]
    if others:
        found.notes.append(f"{folder}: no {' or '.join(endings)} files, left out: {some(others)}")
    return good


def _by_name(paths: Sequence[Path], found: PatchSet, facts: PatchFacts) -> dict[str, Path]:
    """Return the files by their names without flags; two files of one patch are trouble."""
    named: dict[str, Path] = {}
    for path in paths:
        bare, _ = split_name(path.stem, len(facts.tissues))
        if named.setdefault(bare, path) != path:
            name = case_name(facts.site, bare)
            fix = "Keep the one with the right flags."
            problem = Problem(str(path), f"the same patch as {named[bare].name}", fix=fix)
            found.troubles.append(Trouble(problem, case=name))
    return named


def _patient(bare: str, facts: PatchFacts) -> str | None:
    match = facts.patient.match(bare)
    return match["patient"] if match else None
