"""The command of the three public sets of tagged patches, defined once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dataset_conversion._patch_tree import add_tree
from dataset_conversion._patches import (
    COMMON_ORDER,
    MASKS,
    PUBLISHED,
    RELEASE,
    STRICT,
    TAGS,
    TEST,
    TWO,
    PatchFacts,
    PatchRequest,
    PatchSet,
)
from nnunet_dgplugins.errors import UserError, nearest

PATCH_SETS = ("luad-histoseg", "bcss-wsss", "wsss4luad")  # those that can be a target of each other
_SETTINGS = {"help_option_names": ["-h", "--help"]}


def shared_options(dataset_id: int) -> list[Callable[..., Any]]:
    """Return the options that every converter of patches has."""
    return [
        click.argument("root", type=click.Path(path_type=Path)),
        click.option("--id", "dataset_id", type=click.IntRange(1, 999), default=dataset_id, show_default=True,
                     help="nnU-Net's dataset id."),
        click.option("--supervision", type=click.Choice([TAGS, MASKS]), default=TAGS, show_default=True,
                     help="Weak dataset of tags, or its fully supervised twin where training masks exist."),
        click.option("--resize", type=click.IntRange(32), metavar="PIXELS",
                     help="Give every patch this side: pictures bilinear, masks nearest. [default: as they are]"),
        click.option("--exclude", multiple=True, metavar="CASE", help="Patch or patient to leave out; repeatable."),
        click.option("--copy/--link", "copy", default=True, show_default=True,
                     help="Copy pictures, or link those that need no change."),
        click.option("--overwrite", is_flag=True, help="Replace an earlier conversion of other input or options."),
        click.option("--jobs", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True,
                     help="Processes."),
    ]  # fmt: skip


def build(name: str, text: str, options: Sequence[Callable[..., Any]], callback: Callable[..., Any]) -> click.Command:
    """Return a click command with these options."""
    wrapped = callback
    for option in reversed(options):
        wrapped = option(wrapped)
    return click.command(name, help=text, context_settings=_SETTINGS)(wrapped)


def make_patch_command(facts: PatchFacts, text: str) -> click.Command:
    """Return the click command of a public set.

    Args:
        facts: what the converter knows about it.
        text: first lines of ``--help``.
    """
    count = len(facts.tissues)
    options = [
        *shared_options(facts.dataset_id),
        click.option("--classes", type=click.Choice([str(count), str(len(TWO))]), default=str(count), show_default=True,
                     help=f"{', '.join(facts.classes(None))}; or {' and '.join(TWO)}, the others excluded."),
        click.option("--target", "targets", multiple=True, metavar="NAME=ROOT",
                     help=f"Set of another hospital to test on, of {', '.join(set_names(facts))}; may be repeated."),
        click.option("--protocol", type=click.Choice([STRICT, RELEASE]), default=STRICT, show_default=True,
                     help="strict: targets are seen at test only. release: their tagged training patches come along, "
                          "for stage 2."),
        click.option("--train-masks", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
                     help="Masks of the training patches, for --supervision masks; no public download has them."),
    ]  # fmt: skip
    if facts.classes(None) != facts.classes(None, COMMON_ORDER):
        shown = ", ".join(facts.classes(None, COMMON_ORDER))
        options.append(
            click.option("--order", type=click.Choice([PUBLISHED, COMMON_ORDER]), default=PUBLISHED, show_default=True,
                         help=f"Order of the label values; common: {shown}, as in the other sets.")
        )  # fmt: skip

    def callback(**values: Any) -> None:
        from dataset_conversion._patch_dataset import convert_patches

        request = make_request(values)
        convert_patches(collect(facts, request), request)

    return build(facts.command, text, options, callback)


def set_names(facts: PatchFacts) -> list[str]:
    """Return the other sets."""
    return [name for name in PATCH_SETS if name != facts.command]


def make_request(values: Mapping[str, Any]) -> PatchRequest:
    """Return the request of a command line."""
    rest = {key: value for key, value in values.items() if key not in ("copy", "classes")}
    return PatchRequest(link=not values["copy"], classes=int(values["classes"]), **rest)


def dataset_name(facts: PatchFacts, values: Mapping[str, Any]) -> str:
    """Return the name of the dataset that a command line would write; no file is opened."""
    request = make_request(values)
    return _title(facts, request, [target for target, _ in _targets(facts, request)])


def _title(facts: PatchFacts, request: PatchRequest, targets: Sequence[PatchFacts]) -> str:
    parts = [facts.name, f"{len(facts.classes(request.classes))}classes"]
    if targets:
        release = "-release" if request.protocol == RELEASE else ""
        parts.append("to-" + "-".join(target.site for target in targets) + release)
    return f"Dataset{request.dataset_id:03d}_{'_'.join(parts)}_{request.supervision}"


def _targets(facts: PatchFacts, request: PatchRequest) -> list[tuple[PatchFacts, Path]]:
    """Return the facts and folder of each target.

    Raises:
        UserError: not NAME=ROOT, an unknown set, the source itself, or one named twice.
    """
    from dataset_conversion._registry import load_converter

    found: list[tuple[PatchFacts, Path]] = []
    for text in request.targets:
        name, _, root = text.partition("=")
        if not root:
            raise UserError(f"--target {text}: expected NAME=ROOT, for instance {set_names(facts)[0]}=FOLDER.")
        if name not in set_names(facts):
            raise UserError(f"--target {text}: no other set '{name}'{nearest(name, set_names(facts))}")
        target = load_converter(name).FACTS
        if target in [other for other, _ in found]:
            raise UserError(f"--target {text}: {name} is named twice.")
        found.append((target, Path(root)))
    return found


def collect(facts: PatchFacts, request: PatchRequest) -> PatchSet:
    """List the patches of the source and of the targets.

    Raises:
        UserError: folders are missing, or options contradict each other.
    """
    targets = _targets(facts, request)
    if request.protocol == RELEASE and not targets:
        raise UserError(f"--protocol {RELEASE} is about training patches of a target; name it with --target NAME=ROOT.")
    if request.supervision == MASKS and request.protocol == RELEASE:
        raise UserError(f"--protocol {RELEASE} is about tagged patches; leave out --supervision {MASKS}.")
    if (request.supervision == MASKS) != (request.train_masks is not None):
        raise UserError(
            f"--supervision {MASKS} and --train-masks FOLDER go together: {facts.command} has masks of validation and "
            "test patches only."
        )
    classes = facts.classes(request.classes, request.order)
    trained = targets[0][0] if request.protocol == RELEASE else facts  # whose patches get pseudo masks
    options = {
        "converter": facts.command,
        "supervision": request.supervision,
        "classes": list(classes),
        "targets": [target.site for target, _ in targets],
        "protocol": request.protocol,
        "resize": request.resize,
        "white_background": trained.white and len(classes) != len(TWO),
        "excluded": sorted(request.exclude),
    }
    name = _title(facts, request, [target for target, _ in targets])
    found = PatchSet(facts.command, name, classes, options, facts.reference, facts.licence, facts.site)
    add_tree(found, request.root, facts, training=True, masks=request.train_masks)
    for target, root in targets:
        add_tree(found, root, target, training=request.protocol == RELEASE, target=True)
        if not any(patch.part == TEST and patch.site == target.site for patch in found.patches):
            raise UserError(f"{root}: no patch with a mask to test on, in {target.command}.")
    found.close(request.exclude)
    return found
