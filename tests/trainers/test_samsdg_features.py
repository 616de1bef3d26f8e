"""Every feature of nnU-Net works with, or is refused by, both SAM-SDG trainers; docs/support.md is the table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from samsdg_worlds import COARSE, SAM, TRAINERS, before, checkpoint, step_one
from tiny_dataset import Recipe, threads_for_processes

from nnunet_dgplugins.errors import UnsupportedFeature
from nnunet_dgplugins.files import read_json

pytestmark = pytest.mark.parametrize("trainer", TRAINERS)
MASKS = "decoder.mask_decoder"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def refused(world: World, trainer: str, **options: Any) -> str:
    """The sentence of a refusal, which leaves nothing behind."""
    with pytest.raises(UnsupportedFeature) as caught:
        world.construct(trainer, **options)
    assert not list(world.results.iterdir())
    text = str(caught.value)
    assert text.startswith(trainer)
    assert text.endswith(".")
    assert ". " not in text
    return text


def watched_losses(built: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Collect logits, target and valid pixels of each training step."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    built.initialize()
    loss = built.loss

    def watched(logits: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None = None) -> Any:
        if logits.requires_grad:
            logits.retain_grad()
            seen.append((logits, target, valid))
        return loss(logits, target, valid=valid)

    built.loss = watched
    return seen


def test_2d_trains_and_predicts(world: World, trainer: str):
    before(world, trainer)
    built = world.train(trainer)
    assert np.isfinite(built.logger.get_value("train_losses", 0))
    predicted = world.predict(world.model(trainer))
    assert [x.shape for x in predicted] == [(6, 36, 40), (4, 36, 40)]
    assert {int(value) for x in predicted for value in np.unique(x)} <= {0, 1}


def test_3d_fullres_is_refused(world: World, trainer: str):
    assert "3d" in refused(world, trainer, configuration="3d_fullres")


def test_resenc_plans_train_and_predict(world: World, trainer: str):
    world.use(Recipe(), own=True)
    plans = world.plan_again("nnUNetPlannerResEncM")
    if trainer == SAM:
        world.train(COARSE, plans=plans)
    built = world.train(trainer, plans=plans)
    network = built.network.network if trainer == COARSE else built.network.coarse
    assert type(network).__name__ == "ResidualEncoderUNet"
    assert [x.shape for x in world.predict(world.model(trainer, plans=plans))] == [(6, 36, 40), (4, 36, 40)]


def test_region_labels_train_and_predict(world: World, trainer: str):
    world.use(Recipe("Regions", classes=2, regions=True))
    before(world, trainer)
    built = world.construct(trainer)
    seen = watched_losses(built)
    built.run_training()
    assert built.heads == [(1, 2), (2,)]
    whole, core = torch.cat([target for _, target, _ in seen]).unbind(1)
    assert core.any()
    assert bool((whole >= core).all())
    predicted = world.predict(world.model(trainer))
    assert {int(value) for x in predicted for value in np.unique(x)} <= {0, 1, 2}


def test_ignored_pixels_get_no_gradient_and_the_label_is_never_predicted(world: World, trainer: str):
    world.use(Recipe("Ignore", ignore=True))
    before(world, trainer)
    built = world.construct(trainer)
    seen = watched_losses(built)
    built.run_training()
    for logits, _, valid in seen:
        assert valid is not None
        ignored = (valid == 0).expand_as(logits)
        assert ignored.any()
        assert bool((logits.grad[ignored] == 0).all())
        assert bool((logits.grad[~ignored] != 0).any())
    assert 2 not in np.unique(np.concatenate(world.predict(world.model(trainer))))


def _stop_at(trainer: Any, epoch: int) -> Any:
    start = trainer.on_epoch_start

    def stopping() -> None:
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt
        start()

    return stopping


def test_continuing_without_a_checkpoint_starts_as_a_fresh_run_would(world: World, trainer: str):
    before(world, trainer)
    world.command(trainer, continue_training=True)
    first = checkpoint(world, trainer)["network_weights"]
    before(world.elsewhere("other"), trainer)
    world.command(trainer)
    second = checkpoint(world, trainer)["network_weights"]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_validation_alone_writes_the_summary(world: World, trainer: str):
    before(world, trainer)
    world.train(trainer)
    summary = world.model(trainer) / "fold_0" / "validation" / "summary.json"
    assert not summary.exists()
    world.command(trainer, only_run_validation=True)
    assert 0 <= read_json(summary)["foreground_mean"]["Dice"] <= 1


def test_validation_with_the_best_checkpoint_reads_that_one(world: World, trainer: str):
    before(world, trainer)
    world.train(trainer)
    path = world.model(trainer) / "fold_0" / "checkpoint_best.pth"
    best = torch.load(path, weights_only=False)
    last = "network.decoder.seg_layers.2" if trainer == COARSE else f"{MASKS}.output_hypernetworks_mlps.0.layers.2"
    best["network_weights"][f"{last}.weight"].fill_(0)
    best["network_weights"][f"{last}.bias"].fill_(-9 if trainer == COARSE else 0)  # this network sees no organ
    torch.save(best, path)
    world.command(trainer, only_run_validation=True, val_with_best=True)
    assert read_json(path.parent / "validation" / "summary.json")["foreground_mean"]["Dice"] == 0


def test_probabilities_are_written_on_request(world: World, trainer: str):
    before(world, trainer)
    world.command(trainer, export_validation_probabilities=True)
    (file,) = (world.model(trainer) / "fold_0" / "validation").glob("*.npz")
    probabilities = np.load(file)["probabilities"].astype(np.float32)
    assert probabilities.shape[0] == 2
    assert probabilities.shape[2:] == (36, 40)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=2e-3)


def test_fold_all_trains_and_validates_on_every_case(world: World, trainer: str):
    before(world, trainer, "all")
    world.command(trainer, fold="all")
    validated = {path.name for path in (world.model(trainer) / "fold_all" / "validation").glob("*.nii.gz")}
    assert validated == {f"case_{number}.nii.gz" for number in range(5)}
    assert len(world.predict(world.model(trainer), fold="all")) == 2


def test_pretrained_weights_are_where_training_starts(world: World, trainer: str):
    """Of step 2 the decoder's: its coarse network is the one of the step 1 that it found."""
    before(world, trainer)
    world.train(trainer)
    first = checkpoint(world, trainer)["network_weights"]
    start = world.model(trainer) / "fold_0" / "checkpoint_final.pth"
    world.elsewhere("second")
    if trainer == SAM:
        step_one(world, seed=5, iterations_per_epoch=2)
    world.settings(initial_lr=0.0, seed=3)
    world.command(trainer, pretrained_weights=str(start))
    second = checkpoint(world, trainer)["network_weights"]
    other = {key for key in first if not torch.equal(first[key], second[key])}
    if trainer == COARSE:  # nnU-Net gives a planned network's last layers no start
        assert all(".seg_layers." in key for key in other)
    if trainer == SAM:
        assert {key.partition(".")[0] for key in other} == {"coarse", "coarse_hash"}
        own = checkpoint(world, COARSE)["network_weights"]
        assert all(torch.equal(value, second[f"coarse.{key.removeprefix('network.')}"]) for key, value in own.items())


