"""Every feature of nnU-Net works with, or is refused by, EquivariantCAMTrainer; docs/support.md is the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TAGGED, World
from resuming import checkpoint
from tiny_dataset import plan, threads_for_processes

from nnunet_dgplugins.errors import UnsupportedFeature
from nnunet_dgplugins.files import read_json

TRAINER = "EquivariantCAMTrainer"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def refused(world: World, **options: Any) -> str:
    """The sentence of a refusal, which leaves nothing behind."""
    with pytest.raises(UnsupportedFeature) as caught:
        world.construct(TRAINER, **options)
    assert not list(world.results.iterdir())
    text = str(caught.value)
    assert text.startswith(TRAINER)
    assert text.endswith(".")
    return text


def map_dtypes(built: Any) -> set[torch.dtype]:
    """Train, and return the type of the signed maps as the networks made them."""
    built.initialize()
    dtypes, run = set(), built.run

    def watched(*inputs: Any) -> Any:
        found = run(*inputs)
        dtypes.add(found[1].dtype)
        return found

    built.run = watched
    built.run_training()
    return dtypes


def test_2d_trains_and_predicts(tagged: World):
    built = tagged.train(TRAINER)
    assert np.isfinite(built.logger.get_value("train_losses", 0))
    tagged.no_settings()
    predicted = tagged.predict(tagged.model(TRAINER))
    assert [x.shape for x in predicted] == [(6, 36, 40), (4, 36, 40)]
    assert {int(value) for x in predicted for value in np.unique(x)} <= {0, 1}


def test_3d_fullres_is_refused(tagged: World):
    tagged.use(TAGGED, own=True)
    plan(tagged.number, configuration="3d_fullres")
    assert "no 3d form" in refused(tagged, configuration="3d_fullres")


def test_resenc_plans_train_and_predict(tagged: World):
    tagged.use(TAGGED, own=True)
    name = tagged.plan_again("nnUNetPlannerResEncM")
    tagged.train(TRAINER, plans=name)
    assert [x.shape for x in tagged.predict(tagged.model(TRAINER, plans=name))] == [(6, 36, 40), (4, 36, 40)]


def test_several_classes_are_refused(tagged: World):
    tagged.use(replace(TAGGED, name="TaggedThree", classes=3))
    assert "knows one class; part1, part2, part3 are 3" in refused(tagged)


def test_region_labels_are_refused(tagged: World):
    tagged.use(replace(TAGGED, name="TaggedRegions", classes=2, regions=True))
    assert "classes or regions" in refused(tagged)


def test_an_ignore_label_is_accepted_and_never_predicted(tagged: World):
    tagged.use(replace(TAGGED, name="TaggedIgnore"), own=True)
    for name in ("dataset.json",):
        tagged.edit_json(name, lambda content: content["labels"].update(ignore=2))
    tagged.train(TRAINER)
    predicted = np.concatenate([x.ravel() for x in tagged.predict(tagged.model(TRAINER))])
    assert set(np.unique(predicted)) <= {0, 1}


def test_validation_alone_writes_the_dice_per_volume(tagged: World):
    tagged.train(TRAINER)
    path = tagged.model(TRAINER) / "fold_0" / "validation_cam" / "cam_dice.json"
    assert not path.exists()
    tagged.command(TRAINER, only_run_validation=True)
    dice = read_json(path)["mean"]["0.5"]
    assert 0 <= dice <= 1
    summary = read_json(path.parents[1] / "validation" / "summary.json")
    assert summary["foreground_mean"]["Dice"] == dice


def test_validation_with_the_best_checkpoint_reads_that_one(tagged: World):
    tagged.train(TRAINER)
    path = tagged.model(TRAINER) / "fold_0" / "checkpoint_best.pth"
    best = torch.load(path, weights_only=False)
    for key, value in best["network_weights"].items():
        if key.endswith("classifier.weight"):  # these networks call every slice negative
            value[0] = value[1] + 10
    torch.save(best, path)
    tagged.command(TRAINER, only_run_validation=True, val_with_best=True)
    assert read_json(path.parent / "validation_cam" / "cam_dice.json")["mean"]["0.5"] == 0


def test_probabilities_are_written_on_request(tagged: World):
    tagged.command(TRAINER, export_validation_probabilities=True)
    (file,) = (tagged.model(TRAINER) / "fold_0" / "validation_cam").glob("*.npz")
    probabilities = np.load(file)["probabilities"].astype(np.float32)
    assert probabilities.shape[0] == 2
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=2e-3)


def test_fold_all_trains_and_validates_on_every_tagged_case(tagged: World):
    tagged.command(TRAINER, fold="all")
    validated = {path.name for path in (tagged.model(TRAINER) / "fold_all" / "validation_cam").glob("*.nii.gz")}
    assert validated == {f"case_{number}.nii.gz" for number in range(TAGGED.cases)}
    assert len(tagged.predict(tagged.model(TRAINER), fold="all")) == 2


def test_pretrained_weights_are_where_training_starts(tagged: World):
    tagged.train(TRAINER)
    start = tagged.model(TRAINER) / "fold_0" / "checkpoint_final.pth"
    first = checkpoint(tagged, TRAINER)
    tagged.elsewhere("second").settings(initial_lr=0.0, seed=3)
    tagged.command(TRAINER, pretrained_weights=str(start))
    second = checkpoint(tagged, TRAINER)
    kept = [key for key in first["network_weights"] if key.endswith("weight")]
    assert all(torch.equal(first["network_weights"][key], second["network_weights"][key]) for key in kept)


def test_bfloat16_on_the_cpu_is_used_when_asked_for(tagged: World):
    tagged.settings(cpu_bfloat16=True)
    built = tagged.construct(TRAINER)
    assert map_dtypes(built) == {torch.bfloat16}
    assert np.isfinite(built.logger.get_value("train_losses", 0))


def test_find_best_configuration_finds_nothing_to_score_against_tags(tagged: World):
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    tagged.command(TRAINER)
    # nnU-Net collects predictions of folders called validation; ours lie elsewhere, so it has none and stops
    with threads_for_processes(), pytest.raises(IndexError):
        find_best_configuration(
            tagged.number,
            ({"plans": "nnUNetPlans", "configuration": "2d", "trainer": TRAINER},),
            num_processes=1, folds=(0,),
        )  # fmt: skip


@pytest.mark.gpu
@needs_cuda
def test_cuda_trains_with_mixed_precision_and_predicts(tagged: World):
    tagged.settings(epochs=2, amp=True)
    built = tagged.construct(TRAINER, device="cuda")
    assert map_dtypes(built) == {torch.float16}
    assert np.isfinite(built.logger.get_value("train_losses", 1))
    assert len(tagged.predict(tagged.model(TRAINER), device="cuda")) == 2


@pytest.mark.gpu
@needs_cuda
def test_cuda_trains_without_mixed_precision(tagged: World):
    built = tagged.construct(TRAINER, device="cuda")
    assert map_dtypes(built) == {torch.float32}
    assert np.isfinite(built.logger.get_value("train_losses", 0))
