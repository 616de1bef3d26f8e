"""Between D-CAM's stages: what stage 2 asks of stage 1, and the pseudo masks on disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATCHES, World
from stages import log_of, turn_tags
from tiny_patches import patch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.dcam.masks import IGNORE, pseudo_masks
from nnunet_dgplugins.trainers.dcam_stages import FOLDER, PseudoMasks, _equal_sizes
from nnunet_dgplugins.trainers.patches import Patches

FIRST, SECOND = "DCAMClassifierTrainer", "DCAMTrainer"
WHITE = replace(PATCHES, name="White", white=True)


def started(world: World) -> PseudoMasks:
    """Do what stage 2 does before its first step."""
    trainer = world.construct(SECOND)
    trainer.on_train_start()
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        loader.close()
    masks: PseudoMasks = trainer.masks
    assert log_of(trainer).count("seudo masks") >= 1
    world.log = log_of(trainer)  # type: ignore[attr-defined]
    return masks


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_stage_two_names_the_command_where_stage_one_is_missing(patches: World):
    with pytest.raises(
        UserError, match=rf"stage 1 is missing.* Run: nnUNetv2_train {patches.number} 2d 0 -tr {FIRST}$"
    ):
        patches.construct(SECOND)
    assert not list(patches.results.iterdir())
    patches.use(PATCHES, own=True)
    shutil.copy(patches.preprocessed / "nnUNetPlans.json", patches.preprocessed / "Mine.json")
    patches.edit_json("Mine.json", lambda plans: plans.update(plans_name="Mine"))
    with pytest.raises(UserError, match=rf"nnUNetv2_train {patches.number} 2d all -tr {FIRST} -p Mine$"):
        patches.construct(SECOND, "all", plans="Mine")


def test_an_unfinished_stage_one_is_to_be_continued(patches: World):
    patches.train(FIRST)
    final = patches.model(FIRST) / "fold_0" / "checkpoint_final.pth"
    final.rename(final.with_name("checkpoint_latest.pth"))
    with pytest.raises(UserError, match=rf"stage 1 is not finished.* -tr {FIRST} --c$"):
        patches.construct(SECOND)
    assert not patches.model(SECOND).exists()


def test_a_stage_one_of_other_tags_or_patches_is_stale(patches: World):
    patches.use(PATCHES, own=True).train(FIRST)
    patches.construct(SECOND)
    turn_tags(patches)
    with pytest.raises(UserError, match=rf"other patches, tags or classes .*Remove .*fold_0 and run: .* -tr {FIRST}$"):
        patches.construct(SECOND)
    turn_tags(patches)
    patches.construct(SECOND)
    patches.write_splits([{"train": PATCHES.training[1:], "val": PATCHES.validation}])
    with pytest.raises(UserError, match="other patches, tags or classes"):
        patches.construct(SECOND)


def test_a_stage_one_of_another_build_is_refused_beside_a_trained_fold(patches: World):
    patches.train(FIRST)
    patches.train(SECOND)
    shutil.rmtree(patches.model(FIRST))
    patches.settings(pcnorm="off")
    patches.train(FIRST)
    with pytest.raises(UserError, match=r"trained with another stage 1 \(pcnorm: 'instance', now 'off'"):
        patches.construct(SECOND)


def test_masks_are_made_once_beside_the_preprocessed_data_and_found_again(patches: World):
    patches.use(PATCHES, own=True).train(FIRST)
    data = {path.name for path in (patches.preprocessed / "nnUNetPlans_2d").iterdir()}
    masks = started(patches)
    assert masks.folder.parent == patches.preprocessed / FOLDER
    assert {path.name for path in (patches.preprocessed / "nnUNetPlans_2d").iterdir()} == data
    assert {path.stem for path in masks.folder.iterdir()} == {*PATCHES.training}  # the others have real masks
    times = {path: path.stat().st_mtime_ns for path in masks.folder.iterdir()}
    patches.command(FIRST, continue_training=True)  # writes the same weights once more
    assert started(patches).folder == masks.folder
    assert "6 patches, all in" in patches.log  # type: ignore[attr-defined]
    assert {path: path.stat().st_mtime_ns for path in masks.folder.iterdir()} == times


def test_masks_are_those_of_the_classifier_and_the_tags(patches: World):
    trainer = patches.use(WHITE).train(FIRST)
    masks = started(patches)
    network = trainer.network.classifier.eval()
    for name in WHITE.training:
        picture, _, tags = patch(WHITE, int(name[-1]))
        image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        expected = pseudo_masks(network, image, torch.tensor([tags]), white=True)
        three = masks.read(name)
        assert three.shape == (3, 64, 64)
        for found, layer in zip(three, ("b4_5", "b5_2", "bn7"), strict=True):
            assert (found == expected[layer][0].numpy()).mean() > 0.99  # batches round differently
        assert (three[:, :12, :12] == 3).all()  # white is the value behind the classes
        assert set(np.unique(three)) <= {3, *np.flatnonzero(tags)}


def test_a_killed_making_of_masks_goes_on_and_ends_with_the_same_bytes(patches: World):
    patches.use(PATCHES, own=True).train(FIRST)
    folder = started(patches).folder
    before = contents(folder)
    for name in PATCHES.training[1:4]:
        (folder / f"{name}.npz").unlink()
    (folder / ".tmp-1-1-case_2.npz").write_bytes(b"half")
    started(patches)
    assert "Making 3 of 6 pseudo masks" in patches.log  # type: ignore[attr-defined]
    assert contents(folder) == before


def test_batches_of_masks_hold_one_size_and_are_those_of_an_unbroken_run(patches: World):
    patches.use(replace(PATCHES, name="Unequal", sizes=((48, 64), (64, 64), (80, 56))))
    trainer = patches.construct(FIRST)
    trainer.initialize()
    assert _equal_sizes(Patches(trainer, trainer.do_split()[0]), 1) == [[0], [3], [1], [4], [2], [5]]
    assert _equal_sizes(Patches(trainer, trainer.do_split()[0]), 8) == [[0, 3], [1, 4], [2, 5]]


def test_another_stage_one_or_other_tags_get_a_folder_of_their_own(patches: World):
    patches.use(PATCHES, own=True).train(FIRST)
    folders = [started(patches).folder]
    patches.settings(seed=1)
    patches.elsewhere("seed").train(FIRST)
    folders.append(started(patches).folder)
    turn_tags(patches)
    patches.elsewhere("tags").train(FIRST)
    folders.append(started(patches).folder)
    patches.settings(seed=1, white_background=True)
    patches.command(FIRST, only_run_validation=True)  # how maps become masks is not learnt
    folders.append(started(patches).folder)
    assert len(set(folders)) == 4
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize(("white", "background"), [(True, False), (True, True), (False, True)])
def test_white_and_background_are_the_value_behind_the_classes(patches: World, white: bool, background: bool):
    patches.use(replace(PATCHES, name=f"Rule{white}{background}", white=white, background=background, empty=1))
    patches.train(FIRST)
    masks = started(patches)
    with_tissue, without = masks.read("case_0"), masks.folder / "case_1.npz"
    assert without.exists() == background  # shows nothing: all background, or left out
    assert not background or (masks.read("case_1") == 3).all()
    assert (with_tissue[:, :12, :12] == 3).all() == white
    assert IGNORE not in with_tissue


def test_the_setting_wins_over_what_the_dataset_says_of_white(patches: World):
    patches.use(WHITE).settings(white_background=False)
    patches.train(FIRST)
    assert 3 not in started(patches).read("case_0")
    assert "stage 1's rules: white_background=False, background_threshold=None" in patches.log  # type: ignore[attr-defined]


def test_a_dataset_that_shows_next_to_nothing_is_refused(patches: World):
    patches.use(PATCHES, own=True)

    def emptied(content: dict) -> None:
        for name in PATCHES.training[1:]:
            content["dgplugins"]["cases"][name]["tags"] = [[0, 0, 0]]

    patches.edit_json("dataset.json", emptied)
    patches.train(FIRST)
    with pytest.raises(UserError, match="two training patches or more that show a class, found 1"):
        patches.train(SECOND)