@pytest.mark.slow
def test_find_best_configuration_compares_finished_folds(world: World, trainer: str):
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    world.use(Recipe(), own=True)
    cases = [f"case_{number}" for number in range(5)]
    folds = [{"train": cases[2:], "val": cases[:2]}, {"train": cases[:2], "val": cases[2:]}]
    world.write_splits(folds)
    for fold in (0, 1):
        before(world, trainer, fold)
        world.command(trainer, fold, export_validation_probabilities=True)
    with threads_for_processes():
        found = find_best_configuration(
            world.number,
            ({"plans": "nnUNetPlans", "configuration": "2d", "trainer": trainer},),
            num_processes=1, folds=(0, 1),
        )  # fmt: skip
    assert found["best_model_or_ensemble"]["selected_model_or_models"][0]["trainer"] == trainer
    assert (world.model(trainer) / "crossval_results_folds_0_1" / "summary.json").is_file()


@pytest.mark.gpu
@needs_cuda
def test_cuda_trains_with_mixed_precision_and_predicts(world: World, trainer: str):
    before(world, trainer)
    world.settings(epochs=2)
    built = world.construct(trainer, device="cuda")
    built.initialize()
    # what enlarges the logits last does so in float32, so a convolution inside is asked
    part = built.network.network if trainer == COARSE else built.network.decoder.mask_decoder.output_upscaling
    layer = [inner for inner in part.modules() if isinstance(inner, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))][-1]
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    built.run_training()
    assert torch.float16 in seen
    assert np.isfinite(built.logger.get_value("train_losses", 1))
    assert len(world.predict(world.model(trainer), device="cuda")) == 2


@pytest.mark.gpu
@needs_cuda
def test_cuda_trains_without_mixed_precision(world: World, trainer: str):
    before(world, trainer)
    world.settings(amp=False)
    built = world.construct(trainer, device="cuda")
    built.run_training()
    assert np.isfinite(built.logger.get_value("train_losses", 0))


def test_a_bundled_encoder_travels_in_a_zip_to_an_empty_results_folder(
    world: World, trainer: str, sam_file: Path, monkeypatch: pytest.MonkeyPatch
):
    from nnunetv2.model_sharing.model_export import export_pretrained_model
    from nnunetv2.model_sharing.model_import import install_model_from_zip_file

    from nnunet_dgplugins.trainers.deployed import bundle

    before(world, trainer)
    world.settings(sam="vit_b")
    world.command(trainer)
    (world.model(trainer) / "fold_0" / "progress.png").touch()  # nnU-Net's plot is off in fast tests
    expected = world.predict(world.model(trainer))
    if trainer == SAM:
        bundle(world.model(trainer), say=lambda text: None)
    export_pretrained_model(
        world.name, str(world.root / "model.zip"), ("2d",), trainer, folds=(0,), export_crossval_predictions=False
    )
    shutil.rmtree(sam_file.parent)
    monkeypatch.delenv("DGPLUGINS_SAM_DIR")
    world.elsewhere("received").no_settings()
    install_model_from_zip_file(str(world.root / "model.zip"))
    after = world.predict(world.model(trainer))
    # the encoder travels in half precision
    assert np.mean([np.mean(a == b) for a, b in zip(expected, after, strict=True)]) > 0.999
