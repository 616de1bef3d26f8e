"""Compares a folder of predictions with a folder of labels and returns one tidy table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.errors import BadInput, Problem, UserError, nearest
from nnunet_dgplugins.evaluation import dcam_protocol, desam_protocol, metrics, samsdg_protocol
from nnunet_dgplugins.evaluation.label_maps import LabelMap, read_label_map
from nnunet_dgplugins.evaluation.metrics import Metric
from nnunet_dgplugins.files import RAW, dataset_name, nnunet_folder, read_json

if TYPE_CHECKING:
    import pandas

PROTOCOLS: dict[str, dict[str, Metric]] = {
    "standard": metrics.METRICS,
    "desam": desam_protocol.METRICS,
    "samsdg": samsdg_protocol.METRICS,
    "dcam": dcam_protocol.METRICS,
}
COLUMNS = ["case", "site", "patient", "class", "metric", "value"]
UNKNOWN_SITE = "unknown site"
_FEW_CASES = 4  # below, a second process costs more than it saves


@dataclass(frozen=True)
class Classes:
    """What the labels of a dataset mean.

    Args:
        values: class or region name to the label values it consists of; the background is no class.
        ignore: value that means "not annotated", or None.
    """

    values: Mapping[str, tuple[int, ...]]
    ignore: int | None = None

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> Classes:
        """Read the ``labels`` of a dataset.json: integers, or lists of integers for regions."""
        values: dict[str, tuple[int, ...]] = {}
        ignore = None
        for name, label in dataset_json["labels"].items():
            if isinstance(label, str):
                raise UserError(
                    f"labels of dataset.json: '{name}: {label}'; nnU-Net v2 wants names first, then numbers."
                )
            if name == "ignore":
                ignore = int(label)
            elif name != "background":
                values[name] = tuple(map(int, label)) if isinstance(label, (list, tuple)) else (int(label),)
        return cls(values, ignore)

    def allowed(self, *, reference: bool) -> set[int]:
        """Return the values a file may hold; only a reference may hold the ignore label."""
        found = {0, *(value for members in self.values.values() for value in members)}
        return found | {self.ignore} if reference and self.ignore is not None else found


@dataclass(frozen=True)
class Dataset:
    """What evaluation needs to know of an nnU-Net raw dataset."""

    name: str
    folder: Path
    file_ending: str
    classes: Classes
    table: CaseTable

    @classmethod
    def load(cls, dataset: int | str) -> Dataset:
        """Read a raw dataset by id or name.

        Raises:
            UserError: no such dataset, or its dataset.json is missing or faulty.
        """
        name = dataset_name(dataset)
        folder = nnunet_folder(RAW) / name
        content = read_json(folder / "dataset.json")
        missing = [key for key in ("labels", "file_ending") if key not in content]
        if missing:
            raise UserError(f"{folder / 'dataset.json'}: lacks {' and '.join(missing)}.")
        table = CaseTable.from_dataset_json(content, str(folder / "dataset.json")) or CaseTable()
        return cls(name, folder, content["file_ending"], Classes.from_dataset_json(content), table)

    def files(self, folder: Path) -> dict[str, Path]:
        """Return case identifier -> file for the label maps in a folder, sorted by case."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder.")
        return {
            path.name[: -len(self.file_ending)]: path
            for path in sorted(folder.iterdir())
            if path.name.endswith(self.file_ending) and not path.name.startswith(".") and path.is_file()
        }

    def site_of(self, case: str) -> str:
        """Return the site of a case as it is printed."""
        return self.table.site_of(case) or UNKNOWN_SITE


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one folder of predictions.

    Args:
        dataset: whose cases they are.
        predictions: folder that was evaluated.
        labels: folder it was held against.
        protocol: one of :data:`PROTOCOLS`.
        table: columns case, site, patient, class, metric, value. Under ``samsdg`` a "case" is a canvas; under ``dcam``
            the metrics are counts of pixels, from which :mod:`~.tables` makes the numbers of sites.
        notes: what a reader of the numbers has to know, one sentence each.
    """

    dataset: Dataset
    predictions: Path
    labels: Path
    protocol: str
    table: pandas.DataFrame
    notes: list[str] = field(default_factory=list)


def evaluate(
    dataset: Dataset,
    predictions: Path,
    labels: Path | None = None,
    *,
    protocol: str = "standard",
    partial_folder: bool = False,
    jobs: int = 2,
) -> Evaluation:
    """Evaluate a folder of predictions.

    Args:
        dataset: the raw dataset the cases belong to.
        predictions: folder written by ``nnUNetv2_predict``.
        labels: folder of reference labels; None takes ``labelsTs`` of the dataset.
        protocol: ``standard``, ``desam``, ``samsdg`` or ``dcam``.
        partial_folder: whether cases that lack a prediction or a label are left out instead of being a problem.
        jobs: processes.

    Raises:
        UserError: a folder is missing or holds nothing.
        BadInput: missing files, grids that differ, unknown values, all reported together.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"No protocol '{protocol}'{nearest(protocol, PROTOCOLS)}.")
    from nnunet_dgplugins.parallel import run

    classes = _patch_classes(dataset) if protocol == "dcam" else dataset.classes
    labels = labels or dataset.folder / "labelsTs"
    truths, guesses = dataset.files(labels), dataset.files(predictions)
    for folder, files in ((labels, truths), (predictions, guesses)):
        if not files:
            raise UserError(f"{folder}: no file ending in {dataset.file_ending}.")
    cases, problems, notes = _pair(dataset, truths, guesses, labels, predictions, partial_folder)
    ends_left_out = any(dataset.table.protocol.get(key, False) for key in ("ends_left_out", "drop_empty_slices"))
    work = [(case, truths[case], guesses[case], classes, protocol, ends_left_out) for case in cases]
    results = run("Evaluating", _measure, work, jobs if len(work) >= _FEW_CASES else 1)
    for found in results:
        problems += found.problems
    if problems:
        raise BadInput(f"{predictions} cannot be evaluated against {labels}", problems)
    collect = _canvas_rows if protocol == "samsdg" else _case_rows
    rows = collect(dataset, {case: found.content for case, found in zip(cases, results, strict=True)}, notes)
    import pandas

    return Evaluation(dataset, predictions, labels, protocol, pandas.DataFrame(rows, columns=COLUMNS), notes)


