"""Settings of SAM-SDG."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_dgplugins.settings.base import TrainingSettings, setting


@dataclass(frozen=True)
class _SAMSDGShared(TrainingSettings):
    """What both steps can be told."""

    channels: tuple[int, ...] | None = setting(
        None,
        "Input channels that are shown: one (as grey) or three (published: the slices z-1, z, z+1); null: three if "
        "the channel names say so (X_below, X, X_above, or R, G, B), else channel 0. Both steps need the same.",
    )
    field_of_view: str = setting(
        "slice",
        "What fills a tile. slice: each slice, however much of the body it shows (published). source: at least as "
        "much as the largest source slice, with black around what shows less, so that an organ keeps its size in mm.",
        "released preprocessing",
        choices=("slice", "source"),
    )
    equalise: bool = setting(True, "Spread each slice's histogram.", "released preprocessing")
    train_slices: str = setting(
        "all",
        "all: slices without organ are trained on too, so that the coarse network learns to find nothing there. "
        "foreground: slices with organ alone (published).",
        "released data",
        choices=("all", "foreground"),
    )


@dataclass(frozen=True)
class SAMSDGCoarseSettings(_SAMSDGShared):
    """SAM-SDG step 1, the coarse network (arXiv 2401.02076)."""

    epochs: int = setting(100, "Passes over all slices of the fold.", "released scripts", minimum=1)
    batch_size: int | None = setting(8, "Slices per step.", "released scripts", minimum=2)
    initial_lr: float = setting(1e-3, "Adam's constant learning rate.", "released scripts", minimum=0)
    network: str = setting(
        "deeplabv3",
        "deeplabv3: on ResNet-50 with output stride 8 (published). planned: nnU-Net's own 2d network.",
        "section 3.2",
        choices=("deeplabv3", "planned"),
    )
    start_weights: str | None = setting(
        None,
        "File of torchvision's ImageNet ResNet-50 that deeplabv3 starts from (published); null: from scratch. It is "
        "never downloaded.",
        "released scripts",
    )
    image_size: int = setting(
        512, "Side of the images the network sees, a multiple of 32; less is quicker.", "section 4.1", minimum=64
    )
    loss: str = setting(
        "dice_bce",
        "dice_bce, or double_sigmoid: another cross-entropy that takes probabilities for logits, as the released code "
        "does with MONAI 1.3 and later.",
        "released scripts",
        choices=("dice_bce", "double_sigmoid"),
    )
    augmentation: str = setting(
        "none",
        "none (published). location_scale: other intensities, one curve per slice or one per class. "
        "saliency: one per class where the loss does not look, one for all elsewhere, at twice the passes.",
        "released code holds the other two and never calls them; SLAug (AAAI 2023)",
        choices=("none", "location_scale", "saliency"),
    )
    saliency_grid: int = setting(
        3, "Cells per side of the saliency map; SLAug: 3 for abdomen, 18 for heart.", "SLAug", minimum=1
    )
    threshold: float = setting(
        0.5,
        "A class wins where its probability is above, when this network segments alone; published: 0.75.",
        "released scripts",
        minimum=0.01,
        maximum=0.99,
    )


@dataclass(frozen=True)
class SAMSDGSettings(_SAMSDGShared):
    """SAM-SDG steps 2 and 3, SAM prompted by the coarse network's boxes (arXiv 2401.02076)."""

    epochs: int = setting(200, "Passes over all slices of the fold.", "section 4.1", minimum=1)
    batch_size: int | None = setting(16, "Slices per step, a multiple of 4.", "section 4.1", minimum=4)
    initial_lr: float = setting(1e-4, "Adam's constant learning rate.", "section 4.1", minimum=0)
    groupings: int | None = setting(
        None,
        "How often the slices are put together to canvases anew. null: every epoch (published), the encoder runs "
        "in each step. n: n groupings are drawn once and take turns, so that their embeddings can be kept.",
        "released scripts",
        minimum=1,
    )
    weight_decay: float = setting(1e-3, "Adam's L2 term, on what is truly trained alone.", "released code", minimum=0)
    sam: str = setting(
        "auto",
        "SAM encoder: vit_h, vit_l, vit_b (the paper's), vit_tiny (ours, small, shipped with the package), or a file "
        "of their layout; auto: the largest file found in DGPLUGINS_SAM_DIR, else vit_tiny.",
        "section 4.1",
    )
    sam_pixel_norm: bool = setting(
        True,
        "Give SAM's encoder the pixel normalisation it was trained with; false: [0, 1] as it is (published).",
        "released code: false",
    )
    boxes: str = setting(
        "refined",
        "Prompts. refined: box of the coarse mask's largest component. unfiltered: of the whole coarse mask. tile: the "
        "whole tile. masks: of the true masks, an upper bound; nnUNetv2_predict has none and takes refined boxes, "
        "dgplugins predict --masks is given them (the last three are the paper's ablation).",
        "section 3.3",
        choices=("refined", "unfiltered", "tile", "masks"),
    )
    box_threshold: float = setting(
        0.75, "A pixel of the coarse mask counts when its probability is above (theta 1).", "section 4.1",
        minimum=0, maximum=1,
    )  # fmt: skip
    jitter: int = setting(
        9,
        "In training each edge of a box moves outward by 0 to this many pixels of a 512 tile, drawn anew; the released "
        "code also does so at test time.",
        "released code",
        minimum=0,
    )
    augmentation: str = setting(
        "none",
        "none (published). location_scale: other intensities, one curve per slice or one per class; "
        "the encoder runs in every step. saliency needs gradients through the encoder and is step 1's alone.",
        "released code holds it and never calls it; SLAug (AAAI 2023)",
        choices=("none", "location_scale"),
    )
    empty: str = setting(
        "background",
        "What a class is on a slice where the coarse network does not find it. background: absent, and SAM "
        "is not trained on it there. full_box: whatever SAM finds in the whole tile (published, where every slice has "
        "the organ).",
        "released code: full_box",
        choices=("background", "full_box"),
    )
    ce_weight: float = setting(
        1.0,
        "Weight of the cross-entropy beside Dice; 0: as the released code runs with MONAI 1.2 and before.",
        "released code",
        minimum=0,
    )
    threshold: float = setting(
        0.5,
        "A class wins where its probability is above (theta 2).",
        "section 4.1",
        minimum=0.01,
        maximum=0.99,
    )
