"""Slices of unseen sites: any size, spacing and orientation, with the result of the slice alone."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import World
from tiny_dataset import Recipe, case_arrays, write_image

from nnunet_dgplugins.content import CLOSED
from nnunet_dgplugins.sam.segmenter import SliceSegmenter
from nnunet_dgplugins.trainers.whole_slices import deployed_patch

TRAINERS = ("DeSAMTrainer", "DeSAMGridTrainer")
FINE = Recipe("Fine", spacing=(0.25, 0.25, 3.0))


def target_file(world: World, shape: tuple[int, int, int], spacing: tuple[float, ...], direction: Any = None) -> Path:
    path = world.root / "target" / "case_9_0000.nii.gz"
    write_image(path, case_arrays(Recipe(), 9, shape)[0][0], spacing, direction)
    return path


def network_of(world: World, trainer: str) -> SliceSegmenter:
    predictor = world.predictor(world.model(trainer))
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    return predictor.network.eval()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_predicting_a_coarser_site_equals_predicting_each_slice_alone(world: World, trainer: str):
    """A source of 0.25 mm, a target of 0.79 mm with as many pixels: three times the pixels after resampling."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    world.use(FINE).settings(min_region_area=0)
    world.train(trainer)
    file = target_file(world, (4, 36, 40), (0.79, 0.79, 3.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fills the whole patch")
        (together,) = world.predict(world.model(trainer), [[str(file)]])
    predictor, network = world.predictor(world.model(trainer)), network_of(world, trainer)
    configuration = predictor.configuration_manager
    data, _, properties = configuration.preprocessor_class(verbose=False).run_case(
        [str(file)], None, predictor.plans_manager, configuration, predictor.dataset_json
    )
    assert data.shape[2:] == (114, 126)
    with torch.inference_mode():
        alone = torch.stack([network.segment(torch.as_tensor(data[None, :, z]).float())[0][0] for z in range(4)], 1)
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(
        alone, predictor.plans_manager, configuration, predictor.label_manager, properties
    )
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(together, expected)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_padding_never_changes_a_bit(world: World, trainer: str):
    world.settings(min_region_area=0)
    world.train(trainer)
    network = network_of(world, trainer)
    slices = torch.from_numpy(case_arrays(Recipe(), 3)[0][None, 0, 1:3]).transpose(0, 1)
    padded = torch.zeros(2, 1, 101, 77)
    padded[:, :, 13:49, 5:45] = slices
    with torch.inference_mode():
        plain, found = network.segment(slices)[0], network(padded)
    assert torch.equal(found[:, :, 13:49, 5:45], plain)
    outside = torch.ones(101, 77, dtype=torch.bool)
    outside[13:49, 5:45] = False
    assert bool((found[:, 1, outside] == CLOSED).all())
    assert bool((found[:, 0] == 0).all())


def test_a_slice_gives_the_same_result_in_any_batch(world: World):
    world.train()
    network = network_of(world, "DeSAMTrainer")
    slices = torch.from_numpy(case_arrays(Recipe(), 3)[0][0, :3, None])
    with torch.inference_mode():
        together = network.segment(slices)[0]
        one_by_one = torch.cat([network.segment(item[None])[0] for item in slices])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_with_the_sources_field_of_view_a_smaller_site_is_seen_at_the_same_scale(world: World):
    """A slice cut out of a training slice: its canvas is the whole slice's, with black where it was cut away."""
    world.settings(field_of_view="source")
    assert world.train().largest_slice == (36, 40)
    network = network_of(world, "DeSAMTrainer")
    assert network.field == (36, 40)  # out of the plans beside the model
    whole = torch.from_numpy(case_arrays(Recipe(), 9)[0][:, 2]).float() + 1
    cut = whole[:, 9:27, 10:30]  # half of each side, from the middle
    half = network.model.image_size // 2
    inner = slice(half // 2 + 2, half // 2 + half - 2)
    seen, part = network.canvas(whole)[0, inner, inner], network.canvas(cut)[0, inner, inner]
    agreement = float(torch.corrcoef(torch.stack([seen.flatten(), part.flatten()]))[0, 1])
    assert agreement > 0.99
    with torch.inference_mode():
        logits = network(cut[None])
    assert logits.shape[-2:] == (18, 20)


def test_a_field_of_view_has_embeddings_of_its_own(world: World):
    stores = world.use(Recipe(), own=True).preprocessed / "dgplugins_embeddings"
    shutil.rmtree(stores, ignore_errors=True)  # what other tests left in the copied dataset
    assert world.train().network.field is None
    plain = {path.name for path in stores.iterdir()}
    world.settings(field_of_view="source")
    world.train("DeSAMGridTrainer")
    (added,) = {path.name for path in stores.iterdir()} - plain
    assert added.removesuffix("__f36x40") in plain
    assert added.endswith("__f36x40")


def test_an_empty_slice_is_background(world: World):
    world.train()
    with torch.inference_mode():
        logits, confidence = network_of(world, "DeSAMTrainer").segment(torch.zeros(1, 1, 20, 30))
    assert bool((logits.argmax(1) == 0).all())
    assert bool((confidence == 1).all())


def test_a_slice_larger_than_the_patch_is_tiled_and_warned_about(world: World):
    world.train()
    patch = world.predictor().configuration_manager.patch_size
    file = target_file(world, (1, patch[0] + 20, 50), (0.6, 0.6, 3.0))
    with pytest.warns(UserWarning, match="cut into tiles"):
        (found,) = world.predict(files=[[str(file)]])
    assert found.shape == (1, patch[0] + 20, 50)


@pytest.mark.parametrize(
    ("largest", "spacing", "patch"),
    [
        ((384, 384), (0.25, 0.25), [1536, 1536]),
        ((320, 384), (0.6, 0.6), [834, 834]),
        ((512, 512), (1.2, 1.2), [1024, 1024]),
    ],
)
def test_the_patch_is_at_least_twice_the_largest_source_slice(
    largest: tuple[int, int], spacing: tuple[float, float], patch: list[int]
):
    assert deployed_patch(largest, spacing) == patch


def test_predictions_come_back_on_the_grid_of_an_oblique_input(world: World):
    world.train()
    turn, tilt = np.deg2rad([20.0, 10.0])
    around_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    around_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    file = target_file(world, (3, 52, 31), (0.45, 0.7, 4.0), (around_z @ around_x).ravel())
    out = world.root / "out"
    out.mkdir()
    world.predictor().predict_from_files_sequential([[str(file)]], [str(out / "case_9")])
    given, found = sitk.ReadImage(str(file)), sitk.ReadImage(str(out / "case_9.nii.gz"))
    assert found.GetSize() == given.GetSize() == (31, 52, 3)
    for part in ("Origin", "Spacing", "Direction"):
        np.testing.assert_allclose(getattr(found, f"Get{part}")(), getattr(given, f"Get{part}")(), atol=1e-6)
    assert 0 < sitk.GetArrayFromImage(found).mean() < 1


def test_volumes_sliced_along_another_axis_train_and_predict_as_axial_ones(world: World):
    world.train()
    axial = world.predict()
    world.elsewhere("sagittal").use(Recipe("Sagittal", sagittal=True)).train()
    predictor = world.predictor()
    assert list(predictor.plans_manager.transpose_forward) == [2, 0, 1]
    for plain, turned in zip(axial, world.predict(), strict=True):
        np.testing.assert_array_equal(turned.transpose(2, 0, 1), plain)


def test_what_nnunet_crops_away_is_background(world: World):
    world.train()
    image = case_arrays(Recipe(), 9, (5, 36, 40))[0][0]
    image[0] = 0
    image[:, :, :7] = 0
    path = world.root / "target" / "case_9_0000.nii.gz"
    write_image(path, image, Recipe().spacing)
    (found,) = world.predict(files=[[str(path)]])
    assert found.shape == image.shape
    assert not found[0].any()
    assert not found[:, :, :7].any()
    assert found.any()
