"""Every feature of nnU-Net works with, or is refused by, EPLTrainer; docs/support.md is the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SEMI, World
from resuming import checkpoint, resume
from tiny_dataset import Recipe, plan, threads_for_processes

from nnunet_dgplugins.errors import UnsupportedFeature, UserError
from nnunet_dgplugins.files import read_json

TRAINER = "EPLTrainer"
CLASSES = Recipe("SemiClasses", cases=6, unlabelled=3, classes=3)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def refused(world: World, **options: Any) -> str:
    """The sentence of a refusal, which leaves nothing behind."""
    with pytest.raises(UnsupportedFeature) as caught:
        world.construct(TRAINER, **options)
    assert not list(world.results.iterdir())
    text = str(caught.value)
    assert text.startswith(TRAINER)
    assert text.endswith(".")
    assert ". " not in text
    return text


def test_2d_trains_and_predicts(semi: World):
    built = semi.train(TRAINER)
    assert np.isfinite(built.logger.get_value("train_losses", 0))
    semi.no_settings()
    predicted = semi.predict(semi.model(TRAINER))
    assert [x.shape for x in predicted] == [(4, 36, 40), (5, 36, 40)]
    assert {int(value) for x in predicted for value in np.unique(x)} <= {0, 1}


def test_3d_fullres_trains_and_predicts(semi: World):
    semi.use(SEMI, own=True)
    plan(semi.number, configuration="3d_fullres")
    semi.settings(histogram_matching=True)
    built = semi.train(TRAINER, configuration="3d_fullres")
    assert len(built.configuration_manager.patch_size) == 3
    assert np.isfinite(built.logger.get_value("train_losses", 0))
    assert [x.shape for x in semi.predict(semi.model(TRAINER, "3d_fullres"))] == [(4, 36, 40), (5, 36, 40)]


def test_resenc_plans_train_and_predict(semi: World):
    semi.use(SEMI, own=True)
    name = semi.plan_again("nnUNetPlannerResEncM")
    semi.train(TRAINER, plans=name)
    assert [x.shape for x in semi.predict(semi.model(TRAINER, plans=name))] == [(4, 36, 40), (5, 36, 40)]


def test_three_classes_train_and_predict(semi: World):
    built = semi.use(CLASSES).train(TRAINER)
    assert len(built.logger.get_value("dice_per_class_or_region", 0)) == 3
    predicted = semi.predict(semi.model(TRAINER))
    assert {int(value) for x in predicted for value in np.unique(x)} <= {0, 1, 2, 3}


def test_region_labels_are_refused(world: World):
    world.use(Recipe("Regions", classes=2, regions=True))
    assert "region labels" in refused(world)


def test_ignored_pixels_get_no_gradient_and_the_label_is_never_predicted(semi: World):
    semi.use(Recipe("SemiIgnore", cases=6, unlabelled=3, ignore=True))
    built = semi.train(TRAINER)
    batch = next(built.dataloader_train)
    built.set_deep_supervision_enabled(True)
    output = built.network(batch["data"])
    output[0].retain_grad()
    built.supervised_loss([output], batch).backward()
    ignored = (batch["target"][0] == 2).expand_as(output[0])
    assert ignored.any()
    assert bool((output[0].grad[ignored] == 0).all())
    assert bool((output[0].grad[~ignored] != 0).any())
    assert 2 not in np.unique(np.concatenate(semi.predict(semi.model(TRAINER))))


def test_validation_alone_writes_the_summary(semi: World):
    semi.train(TRAINER)
    summary = semi.model(TRAINER) / "fold_0" / "validation" / "summary.json"
    assert not summary.exists()
    semi.command(TRAINER, only_run_validation=True)
    assert 0 <= read_json(summary)["foreground_mean"]["Dice"] <= 1


def test_validation_with_the_best_checkpoint_reads_that_one(semi: World):
    semi.train(TRAINER)
    path = semi.model(TRAINER) / "fold_0" / "checkpoint_best.pth"
    best = torch.load(path, weights_only=False)
    for key, value in best["network_weights"].items():
        if ".seg_layers." in key:  # this network sees no organ
            value.fill_(0)
            value[0] = float(key.endswith("bias"))
    torch.save(best, path)
    semi.command(TRAINER, only_run_validation=True, val_with_best=True)
    assert read_json(path.parent / "validation" / "summary.json")["foreground_mean"]["Dice"] == 0


def test_probabilities_are_written_on_request(semi: World):
    semi.command(TRAINER, export_validation_probabilities=True)
    (file,) = (semi.model(TRAINER) / "fold_0" / "validation").glob("*.npz")
    probabilities = np.load(file)["probabilities"].astype(np.float32)
    assert probabilities.shape[0] == 2
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=2e-3)


def test_fold_all_trains_and_validates_on_every_labelled_case(semi: World):
    semi.command(TRAINER, fold="all")
    validated = {path.name for path in (semi.model(TRAINER) / "fold_all" / "validation").glob("*.nii.gz")}
    assert validated == {f"case_{number}.nii.gz" for number in range(3)}
    assert len(semi.predict(semi.model(TRAINER), fold="all")) == 2


def test_pretrained_weights_are_where_training_starts(semi: World):
    semi.train(TRAINER)
    start = semi.model(TRAINER) / "fold_0" / "checkpoint_final.pth"
    first = checkpoint(semi, TRAINER)
    semi.elsewhere("second").settings(initial_lr=0.0, seed=3)
    semi.command(TRAINER, pretrained_weights=str(start))
    second = checkpoint(semi, TRAINER)
    kept = [key for key in first["network_weights"] if ".seg_layers." not in key]  # nnU-Net takes over no output layer
    assert all(torch.equal(first["network_weights"][key], second["network_weights"][key]) for key in kept)
    other = second["dgplugins"]["second_network"]  # two networks with the same start would have nothing to teach
    assert any(not torch.equal(first["network_weights"][key], other[key]) for key in kept)


def test_bfloat16_on_the_cpu_is_used_when_asked_for(semi: World):
    semi.settings(cpu_bfloat16=True)
    built = semi.construct(TRAINER)
    assert student_dtypes(built) == {torch.bfloat16}
    assert np.isfinite(built.logger.get_value("train_losses", 0))


def student_dtypes(built: Any) -> set[torch.dtype]:
    """Train, and return the type of the student's logits."""
    built.initialize()
    dtypes, passes = set(), built.passes

    def watched(*inputs: Any) -> Any:
        found = passes(*inputs)
        dtypes.add(found.plain[0].dtype)
        return found

    built.passes = watched
    built.run_training()
    return dtypes


