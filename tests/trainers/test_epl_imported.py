"""EPL's released networks as model folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import World
from tiny_dataset import ENDING, Recipe, case_arrays, write_image

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import read_json
from nnunet_dgplugins.methods.epl.deeplab import DeepLabV3Plus
from nnunet_dgplugins.trainers.checkpoints import read_checkpoint
from nnunet_dgplugins.trainers.imported import Destination, import_epl

RELEASED = ("LV", "MYO", "RV")
HEARTS = Recipe("Hearts", classes=3)
ACDC = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
SPACING = (1.1, 1.1, 10.0)


def released(path: Path, seed: int, classes: int = 4) -> DeepLabV3Plus:
    """Save a network as the release would be saved as a state dict, and return it."""
    torch.manual_seed(seed)
    network = DeepLabV3Plus(1, classes).eval()
    with torch.no_grad():  # every class wins somewhere
        network.classifier.weight *= 30
    torch.save(network.state_dict(), path)
    return network


@pytest.fixture
def hearts(world: World) -> World:
    """A planned dataset whose classes count as ACDC's do."""
    world.use(HEARTS, own=True).no_settings()
    world.edit_json("dataset.json", lambda content: content.update(labels=dict(ACDC)))
    return world


def to(world: World, **changes: object) -> Destination:
    return Destination(**{"dataset": str(world.number), "trainer": "EPLTrainer", "plans": "nnUNetPlans",
                          "configuration": "2d", "fold": 0, **changes})  # fmt: skip


def expected(network: DeepLabV3Plus, volume: np.ndarray) -> np.ndarray:
    """What the released inference draws on each slice, in ACDC's label values; argmax instead of a threshold."""
    slices = []
    for image in volume:
        low, high = np.percentile(image, (0.5, 99.5))
        scaled = (np.clip(image, low, high) - low) / (high - low)
        with torch.no_grad():
            drawn = network(torch.from_numpy(scaled).float()[None, None])[0].argmax(0)
        slices.append(np.array([ACDC[name] for name in (*RELEASED, "background")])[drawn.numpy()])
    return np.stack(slices)


def test_an_imported_network_draws_what_the_released_one_draws_in_the_datasets_label_values(hearts: World):
    networks = [released(hearts.root / f"net{number}.pth", number) for number in (1, 2)]
    volume = case_arrays(HEARTS, 0, (2, 288, 288))[0][0]
    image = hearts.root / f"image_0000{ENDING}"
    write_image(image, volume, SPACING)
    done = CliRunner().invoke(cli, [
        "import-checkpoint", str(hearts.root / "net1.pth"), "--second", str(hearts.root / "net2.pth"),
        "--dataset", str(hearts.number), "-tr", "EPLTrainer",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "372 tensors loaded." in done.output
    folder = hearts.model("EPLTrainer")
    assert "-f 0 100" in done.output
    assert CliRunner().invoke(cli, ["second-fold", str(folder), "-f", "0"]).exit_code == 0
    for fold, network in zip((0, 100), networks, strict=True):
        (found,) = hearts.predict(folder, [[str(image)]], fold=fold)
        wanted = expected(network, volume)
        assert len(np.unique(wanted)) > 1
        # nnU-Net counts a percentile's nearest rank, the released code interpolates
        assert np.mean(found == wanted) > 0.995


def test_the_plans_say_how_the_released_networks_saw_images(hearts: World):
    released(hearts.root / "net.pth", 0)
    folder = import_epl(hearts.root / "net.pth", None, to(hearts))
    configuration = read_json(folder / "plans.json")["configurations"]["2d"]
    assert configuration["spacing"] == [1.1, 1.1]
    assert configuration["patch_size"] == [288, 288]
    assert configuration["normalization_schemes"] == ["NoNormalization"]
    assert configuration["dgplugins"]["EPLTrainer"]["input_scaling"] == "percentiles"
    assert "dgplugins" not in read_checkpoint(folder / "fold_0" / "checkpoint_final.pth")  # no second network


def test_scgm_networks_know_grey_matter_and_take_its_images_by_their_maximum(world: World):
    world.use(Recipe(), own=True).no_settings()
    world.edit_json("dataset.json", lambda content: content.update(labels={"background": 0, "gm": 1}))
    network = released(world.root / "net.pth", 0, classes=2)
    folder = import_epl(world.root / "net.pth", None, to(world), spacing=0.5)
    configuration = read_json(folder / "plans.json")["configurations"]["2d"]
    assert configuration["spacing"] == [0.5, 0.5]
    assert configuration["dgplugins"]["EPLTrainer"]["input_scaling"] == "maximum"
    weights = read_checkpoint(folder / "fold_0" / "checkpoint_final.pth")["network_weights"]
    assert torch.equal(weights["classifier.bias"], network.classifier.bias.detach()[[1, 0]])


def test_every_reason_against_an_import_is_named_at_once_and_nothing_is_written(world: World):
    released(world.root / "net.pth", 0)
    world.use(Recipe("Channels", channels=("T2", "ADC"))).no_settings()
    with pytest.raises(UserError) as caught:
        import_epl(world.root / "net.pth", None, to(world))
    text = str(caught.value)
    assert "takes 1 channel(s)" in text
    assert "has classes {'part1': 1} instead of LV, MYO, RV" in text
    assert not list(world.results.iterdir())


def test_part_of_a_network_is_refused_by_the_names_that_are_missing(hearts: World):
    state = released(hearts.root / "net.pth", 0).state_dict()
    torch.save({key: value for key, value in state.items() if "layer4" not in key}, hearts.root / "net.pth")
    with pytest.raises(UserError, match=r"not the whole released network.*not in the file.*layer4"):
        import_epl(hearts.root / "net.pth", None, to(hearts))
    assert not list(hearts.results.iterdir())


def test_a_pickled_network_is_refused_with_the_line_that_saves_it_anew(hearts: World):
    torch.save(DeepLabV3Plus(1, 4), hearts.root / "net.pth")
    with pytest.raises(UserError, match=r"could run that code.*state_dict\(\)"):
        import_epl(hearts.root / "net.pth", None, to(hearts))
    assert not list(hearts.results.iterdir())


def test_an_import_replaces_no_model_unasked_and_joins_no_folds_of_other_settings(hearts: World):
    released(hearts.root / "net.pth", 0)
    folder = import_epl(hearts.root / "net.pth", None, to(hearts))
    with pytest.raises(UserError, match="--overwrite"):
        import_epl(hearts.root / "net.pth", None, to(hearts))
    import_epl(hearts.root / "net.pth", None, to(hearts, overwrite=True))
    before = (folder / "plans.json").read_bytes()
    with pytest.raises(UserError, match=r"other settings.*dgplugins configure"):
        import_epl(hearts.root / "net.pth", None, to(hearts, fold=1), spacing=2.0)
    assert (folder / "plans.json").read_bytes() == before
    assert not (folder / "fold_1").exists()
    import_epl(hearts.root / "net.pth", None, to(hearts, fold=1))
    named = ["configure", str(hearts.number), "-tr", "EPLTrainer", "-o", "nnUNetPlansOfficial"]
    assert CliRunner().invoke(cli, named).exit_code == 0
    import_epl(hearts.root / "net.pth", None, to(hearts, fold=1, plans="nnUNetPlansOfficial"), spacing=2.0)


def test_a_trial_file_that_asks_for_another_network_is_named(hearts: World):
    released(hearts.root / "net.pth", 0)
    hearts.settings(network="planned")
    with pytest.raises(UserError, match="DGPLUGINS_SETTINGS"):
        import_epl(hearts.root / "net.pth", None, to(hearts))
