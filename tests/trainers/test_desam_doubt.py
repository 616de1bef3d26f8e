"""A model says how sure it was of each case."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import World
from tiny_dataset import ENDING, Recipe, case_arrays, write_image

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.doubt import FILE
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.trainers.doubt import write_doubt

TRAINERS = ("DeSAMTrainer", "DeSAMGridTrainer")


def predicted(world: World, trainer: str, fold: int | str = 0) -> Path:
    """A folder of predictions of the target cases."""
    out = world.root / f"out_{trainer}"
    out.mkdir(exist_ok=True)
    names = [Path(files[0]).name[: -len(ENDING) - 5] for files in world.images()]
    world.predictor(world.model(trainer), fold=fold).predict_from_files_sequential(
        world.images(), [str(out / name) for name in names]
    )
    return out


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_case_class_and_slice_gets_a_doubt(world: World, trainer: str):
    world.use(Recipe("Classes", classes=3)).train(trainer)
    out = predicted(world, trainer)
    path = write_doubt(world.model(trainer), world.raw / "imagesTs", out, device="cpu", progress=False)
    found = read_json(path)
    assert path == out / FILE
    assert set(found) == {"case_5", "case_6"}
    assert [len(found[name]["slices"]) for name in ("case_5", "case_6")] == [6, 4]
    for case in found.values():
        assert set(case["per_class"]) == {"part1", "part2", "part3"}
        assert all(0 <= value <= 1 for value in [case["doubt"], *case["per_class"].values(), *case["slices"]])
        assert case["doubt"] == pytest.approx(sum(case["per_class"].values()) / 3, abs=1e-6)


def test_an_organ_that_is_nowhere_is_looked_at_first(world: World):
    world.train()
    path = world.model() / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["network_weights"]["head.mask_decoder.pimm.seg_outputs.1.weight"].fill_(0)
    torch.save(content, path)
    out = predicted(world, "DeSAMTrainer")
    found = read_json(write_doubt(world.model(), world.raw / "imagesTs", out, device="cpu", progress=False))
    assert [case["doubt"] for case in found.values()] == [1, 1]


def test_slices_that_were_cropped_away_have_no_doubt(world: World):
    world.train()
    image = case_arrays(Recipe(), 9, (5, 36, 40))[0][0]
    image[:2] = 0
    write_image(world.root / "images" / f"case_9_0000{ENDING}", image, Recipe().spacing)
    out = world.root / "out"
    out.mkdir()
    world.predictor().predict_from_files_sequential(
        [[str(world.root / "images" / f"case_9_0000{ENDING}")]], [str(out / "case_9")]
    )
    found = read_json(write_doubt(world.model(), world.root / "images", out, device="cpu", progress=False))
    slices = found["case_9"]["slices"]
    assert slices[:2] == [None, None]
    assert all(0 <= value <= 1 for value in slices[2:])


def test_a_model_of_fold_all_can_be_asked_and_compilation_does_not_matter(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    world.train(fold="all")
    out = predicted(world, "DeSAMTrainer", fold="all")
    plain = read_json(write_doubt(world.model(), world.raw / "imagesTs", out, "all", device="cpu", progress=False))
    monkeypatch.setenv("nnUNet_compile", "t")
    compiled = read_json(write_doubt(world.model(), world.raw / "imagesTs", out, "all", device="cpu", progress=False))
    assert plain == compiled


def test_a_fold_that_is_not_there_is_an_error_that_names_those_that_are(world: World):
    world.train(fold=1)
    with pytest.raises(UserError, match=r"fold_0.*no such checkpoint.*fold_1"):
        write_doubt(world.model(), world.raw / "imagesTs", world.root, device="cpu")


def test_a_stock_model_has_no_doubt_to_tell(world: World):
    trainer = world.construct("nnUNetTrainer")
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()
    with pytest.raises(UserError, match="says nothing about its doubt"):
        write_doubt(world.model("nnUNetTrainer"), world.raw / "imagesTs", world.root, device="cpu")
