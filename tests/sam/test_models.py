"""The table of SAM models and the names a user may type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sam_helpers import full_state

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.sam import models
from nnunet_dgplugins.sam.models import MODELS, get_model, what_a_file_adds


def test_the_table_is_readable_without_torch():
    code = "import sys, nnunet_dgplugins.sam.models; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "taps", "grid", "mask", "mebibytes"),
    [
        ("vit_h", (7, 15, 23), 64, 256, 64),
        ("vit_l", (5, 11, 17), 64, 256, 52),
        ("vit_b", (2, 5, 8), 64, 256, 40),
        ("vit_tiny", (1, 3, 5), 32, 128, 1.75),
    ],
)
def test_sizes_follow_from_the_table(name: str, taps: tuple[int, ...], grid: int, mask: int, mebibytes: float):
    model = MODELS[name]
    assert (model.taps, model.grid, model.mask_size) == (taps, grid, mask)
    assert model.raw_bytes == mebibytes * 2**20


def test_the_shipped_model_says_so_wherever_it_is_named():
    assert MODELS["vit_tiny"].described == "vit_tiny (shipped)"
    assert MODELS["vit_b"].described == "vit_b"
    assert [name for name, model in MODELS.items() if model.shipped] == ["vit_tiny"]


def test_a_users_file_of_the_shipped_size_is_the_users():
    model = get_model("vit_tiny:/nowhere/own.safetensors")
    assert not model.shipped
    assert model.described == "vit_tiny:/nowhere/own.safetensors"
    assert model.find() is None


def test_the_shipped_file_is_never_taken_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DGPLUGINS_SAM_DIR", str(tmp_path))
    (tmp_path / "vit_tiny.safetensors").touch()
    found = MODELS["vit_tiny"].find()
    assert found is not None
    assert found.parent == Path(models.__file__).parent


def test_one_line_says_what_a_real_file_adds_and_where_it_goes():
    text = what_a_file_adds()
    assert "vit_h 2.4 GiB, vit_l 1.2 GiB, vit_b 357.7 MiB" in text
    assert "DGPLUGINS_SAM_DIR" in text
    assert "\n" not in text
    assert len(text) <= 120


def test_a_wrong_name_gets_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'vit_b'"):
        get_model("vitb")


def test_auto_takes_the_largest_file_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert get_model("auto").name == "vit_tiny"
    monkeypatch.setenv("DGPLUGINS_SAM_DIR", str(tmp_path))
    (tmp_path / "sam_vit_b_01ec64.pth").touch()
    assert get_model("auto").name == "vit_b"
    (tmp_path / "sam_vit_l_0b3195.pth").touch()
    assert get_model("auto").name == "vit_l"
    monkeypatch.setenv("DGPLUGINS_SAM_DIR", str(tmp_path / "nowhere"))
    assert get_model("auto").name == "vit_tiny"


def test_a_path_is_recognised_by_its_tensors(tmp_path: Path):
    path = tmp_path / "my weights.pth"
    torch.save(full_state(), path)
    model = get_model(str(path))
    assert model.size == "vit_tiny"
    assert model.file == str(path)
    assert model.sha256 is None
    assert get_model(model.name) == model  # the recognised name needs no file any more
    assert model.label == "vit_tiny-my-weights"


def test_a_size_with_a_file_needs_no_file_yet():
    model = get_model("vit_b:/nowhere/medsam_vit_b.pth")
    assert (model.embed_dim, model.size, model.url) == (768, "vit_b", None)


def test_a_file_of_no_known_size_is_refused(tmp_path: Path):
    path = tmp_path / "odd.pth"
    state = full_state()
    state["image_encoder.pos_embed"] = torch.zeros(1, 32, 32, 96)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"known size.*\(1, 32, 32, 96\), 8 blocks"):
        get_model(str(path))
    with pytest.raises(UserError, match="not found"):
        get_model(str(tmp_path / "absent.pth"))
