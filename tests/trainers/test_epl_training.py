"""What a step of EPL learns from, and what it never looks at."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SEMI, World

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.splits import single_source
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json


def weights(world: World) -> dict[str, torch.Tensor]:
    """Both networks of a finished training."""
    content = torch.load(world.model("EPLTrainer") / "fold_0" / "checkpoint_final.pth", weights_only=False)
    second = content["dgplugins"]["second_network"]
    return {**content["network_weights"], **{f"second.{key}": value for key, value in second.items()}}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def started(world: World) -> Any:
    """A trainer at the start of its first epoch."""
    trainer = world.construct("EPLTrainer")
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def test_labelled_batches_hold_labelled_cases_and_the_two_draws_all_source_images(semi: World):
    trainer = started(semi)
    labelled, unlabelled = set(), set()
    for _ in range(12):
        batch = next(trainer.dataloader_train)
        assert [len(x) for x in (batch["data"], *batch["unlabelled"])] == [2, 2, 2]
        labelled |= {str(key) for key in batch["keys"]}
        unlabelled |= {str(key) for key in batch["unlabelled_keys"]}
    assert labelled == {"case_0", "case_1"}
    assert unlabelled == {"case_0", "case_1", "case_3", "case_4", "case_5"}  # case_2 validates


def test_the_pool_can_be_the_cases_without_masks_alone(semi: World):
    semi.settings(unlabelled_pool="unlabelled")
    assert started(semi)._unlabelled_pool() == ["case_3", "case_4", "case_5"]


def test_cases_of_other_sites_held_out_sites_and_validation_patients_stay_outside(semi: World):
    semi.use(SEMI, own=True)
    semi.settings(unlabelled_pool="unlabelled")

    def change(content: dict[str, Any]) -> None:
        cases = content["dgplugins"]["cases"]
        cases["case_3"].update(site=cases["case_2"]["site"], patient=cases["case_2"]["patient"])
        cases["case_4"]["site"] = "west"

    semi.edit_json("dataset.json", change)
    assert semi.construct("EPLTrainer")._unlabelled_pool() == ["case_5"]
    semi.write_splits([{"train": ["case_0"], "val": ["case_2"], "held_out": "south"}])
    with pytest.raises(UserError, match="no case without masks"):
        semi.construct("EPLTrainer")._unlabelled_pool()


def test_unlabelled_cases_of_targets_stay_outside_a_single_source_of_a_mixed_dataset(semi: World):
    semi.use(SEMI, own=True)
    semi.settings(unlabelled_pool="unlabelled")

    def mix(content: dict[str, Any]) -> None:
        table = content["dgplugins"]
        table["source"] = None
        for number, case in enumerate(table["cases"].values()):
            case.update(site="target" if number in (4, 5) else "here", patient=str(number))

    semi.edit_json("dataset.json", mix)
    table = CaseTable.from_dataset_json(read_json(semi.preprocessed / "dataset.json"))
    semi.write_splits(single_source(table, "here", [f"case_{number}" for number in range(6)], k=2))
    assert semi.construct("EPLTrainer")._unlabelled_pool() == ["case_3"]


def test_a_sample_without_masks_gets_exactly_no_gradient_from_the_supervised_loss(semi: World):
    trainer = started(semi)
    batch = next(trainer.dataloader_train)
    batch["keys"] = np.array(["case_0", "case_4"])  # the targets of both look annotated
    outputs = [network(batch["data"]) for network in trainer.networks()]
    for levels in outputs:
        for level in levels:
            level.retain_grad()
    trainer.supervised_loss(outputs, batch).backward()
    for levels in outputs:
        assert bool((levels[0].grad[0] != 0).any())
        for level in levels[:-1]:  # nnU-Net gives the lowest resolution no weight
            assert bool((level.grad[1] == 0).all())
    batch["keys"] = np.array(["case_3", "case_4"])
    with torch.no_grad():
        assert float(trainer.supervised_loss([network(batch["data"]) for network in trainer.networks()], batch)) == 0


@pytest.mark.parametrize("loss", ["nnunet", "published"])
def test_the_supervised_loss_gives_the_unlabelled_images_exactly_no_gradient(semi: World, loss: str):
    semi.settings(supervised_loss=loss, forwards="batched")
    trainer = started(semi)
    batch = next(trainer.dataloader_train)
    labelled, *pair = (x.requires_grad_() for x in (batch["data"], *batch["unlabelled"]))
    passes = trainer.passes(trainer.networks(), trainer._unlabelled_images(pair, labelled), labelled)
    assert passes.plain[0].requires_grad
    trainer.supervised_loss(passes.labelled, batch).backward()
    assert bool((labelled.grad != 0).any())
    assert all(x.grad is None or bool((x.grad == 0).all()) for x in pair)


def test_labels_of_unlabelled_cases_and_names_of_sites_do_not_change_one_bit(semi: World):
    semi.use(SEMI, own=True)
    semi.train("EPLTrainer")
    first = weights(semi)
    scramble(semi)
    semi.elsewhere("scrambled").train("EPLTrainer")
    assert same(first, weights(semi))


def scramble(world: World) -> None:
    """Draw new labels for the preprocessed unlabelled cases, where there is image, and rename the sites."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    folder = world.preprocessed / "nnUNetPlans_2d"
    dataset = infer_dataset_class(str(folder))(str(folder))
    random = np.random.RandomState(0)
    for name in ("case_3", "case_4", "case_5"):
        data, seg, _, properties = dataset.load_case(name)
        data, seg = np.asarray(data[:]), np.asarray(seg[:])
        assert (seg == 2).any()  # the ignore label
        drawn = np.where(seg < 0, seg, random.randint(0, 3, seg.shape)).astype(seg.dtype)
        for key in properties["class_locations"]:
            properties["class_locations"][key] = np.argwhere(drawn[0] >= 0)[:5] @ np.eye(3, 4, 1, dtype=int)
        for kind in (".b2nd", "_seg.b2nd"):
            (folder / f"{name}{kind}").unlink()
        dataset.save_case(data, drawn, properties, str(folder / name))

    def rename(content: dict[str, Any]) -> None:
        table = content["dgplugins"]
        table["source"] = ["one", "another"]
        for number, case in enumerate(table["cases"].values()):
            case["site"] = table["source"][number // 3 % 2]

    world.edit_json("dataset.json", rename)


def test_the_networks_start_apart_and_both_learn(semi: World):
    trainer = started(semi)
    first, second = ([p.detach().clone() for p in network.parameters()] for network in trainer.networks())
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    trainer.train_step(next(trainer.dataloader_train))
    for before, network in zip((first, second), trainer.networks(), strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_before_the_start_epoch_only_labelled_patches_teach(semi: World):
    semi.settings(cps_start_epoch=1)
    trainer = started(semi)
    batch = next(trainer.dataloader_train)
    batch["unlabelled"] = tuple(torch.full_like(x, torch.nan) for x in batch["unlabelled"])
    trainer.train_step(batch)
    assert all(bool(p.isfinite().all()) for network in trainer.networks() for p in network.parameters())


def test_both_orders_of_the_forwards_give_the_same_losses(semi: World):
    losses = {}
    for forwards in ("published", "batched"):
        semi.elsewhere(forwards).settings(forwards=forwards, channels_last=False)
        trainer = started(semi)
        assert trainer.passes.__name__ == f"{forwards}_passes"
        losses[forwards] = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(2)]
    assert losses["batched"] == pytest.approx(losses["published"], rel=1e-3)
    assert losses["batched"][0] != losses["batched"][1]


def test_a_loss_that_is_not_a_number_stops_with_the_cases_and_leaves_the_weights(semi: World):
    trainer = started(semi)
    batch = next(trainer.dataloader_train)
    batch["unlabelled"][1][0] = torch.nan
    before = [p.detach().clone() for network in trainer.networks() for p in network.parameters()]
    with pytest.raises(UserError) as caught:
        trainer.train_step(batch)
    assert all(str(key) in str(caught.value) for key in [*batch["keys"], *batch["unlabelled_keys"]])
    after = [p for network in trainer.networks() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


FULL_MIX = {"fourier_mode": "full_mix"}


@pytest.mark.parametrize(
    ("baseline", "option"),
    [
        ({}, {"supervised_loss": "published"}),
        ({}, {"supervised_loss": "published_scgm"}),
        ({}, {"cps_weight": 1.0}),
        ({}, {"confidence": "batch"}),
        ({}, {"detach_confidence": True}),
        ({}, FULL_MIX),
        (FULL_MIX, {"fourier_strength": 0.9}),
        ({}, {"fourier_strength": 0.5}),
        ({}, {"fourier_fraction": 0.3}),
        ({}, {"fourier_minimum": 4}),
        ({}, {"histogram_matching": True}),
        ({}, {"batch_size": 3}),
        ({}, {"unlabelled_batch_size": 3}),
        ({}, {"unlabelled_pool": "unlabelled"}),
        ({}, {"optimizer": "sgd"}),
        ({}, {"initial_lr": 1e-2}),
        ({}, {"weight_decay": 0.5}),
    ],
    ids=str,
)
def test_every_option_trains_to_other_weights(semi: World, baseline: dict[str, Any], option: dict[str, Any]):
    plain = first_step(semi, baseline)
    changed = first_step(semi, {**baseline, **option})
    assert all(bool(x.isfinite().all()) for x in changed)
    assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_the_same_options_train_to_the_same_weights(semi: World):
    plain, again = trained_step(semi, {}), trained_step(semi, {})
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


_steps: dict[str, list[torch.Tensor]] = {}


def first_step(world: World, options: dict[str, Any]) -> list[torch.Tensor]:
    """Network 1 after one step with these options, which is trained once for all tests."""
    if str(options) not in _steps:
        _steps[str(options)] = trained_step(world, options)
    return _steps[str(options)]


def trained_step(world: World, options: dict[str, Any]) -> list[torch.Tensor]:
    world.settings(**options)
    trainer = started(world)
    trainer.train_step(next(trainer.dataloader_train))
    return [p.detach().clone() for p in trainer.network.parameters()]


def test_a_dataset_without_unlabelled_cases_trains_on_its_own_images(world: World):
    trainer = world.train("EPLTrainer")
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))
    assert "0 of them without masks" in Path(trainer.log_file).read_text()


