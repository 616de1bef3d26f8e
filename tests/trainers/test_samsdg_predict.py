"""Prediction by SAM-SDG: slice by slice through nnU-Net, four neighbours per canvas through ``dgplugins predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from click.testing import CliRunner
from conftest import World
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from samsdg_worlds import COARSE, SAM, step_one
from tiny_dataset import Recipe, case_arrays, write_image

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.trainers import grouped_prediction
from nnunet_dgplugins.trainers.grouped_prediction import FourSlices, find_cases, predict_folder


@pytest.fixture
def trained(world: World) -> World:
    """A world with both steps trained; SAM is asked everywhere."""
    step_one(world)
    world.settings(initial_lr=1e-3, iterations_per_epoch=10)
    world.train(SAM)
    return world


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many canvases each call of the encoder saw."""
    seen: list[int] = []
    forward = FrozenEncoder.forward

    def counted(self: FrozenEncoder, canvas: torch.Tensor) -> Any:
        seen.append(len(canvas))
        return forward(self, canvas)

    monkeypatch.setattr(FrozenEncoder, "forward", counted)
    return seen


def predicted(world: World, out: str, images: Path | None = None, *more: str) -> dict[str, sitk.Image]:
    """Run the command in this process."""
    arguments = ["-d", world.number, "-i", images or world.raw / "imagesTs", "-o", world.root / out, "-c", "2d"]
    done = CliRunner().invoke(
        cli, ["predict", *map(str, arguments), "-tr", SAM, "-device", "cpu", *more], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return {path.name: sitk.ReadImage(str(path)) for path in sorted((world.root / out).glob("*.nii.gz"))}


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def test_four_slices_share_a_canvas_at_a_quarter_of_the_encoders_work(trained: World, encoded: list[int]):
    alone = trained.predict(trained.model(SAM))
    assert sum(encoded) == 6 + 4  # one canvas per slice
    encoded.clear()
    found = predicted(trained, "four")
    assert sum(encoded) == 2 + 1  # ceil(6 / 4) and ceil(4 / 4)
    for name, plain in zip(("case_5", "case_6"), alone, strict=True):
        image, given = found[f"{name}.nii.gz"], sitk.ReadImage(str(trained.raw / "imagesTs" / f"{name}_0000.nii.gz"))
        assert array(image).shape == plain.shape
        for part in ("Size", "Origin", "Spacing", "Direction"):
            np.testing.assert_allclose(getattr(image, f"Get{part}")(), getattr(given, f"Get{part}")(), atol=1e-6)
        assert (array(image) > 0).any()
        assert np.mean(array(image) == plain) > 0.8  # neighbours matter, a little
    assert (trained.root / "four" / "dataset.json").is_file()
    assert (trained.root / "four" / "plans.json").is_file()


def test_both_ways_give_the_same_again_in_any_order_of_cases_and_after_going_on(trained: World):
    files = trained.images()
    forwards, backwards = trained.predict(trained.model(SAM), files), trained.predict(trained.model(SAM), files[::-1])
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards[::-1], strict=True))
    first = predicted(trained, "first")
    (trained.root / "second").mkdir()
    half_written = trained.root / "second" / ".tmp-1-1-case_5.nii.gz"
    half_written.write_bytes(b"half")
    image = trained.root / "one"
    image.mkdir()
    (image / "case_6_0000.nii.gz").symlink_to(trained.raw / "imagesTs" / "case_6_0000.nii.gz")
    predicted(trained, "second", image)
    kept = (trained.root / "second" / "case_6.nii.gz").stat().st_mtime_ns
    second = predicted(trained, "second", None, "--continue")
    assert first.keys() == second.keys()
    assert all(np.array_equal(array(first[name]), array(second[name])) for name in first)
    assert (trained.root / "second" / "case_6.nii.gz").stat().st_mtime_ns == kept
    assert not half_written.exists()


def test_padding_and_another_spacing_and_orientation_come_back_to_the_input(trained: World):
    turn = np.deg2rad(20.0)
    direction = (np.cos(turn), -np.sin(turn), 0, np.sin(turn), np.cos(turn), 0, 0, 0, 1)
    folder = trained.root / "target"
    write_image(folder / "case_9_0000.nii.gz", case_arrays(Recipe(), 9, (3, 52, 31))[0][0], (0.45, 0.7, 4.0), direction)
    (found,) = predicted(trained, "out", folder).values()
    given = sitk.ReadImage(str(folder / "case_9_0000.nii.gz"))
    assert found.GetSize() == given.GetSize() == (31, 52, 3)
    np.testing.assert_allclose(found.GetDirection(), given.GetDirection(), atol=1e-6)