def _patch_classes(dataset: Dataset) -> Classes:
    """Return the classes of protocol ``dcam``, which exclude each other: background too, unless it is no class."""
    values = dataset.classes.values
    if any(len(members) > 1 for members in values.values()):
        raise UserError(f"{dataset.name}: protocol dcam counts classes that exclude each other, not regions.")
    background = {dcam_protocol.BACKGROUND: (0,)} if dataset.table.protocol.get("background", True) else {}
    return Classes({**background, **values}, dataset.classes.ignore)


def _pair(
    dataset: Dataset,
    truths: Mapping[str, Path],
    guesses: Mapping[str, Path],
    labels: Path,
    predictions: Path,
    partial_folder: bool,
) -> tuple[list[str], list[Problem], list[str]]:
    """Return the cases to compare, what is missing, and what was left out on purpose."""
    ending, notes = dataset.file_ending, []
    without_label = [case for case in guesses if case not in truths]
    unlabelled = [c for c in without_label if c in dataset.table.cases and not dataset.table.cases[c].labelled]
    if unlabelled:
        notes.append(f"{len(unlabelled)} predicted cases have no voxel annotation by the case table and are left out.")
    problems: list[Problem] = []
    for cases, folder, what, other, remedy in (
        ([case for case in without_label if case not in unlabelled], predictions, "label", labels, "Add its label"),
        ([case for case in truths if case not in guesses], labels, "prediction", predictions, "Predict it"),
    ):
        if cases and partial_folder:
            notes.append(f"{len(cases)} cases in {folder} have no {what} and are left out (--partial).")
            continue
        for case in cases:
            expected = str(other / f"{case}{ending}")
            fix = f"{remedy}, or give --partial to evaluate the cases that have both."
            problems.append(Problem(str(folder / f"{case}{ending}"), f"no {what}", expected, fix))
    both = [case for case in truths if case in guesses]
    if not both and not problems:
        raise UserError(f"No case has both a prediction in {predictions} and a label in {labels}.")
    return both, problems, notes


