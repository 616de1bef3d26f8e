"""Released checkpoints: what is read, and what is refused with which words."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.methods.desam.checkpoint import num_classes, read_official, sam_size
from nnunet_dgplugins.methods.desam.network import build_decoder, load_decoder
from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder

SIZES = SimpleNamespace(embed_dim=768, prompt_dim=64, decoder_mlp_dim=32, decoder_num_heads=4, iou_head_hidden=32)


def whole_model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    parts = {"mask_decoder": build_decoder(SIZES), "prompt_encoder": build_prompt_encoder(64, 4, 64)}
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    return {**state, "image_encoder.pos_embed": torch.zeros(1, 4, 4, 8), "pixel_mean": torch.zeros(3, 1, 1)}


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_released_checkpoint_is_read_whatever_wrapped_it(tmp_path, prefix, wrapper):
    state = whole_model()
    content = {prefix + key: value for key, value in state.items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "desam_model_best.pth")
    found = read_official(tmp_path / "desam_model_best.pth")
    assert set(found) == set(state) - {"pixel_mean"}
    assert sam_size(found) == "vit_b"
    assert num_classes(found) == 1
    assert load_decoder(build_decoder(SIZES), found) == []


def test_a_pickled_module_is_refused_with_what_to_do(tmp_path):
    torch.save(build_decoder(SIZES), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"refused.*state_dict\(\)"):
        read_official(tmp_path / "model.pth")


def test_other_pickled_objects_are_refused_too(tmp_path):
    torch.save({**whole_model(), "args": argparse.Namespace(lr=1)}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="refused"):
        read_official(tmp_path / "model.pth")


def test_a_file_of_sam_itself_is_recognised(tmp_path):
    torch.save({key: value for key, value in whole_model().items() if ".pimm." not in key}, tmp_path / "sam.pth")
    with pytest.raises(UserError, match="plain SAM file"):
        read_official(tmp_path / "sam.pth")


def test_a_decoder_alone_is_not_enough(tmp_path):
    state = {key: value for key, value in whole_model().items() if key.startswith("mask_decoder.")}
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"prompt_encoder\.\* is missing"):
        read_official(tmp_path / "half.pth")


def test_missing_truncated_and_foreign_files_say_so(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_official(tmp_path / "nowhere.pth")
    torch.save(whole_model(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for name, data in (("cut.pth", content[: len(content) // 2]), ("empty.pth", b""), ("text.pth", b"not a model")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            read_official(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a state dict"):
        read_official(tmp_path / "list.pth")


def test_unknown_widths_are_named():
    with pytest.raises(UserError, match="512 channels; known are 1280"):
        sam_size({"mask_decoder.pimm.conv_blocks_context.0.block_init.conv1.conv.weight": torch.zeros(64, 512, 3, 3)})
