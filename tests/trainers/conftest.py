"""Planned tiny datasets, once per session; results in a folder of each test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_dataset
import tiny_patches
from tiny_dataset import Recipe, plan, threads_for_processes, write_raw
from tiny_patches import PatchRecipe, plan_patches, write_patches

from nnunet_dgplugins.files import read_json, write_json
from nnunet_dgplugins.registry import TRAINERS
from nnunet_dgplugins.sam.models import MODELS
from nnunet_dgplugins.settings import settings_class

QUICK = {"sam": "vit_tiny", "epochs": 1, "iterations_per_epoch": 2, "batch_size": 2, "store": "half"}
QUICK_GRID = {**QUICK, "grid_size": 2, "validation": "points"}
QUICK_EPL = {"epochs": 1, "iterations_per_epoch": 2, "batch_size": 2, "unlabelled_batch_size": 2}
QUICK_EQUIVARIANT = {"epochs": 1, "iterations_per_epoch": 2, "batch_size": 4, "width_divisor": 16, "initial_lr": 1e-3}
QUICK_DCAM = {"epochs": 1, "iterations_per_epoch": 2, "batch_size": 3, "initial_lr": 1e-3}
QUICK_COARSE = {
    "epochs": 1, "iterations_per_epoch": 2, "batch_size": 4, "network": "planned", "image_size": 64,
}  # fmt: skip
QUICK_SAMSDG = {"sam": "vit_tiny", "epochs": 1, "iterations_per_epoch": 2, "batch_size": 8, "empty": "full_box"}
SEMI = Recipe("Semi", cases=6, unlabelled=3)
TAGGED = Recipe("Tagged", channels=("noNorm", "noNorm"), tags=True)
PATCHES = PatchRecipe()
FIRST_NUMBER = 901
AnyRecipe = Recipe | PatchRecipe


class World:
    """nnU-Net's three folders as one test sees them: shared data, own results, own settings file."""

    def __init__(self, root: Path, shared: Callable[[AnyRecipe], tuple[Path, int]], monkeypatch: pytest.MonkeyPatch):
        self.root, self._shared, self.monkeypatch = root, shared, monkeypatch
        self.results = root / "nnUNet_results"
        self.results.mkdir()
        monkeypatch.setenv("nnUNet_results", str(self.results))
        self.use(Recipe())
        self.settings()

    def use(self, recipe: AnyRecipe, own: bool = False) -> World:
        """Work on the dataset of a recipe; ``own`` copies it, so that the test may change it."""
        folder, self.number = self._shared(recipe)
        self.recipe, self.name = recipe, f"Dataset{self.number}_{recipe.name}"
        self.ending = (tiny_patches if isinstance(recipe, PatchRecipe) else tiny_dataset).ENDING
        if own:
            for kind in ("raw", "preprocessed"):
                shutil.copytree(folder / f"nnUNet_{kind}" / self.name, self.root / f"nnUNet_{kind}" / self.name)
            folder = self.root
        self.raw, self.preprocessed = (folder / f"nnUNet_{kind}" / self.name for kind in ("raw", "preprocessed"))
        for kind in ("raw", "preprocessed"):
            self.monkeypatch.setenv(f"nnUNet_{kind}", str(folder / f"nnUNet_{kind}"))
        return self

    def settings(self, **values: Any) -> None:
        """Write the trial file that the trainers read: quick values with these over them.

        A trainer gets those that it has, and those that no trainer has, so that it can refuse them.
        """
        quick = {
            "DeSAMTrainer": QUICK, "DeSAMGridTrainer": QUICK_GRID, "EPLTrainer": QUICK_EPL,
            "EquivariantCAMTrainer": QUICK_EQUIVARIANT,
            "DCAMClassifierTrainer": {**QUICK_DCAM, "width_divisor": 32},
            "DCAMTrainer": {**QUICK_DCAM, "network": "planned"},
            "SAMSDGCoarseTrainer": QUICK_COARSE, "SAMSDGTrainer": QUICK_SAMSDG,
        }  # fmt: skip
        known = {name: settings_class(TRAINERS[name].settings).__dataclass_fields__ for name in quick}
        strange = {key for key in values if not any(key in fields for fields in known.values())}
        write_json(
            self.root / "settings.json",
            {
                name: {**chosen, **{key: value for key, value in values.items() if key in {*known[name], *strange}}}
                for name, chosen in quick.items()
            },
        )
        self.monkeypatch.setenv("DGPLUGINS_SETTINGS", str(self.root / "settings.json"))

    def elsewhere(self, name: str, keeping: str = "") -> World:
        """Go on with another results folder, empty but for the model of a trainer."""
        model, self.results = self.model(keeping), self.root / name
        self.results.mkdir()
        if keeping:
            shutil.copytree(model, self.model(keeping))
        self.monkeypatch.setenv("nnUNet_results", str(self.results))
        return self

    def no_settings(self) -> None:
        """Leave the trainers to the plans file and the defaults."""
        self.monkeypatch.delenv("DGPLUGINS_SETTINGS")

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a file of the test's own preprocessed folder."""
        content = read_json(self.preprocessed / name)
        change(content)
        write_json(self.preprocessed / name, content)

    def plan_again(self, planner: str) -> str:
        """Add another planner's plans to the test's own dataset; they share the preprocessed data."""
        return plan(self.number, planner, preprocess=False)

    def write_splits(self, folds: list[dict[str, Any]]) -> None:
        """Write the folds of the test's own preprocessed folder."""
        write_json(self.preprocessed / "splits_final.json", folds)

    def model(self, trainer: str = "DeSAMTrainer", configuration: str = "2d", plans: str = "nnUNetPlans") -> Path:
        """The model folder."""
        return self.results / self.name / f"{trainer}__{plans}__{configuration}"

    def construct(
        self, trainer: str = "DeSAMTrainer", fold: int | str = 0, configuration: str = "2d", plans: str = "nnUNetPlans",
        continues: bool = False, device: str = "cpu",
    ) -> Any:  # fmt: skip
        """Make a trainer as ``nnUNetv2_train`` does."""
        import torch
        from nnunetv2.run.run_training import get_trainer_from_args

        return get_trainer_from_args(
            str(self.number), configuration, fold, trainer, plans, continues, torch.device(device)
        )

    def train(self, trainer: str = "DeSAMTrainer", fold: int | str = 0, **options: Any) -> Any:
        """Train without nnU-Net's final validation, and return the trainer."""
        built = self.construct(trainer, fold, **options)
        built.run_training()
        return built

    def command(self, trainer: str = "DeSAMTrainer", fold: int | str = 0, **options: Any) -> None:
        """Do all that ``nnUNetv2_train`` does, validation included, in this process; options as its function has."""
        import torch
        from nnunetv2.run.run_training import run_training

        with threads_for_processes():
            run_training(str(self.number), "2d", fold, trainer, device=torch.device("cpu"), **options)

    def images(self) -> list[list[str]]:
        """Files of the target cases, one list per case."""
        folder = self.raw / "imagesTs"
        names = sorted({path.name[: -len(self.ending) - 5] for path in folder.glob(f"*{self.ending}")})
        return [sorted(str(path) for path in folder.glob(f"{name}_*{self.ending}")) for name in names]

    def predictor(
        self, model: Path | None = None, fold: int | str = 0, checkpoint: str = "checkpoint_final.pth",
        device: str = "cpu",
    ) -> Any:  # fmt: skip
        """nnU-Net's predictor over a model folder."""
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        found = nnUNetPredictor(device=torch.device(device), allow_tqdm=False)
        found.initialize_from_trained_model_folder(str(model or self.model()), (fold,), checkpoint)
        return found

    def predict(self, model: Path | None = None, files: list[list[str]] | None = None, **options: Any) -> list[Any]:
        """Label arrays (Z, Y, X) of the target cases, from nnU-Net's predictor."""
        return self.predictor(model, **options).predict_from_files_sequential(files or self.images(), None)


