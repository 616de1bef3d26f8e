"""From a study's folder to what its report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_dgplugins import settings
from nnunet_dgplugins.data.case_table import KEY
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.comparison import COLUMNS
from nnunet_dgplugins.evaluation.evaluate import Classes
from nnunet_dgplugins.evaluation.report.content import Costs, Entry, Published, Report
from nnunet_dgplugins.files import PANELS, read_json
from nnunet_dgplugins.study.results import FILE, FORMAT
from nnunet_dgplugins.trainers.costs import CURVES, TRAINING


def read_study_results(out: Path) -> Report:
    """Return what a study has found so far.

    Args:
        out: its folder.

    Raises:
        UserError: no study's folder, or written by an earlier version.
    """
    import pandas

    if not (out / FILE).is_file():
        raise UserError(f"{out}: no {FILE} in it. It is no folder of a study, or nothing has been evaluated there yet.")
    content = read_json(out / FILE)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{out / FILE}: format {content.get('format')}, this version reads {FORMAT}. Run the study again "
            "(finished tasks are kept), it writes the file anew."
        )
    table = pandas.DataFrame(content["values"], columns=[*COLUMNS, "split"])
    table = table[table["case"].notna()]
    drawn = _drawn(content["runs"], out)
    entries = [replace(_entry(run, out), drawn=drawn.get(place)) for place, run in enumerate(content["runs"])]
    return Report(
        title=content["study"],
        table=table,
        protocol=content["protocol"],
        entries=entries,
        metric=content["metric"],
        baseline=baseline if (baseline := content["baseline"]) in set(table["method"]) else None,
        bounds=sorted({run["method"] for run in content["runs"] if run["bound"]}),
        collections=content["datasets"],
        budget=" ".join(reversed(content["budget"])).replace("--", ""),
        published=[Published(**row) for row in content["published"]],
    )


def _entry(run: Mapping[str, Any], out: Path) -> Entry:
    folds, raw = [out / fold for fold in run["folds"]], out / run["raw"]
    predictions = out / run["predictions"]
    stages = [_training(fold) for fold in folds]
    took = [values for values, _ in stages]
    costs = Costs(
        minutes=_of_all(sum, [values.get("minutes") for values in took]),
        prediction_seconds=run["seconds"].get("predict"),
        memory=_of_all(max, [values.get("peak_memory_bytes") for values in took]),
        gpu_memory=_of_all(max, [values.get("peak_gpu_memory_bytes") for values in took]),
        disk=sum(path.stat().st_size for fold in folds for path in fold.rglob("*") if path.is_file()),
    )
    facts = read_json(raw / "dataset.json") if (raw / "dataset.json").is_file() else {}
    panels = raw / PANELS
    return Entry(
        method=run["method"],
        dataset=run["dataset"],
        source=run["source"],
        ratio=run["ratio"],
        seed=run["seed"],
        predictions=predictions if predictions.is_dir() else None,
        labels=raw / "labelsTs",
        images=[raw / "imagesTs"],
        file_ending=facts["file_ending"] if facts else "",
        ignore=Classes.from_dataset_json(facts).ignore if facts else None,
        panels=panels if panels.is_file() else None,
        curves=stages[-1][1] if stages else {},
        settings=_settings(folds[-1].parent) if folds else {},
        costs=costs,
    )


def _drawn(runs: Sequence[Mapping[str, Any]], out: Path) -> dict[int, Path]:
    """Return the page of pseudo labels that each run drew for another one, by its place in the list."""
    models: dict[tuple[Any, ...], int] = {}
    for place, run in enumerate(runs):
        if run["folds"]:
            models[run["dataset"], run["seed"], Path(run["folds"][-1]).parts[-3:]] = place
    found = {}
    for run in runs:
        description, page = out / run["raw"] / "dataset.json", out / run["raw"] / PANELS
        if not (description.is_file() and page.is_file()):
            continue
        origin = read_json(description).get(KEY, {}).get("protocol", {}).get("pseudo_labels", {})
        # the model's dataset, folder and fold, and the name of its checkpoint; those of other seeds are called alike
        model = tuple(str(origin.get("model", "")).split("/")[:3])
        teacher = models.get((run["dataset"], run["seed"], model))
        if teacher is not None:
            found[teacher] = page
    return found


def _of_all(take: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    """Return the sum or highest of what every stage knows, None where one does not."""
    known = [value for value in values if value is not None]
    return take(known) if known and len(known) == len(values) else None


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
    found: Mapping[str, Any] = settings.configuration_block(read_json(plans), configuration, trainer) or {}
    return found
