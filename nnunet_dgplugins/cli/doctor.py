"""``dgplugins doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from nnunet_dgplugins.cli.options import json_option, print_json, print_rows


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Check versions, nnU-Net's folders, the lookup of every trainer, GPU, disk, SAM files; exit code 1 on failure."""
    checks = [
        *_versions(), *_folders(), *_lookup(), *_accelerator(), *_sam_files(), *_second_networks(), *_loggers(),
    ]  # fmt: skip
    good = all(check["state"] != "failed" for check in checks)
    if as_json:
        print_json({"good": good, "checks": checks})
    else:
        print_rows(
            [(f"{_MARK[c['state']]} {c['what']}", c["found"] + (f" -> {c['fix']}" if c["fix"] else "")) for c in checks]
        )
        click.echo("\nAll good." if good else "\nSomething failed: see the lines marked x.")
    if not good:
        raise SystemExit(1)


_MARK = {"good": "+", "note": "-", "failed": "x"}


def _check(what: str, state: str, found: str, fix: str = "") -> dict[str, Any]:
    return {"what": what, "state": state, "found": found, "fix": fix}


def _versions() -> list[dict[str, Any]]:
    checks = [_check("python", "good", f"{platform.python_version()} ({sys.executable})")]
    for name in ("nnunet_dgplugins", "nnunetv2", "torch", "torchvision", "segment-anything", "SimpleITK"):
        try:
            checks.append(_check(name, "good", metadata.version(name)))
        except metadata.PackageNotFoundError:
            checks.append(
                _check(name, "failed", "not installed", "pip install nnunet_dgplugins from its checkout again")
            )
    return checks


def _folders() -> list[dict[str, Any]]:
    checks = []
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        value = os.environ.get(variable)
        if not value:
            checks.append(_check(variable, "failed", "not set", f"export {variable}=/a/folder"))
        elif not Path(value).is_dir():
            checks.append(_check(variable, "note", f"{value} does not exist yet", "nnU-Net makes it"))
        elif not os.access(value, os.W_OK):
            checks.append(_check(variable, "failed", f"{value} is not writable"))
        else:
            free = shutil.disk_usage(value).free / 2**30
            checks.append(_check(variable, "good", f"{value} ({free:.0f} GiB free)"))
    return checks


def _lookup() -> list[dict[str, Any]]:
    """Resolve every trainer through nnU-Net's own lookup, as nnUNetv2_train does."""
    from contextlib import redirect_stdout
    from io import StringIO

    from nnunet_dgplugins import ext
    from nnunet_dgplugins.registry import TRAINERS

    variable = os.environ.get(ext.VARIABLE)
    checks = [
        _check(ext.VARIABLE, "good" if variable else "failed", variable or "not set", "" if variable else _BY_HAND)
    ]
    try:
        with redirect_stdout(StringIO()):
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    except ImportError as error:
        return [*checks, _check("trainer lookup", "failed", f"nnunetv2 cannot be imported: {error}")]
    for name, info in TRAINERS.items():
        try:
            with redirect_stdout(StringIO()):
                found = recursive_find_trainer_class_by_name(name)
            checks.append(_check(name, "good", f"{found.__module__} ({info.stage})"))
        except Exception as error:  # whatever an import raises is the answer the user needs
            checks.append(_check(name, "failed", f"{type(error).__name__}: {error}", _BY_HAND))
    return checks


_BY_HAND = "export nnUNet_extTrainer=$(python -m nnunet_dgplugins.ext)"


def _accelerator() -> list[dict[str, Any]]:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return [_check("GPU", "good", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")]
    return [_check("GPU", "note", f"none; {os.cpu_count()} CPU cores", "train and predict with -device cpu")]


def _sam_files() -> list[dict[str, Any]]:
    from nnunet_dgplugins.sam.models import AUTO, MODELS, VARIABLE, get_model, what_a_file_adds

    folder, default = os.environ.get(VARIABLE), get_model(AUTO)
    checks = [
        _check(VARIABLE, "good" if folder else "note", folder or "not set"),
        _check("SAM encoder, sam=auto", "good", default.described, what_a_file_adds() if default.shipped else ""),
    ]
    for model in MODELS.values():
        if found := model.find():
            checks.append(_check(model.name, "good", str(found)))
        elif model.shipped:
            checks.append(_check(model.name, "failed", f"{model.file} is missing", "install nnunet_dgplugins again"))
        else:
            checks.append(_check(model.name, "note", "no file", f"{model.url} -> {VARIABLE}"))
    return checks


def _loggers() -> list[dict[str, Any]]:
    """Say which loggers are on, and whether a training could begin with them."""
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.trainers import loggers

    wandb = os.environ.get("nnUNet_wandb_enabled") in ("1", "True", "true")  # noqa: SIM112 - nnU-Net's own words
    on = [*loggers.named(), *["wandb"] * wandb]
    checks = []
    for name, install in {"wandb": "pip install wandb", **loggers.INSTALL}.items():
        there = loggers.is_installed(name)
        state = "note" if name not in on else "good" if there else "failed"
        found = f"{'on' if name in on else 'off'}, {'installed' if there else 'not installed'}"
        checks.append(_check(f"logger {name}", state, found, "" if there else install))
    try:
        loggers.asked()
    except UserError as error:
        checks.append(_check(loggers.VARIABLE, "failed", str(error)))
    return checks


def _second_networks() -> list[dict[str, Any]]:
    """Mention folds that hold EPL's second network: nnU-Net's Python interface takes them in unasked."""
    from nnunet_dgplugins.files import RESULTS

    results = os.environ.get(RESULTS)
    if not results:
        return []
    from nnunet_dgplugins.trainers.second_network import exported_folds

    return [
        _check("EPL, network 2", "note", str(folder), "averaged in by -f k 100+k, and by use_folds=None in Python")
        for folder in exported_folds(Path(results))
    ]
