"""nnU-Net finds our trainers by name: real installs in throw-away environments layered on the installed one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_paths()["purelib"])
OURS = (
    "nnunet_dgplugins",
    "_nnunet_dgplugins",
    "dataset_conversion",
    "_editable_impl_nnunet_dgplugins",
    "__editable__",
)
LOOKUP = (
    "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as f; "
    "c = f('{}'); print(c.__module__, c.__name__)"
)


class Environment:
    """A virtual environment that sees every installed package but ours (and, if asked, not nnunetv2)."""

    def __init__(self, folder: Path, hide: tuple[str, ...] = ()):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "lib" / version / "site-packages"
        layer = folder / "layer"
        layer.mkdir()
        for entry in SITE.iterdir():
            if not entry.name.startswith(OURS + hide):
                (layer / entry.name).symlink_to(entry)
        (self.site / "layer.pth").write_text(f"{layer}\n")

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {
            k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "DGPLUGINS_NO_AUTOLOAD", "PYTHONPATH")
        }
        return subprocess.run(
            [str(self.folder / "bin" / "python"), *arguments],
            capture_output=True, text=True, env={**kept, **variables}, cwd=self.folder, check=False,
        )  # fmt: skip

    def pip(self, *arguments: str) -> None:
        done = self.run("-m", "pip", *arguments, "--disable-pip-version-check")
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, *what: str) -> None:
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *what)

    def lookup(self, name: str, **variables: str) -> str:
        done = self.run("-c", LOOKUP.format(name), **variables)
        return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else f"failed: {done.stderr[-300:]}"

    def files(self) -> set[str]:
        return {p.name for p in self.site.iterdir() if p.name != "__pycache__"}


FOUND = "nnunet_dgplugins.trainers.desam DeSAMTrainer"


def _sources_of_nnunet(folder: Path) -> Path:
    """A source tree of the installed nnunetv2, as a developer's clone would be."""
    import shutil

    import nnunetv2

    folder.mkdir()
    shutil.copytree(Path(nnunetv2.__file__).parent, folder / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "nnunetv2"\nversion = "2.8.1"\n[tool.setuptools.packages.find]\ninclude = ["nnunetv2*"]\n'
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["wheel", "editable"])
@pytest.mark.parametrize("host", ["wheel", "editable"])
def test_trainers_are_found_without_a_variable_and_uninstall_leaves_nothing(tmp_path: Path, ours: str, host: str):
    environment = Environment(
        tmp_path / "env", hide=("nnunetv2", "nnUNetv2", "__editable___nnunetv2") if host == "editable" else ()
    )
    if host == "editable":
        environment.install("-e", str(_sources_of_nnunet(tmp_path / "clone")))
    before = environment.files()
    environment.install(*(["-e"] if ours == "editable" else []), str(ROOT))
    assert environment.lookup("DeSAMTrainer") == FOUND
    assert environment.lookup("nnUNetTrainer") == "nnunetv2.training.nnUNetTrainer.nnUNetTrainer nnUNetTrainer"
    assert environment.lookup("DeSAMTrainer", DGPLUGINS_NO_AUTOLOAD="1").startswith("failed")
    by_hand = environment.run("-m", "nnunet_dgplugins.ext").stdout.strip()
    assert environment.lookup("DeSAMTrainer", DGPLUGINS_NO_AUTOLOAD="1", nnUNet_extTrainer=by_hand) == FOUND
    environment.pip("uninstall", "-y", "nnunet_dgplugins")
    assert environment.files() == before
    started = environment.run("-c", "import os; print(os.environ.get('nnUNet_extTrainer'))")
    assert started.stdout.strip() == "None"
    assert started.stderr == ""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("lookup") / "env")
    environment.install(str(ROOT))
    return environment


def test_entries_of_the_user_stay_first(installed: Environment):
    done = installed.run("-c", "import os; print(os.environ['nnUNet_extTrainer'])", nnUNet_extTrainer="/my/trainers")
    mine, ours = done.stdout.strip().split(os.pathsep)
    assert mine == "/my/trainers"
    assert ours == str(installed.site / "_nnunet_dgplugins_ext")


def test_the_start_up_file_can_be_switched_off(installed: Environment):
    done = installed.run("-c", "import os; print(os.environ.get('nnUNet_extTrainer'))", DGPLUGINS_NO_AUTOLOAD="1")
    assert done.stdout.strip() == "None"


def test_a_broken_boot_module_never_breaks_python(tmp_path: Path, installed: Environment):
    boot = installed.site / "nnunet_dgplugins_boot.py"
    good = boot.read_text()
    try:
        boot.write_text("raise RuntimeError('broken')\n")
        done = installed.run("-c", "print('fine')")
    finally:
        boot.write_text(good)
    assert done.returncode == 0
    assert done.stdout.strip() == "fine"
    assert "trainers not registered (broken)" in done.stderr


def test_the_wheel_holds_the_two_packages_and_the_start_up_files_only(installed: Environment):
    names = {name for name in installed.files() if not name.startswith("layer")}
    assert {name for name in names if not name.endswith(".dist-info")} == {
        "nnunet_dgplugins", "dataset_conversion", "_nnunet_dgplugins_ext", "nnunet_dgplugins_boot.py",
        "nnunet_dgplugins_autoload.pth", "nnunet_dgplugins_autoload.start",
    }  # fmt: skip


WEIGHTS = "nnunet_dgplugins/sam/vit_tiny.safetensors"


def test_an_installed_package_loads_the_weights_it_ships(installed: Environment):
    from nnunet_dgplugins.sam.weights import weights_hash

    file = installed.site / WEIGHTS
    assert file.stat().st_size <= 8 * 10**6
    code = (
        "from nnunet_dgplugins.sam import weights as w; print(w.find_weights('vit_tiny'), w.weights_hash('vit_tiny'))"
    )
    done = installed.run("-c", code)
    assert done.stdout.strip() == f"{file} {weights_hash('vit_tiny')}", done.stderr


def test_the_source_archive_and_the_wheel_made_from_it_hold_the_shipped_weights(tmp_path: Path, installed: Environment):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        (member,) = [item for item in content.getmembers() if item.name.endswith(WEIGHTS)]
        packed = content.extractfile(member)
        assert packed is not None
        assert packed.read() == (ROOT / WEIGHTS).read_bytes()
    installed.pip(
        "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path / "wheel"), str(archive)
    )
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        assert content.read(WEIGHTS) == (ROOT / WEIGHTS).read_bytes()


def test_two_lookups_give_the_same_class_and_every_registered_trainer_is_found():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_dgplugins.registry import TRAINERS, load_trainer

    for name in TRAINERS:
        first, second = (recursive_find_trainer_class_by_name(name) for _ in range(2))
        assert first is second is load_trainer(name)
        assert first.__name__ == name


def test_an_unknown_name_is_not_found_in_the_bridge():
    sys.path.insert(0, str(ROOT / "startup" / "_nnunet_dgplugins_ext"))
    try:
        import nnunet_dgplugins_bridge
    finally:
        sys.path.pop(0)
    assert not hasattr(nnunet_dgplugins_bridge, "nnUNetTrainer")
    assert not hasattr(nnunet_dgplugins_bridge, "Nobody")
