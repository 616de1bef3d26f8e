"""Both stages of D-CAM learn from tags alone, and say which patches went wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import PATCHES, World
from stages import after_its_stage, elsewhere, log_of, same, turn_tags, weights
from test_desam_reads import Opened, linux
from tiny_dataset import Recipe

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import BadInput, UnsupportedFeature, UserError

FIRST, SECOND = TRAINERS = ("DCAMClassifierTrainer", "DCAMTrainer")
both = pytest.mark.parametrize("trainer", TRAINERS)


@both
def test_label_files_can_hold_anything_and_not_one_bit_of_the_weights_changes(patches: World, trainer: str):
    after_its_stage(patches.use(PATCHES, own=True), trainer).train(trainer)
    before = weights(patches, trainer)
    for folder in (patches.raw / "labelsTr", patches.preprocessed / "gt_segmentations"):
        for path in folder.glob("*.png"):
            path.write_bytes(b"no image")
    gone = [*(patches.raw / "labelsVal").iterdir(), *patches.preprocessed.glob("nnUNetPlans_2d/*_seg.b2nd")]
    assert len(gone) == 2 + PATCHES.cases
    for path in gone:
        path.unlink()
    elsewhere(patches, trainer, "again").train(trainer)
    assert same(before, weights(patches, trainer))


@linux
@both
def test_masks_of_validation_patches_alone_are_opened(patches: World, trainer: str):
    after_its_stage(patches.use(PATCHES, own=True), trainer)
    folders = [patches.raw / name for name in ("labelsTr", "labelsVal", "labelsTs", "imagesTs")]
    data = patches.preprocessed / "nnUNetPlans_2d"
    with Opened(*folders, patches.preprocessed / "gt_segmentations", data) as opened:
        patches.command(trainer)
        paths = {path for path in map(Path, opened.paths()) if path.suffix}
    assert {path for path in paths if path.parent != data} == {folders[1] / f"{n}.png" for n in PATCHES.validation}
    assert not any("_seg" in path.name for path in paths)
    assert data / "case_0.b2nd" in paths  # a library written in C is seen


@linux
@both
def test_fold_all_opens_no_mask_because_every_case_trains(patches: World, trainer: str):
    after_its_stage(patches.use(PATCHES, own=True), trainer, "all")
    folders = [patches.raw / name for name in ("labelsTr", "labelsVal", "labelsTs")]
    data = patches.preprocessed / "nnUNetPlans_2d"
    with Opened(*folders, patches.preprocessed / "gt_segmentations", data) as opened:
        patches.command(trainer, "all")
        names = {(path.parent, path.name) for path in map(Path, opened.paths()) if path.suffix}
    assert {folder for folder, _ in names} == {data}
    assert not any("_seg" in name for _, name in names)
    folder = patches.model(trainer) / "fold_all"
    assert not (folder / "validation_cam" / "iou.json").exists()
    if trainer == SECOND:
        (log,) = folder.glob("training_log_*.txt")
        assert "8 of 8 validation patches have no real masks" in log.read_text()


@both
def test_other_tags_give_other_weights(patches: World, trainer: str):
    after_its_stage(patches.use(PATCHES, own=True), trainer).train(trainer)
    before = weights(patches, trainer)
    turn_tags(patches)
    after_its_stage(patches.elsewhere("again"), trainer).train(trainer)
    assert not same(before, weights(patches, trainer))


@both
def test_a_training_is_not_continued_on_other_tags(patches: World, trainer: str):
    """Else its last checkpoint would carry the stamp of data that it has not seen."""
    after_its_stage(patches.use(PATCHES, own=True), trainer).train(trainer)
    turn_tags(patches)
    if trainer == SECOND:
        shutil.rmtree(patches.model(FIRST))
        patches.train(FIRST)
    with pytest.raises(UserError, match=r"has changed since it began\. Remove .*fold_0"):
        patches.command(trainer, continue_training=True)
    patches.command(trainer, only_run_validation=True)  # looks at what was trained, whatever came later


@both
def test_a_loss_that_is_no_number_names_the_patches(patches: World, trainer: str):
    built = after_its_stage(patches, trainer).construct(trainer)
    built.on_train_start()
    for parameter in built.network.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at epoch 0, cases case_\d, case_\d, case_\d\."):
        built.run_training()


@both
def test_validation_goes_without_scores_where_no_mask_is_known(patches: World, trainer: str):
    patches.use(replace(PATCHES, name="White", white=True), own=True)
    for path in (patches.raw / "labelsVal").iterdir():
        path.unlink()
    built = after_its_stage(patches, trainer).construct(trainer)
    built.run_training()
    built.perform_actual_validation()
    folder = patches.model(trainer) / "fold_0" / "validation_cam"
    assert {path.stem for path in folder.glob("*.png")} == {*PATCHES.validation}
    assert not (folder / "iou.json").exists()
    assert "no masks of them are known" in log_of(built)
    if trainer == SECOND:
        assert "2 of 2 validation patches have no real masks" in log_of(built)
        assert 0 <= built.logger.get_value("mean_fg_dice", 0) <= 1


@both
def test_a_patch_without_tags_in_a_fold_is_named(patches: World, trainer: str):
    after_its_stage(patches.use(PATCHES, own=True), trainer)
    patches.edit_json("dataset.json", lambda content: content["dgplugins"]["cases"]["case_2"].pop("tags"))
    with pytest.raises(BadInput, match="'case_2' has no tags"):
        patches.train(trainer)


@both
def test_other_images_and_datasets_without_tags_are_refused(patches: World, trainer: str):
    patches.use(Recipe())
    with pytest.raises(UnsupportedFeature, match=r"this dataset has 1 channels\. .* has none in its case table"):
        patches.construct(trainer)
    patches.use(replace(PATCHES, name="ZScored", normalisation="red"))
    with pytest.raises(UnsupportedFeature, match="normalise by ZScoreNormalization: name the channels rgb_to_0_1"):
        patches.construct(trainer)
    assert not list(patches.results.iterdir())


@both
def test_wrong_settings_are_refused_all_at_once(patches: World, trainer: str):
    patches.settings(batch_size=1, momentum=2.0, pcmorm="batch")
    with pytest.raises(BadInput, match=r"(?s)batch_size.*at least 2.*momentum.*at most 0\.999.*unknown.*'pcmorm'"):
        patches.construct(trainer)
    assert not list(patches.results.iterdir())


@both
def test_the_commands_that_list_and_describe_know_both_stages(trainer: str):
    assert f"{trainer}  (D-CAM, {1 + TRAINERS.index(trainer)}: " in CliRunner().invoke(cli, ["list"]).output
    described = CliRunner().invoke(cli, ["describe", trainer]).output
    assert "image tags only" in described
    assert ("pcnorm" in described) == (trainer == FIRST)
    assert ("gate_threshold" in described) == (trainer == SECOND)
