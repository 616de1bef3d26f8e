"""The study file: read whole, refused whole."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataset_conversion._registry import CONVERTERS, load_converter
from nnunet_dgplugins import settings
from nnunet_dgplugins.budget import Budget
from nnunet_dgplugins.errors import BadInput, Problem, UserError, nearest
from nnunet_dgplugins.evaluation.comparison import TABLE_METRICS
from nnunet_dgplugins.registry import GROUPS_SLICES, TRAINERS
from nnunet_dgplugins.study.definition import PLANNERS, Data, Method, Study

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+()-]*")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        BadInput: with every problem of the file: unknown keys, trainers, converters, sites, missing downloads,
            overlapping ids, an impossible budget.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with datasets, methods, seeds and budget.")
    reader = _Reader(path)
    study = reader.study(content)
    if reader.problems or study is None:
        raise BadInput(f"{path} is not a study", reader.problems)
    return study


class _Reader:
    """Turns the file's content into dataclasses and collects what is wrong."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[Problem] = []

    def note(self, where: str, found: str, expected: str = "", fix: str = "") -> None:
        self.problems.append(Problem(where, found, expected, fix))

    def known(self, where: str, content: Any, cls: type) -> dict[str, Any]:
        """Return the values whose keys the dataclass knows and whose types fit; lists become tuples."""
        if not isinstance(content, dict):
            self.note(where, repr(content), f"a mapping with {', '.join(item.name for item in fields(cls))}")
            return {}
        hints, found = typing.get_type_hints(cls), {}
        for key, value in content.items():
            if key not in hints:
                self.note(where, f"unknown key '{key}'{nearest(str(key), hints)}")
                continue
            value = tuple(value) if isinstance(value, list) else value
            expected = _misfit(value, hints[key])
            if expected:
                self.note(f"{where}, {key}", repr(value), expected)
            else:
                found[key] = value
        return found

    def entries(self, content: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Return the named entries under a key; there must be one at least."""
        value = content.get(key)
        if not isinstance(value, dict) or not value:
            self.note(key, repr(value), "at least one named entry")
            return {}
        for name in value:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self.note(f"{key}, {name}", "this name", "letters, digits, blanks, dots, dashes, brackets")
        return {str(name): entry for name, entry in value.items()}

    def study(self, content: dict[str, Any]) -> Study | None:
        datasets = [self.data(name, entry) for name, entry in self.entries(content, "datasets").items()]
        methods = [self.method(name, entry) for name, entry in self.entries(content, "methods").items()]
        budget = self.budget(content.get("budget"))
        nested = {"datasets", "methods", "budget"}
        values = self.known("study", {key: value for key, value in content.items() if key not in nested}, Study)
        names = [method.name for method in methods if method]
        baseline = values.get("baseline")
        if baseline is not None and baseline not in names:
            self.note("baseline", f"no method '{baseline}'{nearest(baseline, names) if names else ''}")
        self._ids([data for data in datasets if data], sum(bool(m and m.pseudo_labels) for m in methods), values)
        self._supervision([data for data in datasets if data], [method for method in methods if method])
        seeds = values.get("seeds", (0,))
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            self.note("seeds", repr(list(seeds)), "different whole numbers from 0")
        protocol = values.get("protocol", "standard")
        if protocol not in TABLE_METRICS:
            self.note("protocol", f"no protocol '{protocol}'{nearest(protocol, TABLE_METRICS)}")
        if values.get("device", "auto") not in ("auto", "cpu", "cuda", "mps"):
            self.note("device", repr(values["device"]), "auto, cpu, cuda or mps")
        if self.problems or budget is None:
            return None
        values.setdefault("name", self.path.stem)
        return Study(
            datasets=tuple(data for data in datasets if data),
            methods=tuple(method for method in methods if method),
            budget=budget,
            **values,
        )

    def budget(self, content: Any) -> Budget | None:
        values = self.known("budget", content, Budget)
        given = {key: value for key, value in values.items() if value is not None}
        if len(given) != 1 or next(iter(given.values())) <= 0:
            self.note("budget", repr(content), "exactly one of minutes, epochs and iterations, above 0")
            return None
        return Budget(**given)

    def method(self, name: str, content: Any) -> Method | None:
        where = f"method {name}"
        values = self.known(where, content, _named(Method))
        trainer = values.get("trainer")
        if trainer is None:
            self.note(where, "no trainer", fix="Name one, e.g. trainer: nnUNetTrainer.")
            return None
        if trainer not in TRAINERS and trainer not in stock_trainers():
            self.note(where, f"no trainer '{trainer}'{nearest(trainer, {*TRAINERS, *stock_trainers()})}")
        plans = values.get("plans", "nnUNetPlans")
        if plans not in PLANNERS:
            self.note(where, f"no plans '{plans}'{nearest(plans, PLANNERS)}")
        for kind in ("settings", "earlier_settings"):
            values[kind] = {
                key: self._expanded(f"{where}, {key}", value) if isinstance(value, str) else value
                for key, value in values.get(kind, {}).items()
            }
        method = Method(name=name, **values)
        for kind, owner, lack in (
            ("settings", trainer if trainer in TRAINERS else "", f"{trainer} is not of this package"),
            ("earlier_settings", method.earlier, f"{trainer} has no stage before"),
        ):
            if values[kind] and not owner:
                self.note(f"{where}, {kind}", lack, f"no {kind}")
            elif values[kind]:
                self._settings(f"{where}, {kind}", owner, values[kind])
        self._stages(where, method)
        sizes = (method.batch_size if method.batch_size is not None else 1, *method.patch_size, method.width_divisor)
        if min(sizes) < 1:
            self.note(f"{where}, batch_size, patch_size, width_divisor", str(min(sizes)), "1 or more")
        if method.smaller and not method.planned:
            self.note(where, " ".join(method.smaller), f"settings of {trainer}, which builds a network of its own")
        return method

    def _stages(self, where: str, method: Method) -> None:
        if method.earlier_share and not method.earlier:
            self.note(f"{where}, earlier_share", f"{method.trainer} has no stage before", "no earlier_share")
        if not 0 <= method.earlier_share < 1:
            self.note(f"{where}, earlier_share", repr(method.earlier_share), "a share from 0, below 1")
        if method.four_slices and method.trainer != GROUPS_SLICES:
            self.note(f"{where}, four_slices", f"{method.trainer} sees one slice at a time", "no four_slices")
        if method.settings.get("boxes") == "masks" and not method.four_slices:
            self.note(f"{where}, boxes", "masks, and nnUNetv2_predict takes none", "four_slices: true")

    def _settings(self, where: str, trainer: str, chosen: Mapping[str, Any]) -> None:
        for key in ("seed", "epochs"):
            if key in chosen:
                decides = "seeds" if key == "seed" else "budget"
                self.note(where, f"{key}={chosen[key]}", fix=f"The study's {decides} decides.")
        try:
            settings.build(settings.settings_class(TRAINERS[trainer].settings), dict(chosen), where)
        except BadInput as error:
            self.problems += error.problems

    def data(self, name: str, content: Any) -> Data | None:
        where = f"dataset {name}"
        values = self.known(where, content, _named(Data))
        tags = values.get("convert") in CONVERTERS and load_converter(values["convert"]).FACTS.tags
        needed = ("convert", "first_id") if tags else ("convert", "first_id", "sources")
        lacking = [key for key in needed if key not in values]
        for key in lacking:
            self.note(where, f"no {key}")
        if lacking:
            return None
        if values["convert"] not in CONVERTERS:
            self.note(where, f"no converter '{values['convert']}'{nearest(values['convert'], CONVERTERS)}")
        elif tags and "sources" in values:
            self.note(f"{where}, sources", f"{values['convert']} splits its cases itself", "no sources")
        elif not tags:
            values["sources"] = self._sites(where, values["convert"], values["sources"])
        if values.get("ratios") and not self._takes_ratio(values["convert"]):
            self.note(f"{where}, ratios", f"dgplugins convert {values['convert']} has no --ratio", "no ratios")
        if not all(0 < ratio <= 1 for ratio in values.get("ratios", ())):
            self.note(f"{where}, ratios", repr(list(values["ratios"])), "shares above 0, at most 1")
        spacing = values.get("spacing", ())
        if spacing and (len(spacing) != 3 or min(spacing) <= 0):
            self.note(f"{where}, spacing", repr(list(spacing)), "three lengths in mm, slices first")
        if "download" in values:
            values["download"] = self._folder(f"{where}, download", values["download"])
        if "prepare" in values:
            several = isinstance(values["prepare"], tuple)
            commands = values["prepare"] if several else (values["prepare"],)
            for command in commands:
                try:
                    shlex.split(command)
                except ValueError as error:
                    self.note(f"{where}, prepare", f"{command} ({error})", "words as a shell reads them")
                if "{download}" not in command:
                    self.note(f"{where}, prepare", command, "{download} where the folder's name belongs")
            expanded = tuple(self._expanded(f"{where}, prepare", command) for command in commands)
            values["prepare"] = expanded if several else expanded[0]
        if ("download" in values) == ("prepare" in values):
            self.note(where, "download and prepare", "exactly one of them")
        return Data(name=name, **values)

    def _sites(self, where: str, converter: str, sources: tuple[str, ...]) -> tuple[str, ...]:
        facts = load_converter(converter).FACTS
        found = []
        for source in sources:
            try:
                found.append(facts.site(source).name)
            except UserError as error:
                self.note(f"{where}, sources", str(error))
        if len(set(found)) != len(found) or not sources:
            self.note(f"{where}, sources", repr(list(sources)), "different sites, one at least")
        return tuple(found)

    def _takes_ratio(self, converter: str) -> bool:
        if converter not in CONVERTERS:
            return True  # said already
        command = load_converter(converter).command
        return any("--ratio" in option.opts for option in command.params)

    def _expanded(self, where: str, text: str) -> str:
        missing = [name for name in _VARIABLE.findall(text) if name not in os.environ]
        if missing:
            self.note(where, f"{', '.join(missing)} not set", fix="Export the variable, or write the path.")
        return os.path.expandvars(text)

    def _folder(self, where: str, text: str) -> str:
        folder = Path(self._expanded(where, text)).expanduser()
        folder = folder if folder.is_absolute() else (self.path.parent / folder).resolve()
        if not folder.is_dir() and "$" not in str(folder):
            self.note(where, f"no folder {folder}")
        return str(folder)

    def _supervision(self, datasets: list[Data], methods: list[Method]) -> None:
        """Note methods that cannot learn from the datasets: masks and tags do not mix in one study."""
        known = [data for data in datasets if data.convert in CONVERTERS]
        weak = [data.convert for data in known if data.weak]
        earlier: set[str] = set()
        for method in methods:
            where = f"method {method.name}"
            if method.pseudo_labels and method.pseudo_labels not in earlier:
                self.note(f"{where}, pseudo_labels", method.pseudo_labels, "a method of tags named before it")
            if method.pseudo_labels and (method.plans != "nnUNetPlans" or method.settings):
                self.note(where, "plans or settings", "a method of pseudo labels has nnU-Net's own plans")
            if method.masks:
                self._ceiling(where, method, known)
            if method.pseudo_options and not method.pseudo_labels:
                self.note(f"{where}, pseudo_options", repr(list(method.pseudo_options)), "pseudo_labels too")
            if method.reads_tags:
                earlier.add(method.name)
            if weak and not (method.reads_tags or method.pseudo_labels or method.masks):
                self.note(where, f"{method.trainer} learns from masks, and {weak[0]} has tags", "pseudo_labels: METHOD")
            if known and (method.reads_tags or method.pseudo_labels) and len(weak) < len(known):
                self.note(where, f"{method.trainer} here learns from tags, and not every dataset has them")

    def _ceiling(self, where: str, method: Method, datasets: list[Data]) -> None:
        """Note why a method cannot train on the masks of the datasets' twins."""
        if method.reads_tags or method.pseudo_labels:
            self.note(f"{where}, masks", f"{method.trainer} here learns from tags", "a trainer that learns from masks")
        for data in datasets:
            if not (data.weak and data.masks):
                self.note(f"{where}, masks", f"dataset {data.name} has none", "masks: [--supervision, masks, ...]")

    def _ids(self, datasets: list[Data], pseudo: int, values: Mapping[str, Any]) -> None:
        owner: dict[int, str] = {}
        for data in datasets:
            names = [
                (f"{data.name} {source}" + (f" {ratio:g}" if ratio else ""), number)
                for source, ratio, number in data.variants()
            ]
            count = pseudo * len(values.get("seeds", (0,)))
            names += [(f"{data.name}, masks", data.twin_id)] if data.masks else []
            names += [(f"{data.name}, pseudo labels", data.first_pseudo_id + i) for i in range(count)]
            for title, number in names:
                if not 1 <= number <= 999:
                    self.note(f"dataset {data.name}", f"id {number} for {title}", "1 to 999")
                if number in owner:
                    self.note(f"dataset {data.name}", f"id {number} for {title}", f"another: {owner[number]} has it")
                owner[number] = title


def stock_trainers() -> set[str]:
    """Return the names of nnU-Net's own trainers, found in its files without importing torch."""
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("nnunetv2 is not installed.")
    folder = Path(next(iter(spec.submodule_search_locations))) / "training" / "nnUNetTrainer"
    pattern = re.compile(r"^class (nnUNetTrainer\w*)\(", re.MULTILINE)
    return {name for path in folder.rglob("*.py") for name in pattern.findall(path.read_text(encoding="utf-8"))}


def _named(cls: type) -> type:
    """Return the dataclass without its field ``name``, which is the key of the entry."""
    from dataclasses import make_dataclass

    hints = typing.get_type_hints(cls)
    return make_dataclass(cls.__name__, [(key, kind) for key, kind in hints.items() if key != "name"])


def _misfit(value: Any, hint: Any) -> str:
    """Return what was expected where a value does not fit its declared type, "" where it does."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) not in (tuple, None) and not _is_mapping(hint) else (hint,)
    if any(_fits(value, kind) for kind in kinds):
        return ""
    return " or ".join(_described(kind) for kind in kinds if kind is not type(None))


def _is_mapping(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _fits(value: Any, kind: Any) -> bool:
    if _is_mapping(kind):
        return isinstance(value, dict)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _described(kind: Any) -> str:
    if _is_mapping(kind):
        return "a mapping"
    if typing.get_origin(kind) is tuple:
        return f"a list of {_described(typing.get_args(kind)[0])}s"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(kind, str(kind))
