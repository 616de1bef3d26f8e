"""The zero-shot evaluation: prompts, the simple rules, coordinates, slices, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate_vit_tiny as script
import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
import zero_shot_data as data
import zero_shot_methods as methods
from click.testing import CliRunner

from nnunet_dgplugins.errors import BadInput, UserError
from nnunet_dgplugins.sam.models import MODELS

TINY = MODELS["vit_tiny"]


def round_mask(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(rows - centre[0], columns - centre[1]) <= radius


def noisy(mask: np.ndarray, inside: float, outside: float) -> np.ndarray:
    noise = 0.1 * np.random.default_rng(0).standard_normal(mask.shape)
    return (np.where(mask, inside, outside) + noise).astype(np.float32)


# ---------------------------------------------------------------- prompts and rules


def test_the_centre_point_of_a_crescent_lies_in_its_thickest_part() -> None:
    crescent = round_mask((80, 100), (40, 50), 30) & ~round_mask((80, 100), (40, 62), 25)
    row, column = methods.centre_point(crescent)
    assert crescent[row, column]
    assert not crescent[40, 50]  # the centre of gravity would have missed it
    assert abs(row - 40) <= 5
    assert 25 <= column <= 32


def test_the_centre_point_keeps_away_from_the_edge_of_the_image() -> None:
    mask = np.zeros((60, 40), dtype=bool)
    mask[:20, :] = True
    assert methods.centre_point(mask) in {(row, column) for row in (9, 10) for column in (19, 20)}


def test_the_true_box_ends_after_the_last_pixel() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:7, 11:29] = True
    assert methods.true_box(mask) == (3, 7, 11, 29)


@pytest.mark.parametrize(("inside", "outside"), [(2.0, -1.0), (-1.0, 2.0)])
def test_otsu_finds_a_disc_whether_it_is_bright_or_dark(inside: float, outside: float) -> None:
    truth = round_mask((70, 90), (30, 50), 17)
    found = methods.otsu_in_box(noisy(truth, inside, outside), methods.true_box(truth))
    assert methods.dice(truth, found) > 0.95


def test_otsu_fills_a_box_of_one_grey_value() -> None:
    found = methods.otsu_in_box(np.ones((20, 30), dtype=np.float32), (2, 8, 3, 9))
    assert found.sum() == 36


def test_the_ellipse_touches_the_sides_of_its_box_and_has_its_area() -> None:
    box = (10, 50, 20, 100)
    found = methods.ellipse_in_box(np.zeros((60, 120), dtype=np.float32), box)
    assert methods.true_box(found) == box
    assert found.sum() == pytest.approx(np.pi * 20 * 40, rel=0.01)


def test_region_growing_stops_at_the_border_of_a_disc() -> None:
    truth = round_mask((70, 90), (30, 50), 17)
    image = noisy(truth, 2.0, -1.0) * 0.1 + truth * 2
    assert methods.dice(truth, methods.region_growing(image.astype(np.float32), (30, 50))) > 0.85


def test_the_disc_has_a_64th_of_the_content_and_not_of_the_padding() -> None:
    image = np.zeros((300, 300), dtype=np.float32)
    image[50:210, 20:180] = 1
    assert methods.disc(image, (120, 100)).sum() == pytest.approx(160 * 160 / 64, rel=0.03)


def test_dice_of_two_masks_counts_both_sizes() -> None:
    truth, guess = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    truth[0], guess[0, :2] = True, True
    assert methods.dice(truth, guess) == pytest.approx(2 * 2 / 6)
    assert methods.dice(truth, np.zeros_like(truth)) == 0


# ---------------------------------------------------------------- coordinates


class Eyes(torch.nn.Module):
    """An image encoder that only remembers what it was shown."""

    shown: torch.Tensor

    def forward(self, canvas: torch.Tensor) -> torch.Tensor:
        self.shown = canvas
        return torch.zeros(len(canvas), 1, 1, 1)


class Prompts:
    """A prompt encoder whose embedding is the prompt itself, shifted by half a pixel as SAM does."""

    def __call__(self, points: Any, boxes: Any, masks: None) -> tuple[torch.Tensor, torch.Tensor]:
        corners = boxes.reshape(-1, 2, 2) if points is None else torch.cat([points[0], torch.zeros_like(points[0])], 1)
        return corners + 0.5, torch.zeros(len(corners), 1, 1, 1)

    def get_dense_pe(self) -> torch.Tensor:
        return torch.zeros(1)


class Painter:
    """A mask decoder that paints the canvas box it is given; a point becomes the square of 8 pixels around it."""

    def predict_masks(self, sparse_prompt_embeddings: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        side = TINY.mask_size
        middle = (torch.arange(side) + 0.5) * TINY.image_size / side
        masks = torch.full((len(sparse_prompt_embeddings), 4, side, side), -10.0)
        scores = torch.zeros(len(masks), 4)
        for mask, score, (first, last) in zip(masks, scores, sparse_prompt_embeddings, strict=True):
            low, high = (first, last) if last.ne(0.5).any() else (first - 4, first + 4)  # a point comes with padding
            inside = [(middle > low[k]) & (middle < high[k]) for k in (0, 1)]
            mask[:, inside[1][:, None] & inside[0][None]] = 10.0
            score[:] = torch.tensor([0.1, 0.2, 0.9, 0.3])
            mask[1] = mask[3] = -10.0
        return masks, scores


def painted(shape: tuple[int, int], points: list[Any], boxes: list[Any], padding: int = 0) -> methods.Answers:
    image = np.random.default_rng(0).random(shape).astype(np.float32) + 1
    image = np.pad(image, padding)
    sam = methods.Sam(TINY, Eyes(), Prompts(), Painter())
    return sam(image, np.array(points), np.array(boxes))


@pytest.mark.parametrize("shape", [(216, 256), (150, 100), (60, 101), (300, 200)])
@pytest.mark.parametrize("padding", [0, 17])
def test_a_box_comes_back_where_it_was_within_one_pixel(shape: tuple[int, int], padding: int) -> None:
    box = tuple(padding + edge for edge in (shape[0] // 5, shape[0] // 2, shape[1] // 3, shape[1] - 4))
    answers = painted(shape, [(padding + 20, padding + 20)], [box], padding)
    assert np.abs(np.subtract(methods.true_box(answers.box_masks[0]), box)).max() <= 1
    assert answers.box_masks.shape == (1, shape[0] + 2 * padding, shape[1] + 2 * padding)


@pytest.mark.parametrize("shape", [(216, 256), (150, 100), (60, 101)])
def test_a_point_comes_back_where_it_was_within_one_pixel(shape: tuple[int, int]) -> None:
    point = (shape[0] // 3, shape[1] - 15)
    answers = painted(shape, [point], [(1, 9, 1, 9)])
    rows, columns = np.nonzero(answers.point_masks[0, 1])
    assert abs(rows.mean() - point[0]) <= 1
    assert abs(columns.mean() - point[1]) <= 1


def test_the_centre_of_the_slice_is_the_centre_of_the_canvas() -> None:
    # 101 pixels: pixel 50 is the middle one; on 256 canvas pixels the middle lies between 127 and 128
    xy = methods.canvas_points(np.array([[30, 50]]), (0, 61, 0, 101), 256)
    assert xy.flatten().tolist() == pytest.approx([127.5, 127.5])


def test_a_box_around_all_content_lies_on_the_edges_of_the_canvas_once_sam_adds_its_half_pixel() -> None:
    box = methods.canvas_boxes(np.array([[5, 66, 7, 108]]), (5, 66, 7, 108), 256) + 0.5
    assert box.flatten().tolist() == pytest.approx([0, 0, 256, 256])


def test_the_mask_with_the_highest_predicted_iou_counts_and_the_oracle_is_a_column_of_its_own() -> None:
    thing = data.Object("disc", 1, round_mask((100, 100), (50, 50), 4))
    place = data.Slice("made", "a", 0, np.random.default_rng(0).random((100, 100)).astype(np.float32) + 1, [thing])

    class Misjudging(Painter):
        def predict_masks(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
            masks, scores = super().predict_masks(*arguments, **named)
            return masks, scores.flip(1)  # of masks 1..3 the empty first one is said to be the best

    sam = methods.Sam(TINY, Eyes(), Prompts(), Misjudging())
    (outcome,) = script.outcomes(place, {"fake": sam})
    rows = {(row["prompt"], row["method"]): row for row in script.as_rows(outcome)}
    assert rows["point", "fake"]["dice"] == 0
    assert rows["point", "fake"]["predicted_iou"] == pytest.approx(0.9)
    assert rows["point", "fake, best of 3"]["dice"] > 0.25
    assert rows["box", "fake"]["dice"] > 0.7  # the single mask, token 0
    assert ("box", "fake, best of 3") not in rows


def test_sams_own_parts_give_the_same_masks_alone_as_in_one_batch() -> None:
    sam = methods.Sam.load("vit_tiny")
    image = noisy(round_mask((90, 70), (40, 30), 15), 2.0, 0.0)
    points, boxes = np.array([(40, 30), (60, 50)]), np.array([(25, 56, 15, 46), (50, 70, 40, 60)])
    both = sam(image, points, boxes)
    alone = [sam(image, points[i : i + 1], boxes[i : i + 1]) for i in range(2)]
    assert both.point_masks.shape == (2, 3, 90, 70)
    assert np.allclose(both.point_scores, np.concatenate([a.point_scores for a in alone]), atol=1e-5)
    assert (both.point_masks != np.concatenate([a.point_masks for a in alone])).mean() < 1e-3
    assert (both.box_masks != np.concatenate([a.box_masks for a in alone])).mean() < 1e-3
    # and SAM's own forward agrees: point and box tokens of one batch do not mix
    box = methods.canvas_boxes(boxes, methods._content(torch.from_numpy(image)), TINY.image_size)
    with torch.inference_mode():
        sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
        features = sam.image_encoder(methods.to_canvas(torch.from_numpy(image)[None], TINY, [0])[None])
        _, scores = sam.mask_decoder(features, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
    assert np.allclose(scores[:, 0].numpy(), both.box_scores, atol=1e-5)


# ---------------------------------------------------------------- slices


def write(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(values, np.diag([-1.5, -1.5, 10, 1]) if affine is None else affine).to_filename(path)


def cardiac_case(folder: Path, patient: str = "patient001", slices: int = 6) -> None:
    """Write a volume whose ventricle shrinks from slice to slice; the first slice shows nothing."""
    labels = np.zeros((60, 80, slices), dtype=np.uint8)
    for z in range(1, slices):
        labels[..., z][round_mask((60, 80), (30, 40), 18 - z)] = 2
        labels[..., z][round_mask((60, 80), (30, 40), 12 - z)] = 3
    image = noisy(labels > 0, 1.0, 0.2) + 0.5 * (labels == 3)
    stem = folder / "cardiac" / "ACDC" / "training" / patient / f"{patient}_frame01"
    write(stem.with_name(f"{stem.name}.nii.gz"), image.astype(np.float32))
    write(stem.with_name(f"{stem.name}_gt.nii.gz"), labels)


def test_slices_are_axial_whatever_the_order_of_the_axes_in_the_file(tmp_path: Path) -> None:
    volume = np.zeros((5, 7, 9), dtype=np.float32)  # to the left, back, top
    volume[1, 2, 3] = 1
    write(tmp_path / "usual.nii.gz", volume)
    stored = volume.transpose(1, 2, 0)[:, ::-1, ::-1]  # to the back, bottom, right
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = -1.5, -10, 1.5, 1
    write(tmp_path / "turned.nii.gz", stored.copy(), affine)
    for name in ("usual", "turned"):
        found = data.read_axial(tmp_path / f"{name}.nii.gz")
        assert found.shape == (9, 7, 5)
        assert np.argwhere(found).tolist() == [[3, 2, 1]]


def test_a_skull_stripped_volume_keeps_its_zeros_and_is_scaled_over_the_brain() -> None:
    volume = np.zeros((4, 20, 20), dtype=np.float32)
    volume[:, 5:15, 6:16] = np.random.default_rng(0).normal(500, 80, (4, 10, 10))
    volume[1, 5, 6] = 0  # nnU-Net's mask of a corner
    image, part = data.normalise(volume, "brain")
    assert image.shape == (4, 10, 10)
    assert part[1:] == (slice(5, 15), slice(6, 16))
    assert image[1, 0, 0] == 0
    inside = image[image != 0]
    assert inside.mean() == pytest.approx(0, abs=1e-4)
    assert inside.std() == pytest.approx(1, abs=1e-3)


def test_ct_is_clipped_to_the_soft_tissue_window() -> None:
    volume = np.array([-1000.0, -160, 40, 240, 3000], dtype=np.float32).reshape(1, 1, 5)
    image, _ = data.normalise(volume, "ct")
    assert image[0, 0, 0] == image[0, 0, 1]
    assert image[0, 0, 3] == image[0, 0, 4]
    assert np.diff(image[0, 0, 1:4]) == pytest.approx([200 / np.std([-160, -160, 40, 240, 240])] * 2, rel=1e-5)


def test_one_object_is_the_largest_connected_part_and_small_ones_are_left_out() -> None:
    labels = np.zeros((40, 40), dtype=np.int32)
    labels[2:8, 2:8], labels[20:30, 20:30], labels[35:38, 2:5] = 1, 1, 2
    target = data.Target("both", Path("unused"), (1, 2))
    (found,) = data.objects_of(labels, target)
    assert (found.label, found.mask.sum(), found.mask[25, 25]) == (1, 100, True)
    (merged,) = data.objects_of(labels, data.Target("any", Path("unused")))
    assert merged.mask.sum() == 100


def test_a_volume_gives_its_largest_slice_and_others_evenly_spread() -> None:
    areas = [0, 0, 10, 20, 50, 40, 30, 20, 10, 0]
    assert data.choose_slices(areas, 3) == [3, 4, 7]
    assert data.choose_slices(areas, 20) == [2, 3, 4, 5, 6, 7, 8]
    assert data.choose_slices(areas, 1) == [4]
    assert data.choose_slices([0, 0], 3) == []


def test_a_limit_on_slices_is_spread_over_all_volumes(tmp_path: Path) -> None:
    for patient in ("patient001", "patient002", "patient003"):
        cardiac_case(tmp_path, patient)
    slices = data.read_slices(data.find_scans(tmp_path, ["cardiac"]), most=3)
    assert [place.scan for place in slices] == [f"patient00{i}_frame01" for i in (1, 2, 3)]
    assert {thing.row for place in slices for thing in place.objects} == {"myocardium", "left ventricle"}


def test_every_missing_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DGPLUGINS_SAMPLE_DATA"):
        data.find_scans(tmp_path / "nowhere")
    cardiac_case(tmp_path)
    image = tmp_path / "cardiac" / "ACDC" / "training" / "patient001" / "patient001_frame01.nii.gz"
    image.unlink()
    with pytest.raises(BadInput) as caught:
        data.find_scans(tmp_path)
    text = str(caught.value)
    assert image.name in text
    assert all(f"{source}: no images" in text for source in data.SOURCES if source != "cardiac")


# ---------------------------------------------------------------- tables and the command


def lines(source: str, row: str, method: str, values: list[float]) -> list[dict[str, Any]]:
    return [{"source": source, "row": row, "method": method, "prompt": "box", "dice": value} for value in values]


def test_sources_weigh_equally_however_many_objects_they_have() -> None:
    table = pd.DataFrame(
        [
            *lines("heart", "left", "sam", [1.0, 1.0, 1.0, 0.6]),
            *lines("heart", "right", "sam", [0.5]),
            *lines("brain", "tumour", "sam", [0.1, 0.3]),
            *lines("heart", "left", "rule", [0.0] * 4),
            *lines("heart", "right", "rule", [0.4]),
            *lines("brain", "tumour", "rule", [0.5, 0.5]),
        ]
    )
    result = script.summary(table, "box")
    assert list(result.columns) == ["n", "sam", "rule"]
    assert result.loc[("heart", "left"), "n"] == 4
    assert result.loc[("heart", "left"), "sam"] == pytest.approx(0.9)
    assert result.loc[("heart", "mean of rows"), "sam"] == pytest.approx(0.7)
    assert result.loc[("mean of sources", ""), "sam"] == pytest.approx((0.7 + 0.2) / 2)
    assert result.loc[("mean of sources", ""), "rule"] == pytest.approx((0.2 + 0.5) / 2)
    text = script.markdown(result)
    assert "| heart | left | 4 | 0.900 | 0.000 |" in text
    assert "| **mean of sources** |  |  | **0.450** | **0.350** |" in text


def test_models_are_told_apart_by_their_labels() -> None:
    given = ["trained=vit_tiny", "random=vit_tiny:/a/b=c.safetensors", "vit_tiny:/a/b=c.safetensors"]
    assert script.parse_models(given) == {
        "trained": "vit_tiny",
        "random": "vit_tiny:/a/b=c.safetensors",
        "vit_tiny-b-c": "vit_tiny:/a/b=c.safetensors",
    }
    with pytest.raises(UserError, match="two models are called 'a'"):
        script.parse_models(["a=vit_tiny", "a=vit_tiny"])


def test_the_command_writes_tables_objects_and_pictures(tmp_path: Path) -> None:
    cardiac_case(tmp_path / "data")
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path / "data"), "--only", "cardiac", "--model", "a=vit_tiny", "--most", "2"]
    arguments += ["--csv", str(out / "o.csv"), "--markdown", str(out / "t.md"), "--pictures", str(out / "pictures")]
    result = CliRunner().invoke(script.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "left ventricle" in result.output
    table = pd.read_csv(out / "o.csv")
    assert set(table["method"]) == {"a", "a, best of 3", *methods.POINT_RULES, *methods.BOX_RULES}
    assert len(table) == 4 * 8  # two objects in each of two slices
    by_object = table[table["prompt"] == "point"].pivot_table(index=["slice", "label"], columns="method", values="dice")
    assert (by_object["a, best of 3"] >= by_object["a"]).all()
    # a made disc is no riddle for the rules
    assert table[(table["method"] == "ellipse in box") & (table["row"] == "left ventricle")]["dice"].min() > 0.9
    assert (out / "t.md").read_text().count("| **mean of sources** |") == 2
    assert (out / "pictures" / "cardiac.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_folder_is_one_message_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["--data", str(tmp_path / "nowhere"), "--baselines-only"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("Error: ")


@pytest.mark.slow
def test_every_source_of_the_real_images_gives_objects_and_sensible_rules(sample_data: Path) -> None:
    slices = data.read_slices(data.find_scans(sample_data), most=2)
    table, _ = script.evaluate(slices, {"sam": methods.Sam.load("vit_tiny")}, set())
    assert list(dict.fromkeys(table["source"])) == list(data.SOURCES)
    assert table["dice"].between(0, 1).all()
    result = script.summary(table, "box")
    assert (result["n"].dropna() <= 40).all()
    # an ellipse is nearly right for round things; turned or shifted masks would show here
    assert result.loc[("cardiac", "left ventricle"), "ellipse in box"] > 0.85
    assert result.loc[("spinal", "T2* cord"), "ellipse in box"] > 0.9
    # bright fluid around a dark cord: image and mask lie on each other
    assert result.loc[("spinal", "T2 cord"), "Otsu in box"] > 0.9
