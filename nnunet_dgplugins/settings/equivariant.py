"""Settings of the equivariant CAMs."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_dgplugins.settings.base import TrainingSettings, setting


@dataclass(frozen=True)
class EquivariantSettings(TrainingSettings):
    """Cross-modality equivariant CAMs from slice tags (Patel and Dolz, Medical Image Analysis 2022)."""

    epochs: int = setting(
        30, "Passes over all slices; published: 30 (BraTS), 100 (prostate).", "released configs", minimum=1
    )
    batch_size: int | None = setting(16, "Slices per step.", "released configs", minimum=2)
    initial_lr: float = setting(
        5e-5, "AdamW's constant learning rate; published: 5e-5 (BraTS), 1e-4 (prostate).", "released configs", minimum=0
    )
    weight_decay: float = setting(0.5, "AdamW's decoupled weight decay.", "released configs", minimum=0)
    amp: bool = setting(False, "Mixed precision on CUDA; maps and losses stay in float32.", "released code: off")
    width_divisor: int = setting(
        1,
        "Channels of each network are 64 over this; published: 1 (BraTS), 4 (prostate).",
        "released configs",
        choices=(1, 2, 4, 8, 16),
    )
    dropout: float = setting(0.0, "Share of channels dropped before the classifier.", minimum=0, maximum=0.9)
    transformation: str = setting(
        "all",
        "Transforms that a map must follow: one of the four families per step, or one family always.",
        "released configs",
        choices=("all", "flipping", "rotation", "translation", "scaling"),
    )
    shift: float | None = setting(
        None,
        "Augmentation: all modalities move together by up to this share of a side; null: 0.1 for up to two "
        "modalities, 0 for more.",
        "released loaders (which move the modalities apart from each other)",
        minimum=0,
        maximum=0.5,
    )
    er_weight: float = setting(1.0, "Weight of equivariance within a modality (ER).", "released code", minimum=0)
    cmer_weight: float = setting(1.0, "Weight of equivariance across modalities (CMER).", "released code", minimum=0)
    cmer_reduction: str = setting(
        "mean",
        "mean over pixels: the term stays below 3.5e-5 at 240 x 240 and is hardly felt. sum: 2 - 2 cos of both maps.",
        "released code: mean",
        choices=("mean", "sum"),
    )
    kd_weight: float = setting(
        0.5, "Weight of the distillation between modalities (KD).", "released configs", minimum=0
    )
    temperature: float = setting(10.0, "Softening of the distillation.", "released configs", minimum=0.1)
    threshold: float = setting(
        0.5, "A pixel is foreground where the fused map is above this.", "0.5 in an early release", minimum=0, maximum=1
    )
    choose_threshold: bool = setting(
        False,
        "After training take, of 0.2 to 0.8, the threshold with the best mean Dice over the validation volumes whose "
        "masks are known; `threshold` stays where none is.",
        "the paper's code reports all seven",
    )
    fusion: str | int = setting(
        "mean", "One map of all modalities': mean, max, or the number of a modality. Published: each by itself."
    )
    gate: str = setting(
        "predicted",
        "predicted: a network that calls a slice negative has an empty map there. none: every map counts.",
        "released export",
        choices=("predicted", "none"),
    )
    forwards: str = setting(
        "auto",
        "separate: one network after the other. grouped: all at once, equal result up to rounding. auto: separate, the "
        "faster one where measured, on the CPU (docs/benchmarks.md).",
        choices=("auto", "separate", "grouped"),
    )
    one_graph_at_a_time: bool = setting(
        False, "Keep one network's graph in memory instead of all, for twice the forward passes."
    )
    channels_last: bool | None = setting(
        None, "Keep a pixel's channels side by side in memory: true, false, or null: true."
    )
    derive_tags: bool = setting(
        False, "Where labelsTr holds masks: derive the tags from them once, into the case table, and read tags alone."
    )
