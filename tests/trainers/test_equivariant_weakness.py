"""The equivariant trainer learns from tags alone, opens no mask of what it trains on, and names cases gone wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TAGGED, World
from stages import same, weights
from test_desam_reads import Opened, linux
from tiny_dataset import ENDING

from nnunet_dgplugins.errors import UserError

TRAINER = "EquivariantCAMTrainer"


def test_label_files_can_hold_anything_and_not_one_bit_of_the_weights_changes(tagged: World):
    tagged.use(TAGGED, own=True).train(TRAINER)
    before = weights(tagged, TRAINER)
    for folder in (tagged.raw / "labelsTr", tagged.preprocessed / "gt_segmentations"):
        for path in folder.glob(f"*{ENDING}"):
            path.write_bytes(b"no image")
    gone = list(tagged.preprocessed.glob("nnUNetPlans_2d/*_seg.b2nd"))
    assert len(gone) == TAGGED.cases
    for path in gone:
        path.unlink()
    tagged.elsewhere("again").train(TRAINER)
    assert same(before, weights(tagged, TRAINER))


def test_other_tags_give_other_weights(tagged: World):
    tagged.use(TAGGED, own=True).train(TRAINER)
    before = weights(tagged, TRAINER)

    def turned(content: dict[str, Any]) -> None:
        for case in content["dgplugins"]["cases"].values():
            if "tags" in case:
                case["tags"] = [1 - tag for tag in case["tags"]]

    tagged.edit_json("dataset.json", turned)
    tagged.elsewhere("again").train(TRAINER)
    assert not same(before, weights(tagged, TRAINER))


@linux
@pytest.mark.parametrize("fold", [0, "all"])
def test_no_mask_of_a_case_that_trains_is_opened(tagged: World, fold: int | str):
    tagged.use(TAGGED, own=True)
    data = tagged.preprocessed / "nnUNetPlans_2d"
    folders = [tagged.raw / "labelsTr", tagged.raw / "labelsVal", tagged.preprocessed / "gt_segmentations", data]
    with Opened(*folders) as opened:
        tagged.command(TRAINER, fold)
        paths = {path for path in map(Path, opened.paths()) if path.suffix}
    masks = {path for path in paths if path.parent != data}
    assert masks == ({tagged.raw / "labelsVal" / f"case_0{ENDING}"} if fold == 0 else set())  # fold 0 validates on it
    assert not any("_seg" in path.name for path in paths)
    assert data / "case_1.b2nd" in paths  # a library written in C is seen


def test_a_loss_that_is_no_number_names_the_cases(tagged: World):
    built = tagged.construct(TRAINER)
    built.on_train_start()
    for parameter in built.network.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at epoch 0, cases case_\d(, case_\d)*\."):
        built.run_training()