def test_find_best_configuration_compares_finished_folds(semi: World):
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    semi.use(SEMI, own=True)
    semi.write_splits(
        [{"train": ["case_2"], "val": ["case_0", "case_1"]}, {"train": ["case_0", "case_1"], "val": ["case_2"]}]
    )
    for fold in (0, 1):
        semi.command(TRAINER, fold, export_validation_probabilities=True)
    with threads_for_processes():
        found = find_best_configuration(
            semi.number,
            ({"plans": "nnUNetPlans", "configuration": "2d", "trainer": TRAINER},),
            num_processes=1, folds=(0, 1),
        )  # fmt: skip
    assert found["best_model_or_ensemble"]["selected_model_or_models"][0]["trainer"] == TRAINER


# ---------------------------------------------------------------- DeepLabV3+


class SmallDeepLab(torch.nn.Sequential):
    """Stands for DeepLabV3+: batch normalisation, one output, no decoder."""

    def __init__(self, in_channels: int, num_classes: int, input_scaling: str):
        super().__init__(
            torch.nn.Conv2d(in_channels, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, num_classes, 1)
        )


def test_deeplab_trains_and_is_rebuilt_by_the_predictor_from_the_plans(semi: World, monkeypatch: pytest.MonkeyPatch):
    from nnunet_dgplugins.methods.epl import deeplab

    monkeypatch.setattr(deeplab, "DeepLabV3Plus", SmallDeepLab)
    semi.settings(network="deeplabv3plus")
    built = semi.train(TRAINER)
    assert built.passes.__name__ == "published_passes"  # batch normalisation
    semi.no_settings()
    predictor = semi.predictor(semi.model(TRAINER))
    assert isinstance(predictor.network, SmallDeepLab)
    assert len(semi.predict(semi.model(TRAINER))) == 2


