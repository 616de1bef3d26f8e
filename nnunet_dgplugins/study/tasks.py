"""From a study to commands that a user could type, in an order in which they can run.

Everything that decides a task's result is part of its key: its command, its environment and the keys of what it needs.
A task whose stamp carries its key is done. Folders carry keys too, so a changed setting makes new results beside the
old ones: nothing is overwritten, and going back costs nothing.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dataset_conversion._command import planned_name
from dataset_conversion._registry import load_converter
from nnunet_dgplugins import __version__, settings
from nnunet_dgplugins.data.splits import SPLITS
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import (
    CAM_VALIDATION,
    PREPROCESSED,
    RAW,
    RESULTS,
    VALIDATION_MASKS,
    content_hash,
    file_sha256,
)
from nnunet_dgplugins.registry import TRAINERS
from nnunet_dgplugins.sam.models import get_model
from nnunet_dgplugins.study.definition import ALL, PLANNERS, Data, Method, Study

#: stock commands take their threads and processes from here; none loads data in a process of its own, so that one seed
#: gives one result
_QUIET = {"nnUNet_def_n_proc": "1"}
_PLANNING, _TRAINING = {**_QUIET, "nnUNet_n_proc_DA": "1"}, {**_QUIET, "nnUNet_n_proc_DA": "0"}
#: configurations whose data ResEnc presets share with the first plans; nnU-Net would remove and write them anew while
#: other tasks read them
_SHARED = ("2d", "3d_fullres")


@dataclass(frozen=True)
class Run:
    """What one training stands for in the tables.

    Args:
        method: name in the study.
        dataset: collection.
        source: site trained on.
        ratio: labelled share, None for all.
        seed: of everything random.
        folder: receives ``source.csv`` and ``unseen.csv`` of ``dgplugins evaluate``.
        folds: the dataset's folds, which say whether its validation cases are training cases.
        stages: folders of the trained folds, one per stage, the method's own last.
        bound: whether it has seen what no user has: a bound, no competitor.
        predictions: folder of the predicted unseen cases.
        raw: the dataset it was trained on.
    """

    method: str
    dataset: str
    source: str
    ratio: float | None
    seed: int
    folder: Path
    folds: Path | None = None
    stages: tuple[Path, ...] = ()
    bound: bool = False
    predictions: Path | None = None
    raw: Path | None = None


@dataclass(frozen=True)
class Task:
    """One command.

    Args:
        name: for people; unique in a study.
        kind: tasks of one kind take about the same time.
        command: words.
        environment: set for the command, over the study's own.
        needs: keys of tasks that come before.
        inputs: what else decides the result, such as the hash of a weight file.
        run: the training it belongs to.
        seed: of that training, also where the task makes no result of it; None: for all seeds.
        replaces: what it overwrites, which another task of the same words here may have written before; else empty.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    inputs: str = ""
    run: Run | None = None
    seed: int | None = None
    replaces: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the result."""
        return content_hash([self.command, dict(self.environment), self.needs, self.inputs, __version__])

    @property
    def typed(self) -> str:
        """The command as a user would type it."""
        shown = {key: value for key, value in self.environment.items() if key.startswith("nnUNet_")}
        return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in shown.items()), shlex.join(self.command)])


def expand(study: Study, out: Path, device: str) -> list[Task]:
    """Return every task of a study, each behind those it needs.

    Args:
        study: what to do.
        out: folder of the study; nnU-Net's three folders of every dataset lie in it.
        device: where training and prediction run.
    """
    tasks: list[Task] = []
    for data in study.datasets:
        tasks += _Collection(study, data, out, device).tasks()
    # seeds outside: a study that is stopped early has compared every method and source, with fewer seeds
    return sorted(tasks, key=lambda task: -1 if task.seed is None else study.seeds.index(task.seed))


def refuse_taken_ids(tasks: Sequence[Task]) -> None:
    """Refuse a study whose datasets have other names under the same ids than when it ran before.

    Raises:
        UserError: sources or seeds were not added at the end, so that ids behind them moved.
    """
    taken = {
        f"{raw.name} would get the id of {other.name}"
        for raw in {task.run.raw for task in tasks if task.run and task.run.raw}
        for other in raw.parent.glob(f"{raw.name[:11]}*")
        if other.name != raw.name
    }
    if taken:
        raise UserError(
            "The file's sources, ratios, seeds or methods with pseudo labels have changed so that ids moved: "
            f"{'; '.join(sorted(taken))}. Add new ones behind the others, or choose another first_id or --out."
        )


def slug(text: str) -> str:
    """Return text as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


