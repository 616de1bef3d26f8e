"""Settings of D-CAM's two stages."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_dgplugins.settings.base import TrainingSettings, setting

_RELEASED = "released code"


@dataclass(frozen=True)
class DCAMClassifierSettings(TrainingSettings):
    """D-CAM stage 1: which tissues a patch shows (Han et al., MedIA 2022; D-CAM, MICCAI 2025)."""

    epochs: int = setting(20, "Passes over the tagged patches.", _RELEASED, minimum=1)
    batch_size: int | None = setting(20, "Patches per step.", _RELEASED, minimum=2)
    initial_lr: float = setting(
        0.01,
        "Learning rate of the tower, the last layer's is ten times that.",
        "0.01; D-CAM's commands: 0.005",
        minimum=0,
    )
    weight_decay: float = setting(5e-4, "SGD's weight decay.", _RELEASED, minimum=0)
    momentum: float = setting(
        0.9, "SGD's momentum.", "5e-4, the weight decay passed in its place", minimum=0, maximum=0.999
    )
    width_divisor: int = setting(
        1, "Channels of ResNet-38 over this; start weights fit 1 alone.", "1", choices=(1, 2, 4, 8, 16, 32)
    )
    start_weights: str | None = setting(
        None,
        "File of start weights: the public MXNet .params or its conversion to .safetensors, or a released stage 1. "
        "With them conv1a, b2 and the normalisations (behind an active PCNorm: theirs alone) are frozen, without them "
        "nothing is.",
        "ilsvrc-cls_rna-a1_cls1000_ep-0001.params",
    )
    pcnorm: str = setting(
        "instance",
        "What keeps content and drops style behind b2, b3 and b4: instance or batch statistics (both reconstructed), "
        "official (as released: without effect, not computed), off.",
        "official",
        choices=("instance", "batch", "official", "off"),
    )
    attention: bool | None = setting(
        None,
        "Progressive dropout attention from the fourth epoch on: true, false, or null: with start weights only, "
        "because from a random start it can reach zero everywhere and end the learning.",
        "true",
    )
    attention_divisor: int | None = setting(
        None, "Divides the sum of the classes' attention; null: the number of classes.", "4", minimum=1
    )
    cam_threshold: float = setting(
        0.25, "The model's own segmentation shows classes of a higher probability.", _RELEASED, minimum=0, maximum=1
    )
    background_threshold: float = setting(
        0.5,
        "Where background is a class of the dataset: pixels whose scaled maps all stay below are background. The "
        "papers have no such class.",
        minimum=0,
        maximum=1,
    )
    white_background: bool | None = setting(
        None,
        "Pseudo masks leave white pixels out: true, false, or null: as the dataset says (LUAD-HistoSeg).",
        "LUAD-HistoSeg only",
    )
    mask_batch_size: int = setting(8, "Patches at once when pseudo masks are made; bounds the memory.", "1", minimum=1)


@dataclass(frozen=True)
class DCAMSettings(TrainingSettings):
    """D-CAM stage 2: a segmenter from three pseudo masks per patch (Han et al., MedIA 2022)."""

    epochs: int = setting(30, "Passes over the patches.", "30; 20 in the command list", minimum=1)
    batch_size: int | None = setting(20, "Patches per step.", _RELEASED, minimum=2)
    initial_lr: float = setting(
        0.01,
        "Learning rate of the backbone, of ASPP and decoder ten times that.",
        "0.01; D-CAM's commands: 0.005",
        minimum=0,
    )
    weight_decay: float = setting(5e-4, "SGD's weight decay.", _RELEASED, minimum=0)
    momentum: float = setting(0.9, "SGD's momentum.", _RELEASED, minimum=0, maximum=0.999)
    network: str = setting(
        "deeplabv3plus",
        "deeplabv3plus (ResNet-101), or planned: the U-Net that nnU-Net planned.",
        "deeplabv3plus",
        choices=("deeplabv3plus", "planned"),
    )
    start_weights: str | None = setting(
        None, "File of start weights of deeplabv3plus, the public deeplab-resnet.pth.tar.", "deeplab-resnet.pth.tar"
    )
    published_loss: bool = setting(
        False,
        "A constant logit 0 in the softmax, white pixels counted in the mean, and the loss divided by the batch size. "
        "Else cross-entropy over tissue pixels.",
        "true",
    )
    focal: bool = setting(False, "The released focal option.", "false")
    easy_examples: bool = setting(False, "Online easy-example mining (OEEM, MICCAI 2022).", "in neither paper nor code")
    blur: bool = setting(True, "Gaussian blur of half the images.", _RELEASED)
    gate: str = setting(
        "closed",
        "closed: tissues that stage 1 thinks absent cannot win. published: their logits are 0, which wins wherever all "
        "others are negative. none.",
        "published",
        choices=("closed", "published", "none"),
    )
    gate_threshold: float = setting(
        0.1, "A tissue is absent at this probability or below.", _RELEASED, minimum=0, maximum=1
    )