def test_loaders_with_worker_processes_train_and_end_with_the_training(semi: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = semi.train("EPLTrainer")
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))
    assert type(trainer.dataloader_train.unlabelled).__name__ == "NonDetMultiThreadedAugmenter"
    assert multiprocessing.active_children() == []


def test_the_rate_stays_or_decays_for_both_networks(semi: World):
    rates = {}
    for schedule in ("constant", "poly"):
        semi.elsewhere(schedule).settings(schedule=schedule, epochs=2)
        trainer = semi.train("EPLTrainer")
        rates[schedule] = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates["constant"] == [1e-4, 1e-4]
    assert rates["poly"] == pytest.approx([1e-4 * 0.5**0.9] * 2)


def test_settings_that_cannot_be_are_refused(semi: World):
    for options, sentence in (
        ({"start_weights": "x.pth"}, "start_weights and input_scaling are for"),
        ({"fourier_fraction": 0.6}, "at most 0.5"),
        ({"export_second": True}, "not all"),
    ):
        semi.settings(**options)
        with pytest.raises(UserError, match=sentence):
            semi.construct("EPLTrainer", fold="all")


def test_the_splits_that_a_stock_trainer_reads_list_labelled_cases_only(semi: World):
    folds = read_json(semi.preprocessed / "splits_final.json")
    assert {name for fold in folds for side in fold.values() for name in side} == {"case_0", "case_1", "case_2"}


def test_a_batch_of_one_shows_foreground_as_often_as_larger_ones(semi: World, monkeypatch: pytest.MonkeyPatch):
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

    built, draws = nnUNetDataLoader.__init__, []

    def watched(self: nnUNetDataLoader, *arguments: Any, **named: Any) -> None:
        built(self, *arguments, **named)
        draws.append((self.batch_size, [self.get_do_oversample(0) for _ in range(300)]))

    monkeypatch.setattr(nnUNetDataLoader, "__init__", watched)
    semi.settings(batch_size=1, unlabelled_batch_size=2)
    trainer = semi.construct("EPLTrainer")
    trainer.initialize()
    trainer.get_dataloaders()
    labelled = [forced for size, forced in draws if size == 1]
    assert len(labelled) == 2  # training and validation
    assert all(60 < sum(forced) < 140 for forced in labelled)  # a third of them
