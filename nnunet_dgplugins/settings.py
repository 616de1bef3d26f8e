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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nnunet_dgplugins.errors import BadInput, Problem, UserError, nearest

KEY = "dgplugins"
VARIABLE = "DGPLUGINS_SETTINGS"
T = TypeVar("T", bound="TrainingSettings")


def setting(
    default: Any,
    help: str,
    reference: str = "",
    choices: tuple[Any, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare one setting: its default, what it means, where it comes from and what is allowed."""
    rules = {"choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata={"help": help, "reference": reference, **rules})


@dataclass(frozen=True)
class TrainingSettings:
    """What every trainer can be told."""

    epochs: int = setting(1000, "Training epochs.", "nnU-Net", minimum=1)
    iterations_per_epoch: int | None = setting(
        None,
        "Training steps per epoch; null: as the method says (one pass over the data, or nnU-Net's 250).",
        minimum=1,
    )
    batch_size: int | None = setting(None, "Samples per step; null: from the plans.", minimum=1)
    initial_lr: float = setting(1e-2, "Learning rate at epoch 0, polynomial decay with exponent 0.9.", minimum=0)
    seed: int = setting(
        0, "Drives initialisation, sampling, prompts and augmentation; same seed, same weights on one CPU.", minimum=0
    )
    amp: bool = setting(True, "Mixed precision on CUDA.")
    cpu_bfloat16: bool = setting(False, "bfloat16 autocast on CPU: 1.7-2x faster where the processor has it.")
    keep_freed_memory: bool = setting(
        True, "On glibc, keep freed memory in the process instead of giving it back at every step (CPU speed)."
    )


@dataclass(frozen=True)
class DeSAMSettings(TrainingSettings):
    """DeSAM, both prompts (Gao et al., MICCAI 2024)."""

    epochs: int = setting(50, "Passes over all slices of the fold.", "section 3, implementation details", minimum=1)
    batch_size: int | None = setting(8, "Slices per step.", "released scripts", minimum=1)
    initial_lr: float = setting(
        1e-4, "Adam's learning rate at epoch 0, polynomial decay 0.9.", "released scripts", minimum=0
    )
    sam: str = setting(
        "auto",
        "SAM encoder: vit_h (the paper's), vit_l, vit_b, vit_tiny (ours, small, shipped with the "
        "package), or a file of their layout; auto: the largest file found in DGPLUGINS_SAM_DIR, else vit_tiny.",
        "section 2.1; the released code runs with vit_h only",
    )
    channels: tuple[int, ...] | None = setting(
        None,
        "Input channels shown to SAM as grey (one) or RGB (three); null: channel 0, or the first three if named "
        "R, G, B.",
    )
    field_of_view: str = setting(
        "slice",
        "What fills the canvas. slice: each slice, however much of the body it shows (published). source: at least as "
        "much as the largest source slice, with black around what shows less, so that an organ keeps its size in mm.",
        "released preprocessing",
        choices=("slice", "source"),
    )
    loss: str = setting(
        "paper",
        "paper: Dice + BCE + 10 MSE(IoU). code: Dice + L1(IoU), what the released code does (its cross-entropy is 0).",
        "section 2.3; specs: losses",
        choices=("paper", "code"),
    )
    train_slices: str = setting(
        "all",
        "all: slices without organ get a background point, IoU target 0, an empty mask. foreground: as published.",
        "released precompute_embeddings.py",
        choices=("all", "foreground"),
    )
    drop_last_slice: bool = setting(False, "Leave out the last foreground slice of a case, as the released code does.")
    store: str = setting(
        "auto",
        "Precision of stored embeddings: half, compact (about 8 bits) or auto (compact where the data bear it).",
        choices=("auto", "half", "compact"),
    )
    augmented_views: int = setting(0, "Stored augmented views per slice beside the plain one.", minimum=0)
    online: bool = setting(
        False, "Run the encoder in the training step, with nnU-Net's augmentation; only validation slices are stored."
    )
    optimizer: str = setting(
        "adam", "adam, or sgd with momentum 0.99; no weight decay.", "released scripts", choices=("adam", "sgd")
    )
    background_points: int = setting(
        1, "Background points drawn per foreground point in training (grid).", "1:1 in the paper", minimum=0
    )
    grid_size: int = setting(9, "Points per side of the grid.", "section 3", minimum=1)
    iou_threshold: float = setting(
        0.5, "A grid point's mask counts when its predicted IoU is above this.", "released code"
    )
    nms_threshold: float = setting(0.7, "Box IoU above which the lower-scored mask is dropped.", "released code")
    min_region_area: int = setting(
        1000,
        "Holes and islands smaller than this are removed (pixels of a 256x256 mask); both prompts.",
        "released code",
        minimum=0,
    )
    border_suppression: int = setting(
        0,
        "Frame of the 256x256 mask set to background; the released metric uses 50 (a prostate-only prior).",
        minimum=0,
    )
    validation: str = setting(
        "points",
        "Prompts of the grid trainer's source validation, which picks checkpoint_best: points (one fixed point per "
        "slice, quick) or grid (as deployed).",
        choices=("points", "grid"),
    )


@dataclass(frozen=True)
class EPLSettings(TrainingSettings):
    """EPL, confidence-aware cross pseudo supervision (Yao et al., AAAI 2022)."""

    epochs: int = setting(
        500, "Epochs of nnU-Net's 250 steps; published: 50 passes over M&Ms, some 100,000 steps.", minimum=1
    )
    batch_size: int | None = setting(None, "Labelled patches per step; null: from the plans.", "32", minimum=1)
    unlabelled_batch_size: int | None = setting(
        None,
        "Patches of each of the two unlabelled draws per step; null: as many as labelled ones. Fewer need less memory.",
        "32",
        minimum=1,
    )
    unlabelled_pool: str = setting(
        "all",
        "What counts as unlabelled. all: every source image, labelled training cases included, their masks hidden. "
        "unlabelled: only cases without masks.",
        "released code: all",
        choices=("all", "unlabelled"),
    )
    initial_lr: float = setting(1e-4, "Learning rate.", "released code", minimum=0)
    optimizer: str = setting(
        "adamw",
        "adamw, or sgd (Nesterov momentum 0.99); with sgd set nnU-Net's initial_lr=1e-2 weight_decay=3e-5 "
        "schedule=poly too.",
        "released code",
        choices=("adamw", "sgd"),
    )
    weight_decay: float = setting(0.01, "Weight decay.", "released code", minimum=0)
    schedule: str = setting(
        "constant",
        "Learning rate over the training: constant, or poly (nnU-Net's decay, exponent 0.9).",
        "released code",
        choices=("constant", "poly"),
    )
    network: str = setting(
        "planned",
        "planned: two of the networks nnU-Net planned, 2d or 3d. deeplabv3plus: the published one (2d only).",
        "released code: DeepLabV3+",
        choices=("planned", "deeplabv3plus"),
    )
    start_weights: str | None = setting(
        None, "File of ImageNet weights (resnet50_v1c.pth) that both DeepLabV3+ start from.", "released code"
    )
    input_scaling: str = setting(
        "none",
        "What DeepLabV3+ does to each patch first. percentiles: cut at 0.5 and 99.5, then 0 to 1. maximum: divided by "
        "it. none: nnU-Net's normalisation is enough.",
        "released code: percentiles (M&Ms), maximum (SCGM)",
        choices=("none", "percentiles", "maximum"),
    )
    supervised_loss: str = setting(
        "nnunet",
        "On labelled patches. nnunet: Dice and cross-entropy with deep supervision. published: sum of the Dice losses "
        "of all classes, background included (M&Ms). published_scgm: Dice loss of the first class alone.",
        "released code: published, published_scgm",
        choices=("nnunet", "published", "published_scgm"),
    )
    cps_weight: float = setting(3.0, "Weight of the unlabelled loss.", "released code", minimum=0)
    cps_start_epoch: int = setting(
        0,
        "First epoch with the unlabelled loss; published: 0 of 50 (M&Ms), 4 of 50 (SCGM).",
        "released code",
        minimum=0,
    )
    confidence: str = setting(
        "pixel",
        "pixel: each pixel's cross-entropy is weighted by its own confidence. batch: one number per batch, as the "
        "released code runs.",
        "abstract and figure; released code: batch",
        choices=("pixel", "batch"),
    )
    detach_confidence: bool = setting(
        False, "Cut the gradient through the confidence, so that no network gains by raising its disagreement."
    )
    fourier_mode: str = setting(
        "window_swap",
        "window_swap: low-frequency amplitudes of another source image. full_mix: a share of its whole spectrum.",
        "released code: AS and AM",
        choices=("window_swap", "full_mix"),
    )
    fourier_fraction: float = setting(
        0.01,
        "Half-width of the swapped window as a share of the patch's shorter side.",
        "released code",
        minimum=0,
        maximum=0.5,
    )
    fourier_minimum: int = setting(
        1,
        "Least half-width in frequencies: a patch below 100 pixels would exchange its mean brightness only. "
        "0: as published.",
        minimum=0,
    )
    fourier_strength: float | None = setting(
        None,
        "Share of the other image's amplitudes; null: 1 for window_swap; full_mix draws from 0 to this, null: 0.3.",
        "released code",
        minimum=0,
        maximum=1,
    )
    histogram_matching: bool = setting(
        False,
        "Give all images of a step the intensities of one of them, drawn anew; training only (the released code "
        "matches to the first domain, at test time too).",
    )
    forwards: str = setting(
        "auto",
        "Forward passes per step: published (14), batched (4), or auto: batched on a GPU where it gives the same "
        "numbers (no batch normalisation), else published.",
        choices=("auto", "published", "batched"),
    )
    channels_last: bool | None = setting(
        None, "Keep a pixel's channels side by side in memory: true, false, or null: in 2d only."
    )
    export_second: bool = setting(
        False,
        "Write network 2 as fold 100+k when training ends: `nnUNetv2_predict -f k 100+k` then averages both networks.",
    )


def settings_class(name: str) -> type[TrainingSettings]:
    """Return the settings class called ``name``."""
    return {cls.__name__: cls for cls in (DeSAMSettings, EPLSettings)}[name]


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
