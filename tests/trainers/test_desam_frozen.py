"""What is trained and what is frozen, what a checkpoint carries of the encoder, and official checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from conftest import World
from tiny_dataset import Recipe

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.sam.weights import load_parts
from nnunet_dgplugins.trainers.deployed import bundle
from nnunet_dgplugins.trainers.imported import Destination, import_desam

TRAINERS = ("DeSAMTrainer", "DeSAMGridTrainer")
both = pytest.mark.parametrize("trainer", TRAINERS)
NEVER_CALLED = ("output_upscaling", "output_hypernetworks_mlps", "pimm.seg_outputs.0")
IOU_SIDE = ("iou_prediction_head", "transformer.final_attn_token_to_image", "transformer.norm_final_attn")


def weights(world: World, trainer: str = "DeSAMTrainer", fold: int = 0) -> dict[str, torch.Tensor]:
    path = world.model(trainer) / f"fold_{fold}" / "checkpoint_final.pth"
    return torch.load(path, weights_only=False)["network_weights"]


def quiet(text: str) -> None:
    """Say nothing."""


@both
def test_the_optimiser_holds_what_is_truly_trained_and_nothing_else(world: World, trainer: str):
    built = world.train(trainer)
    held = {id(p) for group in built.optimizer.param_groups for p in group["params"]}
    trained = {name for name, p in built.network.named_parameters() if id(p) in held}
    assert len(trained) == len(held)
    assert all(name.startswith("head.mask_decoder.") for name in trained)
    outside = NEVER_CALLED + (IOU_SIDE if trainer == "DeSAMTrainer" else ())
    assert not [name for name in trained for part in outside if f"mask_decoder.{part}" in name]
    if trainer == "DeSAMGridTrainer":
        assert any("iou_prediction_head" in name for name in trained)
    unreached = [
        name for name, p in built.network.named_parameters() if name in trained and p not in built.optimizer.state
    ]
    assert unreached == []  # a gradient came to each of them


@both
def test_what_is_frozen_is_bit_identical_after_training_and_what_is_trained_is_not(world: World, trainer: str):
    built = world.construct(trainer)
    built.initialize()
    held = {id(p) for group in built.optimizer.param_groups for p in group["params"]}
    trained = {name for name, p in built.network.named_parameters() if id(p) in held}
    before = {key: value.clone() for key, value in built.network.state_dict().items()}
    built.run_training()
    after = built.network.state_dict()
    assert before.keys() == after.keys()
    assert [key for key in before if key not in trained and not torch.equal(before[key], after[key])] == []
    changed = [key for key in trained if not torch.equal(before[key], after[key])]
    assert len(changed) > 0.9 * len(trained)  # a few biases in front of a norm move by less than a bit


def test_sams_own_decoder_is_where_training_starts(world: World, sam_file: Path):
    world.settings(sam="vit_b")
    built = world.construct()
    built.initialize()
    file = torch.load(sam_file, weights_only=True)
    state = built.network.state_dict()
    for name in ("mask_decoder.transformer.layers.0.self_attn.q_proj.weight", "prompt_encoder.no_mask_embed.weight"):
        assert torch.equal(state[f"head.{name}"], file[name])


def test_a_checkpoint_holds_of_a_file_models_encoder_only_the_hash(world: World, sam_file: Path):
    world.settings(sam="vit_b")
    world.train()
    names = {key for key in weights(world) if key.startswith("image_encoder.")}
    assert names == {"image_encoder.weights_hash"}
    hash = bytes(weights(world)["image_encoder.weights_hash"].tolist()).hex()
    assert hash == load_parts("vit_b").weights_hash


def test_a_file_given_by_its_path_is_recognised_and_found_by_name_on_another_machine(world: World, sam_file: Path):
    own = sam_file.rename(world.root / "my_medsam.pth")
    world.settings(sam=str(own))
    built = world.train()
    assert built.settings.sam == f"vit_b:{own}"
    before = world.predict()
    own.rename(sam_file.parent / own.name)  # DGPLUGINS_SAM_DIR names this folder
    assert all(np.array_equal(a, b) for a, b in zip(before, world.predict(), strict=True))


def test_vit_tiny_is_always_inside_in_half_precision_to_the_bit(world: World):
    world.train()
    own = load_parts("vit_tiny").image_encoder.state_dict()
    found = {key: value for key, value in weights(world).items() if key.startswith("image_encoder.")}
    assert bytes(found.pop("image_encoder.weights_hash").tolist()).hex() == load_parts("vit_tiny").weights_hash
    assert {key.removeprefix("image_encoder.") for key in found} == own.keys()
    for key, value in own.items():
        assert found[f"image_encoder.{key}"].dtype == torch.float16
        assert torch.equal(found[f"image_encoder.{key}"].float(), value)


@both
def test_a_model_predicts_with_its_own_weights_when_the_package_ships_others(
    world: World, trainer: str, monkeypatch: pytest.MonkeyPatch
):
    world.train(trainer)
    trained = weights(world, trainer)
    expected = world.predict(world.model(trainer))
    small_models.install_newer(world.root / "newer", monkeypatch)
    assert bytes(trained["image_encoder.weights_hash"].tolist()).hex() != load_parts("vit_tiny").weights_hash
    predictor = world.predictor(world.model(trainer))
    found = predictor.predict_from_files_sequential(world.images(), None)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    state = predictor.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.items())


def test_prediction_with_another_weight_file_is_refused_with_both_hashes(world: World, sam_file: Path):
    world.settings(sam="vit_b")
    world.train()
    trained = load_parts("vit_b").weights_hash
    small_models.write_file(sam_file.parent, seed=6)
    with pytest.raises(UserError) as caught:
        world.predict()
    assert trained in str(caught.value)
    assert load_parts("vit_b").weights_hash in str(caught.value)
    assert "dgplugins bundle" in str(caught.value)


def test_prediction_without_the_weight_file_says_which_and_where(world: World, sam_file: Path):
    world.settings(sam="vit_b")
    world.train()
    sam_file.unlink()
    with pytest.raises(UserError, match=r"small_vit_b\.pth.*DGPLUGINS_SAM_DIR"):
        world.predict()


@both
def test_a_bundled_model_predicts_without_the_file(world: World, trainer: str, sam_file: Path):
    world.settings(sam="vit_b")
    world.train(trainer, fold=0)
    world.train(trainer, fold=1)
    before = world.predictor(world.model(trainer))
    before.list_of_parameters.append(weights(world, trainer, 1))
    expected = before.predict_from_files_sequential(world.images(), None)
    paths = bundle(world.model(trainer), say=quiet)
    assert len(paths) == 2
    assert weights(world, trainer)["image_encoder.patch_embed.proj.weight"].dtype == torch.float16
    sam_file.unlink()
    after = world.predictor(world.model(trainer))
    after.list_of_parameters.append(weights(world, trainer, 1))
    found = after.predict_from_files_sequential(world.images(), None)
    # the encoder is carried in half precision
    assert np.mean([np.mean(a == b) for a, b in zip(expected, found, strict=True)]) > 0.999


def test_bundling_twice_changes_nothing(world: World, sam_file: Path):
    world.settings(sam="vit_b")
    world.train()
    bundle(world.model(), say=quiet)
    first = weights(world)
    bundle(world.model(), say=quiet)
    second = weights(world)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_bundled_model_is_validated_again_and_continued(world: World, sam_file: Path):
    world.settings(sam="vit_b")
    world.train()
    bundle(world.model(), say=quiet)
    world.command(only_run_validation=True)
    summary = world.model() / "fold_0" / "validation" / "summary.json"
    assert summary.is_file()
    summary.unlink()
    world.command(continue_training=True)
    assert summary.is_file()


def test_a_model_without_frozen_parts_cannot_be_bundled(world: World, tmp_path: Path):
    with pytest.raises(UserError, match=r"no fold_\*/checkpoint_final\.pth"):
        bundle(tmp_path)


# ---------------------------------------------------------------- official checkpoints


def official(world: World, trainer: str) -> tuple[Path, Any]:
    """Write what the released scripts save, a state dict of the whole model, and return it with its network."""
    world.settings(sam="vit_b")
    world.train(trainer)
    predictor = world.predictor(world.model(trainer))
    network = predictor.network
    network.load_state_dict(predictor.list_of_parameters[0])
    state = {key.removeprefix("head."): value for key, value in network.state_dict().items()}
    del state["image_encoder.weights_hash"]
    parts = load_parts("vit_b")
    state.update({f"image_encoder.{key}": value for key, value in parts.image_encoder.state_dict().items()})
    path = world.root / "desam_model_best.pth"
    torch.save({f"module.{key}": value for key, value in state.items()}, path)
    return path, world.predict(world.model(trainer))


@both
def test_an_imported_official_checkpoint_predicts_the_same(world: World, trainer: str, sam_file: Path):
    path, expected = official(world, trainer)
    shutil.rmtree(sam_file.parent)
    world.elsewhere("imported")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DGPLUGINS_SAM_DIR")
        folder = import_desam(path, Destination(str(world.number), trainer, "nnUNetPlans", "2d", 0))
        found = world.predict(folder)
    assert folder == world.model(trainer)
    assert read_json(folder / "plans.json")["configurations"]["2d"]["dgplugins"][trainer]["sam"] == "vit_b"
    assert np.mean([np.mean(a == b) for a, b in zip(expected, found, strict=True)]) > 0.999


def test_an_import_that_the_trial_file_contradicts_is_refused(world: World, sam_file: Path):
    path, _ = official(world, "DeSAMTrainer")
    world.elsewhere("imported").settings(sam="vit_tiny")
    with pytest.raises(UserError, match=r"DGPLUGINS_SETTINGS asks for sam=vit_tiny, but .* is a vit_b"):
        import_desam(path, Destination(str(world.number), "DeSAMTrainer", "nnUNetPlans", "2d", 0))


def test_an_import_never_replaces_a_model_unasked(world: World, sam_file: Path):
    path, _ = official(world, "DeSAMTrainer")
    before = weights(world)
    with pytest.raises(UserError, match="--overwrite"):
        import_desam(path, Destination(str(world.number), "DeSAMTrainer", "nnUNetPlans", "2d", 0))
    assert weights(world).keys() == before.keys()


def test_a_dataset_of_several_classes_cannot_take_an_official_checkpoint(world: World, sam_file: Path):
    path, _ = official(world, "DeSAMTrainer")
    world.elsewhere("imported").use(Recipe("Classes", classes=3)).no_settings()
    with pytest.raises(UserError, match="3 classes; an official DeSAM checkpoint knows one"):
        import_desam(path, Destination(str(world.number), "DeSAMTrainer", "nnUNetPlans", "2d", 0))


def test_a_pickled_module_is_refused_with_instructions(world: World, sam_file: Path):
    path = world.root / "module.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=r"could run that code.*state_dict\(\)"):
        import_desam(path, Destination(str(world.number), "DeSAMTrainer", "nnUNetPlans", "2d", 0))
    assert not list(world.results.iterdir())