class _Collection:
    """Expands one collection."""

    def __init__(self, study: Study, data: Data, out: Path, device: str):
        self.study, self.data, self.out, self.device = study, data, out, device
        # another download or other options are other data, in a folder of their own
        parts = [__version__, data.convert, data.download, data.prepare, data.first_id, data.options, *data.spacing]
        parts += [data.masks] if data.masks else []
        mark = content_hash(parts)[:8]
        self.folder = out / "data" / f"{slug(data.name)}-{mark}"
        self.download = data.download or str(self.folder / "download")
        self.made: list[Task] = []

    def tasks(self) -> list[Task]:
        needs: tuple[str, ...] = ()
        prepare = self.data.prepare or ()
        for number, command in enumerate((prepare,) if isinstance(prepare, str) else prepare, 1):
            words = [word.replace("{download}", self.download) for word in shlex.split(command)]
            needs = (self.add("prepare" if number == 1 else f"prepare {number}", "prepare", words, needs),)
        variants, methods = self.data.variants(), self.study.methods
        own = [method for method in methods if not method.masks]
        for source, ratio, number in variants:
            _Variant(self, self.data, own, source, ratio, number).expand(needs)
        ceilings = [method for method in methods if method.masks]
        if ceilings:
            source, ratio, _ = variants[0]  # data with tags have one
            _Variant(self, self.data.twin, ceilings, source, ratio, self.data.twin_id).expand(needs)
        return self.made

    def add(
        self,
        name: str,
        kind: str,
        command: Sequence[str],
        needs: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        run: Run | None = None,
        inputs: str = "",
        seed: int | None = None,
        replaces: str = "",
    ) -> str:
        """Add a task, return its key."""
        base = {RAW: self.folder / RAW, PREPROCESSED: self.folder / PREPROCESSED, RESULTS: self.folder / RESULTS}
        folders = {key: str(value) for key, value in base.items()}
        words = tuple(sys.executable if word == "python" else word for word in command)
        own = {**folders, **(environment or {})}
        seed = run.seed if run else seed
        task = Task(f"{self.data.name}: {name}", kind, words, own, needs, inputs, run, seed, replaces)
        self.made.append(task)
        return task.key


