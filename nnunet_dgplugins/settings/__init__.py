"""One typed, frozen dataclass per method, and the one road by which values reach it. Importable without torch.

Defaults are the paper's. They are overridden, in this order, by the block
``configurations.<configuration>.dgplugins.<Trainer>`` of the plans file (``inherits_from`` honoured key by key;
written by ``dgplugins configure``) and by a JSON or YAML file named by ``DGPLUGINS_SETTINGS`` (``{Trainer: {key:
value}}``, for quick trials). Unknown keys and values of a wrong type are refused, all at once.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from nnunet_dgplugins.errors import BadInput, Problem, UserError, nearest
from nnunet_dgplugins.settings.base import TrainingSettings
from nnunet_dgplugins.settings.dcam import DCAMClassifierSettings, DCAMSettings
from nnunet_dgplugins.settings.desam import DeSAMSettings
from nnunet_dgplugins.settings.epl import EPLSettings
from nnunet_dgplugins.settings.equivariant import EquivariantSettings
from nnunet_dgplugins.settings.samsdg import SAMSDGCoarseSettings, SAMSDGSettings

__all__ = [
    "KEY", "VARIABLE", "DCAMClassifierSettings", "DCAMSettings", "DeSAMSettings", "EPLSettings", "EquivariantSettings",
    "SAMSDGCoarseSettings", "SAMSDGSettings", "TrainingSettings", "build", "configuration_block", "parse_value",
    "resolve", "settings_class", "to_dict", "trial_settings",
]  # fmt: skip

KEY = "dgplugins"
VARIABLE = "DGPLUGINS_SETTINGS"
T = TypeVar("T", bound="TrainingSettings")


def settings_class(name: str) -> type[TrainingSettings]:
    """Return the settings class called ``name``."""
    known = (
        DCAMClassifierSettings, DCAMSettings, DeSAMSettings, EPLSettings, EquivariantSettings, SAMSDGCoarseSettings,
        SAMSDGSettings,
    )  # fmt: skip
    return {cls.__name__: cls for cls in known}[name]


def configuration_block(plans: Mapping[str, Any], configuration: str, trainer: str) -> dict[str, Any]:
    """Return a trainer's settings block in a plans file, parents first, key by key.

    nnU-Net's own ``inherits_from`` replaces whole top-level keys; a child that sets one value of one trainer would
    thereby lose its parent's values, so the chain is walked here.
    """
    content = plans["configurations"].get(configuration, {})
    parent = content.get("inherits_from")
    block = configuration_block(plans, parent, trainer) if parent else {}
    return {**block, **content.get(KEY, {}).get(trainer, {})}


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return settings of class ``cls`` with ``values`` over the defaults.

    Raises:
        BadInput: unknown keys, wrong types or values out of range, all reported together.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    problems, checked = [], {}
    for key, value in values.items():
        if key not in fields:
            problems.append(Problem(where, f"unknown setting '{key}'{nearest(key, fields)}"))
            continue
        value, expected = _checked(value, hints[key], fields[key].metadata)
        if expected:
            problems.append(Problem(f"{where}, {key}", repr(value), expected))
        checked[key] = value
    if problems:
        raise BadInput(f"Settings of {where} are not valid", problems)
    return cls(**checked)


def resolve(cls: type[T], plans: Mapping[str, Any], configuration: str, trainer: str) -> T:
    """Resolve a trainer's settings along the one road: defaults, plans file, ``DGPLUGINS_SETTINGS``."""
    values = configuration_block(plans, configuration, trainer)
    where = f"{trainer} (plans {plans.get('plans_name', '?')}, configuration {configuration})"
    trial = trial_settings()
    if trial.get(trainer):
        where += f" and {os.environ[VARIABLE]}"
    return build(cls, {**values, **trial.get(trainer, {})}, where)


def to_dict(settings: TrainingSettings) -> dict[str, Any]:
    """Return settings as JSON content."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(settings).items()
    }


def parse_value(text: str) -> Any:
    """Read a value typed on the command line (YAML rules, and ``1e-4`` is a number)."""
    import yaml

    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            return value
    return value


def trial_settings() -> dict[str, Any]:
    """Return the content of the file named by ``DGPLUGINS_SETTINGS``, empty without one.

    Raises:
        UserError: it cannot be read, or names an unknown trainer.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    import yaml

    from nnunet_dgplugins.registry import TRAINERS

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{VARIABLE}={path}: cannot be read ({error}).") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise UserError(
            f"{VARIABLE}={path}: expected trainer names with their settings, e.g. DeSAMTrainer: {{epochs: 5}}."
        )
    for name in content:
        if name not in TRAINERS:
            raise UserError(f"{VARIABLE}={path}: no trainer '{name}'{nearest(name, TRAINERS)}")
    return content


_SWITCH = {False: ("off", "no"), True: ("on", "yes")}


def _checked(value: Any, hint: Any, rules: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the value in its declared type and what was expected, "" when it is fine."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in allowed):
        value = tuple(value)
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
            return value, "a list of whole numbers from 0"
        return value, ""
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        value = float(value)
    if isinstance(value, str) and float in allowed and str not in allowed:
        value = parse_value(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(value, bool) and bool not in allowed:
        # YAML 1.1 reads off as false
        value = next((word for word in _SWITCH[value] if word in (rules["choices"] or ())), value)
    kinds = tuple(kind for kind in allowed if isinstance(kind, type))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return value, " or ".join(
            "null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed
        )
    if rules["choices"] and value not in rules["choices"]:
        return value, f"one of {', '.join(map(str, rules['choices']))}"
    if rules["minimum"] is not None and value is not None and value < rules["minimum"]:
        return value, f"at least {rules['minimum']}"
    if rules["maximum"] is not None and value is not None and value > rules["maximum"]:
        return value, f"at most {rules['maximum']}"
    return value, ""