@dataclass(frozen=True)
class _Found:
    """What one case gave: numbers by class (their kind depends on the protocol), or problems."""

    content: Any = None
    problems: list[Problem] = field(default_factory=list)


def _measure(
    case: str, truth_file: Path, guess_file: Path, classes: Classes, protocol: str, ends_left_out: bool
) -> _Found:
    """Read and compare one case; at module level, because worker processes import it."""
    maps, problems = [], []
    for path, is_reference in ((truth_file, True), (guess_file, False)):
        try:
            maps.append(read_label_map(path))
        except UserError as error:
            problems.append(Problem(case, str(error)))
            continue
        problems += _unknown_values(path, maps[-1].values, classes.allowed(reference=is_reference))
    if len(maps) == 2 and (difference := maps[0].geometry_difference(maps[1])):
        problems.append(Problem(str(guess_file), f"grid differs from the label's: {difference}", "the label's grid"))
    if problems:
        return _Found(problems=problems)
    return _Found(_compare(protocol, maps[0], maps[1], classes, ends_left_out))


def _compare(protocol: str, truth: LabelMap, guess: LabelMap, classes: Classes, ends_left_out: bool) -> Any:
    pair = (truth.values, guess.values)
    if protocol == "desam":
        return desam_protocol.case_dice(*pair, classes.values, classes.ignore)
    if protocol == "samsdg":
        return samsdg_protocol.slice_counts(*pair, classes.values, classes.ignore, ends_left_out=ends_left_out)
    if protocol == "dcam":
        return dcam_protocol.case_counts(*pair, classes.values)
    return metrics.class_metrics(*pair, truth.spacing, classes.values, classes.ignore)


def _unknown_values(path: Path, values: npt.NDArray[np.integer], allowed: set[int]) -> list[Problem]:
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low >= 0 and high <= 65535:  # counting is many times faster than sorting
        found = set(np.flatnonzero(np.bincount(values.ravel(), minlength=1)).tolist())
    else:
        found = set(np.unique(values).tolist())
    unknown = sorted(found - allowed)
    if not unknown:
        return []
    shown = ", ".join(map(str, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
    return [Problem(str(path), f"unknown values {shown}", f"{', '.join(map(str, sorted(allowed)))} (dataset.json)")]


def _case_rows(
    dataset: Dataset, results: Mapping[str, dict[str, dict[str, float]]], notes: list[str]
) -> list[tuple[Any, ...]]:
    rows = []
    left_out = set()
    for case, by_class in results.items():
        head = (case, dataset.site_of(case), dataset.table.patient_of(case))
        rows += [(*head, name, metric, value) for name, found in by_class.items() for metric, value in found.items()]
        if any(np.isnan(found.get("dice_desam", 0.0)) for found in by_class.values()):
            left_out.add(case)
    if left_out:
        notes.append(f"{len(left_out)} cases keep no foreground slice of some class and are left out of its mean.")
    return rows


def _canvas_rows(
    dataset: Dataset, results: Mapping[str, dict[str, list[samsdg_protocol.Counts]]], notes: list[str]
) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    dropped = 0
    for site in sorted({dataset.site_of(case) for case in results}):
        cases = sorted(case for case in results if dataset.site_of(case) == site)
        for name in dataset.classes.values:
            counts = [pair for case in cases for pair in results[case][name]]
            dropped += len(counts) % samsdg_protocol.TILES
            if len(counts) < samsdg_protocol.TILES:
                notes.append(f"{site}: {len(counts)} slices with {name}, no canvas; not in the mean of sites.")
            prefix = f"{name}, " if len(dataset.classes.values) > 1 else ""  # canvases of two classes are not the same
            for number, value in enumerate(samsdg_protocol.canvas_dice(counts), 1):
                rows.append((f"{prefix}canvas {number:03d}", site, None, name, "dice_samsdg", value))
    if dropped:
        notes.append(
            f"{dropped} slices are left over from groups of four and are not counted, as in the released code."
        )
    if not rows:
        raise UserError("No site has four slices with organ away from the ends of its volumes: no canvas to evaluate.")
    return rows