class _Variant:
    """Expands one source and ratio of a collection, or its twin with masks: one nnU-Net dataset and its methods."""

    def __init__(
        self, collection: _Collection, data: Data, methods: Sequence[Method], source: str, ratio: float | None,
        number: int,
    ):  # fmt: skip
        self.all, self.study, self.source, self.ratio = collection, collection.study, source, ratio
        self.data, self.methods = data, methods
        self.id = str(number)
        self.title = source + (f" {ratio:g}" if ratio else "") + ("" if data is collection.data else " masks")
        words = [collection.download, "--id", self.id, *([] if source == ALL else ["--source", source])]
        words += [] if ratio is None else ["--ratio", f"{ratio:g}"]
        self.words = [*words, *(word.replace("{download}", collection.download) for word in data.options)]
        self.dataset = planned_name(load_converter(data.convert), self.words)
        # training of each method of tags by seed, and its model folder: pseudo labels are made of them
        self.teachers: dict[tuple[str, int], tuple[str, Path, Mapping[str, str]]] = {}
        self.pseudo_id = collection.data.first_pseudo_id

    def expand(self, needs: tuple[str, ...]) -> None:
        data, configuration = self.data, self.study.configuration
        convert = ["dgplugins", "convert", data.convert, *self.words]
        converted = self.all.add(f"convert {self.title}", "convert", convert, needs)
        spacing = ["-overwrite_target_spacing", *(f"{length:g}" for length in data.spacing)] if data.spacing else []
        plan = ["nnUNetv2_plan_and_preprocess", "-d", self.id, "-c", configuration, "--verify_dataset_integrity"]
        planned = {
            "nnUNetPlans": self.all.add(
                f"plan {self.title}",
                "plan",
                [*plan, "-np", "1", "-npfp", "1", "--no_pbar", *spacing],
                (converted,),
                _PLANNING,
            )
        }
        ready: list[tuple[Method, str, str]] = []
        for method in self.methods:
            if method.plans not in planned:
                words = ["nnUNetv2_plan_experiment", "-d", self.id, "-pl", PLANNERS[method.plans], *spacing]
                planned[method.plans] = self.all.add(
                    f"plan {self.title} {method.plans}", "plan again", words, (planned["nnUNetPlans"],), _PLANNING
                )
                if configuration not in _SHARED:
                    words = ["nnUNetv2_preprocess", "-d", self.id, "-plans_name", method.plans, "-c", configuration]
                    planned[method.plans] = self.all.add(
                        f"preprocess {self.title} {method.plans}", "preprocess", [*words, "-np", "1", "--no_pbar"],
                        (planned[method.plans],), _PLANNING,
                    )  # fmt: skip
            ready.append((method, *self._settings(method, planned[method.plans])))
        for seed in self.study.seeds:
            for method, plans, key in ready:
                self._run(method, plans, seed, key)

    def _settings(self, method: Method, planned: str) -> tuple[str, str]:
        """Add what a method needs before its trainings; return the name of its plans and the key to wait for."""
        plans, ready, name = method.plans, planned, f"{self.title} {method.name}"
        own = method.trainer in TRAINERS
        if method.pseudo_labels:  # it trains on another dataset
            return plans, ready
        steps = [(method.trainer, method.settings, method.smaller)] if method.smaller or method.settings else []
        steps += [(method.earlier, method.earlier_settings, ())] if method.earlier_settings else []
        if steps:
            mark = content_hash([method.smaller, *(dict(chosen) for _, chosen, _ in steps)])[:8]
            plans = f"{method.plans}_{slug(method.name)}_{mark}"
        source = method.plans
        for trainer, chosen, smaller in steps:
            words = ["dgplugins", "configure", self.id, "-p", source, "-o", plans, "-c", self.study.configuration]
            words += [*smaller, *(["-tr", trainer, "--set", *_set_words(chosen)] if chosen else [])]
            title = "configure stage before" if trainer != method.trainer else "configure"
            ready = self.all.add(f"{title} {name}", "configure", words, (ready,))
            source = plans
        if own and "store" in settings.settings_class(TRAINERS[method.trainer].settings).__dataclass_fields__:
            words = ["dgplugins", "embed", self.id, "-tr", method.trainer, "-p", plans, "--device", self.all.device]
            ready = self.all.add(
                f"embed {name}", f"embed {method.name}", [*words, "-c", self.study.configuration], (ready,),
                inputs=_weights(str(method.settings.get("sam", "auto"))),
            )  # fmt: skip
        return plans, ready

    def _run(self, method: Method, plans: str, seed: int, ready: str) -> None:
        study, device, configuration = self.study, self.all.device, self.study.configuration
        name = f"{self.title} {method.name} seed {seed}"
        number, dataset = self.id, self.dataset
        if method.pseudo_labels:
            number, dataset, plans, ready = self._pseudo_labels(method, plans, seed, name)
        share = [method.earlier_share] if method.earlier_share else []
        mark = content_hash([ready, plans, method.trainer, study.budget.words(), device, configuration, *share])[:8]
        parts = (f"{slug(self.all.data.name)}_{slug(self.title)}", slug(method.name), f"seed{seed}-{mark}")
        folder = self.all.out.joinpath("runs", *parts)
        # what a training is tested with has a place of its own: going back to another way finds its results again
        way = "_four" if method.four_slices else "_mirrored" if study.mirroring else ""
        values = folder / f"{study.protocol}{way}"
        raw = self.all.folder / RAW / dataset
        model = folder / RESULTS / dataset / f"{method.trainer}__{plans}__{configuration}"
        predictions = folder / f"predictions{way}"
        stages = tuple(
            model.parent / f"{trainer}__{plans}__{configuration}" / "fold_0" for trainer in _stages(method.trainer)
        )
        run = Run(
            method.name, self.all.data.name, self.source, self.ratio, seed, values, raw / SPLITS, stages, method.bound,
            predictions, raw,
        )  # fmt: skip
        own = {**_TRAINING, RESULTS: str(folder / RESULTS)}
        where = ["-tr", method.trainer, "-p", plans, "-device", device]
        trained = ready
        for stage, trainer in enumerate(_stages(method.trainer), 1):
            train = ["python", "-m", "nnunet_dgplugins.budget", number, configuration, "0", "-tr", trainer, *where[2:]]
            train += [*method.budget(study.budget, trainer).words(), "--seed", str(seed)]
            title = "train" if trainer == method.trainer else f"train stage {stage}"
            trained = self.all.add(f"{title} {name}", f"{title} {method.name}", train, (trained,), own, run)
        self.teachers[method.name, seed] = trained, model, own
        # a weak dataset keeps the masks of validation cases apart, and trainers of tags their predictions
        truth = raw / (VALIDATION_MASKS if self.data.weak else "labelsTr")
        held_out = model / "fold_0" / (CAM_VALIDATION if method.reads_tags else "validation")
        source = ["dgplugins", "evaluate", number, str(held_out), "--labels", str(truth)]
        protocol = [] if study.protocol == "standard" else ["--protocol", study.protocol]
        source += ["--partial", "--csv", str(values / "source.csv"), *protocol]
        self.all.add(f"evaluate source {name}", "evaluate", source, (trained,), own, run)
        words = [
            "-d",
            number,
            "-i",
            str(raw / "imagesTs"),
            "-o",
            str(predictions),
            "-f",
            "0",
            "-c",
            configuration,
            *where,
        ]
        if method.four_slices:
            predict = ["dgplugins", "predict", *words]
            predict += ["--masks", str(raw / "labelsTs")] if method.settings.get("boxes") == "masks" else []
        else:
            predict = ["nnUNetv2_predict", *words, "-npp", "0", "-nps", "0"]
            predict += [] if study.mirroring else ["--disable_tta"]
        predicted = self.all.add(f"predict {name}", f"predict {method.name}", predict, (trained,), own, run)
        unseen = ["dgplugins", "evaluate", number, str(predictions), "--csv", str(values / "unseen.csv"), *protocol]
        self.all.add(f"evaluate unseen {name}", "evaluate", unseen, (predicted,), own, run)

    def _pseudo_labels(self, method: Method, plans: str, seed: int, name: str) -> tuple[str, str, str, str]:
        """Add the dataset of another method's pseudo labels; return its id, name, plans and the key to wait for."""
        trained, model, own = self.teachers[str(method.pseudo_labels), seed]
        number, self.pseudo_id = str(self.pseudo_id), self.pseudo_id + 1
        words = ["dgplugins", "pseudo-labels", str(model), "--out", number, "--device", self.all.device, "--overwrite"]
        made = self.all.add(
            f"pseudo-labels {name}", "pseudo-labels", [*words, *method.pseudo_options], (trained,), own, seed=seed,
            replaces=str(self.all.folder / RAW / number),
        )  # fmt: skip
        plan = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", self.study.configuration, "-np", "1", "-npfp", "1"]
        prepared = self.all.folder / PREPROCESSED / number
        ready = self.all.add(
            f"plan {name}", "plan", [*plan, "--no_pbar"], (made,), _PLANNING, seed=seed, replaces=str(prepared)
        )
        if method.smaller:
            small = f"{plans}_small_{content_hash(method.smaller)[:8]}"
            words = ["dgplugins", "configure", number, "-p", plans, "-o", small, "-c"]
            plans = small
            words += [self.study.configuration, *method.smaller]
            ready = self.all.add(
                f"configure {name}", "configure", words, (ready,), seed=seed, replaces=str(prepared / plans)
            )
        return number, f"Dataset{int(number):03d}_{self.dataset[11:]}_pseudo", plans, ready


def _stages(trainer: str) -> list[str]:
    """Return the trainers that come before one of this package, and itself; a stock trainer stands alone."""
    info = TRAINERS.get(trainer)
    return [*(_stages(info.after) if info and info.after else []), trainer]


def _set_words(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _weights(name: str) -> str:
    """Say which weights a SAM trainer would read now; a large file is known by size and time instead of its bytes."""
    model = get_model(name)
    file = model.find()
    if file is None:
        return f"{model.name}, not found"
    state = file.stat()
    return file_sha256(file) if model.shipped else f"{file.name} {state.st_size} {state.st_mtime_ns}"
