"""The case table: everything nnU-Net does not know about a case, kept in ``dataset.json`` under ``dgplugins``.

nnU-Net copies ``dataset.json`` into the preprocessed folder and beside every model, so the table travels for free.
Importable without torch and without nnunetv2, because converters use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_dgplugins.errors import BadInput, Problem, nearest

KEY = "dgplugins"
FORMAT = 1
Tag = int | list[int]


@dataclass(frozen=True)
class Case:
    """What is known of one case.

    Args:
        site: hospital, scanner, vendor or modality the case comes from; None if unknown.
        patient: patient identifier; cases of one patient never end on two sides of a split. None: the case itself.
        labelled: whether voxel annotation exists (decided here, never by the ignore value in a label file).
        tags: image tags of a case without masks. One entry per slice, in the reader's slice order (the first axis of
            what SimpleITK reads, nibabel's third); a 2-D image has one entry. An entry is a whole number (0 absent,
            1 present) for a single class, or a list with one such number per class, in the order of the label values
            without background and ignore: a patch of four tissues with the first and the last has [[1, 0, 0, 1]].
        original: path of the source file relative to the download's root, or its original name.
    """

    site: str | None = None
    patient: str | None = None
    labelled: bool = True
    tags: list[Tag] | None = None
    original: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; absent values are left out, ``labelled`` is always said."""
        content = {
            "site": self.site,
            "patient": self.patient,
            "labelled": self.labelled,
            "tags": self.tags,
            "original": self.original,
        }
        return {key: value for key, value in content.items() if value is not None}


_CASE_TYPES: dict[str, tuple[type, ...]] = {
    "site": (str,),
    "patient": (str,),
    "labelled": (bool,),
    "tags": (list,),
    "original": (str,),
}


@dataclass(frozen=True)
class CaseTable:
    """All cases of a dataset, training and test, by case identifier.

    Args:
        cases: case identifier to what is known of it. Test cases (other sites) are listed too.
        source: the source site or sites, as written by the converter; None for a dataset without that notion.
        protocol: how the dataset was made (converter, options), for the reader and for reports.
    """

    cases: Mapping[str, Case] = field(default_factory=dict)
    source: str | list[str] | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any], where: str = "dataset.json") -> CaseTable | None:
        """Read the table; None if the dataset has none.

        Raises:
            BadInput: unknown keys, wrong types or an unknown format, all reported together.
        """
        block = dataset_json.get(KEY)
        if block is None:
            return None
        problems = list(_problems(block, f"{where}, key {KEY}", _count_classes(dataset_json)))
        if problems:
            raise BadInput(f"The case table of {where} cannot be read", problems)
        return cls(
            cases={name: Case(**content) for name, content in block["cases"].items()},
            source=block.get("source"),
            protocol=block.get("protocol", {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form kept under ``dgplugins``."""
        return {
            "format": FORMAT,
            "source": self.source,
            "cases": {name: case.to_dict() for name, case in self.cases.items()},
            "protocol": dict(self.protocol),
        }

    @property
    def sources(self) -> list[str]:
        """The source sites as a list."""
        if self.source is None:
            return []
        return [self.source] if isinstance(self.source, str) else list(self.source)

    def sites(self) -> list[str]:
        """Every site named in the table, sorted."""
        return sorted({case.site for case in self.cases.values() if case.site is not None})

    def site_of(self, name: str) -> str | None:
        """Return the site of a case, None if the case or its site is unknown."""
        case = self.cases.get(name)
        return case.site if case else None

    def can_train(self, name: str) -> bool:
        """Return whether a fold may list a case: it has masks or, in a weak dataset, image tags.

        A case that the table does not know is taken for a labelled one.
        """
        case = self.cases.get(name)
        return case is None or case.labelled or case.tags is not None

    def patient_of(self, name: str) -> str:
        """Return the patient of a case; a case without one is its own patient.

        Patients are told apart by site as well: "patient 3" of two hospitals are two people.
        """
        case = self.cases.get(name)
        if case is None or case.patient is None:
            return name
        return f"{case.site or ''}/{case.patient}"


def _count_classes(dataset_json: Mapping[str, Any]) -> int | None:
    """Return how many labels there are besides background and ignore; None where no label list says it."""
    labels = dataset_json.get("labels")
    return None if not labels else len(set(labels) - {"background", "ignore"})


def _problems(block: Any, where: str, classes: int | None = None) -> Iterable[Problem]:
    if not isinstance(block, dict):
        yield Problem(where, f"a {type(block).__name__}", "an object")
        return
    valid = ("format", "source", "cases", "protocol")
    for key in block:
        if key not in valid:
            yield Problem(where, f"unknown key '{key}'{nearest(key, valid)}")
    if block.get("format") != FORMAT:
        yield Problem(where, f"format {block.get('format')!r}", f"format {FORMAT}", "Update nnunet_dgplugins.")
    source = block.get("source")
    if not (source is None or isinstance(source, str) or _is_list_of(source, str)):
        yield Problem(f"{where}, source", repr(source), "a site or a list of sites")
    if not isinstance(block.get("protocol", {}), dict):
        yield Problem(f"{where}, protocol", repr(block["protocol"]), "an object")
    cases = block.get("cases")
    if not isinstance(cases, dict):
        yield Problem(f"{where}, cases", repr(cases), "an object from case identifier to case")
        return
    for name, content in cases.items():
        at = f"{where}, case {name}"
        if not isinstance(content, dict):
            yield Problem(at, repr(content), "an object")
            continue
        for key, value in content.items():
            if key not in _CASE_TYPES:
                yield Problem(at, f"unknown key '{key}'{nearest(key, _CASE_TYPES)}")
            elif value is not None and not isinstance(value, _CASE_TYPES[key]):
                yield Problem(f"{at}, {key}", repr(value), " or ".join(t.__name__ for t in _CASE_TYPES[key]))
            elif key == "labelled" and value is None:
                yield Problem(f"{at}, labelled", "null", "true or false")
        tags = content.get("tags")
        if isinstance(tags, list) and not all(_is_tag(tag) for tag in tags):
            yield Problem(f"{at}, tags", repr(tags), "a whole number per slice, or a list of them, one per class")
        elif isinstance(tags, list) and not all(_fits(tag, classes) for tag in tags if isinstance(tag, list)):
            yield Problem(f"{at}, tags", repr(tags), f"for each slice 0 or 1 for each of {classes} classes")


def _is_tag(tag: Any) -> bool:
    return (isinstance(tag, int) and not isinstance(tag, bool)) or _is_list_of(tag, int)


def _fits(tag: list[int], classes: int | None) -> bool:
    return set(tag) <= {0, 1} and len(tag) == (len(tag) if classes is None else classes)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
