"""From a study's folder to what its report shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_dgplugins import settings
from nnunet_dgplugins.budget import CURVES, TRAINING
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.comparison import COLUMNS
from nnunet_dgplugins.evaluation.report.content import Costs, Entry, Published, Report
from nnunet_dgplugins.files import read_json

RESULTS_FILE = "results.json"
_FORMAT = 2
_PANELS = "pseudo_labels.png"


def read_study_results(out: Path) -> Report:
    """Return what a study has found so far.

    Args:
        out: its folder.

    Raises:
        UserError: no study's folder, or written by an earlier version.
    """
    import pandas

    content = read_json(out / RESULTS_FILE)
    if content.get("format") != _FORMAT:
        raise UserError(
            f"{out / RESULTS_FILE}: format {content.get('format')}, this version reads {_FORMAT}. Run the study again "
            "(finished tasks are kept), it writes the file anew."
        )
    table = pandas.DataFrame(content["values"], columns=[*COLUMNS, "split"])
    entries = [_entry(run, out) for run in content["runs"]]
    return Report(
        title=content["study"],
        table=table,
        protocol=content["protocol"],
        entries=entries,
        metric=content["metric"],
        baseline=content["baseline"],
        collections=content["datasets"],
        budget=" ".join(reversed(content["budget"])).replace("--", ""),
        published=[Published(**row) for row in content["published"]],
    )


def _entry(run: Mapping[str, Any], out: Path) -> Entry:
    fold, raw = out / run["fold"], out / run["raw"]
    predictions = out / run["predictions"]
    seconds = run["seconds"]
    took, curves = _training(fold)
    costs = Costs(
        minutes=took.get("minutes"),
        prediction_seconds=seconds.get("predict"),
        memory=took.get("peak_memory_bytes"),
        gpu_memory=took.get("peak_gpu_memory_bytes"),
        disk=sum(path.stat().st_size for path in fold.rglob("*") if path.is_file()) if fold.is_dir() else None,
    )
    description = raw / "dataset.json"
    panels = raw / _PANELS
    return Entry(
        method=run["method"],
        dataset=run["dataset"],
        source=run["source"],
        ratio=run["ratio"],
        seed=run["seed"],
        predictions=predictions if predictions.is_dir() else None,
        labels=raw / "labelsTs",
        images=[raw / "imagesTs"],
        file_ending=read_json(description)["file_ending"] if description.is_file() else "",
        panels=panels if panels.is_file() else None,
        curves=curves,
        settings=_settings(fold.parent),
        costs=costs,
    )


def _training(fold: Path) -> tuple[Mapping[str, Any], Mapping[str, list[float]]]:
    """Return what a training took and its curves; trainings by other commands are asked for their checkpoint's log."""
    if (fold / TRAINING).is_file():
        found = read_json(fold / TRAINING)
        return found, found["curves"]
    final = fold / "checkpoint_final.pth"
    if not final.is_file():
        return {}, {}
    from nnunet_dgplugins.trainers.checkpoints import read_checkpoint

    log = read_checkpoint(final)["logging"]
    times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
    minutes = sum(end - start for start, end in times) / 60
    return {"minutes": minutes}, {key: [float(value) for value in log[key]] for key in CURVES if log.get(key)}


def _settings(model: Path) -> Mapping[str, Any]:
    """Return the settings kept beside a model of this package; nothing for a stock trainer."""
    trainer, _, configuration = [*model.name.split("__"), "", ""][:3]
    plans = model / "plans.json"
    if not plans.is_file():
        return {}
    block = read_json(plans)["configurations"].get(configuration, {}).get(settings.KEY, {})
    found: Mapping[str, Any] = block.get(trainer, {})
    return found
