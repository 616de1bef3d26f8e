"""Settings of DeSAM."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_dgplugins.settings.base import TrainingSettings, setting


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