def test_folds_are_averaged(trained: World):
    step_one(trained, 1)
    trained.train(SAM, 1)
    both = predicted(trained, "both", None, "-f", "0", "1")
    one, other = predicted(trained, "0"), predicted(trained, "1", None, "-f", "1")
    for name, image in both.items():
        agreed = array(one[name]) == array(other[name])
        assert np.mean(array(image)[agreed] == array(one[name])[agreed]) > 0.99


def test_a_fold_that_finds_nothing_is_one_vote_of_three(trained: World):
    four = FourSlices(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    four.initialize_from_trained_model_folder(str(trained.model(SAM)), (0,), "checkpoint_final.pth")
    sure, nothing = torch.full((6, 1, 8, 8), 10.0), torch.full((6, 1, 8, 8), -50.0)
    answers = [sure, nothing, sure]
    four.list_of_parameters = four.list_of_parameters * len(answers)
    four.network.segment_four = lambda slices, boxes: (answers.pop(), None)
    image = torch.rand(1, 6, 8, 8)
    assert (four.predict_logits_from_preprocessed_data(image) > 0).all()


def test_images_that_cannot_be_read_are_listed_when_the_others_are_predicted(trained: World):
    folder = trained.root / "damaged"
    folder.mkdir()
    for name in ("case_4", "case_5", "case_6"):
        (folder / f"{name}_0000.nii.gz").write_bytes((trained.raw / "imagesTs" / "case_6_0000.nii.gz").read_bytes())
    for name in ("case_4", "case_5"):
        with (folder / f"{name}_0000.nii.gz").open("r+b") as file:
            file.truncate(100)
    masks = trained.root / "masks"
    masks.mkdir()
    for name in ("case_4", "case_5", "case_6"):
        (masks / f"{name}.nii.gz").write_bytes((folder / "case_6_0000.nii.gz").read_bytes())
    with pytest.raises(BadInput, match=r"(?s)case_4: .*case_5: "):
        predict_folder(trained.model(SAM), folder, trained.root / "out", device="cpu", masks=masks)
    assert not (trained.root / "out").exists()
    with pytest.raises(UserError, match=r"(?s)2 of 3 cases.*--continue:.*case_4_0000.*case_5_0000"):
        predict_folder(trained.model(SAM), folder, trained.root / "out", device="cpu")
    assert [path.name for path in (trained.root / "out").glob("*.nii.gz")] == ["case_6.nii.gz"]


def test_the_file_that_a_writer_puts_beside_a_mask_gets_the_case_s_name(
    trained: World, monkeypatch: pytest.MonkeyPatch
):
    """As nnU-Net's reader of TIFF does with the spacing."""

    def write_both(*arguments: Any) -> None:
        export_prediction_from_logits(*arguments)
        Path(f"{arguments[5]}.json").write_text("{}")

    monkeypatch.setattr(grouped_prediction, "export_prediction_from_logits", write_both)
    predict_folder(trained.model(SAM), trained.raw / "imagesTs", trained.root / "out", device="cpu")
    names = {path.name for path in (trained.root / "out").iterdir()}
    masks = {"case_5.nii.gz", "case_6.nii.gz", "case_5.json", "case_6.json"}
    assert names == {*masks, "dataset.json", "plans.json"}


def test_true_boxes_can_prompt_for_an_upper_bound_and_close_what_has_none(trained: World):
    masks, empty = trained.root / "masks", trained.root / "empty"
    for folder in (masks, empty):
        folder.mkdir()
    for path in trained.images():
        name = Path(path[0]).name.replace("_0000", "")
        image = sitk.ReadImage(path[0])
        truth = np.zeros(image.GetSize()[::-1], np.uint8)
        for folder, fill in ((empty, 0), (masks, 1)):
            truth[1, 5:15, 8:20] = fill
            mask = sitk.GetImageFromArray(truth)
            mask.CopyInformation(image)
            sitk.WriteImage(mask, str(folder / name))
    plain = predicted(trained, "plain")
    bound = predicted(trained, "bound", None, "--masks", str(masks))
    nothing = predicted(trained, "nothing", None, "--masks", str(empty))
    assert not any(array(image).any() for image in nothing.values())
    for name, image in bound.items():
        others = np.delete(array(image), 1, axis=0)
        assert not others.any()  # the truth shows something on one slice only
        assert not np.array_equal(array(image)[1], array(plain[name])[1])
    (masks / "case_6.nii.gz").unlink()
    sitk.WriteImage(sitk.Image(5, 5, 5, sitk.sitkUInt8) + 9, str(masks / "case_5.nii.gz"))
    with pytest.raises(BadInput) as error:
        predict_folder(trained.model(SAM), trained.raw / "imagesTs", trained.root / "x", device="cpu", masks=masks)
    for text in ("case_6.nii.gz", "no such file", "case_5.nii.gz", "grid differs", "unknown values [9]"):
        assert text in str(error.value)
    assert not (trained.root / "x").exists()


def test_true_boxes_lie_where_training_would_see_them(world: World):
    """On slices that are not square, with a black border and a field of view wider than they are."""
    step_one(world, field_of_view="source")
    world.settings(boxes="masks", field_of_view="source", iterations_per_epoch=1)
    built = world.train(SAM)
    network = built.network
    rows, columns = built.field
    random = np.random.default_rng(0)
    slices = torch.zeros(3, 1, rows + 6, columns + 8)
    slices[:, :, 4 : rows - 2, 3 : columns - 5] = torch.from_numpy(
        random.uniform(1, 2, (3, 1, rows - 6, columns - 8)).astype(np.float32)
    )
    labels = torch.zeros(3, rows + 6, columns + 8, dtype=torch.int16)
    labels[1, 8:14, 7:10] = 1
    predictor = world.predictor(world.model(SAM))
    four = FourSlices(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    four.label_manager = predictor.label_manager
    found = four._true_boxes(network, slices, labels)
    assert not found[0].any()
    assert not found[2].any()
    # content begins at (4, 3) and is shown in the middle of the field: its margins are (3, 4) pixels
    tile, scale = network.decoder.tile, (network.decoder.tile / columns, network.decoder.tile / rows)
    left, top, right, bottom = found[1, 0].tolist()
    assert left == pytest.approx((7 - 3 + 4) * scale[0], abs=1)
    assert top == pytest.approx((8 - 4 + 3) * scale[1], abs=1)
    assert right == pytest.approx((10 - 3 + 4) * scale[0], abs=1.5)
    assert bottom == pytest.approx((14 - 4 + 3) * scale[1], abs=1.5)
    assert 0 < left < right < tile


def test_other_trainers_are_refused_in_one_sentence(world: World):
    done = CliRunner().invoke(cli, ["predict", "-d", "1", "-i", str(world.root), "-o", "x", "-tr", COARSE])
    assert isinstance(done.exception, UserError)
    text = str(done.exception)
    assert text.startswith(f"{COARSE} shows its network one slice")
    assert "nnUNetv2_predict" in text


def test_embed_says_that_canvases_are_the_trainers_own_matter(world: World):
    world.use(Recipe(), own=True)
    done = CliRunner().invoke(cli, ["embed", str(world.number), "-tr", SAM])
    assert "embeds canvases of several slices" in str(done.exception)
    plans = [str(world.number), "-tr", SAM, "--set", "groupings=2", "-o", "nnUNetPlansTwo"]
    done = CliRunner().invoke(cli, ["configure", *plans], catch_exceptions=False)
    assert done.exit_code == 0
    assert "dgplugins embed" not in done.output


def test_a_missing_model_fold_or_image_is_one_clear_error(trained: World, tmp_path: Path):
    images, model = trained.raw / "imagesTs", trained.model(SAM)
    with pytest.raises(UserError, match=r"fold_3.*folds that have it: fold_0"):
        predict_folder(model, images, tmp_path / "out", [3])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        predict_folder(model, tmp_path / "empty", tmp_path / "out", device="cpu")
    for name in ("a_0000", "a_0001", "b_0001", "c_0000"):
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "pictures").mkdir()
    for name in ("colours_0000", "grey_0000", "grey_0001"):
        (tmp_path / "pictures" / f"{name}.png").touch()
    with pytest.raises(BadInput, match=r"(?s)2 problems.*b_\*.*files \[1\]; expected \[0, 1\].*c_\*"):
        find_cases(tmp_path, ".nii.gz", [2])
    assert list(find_cases(tmp_path / "pictures", ".png", (1, 2))) == ["colours", "grey"]
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(cli, ["predict", "-d", str(trained.number), "-i", str(images), "-o", "x", "-p", "Other"])
    assert "no such model. Train it" in str(done.exception)
    for wrong in (["x", "1"], ["x", "-f", "0", "one"]):
        done = CliRunner().invoke(cli, ["predict", "-d", str(trained.number), "-i", str(images), "-o", *wrong])
        assert done.exit_code == 2
        assert wrong[-1] in done.output
