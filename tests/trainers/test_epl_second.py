"""Network 2 as a fold of its own, and as a second opinion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import World
from resuming import assert_same
from tiny_dataset import ENDING

from nnunet_dgplugins.budget import Budget, train_or_continue
from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.doubt import FILE
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint, write_checkpoint
from nnunet_dgplugins.trainers.doubt import write_doubt
from nnunet_dgplugins.trainers.epl import EPLTrainer
from nnunet_dgplugins.trainers.second_network import case_disagreement, export_second


def logits(world: World, folds: tuple[int, ...]) -> torch.Tensor:
    """Logits of the first target case, as nnU-Net's predictor makes them of some folds."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(world.model("EPLTrainer")), folds, "checkpoint_final.pth")
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case(
        world.images()[0], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    found: torch.Tensor = predictor.predict_logits_from_preprocessed_data(torch.as_tensor(np.asarray(data)))
    return found.float()


def test_the_two_folds_together_predict_the_mean_of_both_networks(semi: World):
    semi.settings(export_second=True)
    trainer = semi.train("EPLTrainer")
    path = semi.model("EPLTrainer") / "fold_100" / "checkpoint_final.pth"
    second = read_checkpoint(path)["network_weights"]
    assert all(torch.equal(value, second[key]) for key, value in trainer.second_network.state_dict().items())
    one, two = logits(semi, (0,)), logits(semi, (100,))
    assert float((one - two).abs().max()) > 0.05
    assert float((logits(semi, (0, 100)) - (one + two) / 2).abs().max()) < 1e-2


def test_the_command_writes_the_fold_later_and_doctor_mentions_it(semi: World):
    semi.train("EPLTrainer")
    model = semi.model("EPLTrainer")
    assert not (model / "fold_100").exists()
    done = CliRunner().invoke(cli, ["second-fold", str(model)])
    assert done.exit_code == 0, done.output
    assert "-f 0 100" in done.output
    assert "dgplugins" not in read_checkpoint(model / "fold_100" / "checkpoint_final.pth")
    checks = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)["checks"]
    (check,) = [item for item in checks if "fold_100" in item["found"]]
    assert check["state"] == "note"
    with pytest.raises(UserError, match="holds no second network"):
        export_second(model, 100)


def test_a_fold_trained_anew_replaces_the_second_network_that_was_exported_before(semi: World):
    semi.train("EPLTrainer")
    export_second(semi.model("EPLTrainer"), 0)
    path = semi.model("EPLTrainer") / "fold_100" / "checkpoint_final.pth"
    content = read_checkpoint(path)
    old = {name: torch.zeros_like(value) for name, value in content["network_weights"].items()}
    write_checkpoint(path, {**content, "network_weights": old})
    trainer = semi.train("EPLTrainer")
    assert_same(dict(trainer.second_network.state_dict()), dict(read_checkpoint(path)["network_weights"]))


def test_an_export_that_a_kill_prevented_is_made_up_by_the_budget(semi: World, monkeypatch: pytest.MonkeyPatch):
    semi.settings(export_second=True)
    with monkeypatch.context() as patch:
        patch.setattr(EPLTrainer, "after_training", killed)
        with pytest.raises(KeyboardInterrupt):
            train_or_continue(semi.construct("EPLTrainer"), Budget(epochs=1))
    assert (semi.model("EPLTrainer") / "fold_0" / "checkpoint_final.pth").is_file()
    again = semi.construct("EPLTrainer")
    again.perform_actual_validation = lambda save_probabilities: None
    assert train_or_continue(again, Budget(epochs=1)) == 0
    second = read_checkpoint(semi.model("EPLTrainer") / "fold_100" / "checkpoint_final.pth")["network_weights"]
    assert_same(dict(again.second_network.state_dict()), dict(second))


def killed(trainer: Any) -> None:
    raise KeyboardInterrupt


def predicted(world: World) -> Path:
    """A folder of predictions of the target cases."""
    out = world.root / "out"
    out.mkdir(exist_ok=True)
    names = [Path(files[0]).name[: -len(ENDING) - 5] for files in world.images()]
    world.predictor(world.model("EPLTrainer")).predict_from_files_sequential(
        world.images(), [str(out / name) for name in names]
    )
    return out


def test_the_disagreement_of_both_networks_is_the_doubt_of_a_case(semi: World):
    semi.train("EPLTrainer")
    out, images = predicted(semi), semi.raw / "imagesTs"
    found = read_json(write_doubt(semi.model("EPLTrainer"), images, out, device="cpu", progress=False))
    assert set(found) == {"case_6", "case_7"}
    assert [len(found[name]["slices"]) for name in ("case_6", "case_7")] == [4, 5]
    assert all(0 < case["doubt"] <= 1 and set(case["per_class"]) == {"part1"} for case in found.values())

    path = semi.model("EPLTrainer") / "fold_0" / "checkpoint_final.pth"
    content = read_checkpoint(path)
    content["dgplugins"]["second_network"] = content["network_weights"]
    write_checkpoint(path, content)
    agreed = read_json(write_doubt(semi.model("EPLTrainer"), images, out, device="cpu", progress=False))
    assert {case["doubt"] for case in agreed.values()} <= {0, 1}  # equal masks, or none
    assert (out / FILE).is_file()


class Told:
    """A predictor whose networks draw given label maps."""

    def __init__(self) -> None:
        self.list_of_parameters: list[Any] = []

    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        (labels,) = self.list_of_parameters
        return torch.nn.functional.one_hot(labels["map"], 4).movedim(-1, 0).float()


def test_doubt_is_one_minus_dice_between_the_networks_by_class_and_slice():
    one, two = torch.zeros(3, 2, 2, dtype=torch.long), torch.zeros(3, 2, 2, dtype=torch.long)
    one[0, 0], two[0, 0, 0] = 1, 1  # two pixels against one of them
    one[1, 1, 1] = two[1, 1, 1] = 2
    found = case_disagreement(
        Told(), [{"map": one}, {"map": two}], torch.zeros(1, 3, 2, 2), {"a": 1, "b": 2, "nowhere": 3}
    )
    assert found["per_class"] == {"a": pytest.approx(1 / 3), "b": 0, "nowhere": 1}
    assert found["doubt"] == pytest.approx(4 / 9)
    assert found["slices"] == pytest.approx([1 / 3, 0, 0])
