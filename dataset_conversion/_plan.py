"""What is decided before a file is written: sites, cases, labels, and how the dataset is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataset_conversion import _labelled, _tags
from dataset_conversion._facts import WITHOUT, Facts, Listing, Request, SourceCase
from dataset_conversion._sources import Stack
from nnunet_dgplugins.data.names import near
from nnunet_dgplugins.data.splits import SEED, Split
from nnunet_dgplugins.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Everything decided before a file is written."""

    facts: Facts
    request: Request
    sources: list[str]
    targets: list[str]
    name: str
    cases: list[SourceCase]
    shares: list[tuple[str, int, int]]  # group of source patients, how many are labelled, how many are annotated
    keep_zones: bool
    folds: list[Split] | None  # the tree's own

    @property
    def weak(self) -> bool:
        """Whether training cases carry image tags in place of masks."""
        return self.facts.tags and self.request.supervision == _tags.TAGS

    @property
    def labels(self) -> Mapping[str, int]:
        labels = (self.facts.zone_labels or {}) if self.keep_zones else self.facts.labels
        return {**labels, "ignore": self.ignore} if any(case.label is None for case in self.cases) else labels

    @property
    def ignore(self) -> int:
        """Value that fills the labels of unlabelled cases; nnU-Net wants the one after the last label."""
        return 1 + max(self.mapping.values())

    @property
    def split(self) -> str:
        return self.request.split or ("labelled" if self.request.few_labels else self.facts.splits[0])

    @property
    def mapping(self) -> Mapping[int, int]:
        return (self.facts.zone_mapping or {}) if self.keep_zones else self.facts.mapping

    @property
    def channel_names(self) -> dict[str, str]:
        """nnU-Net's; those of a weak dataset keep its hands off the intensities, so that padding equals background."""
        names = dict(self.facts.channel_names)
        if self.request.neighbours:
            (middle,) = names.values()
            # nnU-Net normalises by name: these are none of its own (CT, noNorm, ...), so each gets a z-score
            names = {"0": f"{middle}_below", "1": middle, "2": f"{middle}_above"}
        return dict.fromkeys(names, "noNorm") if self.weak else names

    @property
    def seed(self) -> int:
        """Seed of a drawn split."""
        return SEED if self.request.seed is None else self.request.seed

    def options(self) -> dict[str, Any]:
        """Return what the user chose, as the case table keeps it."""
        request = self.request
        options = {
            "converter": self.facts.command,
            "zones": request.zones,
            "split": self.split,
            "drop_empty_slices": request.drop_empty_slices,
            "excluded": sorted(request.exclude),
        }
        # said where they were given, so that what was converted without them is still known as the same
        few: dict[str, Any] = {
            "ratio": request.ratio,
            "labelled": request.labelled,
            "unannotated": request.unannotated or None,
        }
        few["protocol"] = request.count if request.ratio is not None and len(self.facts.counts) > 1 else None
        few["frames"] = request.frames if any(case.frame is not None for case in self.cases) else None
        if self.facts.tags:
            few |= {"supervision": request.supervision, "modalities": list(self.facts.channel_names.values())}
            few["min_pixels"] = request.min_pixels if self.weak else None
            few["label_code"] = request.label_code or None
            few["label"] = None if request.label_name == Request.label_name else request.label_name
        images = [case.images[0] for case in self.cases]
        bare = any(isinstance(image, Stack) and not image.has_spacing for image in images)
        few["spacing"] = "unknown, 1 mm written" if bare else None
        few["neighbours"] = "slices z-1, z, z+1; edges repeated" if request.neighbours else None
        if self.split == "shares":
            drawn = {"folds": request.folds} if request.folds else {"val": request.val}
            few |= {**drawn, "test": request.test, "seed": self.seed}
        return {**options, **{key: value for key, value in few.items() if value is not None}}


def make_plan(facts: Facts, request: Request, listing: Listing) -> Plan:
    """Choose source and target sites and the cases that go with them."""
    found = {case.site for case in listing.cases} | {trouble.site for trouble in listing.troubles if trouble.site}
    if not found and not listing.troubles:
        raise UserError(f"{request.root}: no cases found for {facts.command}; docs/data.md shows the expected tree.")
    sources, targets, title = _sites(facts, request, found)
    for site in [*sources, *targets]:
        if site not in found:
            raise UserError(f"{request.root}: no cases of {site}; found {', '.join(sorted(found))}.")
    both = sorted(set(sources) & set(targets))
    if both:
        raise UserError(f"{', '.join(both)}: named as source and as target.")
    if request.zones == "keep" and facts.zone_labels is None:
        raise UserError(f"{facts.command}: this source has no zones to keep; use --zones merge.")
    names = {case.name for case in listing.cases} | {trouble.case for trouble in listing.troubles if trouble.case}
    names |= {f"{case.site}_{case.patient}" for case in listing.cases}
    for name in request.exclude:
        if name not in names:
            raise UserError(f"--exclude {name}: no such case{near(name, names)}")
    rank = {name: index for index, name in enumerate([site.name for site in facts.sites] or sources)}
    chosen = {*sources, *targets}
    cases = [case for case in listing.cases if case.site in chosen and not case.answers_to(request.exclude)]
    cases.sort(key=lambda case: (rank[case.site], case.order, case.name))
    counts = [(name, count, len(patients)) for name, patients, count in _labelled.groups(cases, sources, request)]
    cases = _labelled.choose(cases, sources, request)
    number = facts.dataset_id if request.dataset_id is None else request.dataset_id
    name = f"Dataset{number:03d}_{facts.name}_{title}"
    keep = request.zones == "keep"
    return Plan(facts, request, sources, targets, name, cases, counts, keep, listing.folds)


def _sites(facts: Facts, request: Request, found: set[str]) -> tuple[list[str], list[str], str]:
    """Return source sites, target sites and how the dataset's name says it; what the user left open is the rest."""
    if facts.tags:
        return sorted(found), [], request.supervision
    named = list(dict.fromkeys(facts.site(text).name for text in request.sources))
    targets = [facts.site(text).name for text in request.targets]
    without = [name for name in named if name.startswith(WITHOUT)]
    if without and (len(named) > 1 or targets):
        raise UserError(f"--source {without[0]} says all there is to say; leave out the other --source and --target.")
    targets = [name[len(WITHOUT) :] for name in without] or targets
    sources = [name for name in named if name not in without]
    rest = [site.name for site in facts.sites if site.default and site.name in found - {*sources, *targets}]
    if sources:
        return sources, targets or rest, "-".join(sources)
    if not targets:
        raise UserError(f"{facts.command}: name the sites to train on (--source) or those to test on (--target).")
    if not rest:
        raise UserError(f"{request.root}: no site is left to train on; found {', '.join(sorted(found))}.")
    return rest, targets, WITHOUT + "-".join(targets)