@pytest.fixture(scope="session")
def shared_datasets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[AnyRecipe], tuple[Path, int]]:
    """Return the folder and id of the planned dataset of a recipe; each is made once."""
    root = tmp_path_factory.mktemp("shared")
    made: dict[AnyRecipe, int] = {}

    def get(recipe: AnyRecipe) -> tuple[Path, int]:
        if recipe not in made:
            number = FIRST_NUMBER + len(made)
            with pytest.MonkeyPatch.context() as patch:
                for kind in ("raw", "preprocessed", "results"):
                    (root / f"nnUNet_{kind}").mkdir(exist_ok=True)
                    patch.setenv(f"nnUNet_{kind}", str(root / f"nnUNet_{kind}"))
                name = f"Dataset{number}_{recipe.name}"
                if isinstance(recipe, PatchRecipe):
                    write_patches(root / "nnUNet_raw", name, recipe)
                    plan_patches(number, root / "nnUNet_preprocessed" / name)
                else:
                    write_raw(root / "nnUNet_raw", name, recipe)
                    plan(number)
            made[recipe] = number
        return root, made[recipe]

    return get


@pytest.fixture
def real_size_world(
    tmp_path: Path, shared_datasets: Callable[[AnyRecipe], tuple[Path, int]], monkeypatch: pytest.MonkeyPatch
) -> World:
    """A planned dataset of one class, quick settings, an empty results folder, vit_tiny as it is shipped."""
    return World(tmp_path, shared_datasets, monkeypatch)


@pytest.fixture
def world(real_size_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The same with small SAM models and without nnU-Net's plot: a training takes a second."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    for name, model in small_models.installed(real_size_world.root / "package").items():
        monkeypatch.setitem(MODELS, name, model)
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)
    return real_size_world


@pytest.fixture
def semi(world: World) -> World:
    """The same world on a dataset with three labelled and three unlabelled training cases of two sites."""
    return world.use(SEMI)


@pytest.fixture
def tagged(world: World) -> World:
    """The same world on a dataset of two modalities whose slices have tags instead of masks."""
    return world.use(TAGGED)


@pytest.fixture
def patches(world: World) -> World:
    """The same world on a dataset of colour patches with tags of three tissues."""
    return world.use(PATCHES)


@pytest.fixture
def sam_file(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small vit_b's weight file, found through DGPLUGINS_SAM_DIR."""
    monkeypatch.setenv("DGPLUGINS_SAM_DIR", str(world.root / "sam"))
    return small_models.write_file(world.root / "sam")
