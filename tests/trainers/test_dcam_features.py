"""Every feature of nnU-Net works with, or is refused by, both stages of D-CAM; docs/support.md is the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATCHES, World
from resuming import checkpoint
from stages import after_its_stage
from tiny_dataset import plan, threads_for_processes

from nnunet_dgplugins.errors import UnsupportedFeature
from nnunet_dgplugins.files import read_json

FIRST, SECOND = TRAINERS = ("DCAMClassifierTrainer", "DCAMTrainer")
pytestmark = pytest.mark.parametrize("trainer", TRAINERS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def refused(world: World, trainer: str, **options: Any) -> str:
    """The sentence of a refusal, which leaves nothing behind."""
    with pytest.raises(UnsupportedFeature) as caught:
        world.construct(trainer, **options)
    assert not world.model(trainer, options.get("configuration", "2d")).exists()
    text = str(caught.value)
    assert text.startswith(trainer)
    assert text.endswith(".")
    return text


def logit_dtypes(built: Any) -> set[torch.dtype]:
    """Train, and return the type of the logits that the loss is of."""
    built.initialize()
    dtypes = set()
    inner = built.network.classifier if hasattr(built.network, "background") else built.network.segmenter

    def watched(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if module.training:
            dtypes.add(output.dtype)

    inner.register_forward_hook(watched)
    built.run_training()
    return dtypes


def validated(world: World, trainer: str, fold: int | str = 0) -> Path:
    return world.model(trainer) / f"fold_{fold}" / "validation_cam"


def test_2d_trains_and_predicts(patches: World, trainer: str):
    built = after_its_stage(patches, trainer).train(trainer)
    assert np.isfinite(built.logger.get_value("train_losses", 0))
    patches.no_settings()
    predicted = patches.predict(patches.model(trainer))
    assert [x.shape for x in predicted] == [(1, 64, 64)] * 2
    assert {int(value) for x in predicted for value in np.unique(x)} <= {1, 2, 3}


def test_3d_fullres_is_refused(patches: World, trainer: str):
    patches.use(PATCHES, own=True)
    volume = {"3d_fullres": {"inherits_from": "2d", "patch_size": [4, 64, 64]}}
    patches.edit_json("nnUNetPlans.json", lambda plans: plans["configurations"].update(volume))
    assert "no 3d form" in refused(patches, trainer, configuration="3d_fullres")


def test_resenc_plans_train_and_predict(patches: World, trainer: str):
    patches.use(PATCHES, own=True)
    name = plan(patches.number, "nnUNetPlannerResEncM", preprocess=False)
    after_its_stage(patches, trainer, plans=name).train(trainer, plans=name)
    assert [x.shape for x in patches.predict(patches.model(trainer, plans=name))] == [(1, 64, 64)] * 2


def test_three_classes_train_and_predict(patches: World, trainer: str):
    built = after_its_stage(patches, trainer).train(trainer)
    assert len(built.logger.get_value("dice_per_class_or_region", 0)) == 3
    assert built.network.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 4, 64, 64)
    predicted = np.concatenate(patches.predict(patches.model(trainer)))
    assert set(np.unique(predicted)) <= {1, 2, 3}


def test_region_labels_are_refused(patches: World, trainer: str):
    patches.use(PATCHES, own=True)
    patches.edit_json("dataset.json", lambda content: content["labels"].update(tissue1=[1, 2]))
    assert "region labels" in refused(patches, trainer)


def test_an_ignore_label_is_accepted_and_never_predicted(patches: World, trainer: str):
    """Every training patch has a label file of the ignore value alone."""
    after_its_stage(patches, trainer).command(trainer)
    assert read_json(patches.preprocessed / "dataset.json")["labels"]["ignore"] == 4
    assert read_json(validated(patches, trainer) / "iou.json")["cases"] == 2
    assert all(4 not in np.unique(x) for x in patches.predict(patches.model(trainer)))


def test_validation_alone_writes_the_scores(patches: World, trainer: str):
    after_its_stage(patches, trainer).train(trainer)
    path = validated(patches, trainer) / "iou.json"
    assert not path.exists()
    patches.command(trainer, only_run_validation=True)
    assert 0 <= read_json(path)["mIoU"] <= 1
    assert read_json(path.parents[1] / "validation" / "summary.json")["foreground_mean"]["Dice"] is None


def test_validation_with_the_best_checkpoint_reads_that_one(patches: World, trainer: str):
    after_its_stage(patches, trainer).train(trainer)
    path = patches.model(trainer) / "fold_0" / "checkpoint_best.pth"
    best = torch.load(path, weights_only=False)
    for key, value in best["network_weights"].items():  # this one sees the second tissue alone
        if ".seg_layers." in key:
            value.zero_()
            if key.endswith("bias"):
                value[1] = 100
        if key.endswith("fc8.weight"):
            value[:] = -100
            value[1] = 100
        if "classifier.bn7" in key and trainer == FIRST:
            value.fill_(1)
    torch.save(best, path)
    patches.command(trainer, only_run_validation=True, val_with_best=True)
    ious = read_json(path.parent / "validation_cam" / "iou.json")["IoU"]
    assert not ious["tissue1"]
    assert not ious["tissue3"]


def test_probabilities_are_written_on_request(patches: World, trainer: str):
    after_its_stage(patches, trainer).command(trainer, export_validation_probabilities=True)
    file, _ = validated(patches, trainer).glob("*.npz")
    probabilities = np.load(file)["probabilities"].astype(np.float32)
    assert probabilities.shape == (4, 1, 64, 64)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=2e-3)


def test_fold_all_trains_and_validates_on_every_tagged_case(patches: World, trainer: str):
    after_its_stage(patches, trainer, "all").command(trainer, fold="all")
    folder = validated(patches, trainer, "all")
    assert {path.stem for path in folder.glob("*.png")} == {f"case_{number}" for number in range(PATCHES.cases)}
    assert not (folder / "iou.json").exists()  # masks of patches that train count as unknown
    assert len(patches.predict(patches.model(trainer), fold="all")) == 2


def test_pretrained_weights_are_where_training_starts(patches: World, trainer: str):
    after_its_stage(patches, trainer).train(trainer)
    start = patches.model(trainer) / "fold_0" / "checkpoint_final.pth"
    first = checkpoint(patches, trainer)["network_weights"]
    patches.settings(seed=3)
    after_its_stage(patches.elsewhere("second"), trainer)
    patches.settings(initial_lr=0.0, seed=3)
    patches.command(trainer, pretrained_weights=str(start))
    second = checkpoint(patches, trainer)["network_weights"]
    part = "classifier." if trainer == FIRST else "segmenter."
    kept = [name for name in first if name.startswith(part) and name.endswith("weight") and ".seg_layers." not in name]
    assert kept
    assert all(torch.equal(first[name], second[name]) for name in kept)
    if trainer == SECOND:  # the gate is that of the stage 1 beside it, whatever the file brings along
        own = checkpoint(patches, FIRST)["network_weights"]
        assert all(torch.equal(own[name], second[name]) for name in own)
        assert not torch.equal(first["classifier.fc8.weight"], second["classifier.fc8.weight"])


def test_bfloat16_on_the_cpu_is_used_when_asked_for(patches: World, trainer: str):
    after_its_stage(patches, trainer).settings(cpu_bfloat16=True)
    built = patches.construct(trainer)
    assert logit_dtypes(built) == {torch.bfloat16}
    assert np.isfinite(built.logger.get_value("train_losses", 0))


def test_find_best_configuration_finds_nothing_to_score_against_tags(patches: World, trainer: str):
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    after_its_stage(patches, trainer).command(trainer)
    # nnU-Net collects predictions of folders called validation; ours lie elsewhere, so it has none and stops
    with threads_for_processes(), pytest.raises(IndexError):
        find_best_configuration(
            patches.number,
            ({"plans": "nnUNetPlans", "configuration": "2d", "trainer": trainer},),
            num_processes=1, folds=(0,),
        )  # fmt: skip


@pytest.mark.gpu
@needs_cuda
def test_cuda_trains_with_mixed_precision_and_predicts(patches: World, trainer: str):
    after_its_stage(patches, trainer).settings(epochs=2, amp=True)
    built = patches.construct(trainer, device="cuda")
    assert logit_dtypes(built) == {torch.float16}
    assert np.isfinite(built.logger.get_value("train_losses", 1))
    assert len(patches.predict(patches.model(trainer), device="cuda")) == 2


@pytest.mark.gpu
@needs_cuda
def test_cuda_trains_without_mixed_precision(patches: World, trainer: str):
    after_its_stage(patches, trainer).settings(amp=False)
    built = patches.construct(trainer, device="cuda")
    assert logit_dtypes(built) == {torch.float32}
    assert np.isfinite(built.logger.get_value("train_losses", 0))