@pytest.fixture
def start_weights(semi: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A small network in DeepLabV3+'s place, and a file of start weights for it in the settings."""
    from nnunet_dgplugins.methods.epl import deeplab

    class Net(torch.nn.Module):
        def __init__(self, in_channels: int, num_classes: int, input_scaling: str):
            super().__init__()
            self.backbone = torch.nn.Sequential(torch.nn.Conv2d(in_channels, 4, 3, padding=1))
            self.classifier = torch.nn.Conv2d(4, num_classes, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.backbone(x))

    monkeypatch.setattr(deeplab, "DeepLabV3Plus", Net)
    given = {"0.weight": torch.full((4, 1, 3, 3), 0.5), "0.bias": torch.zeros(4), "fc.weight": torch.zeros(3)}
    torch.save(given, semi.root / "start.pth")
    semi.settings(network="deeplabv3plus", start_weights=str(semi.root / "start.pth"), initial_lr=0.0)
    return given


def test_start_weights_reach_both_networks_and_what_fits_is_said(semi: World, start_weights: dict[str, torch.Tensor]):
    built = semi.train(TRAINER)
    for network in built.networks():
        assert torch.equal(network.backbone[0].weight, start_weights["0.weight"])
    assert Path(built.log_file).read_text().count("2 tensors loaded") == 2


def test_pretrained_weights_win_over_start_weights(semi: World, start_weights: dict[str, torch.Tensor]):
    from nnunetv2.run.run_training import maybe_load_checkpoint

    built = semi.construct(TRAINER)
    built.initialize()
    given = {key: torch.full_like(value, 0.25) for key, value in built.network.state_dict().items()}
    torch.save({"network_weights": given}, semi.root / "pretrained.pth")
    maybe_load_checkpoint(built, False, False, str(semi.root / "pretrained.pth"))
    built.on_train_start()
    assert torch.equal(built.network.backbone[0].weight, given["backbone.0.weight"])
    assert torch.equal(built.second_network.backbone[0].weight, start_weights["0.weight"])


def test_a_training_begins_with_its_start_weights_or_not_at_all_and_goes_on_without_the_file(
    semi: World, start_weights: dict[str, torch.Tensor]
):
    file = semi.root / "start.pth"
    file.rename(semi.root / "kept.pth")
    with pytest.raises(UserError, match="no file"):
        semi.train(TRAINER)
    (semi.root / "kept.pth").rename(file)
    semi.train(TRAINER)
    file.unlink()
    resume(semi, TRAINER)


def test_deeplab_in_3d_and_a_batch_of_one_are_refused(semi: World):
    semi.settings(network="deeplabv3plus")
    assert "2d only" in refused(semi, configuration="3d_fullres")
    semi.settings(network="deeplabv3plus", unlabelled_batch_size=1)
    with pytest.raises(Exception, match="2 patches or more"):
        semi.construct(TRAINER).initialize()


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@needs_cuda
def test_cuda_trains_with_mixed_precision_and_predicts(semi: World):
    semi.settings(epochs=2)
    built = semi.construct(TRAINER, device="cuda")
    assert student_dtypes(built) == {torch.float16}
    assert np.isfinite(built.logger.get_value("train_losses", 1))
    assert len(semi.predict(semi.model(TRAINER), device="cuda")) == 2


@pytest.mark.gpu
@needs_cuda
def test_cuda_trains_without_mixed_precision(semi: World):
    semi.settings(amp=False)
    built = semi.construct(TRAINER, device="cuda")
    assert student_dtypes(built) == {torch.float32}
    assert np.isfinite(built.logger.get_value("train_losses", 0))
