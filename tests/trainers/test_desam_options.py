"""Each option does what it says; several classes and colours; a loss that is no number stops the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import World
from tiny_dataset import Recipe, case_arrays, plan

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import write_json
from nnunet_dgplugins.methods.desam.losses import bce_loss, dice_loss
from nnunet_dgplugins.sam.preprocess import PIXEL_MEAN, PIXEL_STD, check_channels

TRAINERS = ("DeSAMTrainer", "DeSAMGridTrainer")
both = pytest.mark.parametrize("trainer", TRAINERS)


def shown(world: World, trainer: str = "DeSAMTrainer", **settings: Any) -> set[tuple[str, int]]:
    """Slices (case, z) that one epoch trains on."""
    world.settings(iterations_per_epoch=None, **settings)
    built = world.construct(trainer)
    seen: set[tuple[str, int]] = set()
    step = built.train_step
    built.train_step = lambda batch: seen.update((key.case, key.z) for key in batch["keys"]) or step(batch)
    built.run_training()
    return seen


def slices_with_organ(world: World, cases: set[str]) -> dict[str, list[int]]:
    built = world.construct()
    built.initialize()
    dataset = built.dataset_class(built.preprocessed_dataset_folder)
    return {case: np.flatnonzero((dataset.load_case(case)[1][0] > 0).any((1, 2))).tolist() for case in sorted(cases)}


def test_an_epoch_is_one_pass_over_all_slices(world: World):
    seen = shown(world)
    assert len(seen) == sum(4 + int(case[-1]) % 3 for case in {case for case, _ in seen})


def test_foreground_slices_alone_are_trained_on_when_asked_for(world: World):
    seen = shown(world, train_slices="foreground")
    organ = slices_with_organ(world, {case for case, _ in seen})
    assert seen == {(case, z) for case, places in organ.items() for z in places}


def test_the_last_slice_with_organ_is_left_out_when_asked_for(world: World):
    seen = shown(world, train_slices="foreground", drop_last_slice=True)
    organ = slices_with_organ(world, {case for case, _ in seen})
    assert seen == {(case, z) for case, places in organ.items() for z in places[:-1]}


@both
def test_augmented_views_are_stored_beside_the_plain_slices(world: World, trainer: str):
    world.use(Recipe(), own=True).settings(augmented_views=2, iterations_per_epoch=None, batch_size=8)
    built = world.construct(trainer)
    batches = []
    step = built.train_step
    built.train_step = lambda batch: batches.append(batch) or step(batch)
    built.run_training()
    views = {key: label for batch in batches for key, label in zip(batch["keys"], batch["labels"], strict=True)}
    plain = {(key.case, key.z) for key in views}
    assert {(*place, view) for place in plain for view in range(3)} == set(views)
    moved = [key for key in views if key.view and not torch.equal(views[key], views[key._replace(view=0)])]
    assert len(moved) > len(plain)


@both
def test_online_training_augments_anew_in_every_epoch_and_can_be_repeated(world: World, trainer: str):
    seen = []
    for attempt in ("first", "second"):
        world.elsewhere(attempt).settings(online=True, epochs=2, batch_size=3)
        built = world.construct(trainer)
        step, batches = built.train_step, []
        built.train_step = lambda batch, step=step, batches=batches: batches.append(batch) or step(batch)
        built.run_training()
        seen.append(batches)
    first, second = seen
    assert {key.view for batch in first for key in batch["keys"]} == {
        1,
        2,
    }  # the epoch's own view; 0 is the plain slice
    for one, other in zip(first, second, strict=True):
        assert one["keys"] == other["keys"]
        assert all(torch.equal(a, b) for a, b in zip(one["images"], other["images"], strict=True))
    assert len(world.predict(world.model(trainer))) == 2


def test_background_points_are_as_frequent_as_asked_for(world: World):
    for wanted in (0, 3):
        world.elsewhere(f"points{wanted}").settings(
            background_points=wanted, train_slices="foreground", iterations_per_epoch=30, batch_size=8
        )
        built = world.construct("DeSAMGridTrainer")
        on_class = []
        at = built._at

        def watched(features: Any, points: Any, at: Any = at, on_class: list[torch.Tensor] = on_class) -> Any:
            if torch.is_grad_enabled():  # training, not validation
                on_class.append(points.on_class)
            return at(features, points)

        built._at = watched
        built.run_training()
        assert torch.cat(on_class).mean().item() == pytest.approx(1 / (wanted + 1), abs=0.08)


@both
def test_border_suppression_clears_a_frame(world: World, trainer: str):
    world.settings(min_region_area=0)
    world.train(trainer)
    plain = world.predict(world.model(trainer))
    world.elsewhere("framed").settings(min_region_area=0, border_suppression=50)
    world.train(trainer)
    framed = world.predict(world.model(trainer))
    # the frame is that of the small mask; upsampling moves its edge by less than two pixels
    rows, columns = 36 * 50 // 256 - 2, 40 * 50 // 256 - 2
    assert any(x[:, :rows].any() or x[:, :, :columns].any() for x in plain)
    for x in framed:
        inside = x[:, rows:-rows, columns:-columns].sum()
        assert inside == x.sum()


def test_validation_by_points_never_runs_the_grid_and_by_grid_does(world: World):
    for choice, expected in (("points", 0), ("grid", 4)):
        world.elsewhere(choice).settings(validation=choice)
        built = world.construct("DeSAMGridTrainer")
        built.initialize()
        slices = []
        forward = built.network.head.forward
        built.network.head.forward = lambda features, f=forward, s=slices: s.append(len(features[-1])) or f(features)
        built.run_training()
        assert sum(slices) == expected, choice
        assert 0 <= built.logger.get_value("mean_fg_dice", 0) <= 1


def test_sgd_is_used_when_asked_for(world: World):
    world.settings(optimizer="sgd", initial_lr=1e-3)
    built = world.train()
    assert isinstance(built.optimizer, torch.optim.SGD)
    assert built.optimizer.defaults["momentum"] == 0.99
    assert built.optimizer.defaults["weight_decay"] == 0


@both
@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_loss_is_the_one_asked_for(world: World, trainer: str, variant: str):
    world.settings(loss=variant, iterations_per_epoch=1)
    built = world.construct(trainer)
    terms: list[dict[str, torch.Tensor]] = []
    prompts = []
    built.initialize()
    loss = built.loss
    built.loss = lambda **inputs: prompts.append(inputs) or terms.append(loss(**inputs)) or terms[-1]
    built.run_training()
    given, found = prompts[0], terms[0]
    expected = dice_loss(given["logits"], given["target"])
    if variant == "paper":
        expected = expected + bce_loss(given["logits"], given["target"])
    if trainer == "DeSAMGridTrainer":
        difference = (given["iou"][:, :1] - given["iou_target"]).detach()
        expected = expected + (10 * difference.square().mean() if variant == "paper" else difference.abs().mean())
    torch.testing.assert_close(found["total"], expected)


@both
def test_bfloat16_on_the_cpu_is_used_when_asked_for(world: World, trainer: str):
    world.settings(cpu_bfloat16=True)
    built = world.construct(trainer)
    kinds = set()
    prompted = built._prompted
    built._prompted = lambda *inputs: kinds.add((found := prompted(*inputs))["logits"].dtype) or found
    built.run_training()
    assert kinds == {torch.bfloat16}
    assert np.isfinite(built.logger.get_value("train_losses", 0))


@both
def test_a_loss_that_is_no_number_stops_the_training_and_names_the_cases(world: World, trainer: str):
    built = world.construct(trainer)
    built.initialize()
    before = {key: value.clone() for key, value in built.network.state_dict().items()}
    loss = built.loss
    built.loss = lambda **inputs: {"total": loss(**inputs)["total"] * float("nan")}
    with pytest.raises(UserError, match=r"the loss is nan at epoch 0, cases case_\d") as caught:
        built.run_training()
    assert trainer in str(caught.value)
    after = built.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@both
def test_three_classes_train_and_predict(world: World, trainer: str):
    world.use(Recipe("Classes", classes=3))
    built = world.train(trainer)
    assert built.heads == [(1,), (2,), (3,)]
    assert len(built.logger.get_value("dice_per_class_or_region", 0)) == 3
    predictor = world.predictor(world.model(trainer))
    assert predictor.network.head.mask_decoder.num_classes == 3
    assert {int(value) for x in world.predict(world.model(trainer)) for value in np.unique(x)} <= {0, 1, 2, 3}


def test_more_classes_than_sams_four_iou_columns_train_and_predict(world: World):
    world.use(Recipe("Many", classes=6))
    built = world.train("DeSAMGridTrainer")
    assert built.network.head.mask_decoder.iou_prediction_head.layers[-1].out_features == 6
    assert len(world.predict(world.model("DeSAMGridTrainer"))) == 2


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [
        (("R", "G", "B"), None, (0, 1, 2)),
        (("T1", "T2", "FLAIR"), None, (0,)),
        (("T1", "T2", "FLAIR"), [2, 0, 1], (2, 0, 1)),
    ],
)
def test_channels_are_shown_as_named_or_as_asked_for(
    world: World, names: tuple[str, ...], asked: list[int] | None, expected: tuple[int, ...]
):
    world.use(Recipe("Colours", channels=("R", "G", "B")), own=True).settings(channels=asked)
    world.edit_json("dataset.json", lambda content: content.update(channel_names=dict(zip("012", names, strict=True))))
    built = world.train()
    assert built.settings.channels == expected
    assert built.network.channels == expected
    image = torch.arange(1.0, 9.0).expand(3, 8, 8) ** torch.arange(1.0, 4.0)[:, None, None]
    canvas = built.network.canvas(image)
    red, green = (canvas[i] * PIXEL_STD[i] + PIXEL_MEAN[i] for i in (0, 1))
    assert torch.allclose(red, green, atol=1e-3) == (len(expected) == 1)
    assert len(world.predict()) == 2


@both
def test_colour_pictures_train_validate_and_predict(world: World, trainer: str, monkeypatch: pytest.MonkeyPatch):
    for kind in ("raw", "preprocessed"):
        (world.root / f"nnUNet_{kind}").mkdir()
        monkeypatch.setenv(f"nnUNet_{kind}", str(world.root / f"nnUNet_{kind}"))
    world.number, world.name = 990, "Dataset990_Pictures"
    folder = world.root / "nnUNet_raw" / world.name
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(5):
        image, label = case_arrays(Recipe(channels=("R", "G", "B")), number)
        picture = sitk.GetImageFromArray(image[:, 1].transpose(1, 2, 0).clip(0, 255).astype(np.uint8), isVector=True)
        sitk.WriteImage(picture, str(folder / "imagesTr" / f"photo_{number}_0000.png"))
        sitk.WriteImage(sitk.GetImageFromArray(label[1]), str(folder / "labelsTr" / f"photo_{number}.png"))
    write_json(
        folder / "dataset.json",
        {
            "channel_names": {"0": "R", "1": "G", "2": "B"},
            "labels": {"background": 0, "organ": 1},
            "numTraining": 5,
            "file_ending": ".png",
        },
    )
    plan(world.number)
    world.command(trainer)
    assert (world.model(trainer) / "fold_0" / "validation" / "summary.json").is_file()
    (found,) = world.predict(world.model(trainer), [[str(folder / "imagesTr" / "photo_0_0000.png")]])
    assert found.shape == (1, 36, 40)


def test_a_channel_that_is_not_there_is_refused(world: World):
    world.settings(channels=[3])
    with pytest.raises(UserError, match=r"channels=\[3\] cannot be shown to SAM"):
        world.train()
    with pytest.raises(UserError):
        check_channels((0, 1), 3, "here")


def test_the_time_left_and_the_settings_are_in_the_log(world: World):
    world.settings(epochs=2)
    text = Path(world.train().log_file).read_text()
    assert "Epoch 1/2 done, about" in text
    assert "Settings of DeSAMTrainer: {'epochs': 2" in text
    assert "vit_tiny (shipped)" in text
