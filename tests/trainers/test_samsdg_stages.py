"""How step 2 finds step 1, what of both is trained and frozen, and what a checkpoint carries."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import World
from samsdg_worlds import COARSE, LEARNS, SAM, before, checkpoint, step_one
from tiny_dataset import Recipe

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.samsdg.decoder import untrained_names
from nnunet_dgplugins.sam.weights import hash_state, load_parts

MASKS = "decoder.mask_decoder."


def coarse_hash(world: World, fold: int = 0) -> str:
    weights = checkpoint(world, COARSE, fold=fold)["network_weights"]
    return hash_state({key.removeprefix("network."): value for key, value in weights.items()})


def test_a_missing_step_1_is_one_error_with_the_command(world: World):
    with pytest.raises(UserError, match=rf"step 1 is missing.*Run: nnUNetv2_train {world.number} 2d 1 -tr {COARSE}$"):
        world.construct(SAM, fold=1)
    assert not (world.model(SAM) / "fold_1").exists()


def test_an_unfinished_step_1_is_to_be_continued(world: World):
    fold = step_one(world) / "fold_0"
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    with pytest.raises(UserError, match=rf"not finished.*-tr {COARSE} --c$"):
        world.construct(SAM)


def test_a_step_1_of_other_plans_does_not_count(world: World):
    world.use(Recipe(), own=True)
    plans = world.plan_again("nnUNetPlannerResEncM")
    step_one(world)
    with pytest.raises(UserError, match=rf"is missing.*-tr {COARSE} -p {plans}$"):
        world.construct(SAM, plans=plans)


def test_a_step_1_of_other_images_or_other_cases_is_stale(world: World):
    world.use(Recipe(), own=True)
    step_one(world)
    folder = world.preprocessed / "nnUNetPlans_2d"
    for kind in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copy(folder / f"case_1{kind}", folder / f"case_2{kind}")
    with pytest.raises(
        UserError, match=rf"trained on other cases, images or labels.*Remove .*fold_0 and run:.*{COARSE}"
    ):
        world.train(SAM)
    world.write_splits([{"train": ["case_0", "case_1"], "val": ["case_3"]}])
    with pytest.raises(UserError, match="trained on other cases"):
        world.train(SAM)


def test_step_1_is_not_continued_on_other_images(world: World):
    """Else its checkpoint would carry the stamp of data that it has not seen, and step 2 would take it."""
    world.use(Recipe(), own=True)
    final = step_one(world) / "fold_0" / "checkpoint_final.pth"
    kept, folder = final.read_bytes(), world.preprocessed / "nnUNetPlans_2d"
    for kind in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copy(folder / f"case_1{kind}", folder / f"case_2{kind}")
    world.settings(**LEARNS)
    with pytest.raises(UserError, match=r"has changed since it began\. Remove .*fold_0 and start it anew, without --c"):
        world.command(COARSE, continue_training=True)
    assert final.read_bytes() == kept


def test_both_steps_see_the_same_images_or_the_second_says_which_setting_differs(world: World):
    step_one(world)
    world.settings(equalise=False)
    with pytest.raises(UserError, match="equalise: step 1 has True, asked for False"):
        world.construct(SAM)


def test_a_training_goes_on_with_no_other_step_1_than_its_own(world: World):
    from nnunetv2.run.run_training import maybe_load_checkpoint

    step_one(world)
    world.train(SAM)
    shutil.rmtree(world.model(COARSE))
    step_one(world, seed=7, iterations_per_epoch=1)
    world.command(SAM, only_run_validation=True)  # this asks for none of step 1's weights
    built = world.construct(SAM, continues=True)
    maybe_load_checkpoint(built, True, False)
    with pytest.raises(UserError, match="step 1 has been trained anew since"):
        built.run_training()


def test_the_optimiser_holds_what_is_truly_trained_and_all_else_stays_to_the_bit(world: World):
    step_one(world)
    built = world.construct(SAM)
    built.initialize()
    held = {id(p) for group in built.optimizer.param_groups for p in group["params"]}
    trained = {name for name, p in built.network.named_parameters() if id(p) in held}
    decoder = built.network.decoder.mask_decoder
    expected = {f"{MASKS}{name}" for name, _ in decoder.named_parameters()}
    assert trained == expected - {f"{MASKS}{name}" for name in untrained_names(decoder)}
    assert built.optimizer.defaults["weight_decay"] == 1e-3
    start = {key: value.clone() for key, value in built.network.state_dict().items()}
    built.run_training()
    assert [
        name for name, p in built.network.named_parameters() if name in trained and p not in built.optimizer.state
    ] == []
    after = built.network.state_dict()
    assert [key for key in start if key not in trained and not torch.equal(start[key], after[key])] == []
    assert len([key for key in trained if not torch.equal(start[key], after[key])]) > 0.9 * len(trained)


def test_training_starts_from_sams_own_decoder_and_step_1s_network(world: World, sam_file):
    step_one(world)
    world.settings(sam="vit_b")
    built = world.construct(SAM)
    built.initialize()
    file, state = torch.load(sam_file, weights_only=True), built.network.state_dict()
    assert all(
        torch.equal(state[f"{MASKS}{key}"], file[f"mask_decoder.{key}"])
        for key in built.network.decoder.mask_decoder.state_dict()
    )
    assert torch.equal(
        state["decoder.prompt_encoder.no_mask_embed.weight"], file["prompt_encoder.no_mask_embed.weight"]
    )
    own = checkpoint(world, COARSE)["network_weights"]
    assert all(torch.equal(value, state[f"coarse.{key.removeprefix('network.')}"]) for key, value in own.items())


def test_a_checkpoint_names_its_encoder_and_its_step_1_by_hash(world: World, sam_file):
    step_one(world)
    world.settings(sam="vit_b")
    world.train(SAM)
    weights = checkpoint(world, SAM)["network_weights"]
    assert {key for key in weights if key.startswith("image_encoder.")} == {"image_encoder.weights_hash"}
    assert bytes(weights["image_encoder.weights_hash"].tolist()).hex() == load_parts("vit_b").weights_hash
    assert bytes(weights["coarse_hash"].tolist()).hex() == coarse_hash(world)
    shutil.rmtree(world.model(COARSE))  # prediction does not need it
    assert len(world.predict(world.model(SAM))) == 2


def test_a_bundled_model_predicts_without_the_sam_file(world: World, sam_file):
    from nnunet_dgplugins.trainers.deployed import bundle

    step_one(world)
    world.settings(sam="vit_b")
    world.train(SAM)
    expected = world.predict(world.model(SAM))
    bundle(world.model(SAM), say=lambda text: None)
    sam_file.unlink()
    found = world.predict(world.model(SAM))
    assert np.mean([np.mean(a == b) for a, b in zip(expected, found, strict=True)]) > 0.999


def test_the_coarse_trainer_has_nothing_to_bundle(world: World):
    from nnunet_dgplugins.trainers.deployed import bundle

    before(world, SAM)
    with pytest.raises(UserError, match=f"trained by {COARSE}, which has no frozen part"):
        bundle(world.model(COARSE))


def test_every_fold_has_a_step_1_of_its_own(world: World):
    step_one(world, 0)
    step_one(world, 1)
    world.train(SAM, 1)
    used = bytes(checkpoint(world, SAM, fold=1)["network_weights"]["coarse_hash"].tolist()).hex()
    assert used == coarse_hash(world, 1) != coarse_hash(world, 0)


@pytest.mark.slow
def test_folds_share_one_build_of_step_1(world: World):
    """Else the plans beside the model would rebuild the first fold's network with the second's sizes."""
    step_one(world)
    world.train(SAM)
    plans = (world.model(SAM) / "plans.json").read_bytes()
    shutil.rmtree(world.model(COARSE))
    step_one(world, 0, image_size=128)
    step_one(world, 1, image_size=128)
    expected = r"trained with another step 1 \(image_size: 64, now 128\)\. Move the folder, or use another plans name"
    with pytest.raises(UserError, match=expected):
        world.construct(SAM, fold=1)
    with pytest.raises(UserError, match=expected):  # trained again from the start, over what is there
        world.train(SAM)
    world.command(SAM, only_run_validation=True)
    assert (world.model(SAM) / "plans.json").read_bytes() == plans


def test_validation_needs_no_step_1(world: World):
    step_one(world)
    world.train(SAM)
    shutil.rmtree(world.model(COARSE))
    world.command(SAM, only_run_validation=True)
    assert (world.model(SAM) / "fold_0" / "validation" / "summary.json").is_file()
