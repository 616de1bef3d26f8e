"""Settings of EPL."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_dgplugins.settings.base import TrainingSettings, setting


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
