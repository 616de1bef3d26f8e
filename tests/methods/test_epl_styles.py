"""Fourier versions of images on any intensity scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_dgplugins.methods.epl.styles import MODES, fourier_version, unit_range
from nnunet_dgplugins.methods.spectral import window_swap


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(shape or (2, 2, 24, 26), generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second.square()


@pytest.mark.parametrize("mode", MODES)
def test_the_result_follows_the_images_scale_and_forgets_the_partners(mode):
    own, other = pair()
    found = fourier_version(own, other, mode, strength=0.6)
    torch.testing.assert_close(fourier_version(5 * own - 2, other, mode, strength=0.6), 5 * found - 2)
    torch.testing.assert_close(fourier_version(own, 5 * other - 2, mode, strength=0.6), found)
    assert (found - own).abs().max() > 1e-3


def test_images_that_fill_zero_to_one_are_mixed_as_published():
    own, other = pair(1, 1, 30, 30)
    for image in (own, other):
        image.view(-1)[:10], image.view(-1)[10:20] = 0.0, 1.0  # both percentiles
    torch.testing.assert_close(fourier_version(own, other, fraction=0.1), window_swap(own, other, 0.1))


def test_the_minimum_reaches_the_window():
    own, other = pair()
    plain, wider = (fourier_version(own, other, minimum=minimum) for minimum in (0, 2))
    assert (plain - wider).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_samples_channels_and_slices_are_mixed_apart(mode):
    own, other = pair(2, 2, 3, 12, 14)
    strength = torch.tensor([0.3, 1.0])
    found = fourier_version(own, other, mode, strength=strength)
    for i in range(2):
        for c in range(2):
            expected = fourier_version(
                own[i : i + 1, c : c + 1], other[i : i + 1, c : c + 1], mode, strength=strength[i].item()
            )
            torch.testing.assert_close(found[i : i + 1, c : c + 1], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [0.0, -1.5])
def test_constant_images_and_partners_stay_finite(mode, constant):
    own = pair(1, 1, 12, 12)[0].float()
    flat = torch.full_like(own, constant)
    for images, partners in ((own, flat), (flat, own), (flat, flat)):
        assert fourier_version(images, partners, mode).isfinite().all()


def test_the_result_is_float32_under_autocast_and_for_half_precision():
    own, other = (x.float() for x in pair())
    expected = fourier_version(own, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fourier_version(own, other), expected)
    assert fourier_version(own.half(), other.half()).dtype == torch.float32


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="window_swap"):
        fourier_version(*pair(), mode="swap")


def test_the_released_scalings_are_those_of_numpy_per_image():
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(3, 1, 40, 50, generator=generator) * torch.tensor([1.0, 40, 900]).view(3, 1, 1, 1) + 7
    low, high = np.percentile(images.flatten(1), (0.5, 99.5), axis=1, method="nearest")
    wanted = np.stack([np.clip((x - a) / (b - a), 0, 1) for x, a, b in zip(images.numpy(), low, high, strict=True)])
    np.testing.assert_allclose(unit_range(images, "percentiles").numpy(), wanted, rtol=0, atol=1e-5)
    divided = unit_range(images, "maximum")
    np.testing.assert_allclose(divided.numpy(), images.numpy() / images.amax((1, 2, 3)).view(3, 1, 1, 1).numpy())
    assert unit_range(images, "none") is images
    with pytest.raises(ValueError, match="one of"):
        unit_range(images, "minimum")


@pytest.mark.parametrize("scaling", ["percentiles", "maximum"])
def test_a_constant_image_stays_finite_under_the_released_scalings(scaling):
    assert torch.isfinite(unit_range(torch.zeros(2, 1, 8, 8), scaling)).all()
