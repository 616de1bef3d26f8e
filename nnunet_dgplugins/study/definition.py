"""What a study is: collections, methods, seeds and a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dataset_conversion._registry import load_converter
from nnunet_dgplugins.budget import Budget
from nnunet_dgplugins.evaluation.comparison import TABLE_METRICS
from nnunet_dgplugins.registry import TRAINERS

#: plans name -> nnU-Net's planner that writes it
PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
ALL = "all"  # stands for the source where a dataset has none


@dataclass(frozen=True)
class Data:
    """One multi-site collection.

    Args:
        name: as the study calls it.
        convert: name after ``dgplugins convert``.
        download: folder that is converted; None when ``prepare`` makes it.
        prepare: command, or several in their order, that makes the download in the folder ``{download}``.
        made: whether ``prepare`` makes images up, which every table then says; false: it cuts or moves real ones.
        first_id: nnU-Net id of the first source and ratio; the others follow.
        sources: sites to train on, each a dataset of its own; none for data with tags, whose converter splits them.
        ratios: labelled shares, each a dataset of its own; empty for all labels.
        options: further words after ``dgplugins convert``; ``{download}`` is the folder that is converted.
        masks: words instead of ``options`` that convert the twin of data with tags, whose training cases have masks:
            what methods with ``masks`` train on.
        spacing: target spacing in mm, slices first, instead of the planned one: coarser images for a quick study.
    """

    name: str
    convert: str
    first_id: int
    sources: tuple[str, ...] = ()
    download: str | None = None
    prepare: str | tuple[str, ...] | None = None
    made: bool = True
    ratios: tuple[float, ...] = ()
    options: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    spacing: tuple[float, ...] = ()

    @property
    def weak(self) -> bool:
        """Whether its training cases have tags instead of masks."""
        return bool(load_converter(self.convert).FACTS.tags) and "masks" not in self.options

    @property
    def twin(self) -> Data:
        """The same collection with the masks of its training cases."""
        return replace(self, options=self.masks, masks=())

    @property
    def twin_id(self) -> int:
        """Id of the twin, behind those of all sources and ratios."""
        return self.first_id + len(self.variants())

    @property
    def first_pseudo_id(self) -> int:
        """First id of pseudo labels, of which each seed has some: they come last, so that seeds can be added."""
        return self.twin_id + bool(self.masks)

    def variants(self) -> list[tuple[str, float | None, int]]:
        """Return source, ratio (None: all labels) and id of every dataset."""
        pairs = [(source, ratio) for source in self.sources or (ALL,) for ratio in self.ratios or (None,)]
        return [(source, ratio, self.first_id + number) for number, (source, ratio) in enumerate(pairs)]


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        name: as the tables call it.
        trainer: name after ``-tr``.
        plans: a key of :data:`PLANNERS`.
        settings: of a trainer of this package, as for ``dgplugins configure --set``.
        earlier_settings: likewise, of the trainer of the stage before.
        earlier_share: share of the budget that the stage before gets, the rest being this stage's; 0: each stage gets
            the whole budget.
        four_slices: predict by ``dgplugins predict``, without mirroring: four neighbouring slices on each canvas.
        batch_size: instead of the planned one, for trainers that use it; ResEnc presets plan for a GPU's memory.
        patch_size: instead of the planned one, likewise.
        width_divisor: channels of the planned network over this, likewise.
        pseudo_labels: a method of tags, named before this one, whose pseudo labels it trains on.
        pseudo_options: further words after ``dgplugins pseudo-labels``.
        masks: train on the masks that the dataset's ``masks`` bring: the ceiling of methods that learn from tags.
    """

    name: str
    trainer: str
    plans: str = "nnUNetPlans"
    settings: Mapping[str, Any] = field(default_factory=dict)
    earlier_settings: Mapping[str, Any] = field(default_factory=dict)
    earlier_share: float = 0.0
    four_slices: bool = False
    batch_size: int | None = None
    patch_size: tuple[int, ...] = ()
    width_divisor: int = 1
    pseudo_labels: str | None = None
    pseudo_options: tuple[str, ...] = ()
    masks: bool = False

    @property
    def earlier(self) -> str:
        """The trainer of the stage before; "" where there is none."""
        return TRAINERS[self.trainer].after if self.trainer in TRAINERS else ""

    def budget(self, whole: Budget, trainer: str) -> Budget:
        """Return what one of its stages gets of the study's budget."""
        if not self.earlier_share:
            return whole
        earlier, rest = whole.split(self.earlier_share)
        return rest if trainer == self.trainer else earlier

    @property
    def smaller(self) -> tuple[str, ...]:
        """Words after ``dgplugins configure`` that make the plans smaller."""
        words: tuple[str, ...] = ("--batch-size", str(self.batch_size)) if self.batch_size else ()
        words += ("--patch-size", " ".join(map(str, self.patch_size))) if self.patch_size else ()
        return words + (("--width-divisor", str(self.width_divisor)) if self.width_divisor != 1 else ())

    @property
    def planned(self) -> bool:
        """Whether it trains nnU-Net's planned network, which may be made smaller."""
        own = TRAINERS.get(self.trainer)
        return own is None or own.planned or self.settings.get("network") == "planned"

    @property
    def bound(self) -> bool:
        """Whether it is given what no user has: masks of a dataset of tags, or of the unseen cases."""
        return self.masks or self.settings.get("boxes") == "masks"

    @property
    def reads_tags(self) -> bool:
        """Whether it learns from tags."""
        return self.trainer in TRAINERS and TRAINERS[self.trainer].tags


@dataclass(frozen=True)
class Study:
    """Everything a study file says.

    Args:
        name: title of the tables.
        datasets: collections.
        methods: lines of the comparison.
        seeds: each a training of its own.
        budget: of each training.
        baseline: name of the method that the others are compared with; None: no differences.
        configuration: nnU-Net's.
        mirroring: predict with nnU-Net's mirroring (four times the work in 2d).
        protocol: of ``dgplugins evaluate``; a paper's own puts its published numbers beside ours, on its data.
        device: cpu, cuda, mps, or auto.
    """

    name: str
    datasets: tuple[Data, ...]
    methods: tuple[Method, ...]
    budget: Budget
    seeds: tuple[int, ...] = (0,)
    baseline: str | None = None
    configuration: str = "2d"
    mirroring: bool = True
    protocol: str = "standard"
    device: str = "auto"

    @property
    def metric(self) -> str:
        """The metric of the tables unless another is asked for: the protocol's own."""
        return TABLE_METRICS[self.protocol]
