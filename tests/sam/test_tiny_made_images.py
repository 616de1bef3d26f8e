"""Made anatomies and their renderings: seeded, varied, and what they say they are."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnunet_dgplugins.sam.models import MODELS
from nnunet_dgplugins.sam.preprocess import to_canvas
from nnunet_dgplugins.sam.tiny.anatomy import Outline, Structure, draw, sample_anatomy
from nnunet_dgplugins.sam.tiny.rendering import Look, render, sample_look

SIZE = 96


def maps(count: int = 12, size: int = SIZE) -> list:
    return [draw(sample_anatomy(np.random.default_rng([5, number])), size) for number in range(count)]


def plain_look(count: int = 1) -> Look:
    """Mean signals only: no texture, blur, noise or field."""
    look = sample_look(count, torch.Generator().manual_seed(1))
    still = {name: torch.zeros_like(getattr(look, name)) for name in ("textures", "shading", "blur", "bias", "noise")}
    coil = look.coil.clone()
    coil[:, 3] = 0
    off = torch.zeros(count, dtype=torch.bool)
    ones = torch.ones_like(look.resolution)
    return replace(look, **still, coil=coil, gamma=torch.ones(count), inverted=off, rician=off, resolution=ones)


def test_the_same_seed_draws_the_same_map_and_another_seed_another():
    first, again, other = (draw(sample_anatomy(np.random.default_rng(seed)), SIZE) for seed in (3, 3, 4))
    assert np.array_equal(first.planes, again.planes)
    assert np.array_equal(first.targets, again.targets)
    assert not np.array_equal(first.planes, other.planes)


def test_sampling_does_not_depend_on_the_size_that_is_drawn():
    anatomy = sample_anatomy(np.random.default_rng(7))
    small, large = draw(anatomy, 64).planes[0], draw(anatomy, 192).planes[0]
    assert (small == large[1::3, 1::3]).mean() > 0.97


def test_every_target_is_one_connected_part_of_a_size_worth_a_prompt():
    seen = 0
    for drawing in maps():
        for plane, number in drawing.targets:
            mask = drawing.planes[plane] == number
            assert ndimage.label(mask)[1] == 1
            assert 0.0004 <= mask.mean() <= 0.6
            seen += 1
    assert seen > 100


def test_a_part_has_one_tissue_and_a_whole_structure_several():
    wholes = 0
    for drawing in maps():
        for plane, number in drawing.targets:
            tissues = np.unique(drawing.planes[0][drawing.planes[plane] == number])
            if plane == 1:
                assert len(tissues) == 1
                assert tissues[0] != 0
            wholes += plane == 2 and len(tissues) > 1
    assert wholes > 5


def test_a_walled_organ_is_a_ring_around_its_lumen():
    circle = Outline((0.0, 0.0), (0.5, 0.5), 0.0, 2.0, np.zeros((1, 2)))
    anatomy = replace(
        sample_anatomy(np.random.default_rng(0)),
        body=None, skin=(), tissues=np.zeros((1, 3, 3), np.float32), warp=np.zeros((2, 3, 3), np.float32),
        structures=(Structure("walled", (circle,), (0.4,)),),
    )  # fmt: skip
    tissue = draw(anatomy, 100).planes[0]
    assert len({tissue[50, 50], tissue[50, 29], tissue[2, 2]}) == 3
    assert (tissue == tissue[50, 50]).sum() == pytest.approx(
        np.pi * 15**2, rel=0.05
    )  # lumen: radius 0.3 of half a side


def test_a_twin_is_the_mirror_image_with_the_same_tissue():
    outline = Outline((0.1, -0.5), (0.2, 0.3), 0.4, 2.5, np.array([[0.1, 1.0]]))
    anatomy = replace(
        sample_anatomy(np.random.default_rng(0)),
        body=None, skin=(), tissues=np.zeros((1, 3, 3), np.float32), warp=np.zeros((2, 3, 3), np.float32),
        structures=(Structure("solid", (outline,), twin=True),),
    )  # fmt: skip
    tissue = draw(anatomy, SIZE).planes[0]
    assert len(np.unique(tissue)) == 2
    assert np.array_equal(tissue, tissue[:, ::-1])


def test_a_rendering_repeats_with_its_look_and_changes_with_another():
    tissue = torch.from_numpy(np.stack([drawing.planes[0] for drawing in maps(2)]))
    look, other = (sample_look(2, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(render(tissue, look), render(tissue, look))
    assert not torch.allclose(render(tissue, look), render(tissue, other))


def test_without_disturbances_each_tissue_has_one_value_and_their_order_is_that_of_the_means():
    tissue = torch.from_numpy(maps(1)[0].planes[:1])
    look = plain_look()
    image = render(tissue, look)[0, 0]
    values = {int(t): image[tissue[0] == t] for t in tissue.unique()}
    assert all(value.max() - value.min() < 1e-4 for value in values.values())
    inner = sorted(values, key=lambda t: float(look.means[0, t]))
    brightness = [float(values[t][0]) for t in inner]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("textures", 0.2), ("shading", 0.3), ("blur", 1.5), ("resolution", 0.3), ("bias", 0.5), ("coil", 1.0),
        ("gamma", 1.8), ("inverted", True), ("noise", 0.2),
    ],
)  # fmt: skip
def test_every_part_of_a_look_shows(name: str, value: float):
    tissue = torch.from_numpy(maps(1)[0].planes[:1])
    look = plain_look()
    changed = torch.full_like(getattr(look, name), value)
    if name in ("shading", "bias"):
        changed[..., :2] *= -1  # a field that is the same everywhere would vanish in the percentiles
    difference = render(tissue, replace(look, **{name: changed})) - render(tissue, look)
    assert difference.abs().mean() > 0.02


def test_rician_noise_is_skewed_where_there_is_no_signal_and_gaussian_noise_is_not():
    tissue = torch.zeros((1, SIZE, SIZE), dtype=torch.uint8)
    tissue[:, SIZE // 2 :] = 1
    look = plain_look()
    look.means[:, :2] = torch.tensor([0.0, 1.0])
    noisy = replace(look, noise=torch.tensor([0.3]))
    gaussian, rician = render(tissue, noisy), render(tissue, replace(noisy, rician=torch.tensor([True])))
    low = slice(0, SIZE // 2)
    assert _skewness(rician[0, 0, low]) > 0.4 > abs(_skewness(gaussian[0, 0, low]))


def _skewness(x: torch.Tensor) -> float:
    centred = x - x.mean()
    return float((centred**3).mean() / (centred**2).mean() ** 1.5)


def test_made_images_have_the_range_that_real_slices_get():
    tissue = torch.from_numpy(np.stack([drawing.planes[0] for drawing in maps(4)]))
    made = render(tissue, sample_look(4, torch.Generator().manual_seed(2)))
    model = replace(MODELS["vit_tiny"], image_size=SIZE)
    real = to_canvas(torch.rand(1, SIZE, SIZE) + 0.1, model, [0])
    for channel in range(3):
        assert float(made[:, channel].min()) == pytest.approx(float(real[channel].min()), abs=1e-4)
        assert float(made[:, channel].max()) == pytest.approx(float(real[channel].max()), abs=1e-4)


def test_a_look_moves_whole_to_a_device():
    look = sample_look(2, torch.Generator().manual_seed(0)).to("meta")
    assert all(getattr(look, f.name).device.type == "meta" for f in fields(look) if f.name != "seed")
