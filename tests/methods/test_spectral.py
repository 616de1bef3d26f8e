"""Fourier amplitude mixing beyond the stored vectors: identities, slices, tiny windows, precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_dgplugins.methods import spectral
from nnunet_dgplugins.methods.spectral import full_mix, half_width, window_swap


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def published_swap(own: np.ndarray, other: np.ndarray, half: int, strength: float) -> np.ndarray:
    """The order of work of the released code on (..., H, W), in float64."""
    spectrum, reference = np.fft.fft2(own.astype(float)), np.fft.fft2(other.astype(float))
    amplitude, phase = np.fft.fftshift(np.abs(spectrum), (-2, -1)), np.angle(spectrum)
    partner = np.fft.fftshift(np.abs(reference), (-2, -1))
    rows, columns = (slice(side // 2 - half, side // 2 + half + 1) for side in own.shape[-2:])
    window = (..., rows, columns)
    amplitude[window] = (1 - strength) * amplitude[window] + strength * partner[window]
    return np.fft.ifft2(np.fft.ifftshift(amplitude, (-2, -1)) * np.exp(1j * phase)).real


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (9, 14), (14, 9), (2, 3), (1, 6), (31, 30)])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.34, 0.5])
def test_the_window_swap_equals_the_published_order_of_work_at_every_parity(size, fraction):
    own, other = images(2, 2, *size, dtype=torch.float64), images(2, 2, *size, seed=1, dtype=torch.float64)
    expected = published_swap(own.numpy(), other.numpy(), half_width(*size, fraction), 0.7)
    np.testing.assert_allclose(window_swap(own, other, fraction, 0.7).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [(12, 12), (13, 10), (10, 13)])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5])
def test_the_fft_of_other_devices_gives_what_the_products_of_the_cpu_give(size, fraction):
    own, other = images(2, 1, *size, dtype=torch.float64), images(2, 1, *size, seed=1, dtype=torch.float64)
    half = half_width(*size, fraction)
    found = spectral._mix_by_fft(own, other, 0.4, spectral._window(size, half, half, own.device))
    torch.testing.assert_close(found, window_swap(own, other, fraction, 0.4), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mix", [window_swap, full_mix])
def test_strength_zero_changes_nothing(mix):
    own, other = images(2, 1, 20, 22), images(2, 1, 20, 22, seed=1)
    torch.testing.assert_close(mix(own, other, strength=0.0), own, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mix", [window_swap, full_mix])
def test_an_image_that_is_its_own_partner_stays_as_it_is(mix):
    own = images(2, 1, 20, 22)
    torch.testing.assert_close(mix(own, own, strength=1.0), own, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mix", [window_swap, full_mix])
def test_each_sample_has_its_own_strength(mix):
    own, other = images(3, 2, 16, 18), images(3, 2, 16, 18, seed=1)
    strength = torch.tensor([0.0, 0.5, 1.0])
    found = mix(own, other, strength=strength)
    for i, value in enumerate(strength.tolist()):
        expected = mix(own[i : i + 1], other[i : i + 1], strength=value)
        torch.testing.assert_close(found[i : i + 1], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mix", [window_swap, full_mix])
def test_a_volume_is_mixed_slice_by_slice(mix):
    own, other = images(2, 3, 4, 16, 18), images(2, 3, 4, 16, 18, seed=1)
    strength = torch.tensor([0.3, 1.0])
    found = mix(own, other, strength=strength)
    for z in range(4):
        expected = mix(own[:, :, z], other[:, :, z], strength=strength)
        torch.testing.assert_close(found[:, :, z], expected, atol=1e-6, rtol=0)


def test_a_tiny_image_exchanges_its_mean_alone_unless_a_minimum_is_set():
    own, other = images(1, 1, 32, 32), images(1, 1, 32, 32, seed=1) / 3
    found = window_swap(own, other)
    torch.testing.assert_close(found, own - own.mean() + other.mean(), atol=1e-6, rtol=0)
    wider = window_swap(own, other, minimum=1)
    expected = published_swap(own.numpy(), other.numpy(), 1, 1.0)
    np.testing.assert_allclose(wider.numpy(), expected, atol=1e-6)


def test_a_minimum_beyond_the_image_takes_the_whole_spectrum():
    own, other = images(1, 1, 6, 9, dtype=torch.float64), images(1, 1, 6, 9, seed=1, dtype=torch.float64)
    torch.testing.assert_close(window_swap(own, other, minimum=50), full_mix(own, other, 1.0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mix", [window_swap, full_mix])
@pytest.mark.parametrize("constants", [(0.0, 0.0), (0.0, 2.0), (2.0, 0.0), (-1.0, 3.0)])
def test_constant_images_stay_finite_and_take_their_partners_size(mix, constants):
    own, other = (torch.full((1, 1, 17, 20), value) for value in constants)
    found = mix(own, other, strength=1.0)
    sign = -1 if constants[0] < 0 else 1  # the phase stays the image's own
    torch.testing.assert_close(found, sign * other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mix", [window_swap, full_mix])
def test_autocast_does_not_lower_the_precision(mix):
    own, other = images(2, 1, 40, 44), images(2, 1, 40, 44, seed=1)
    expected = mix(own, other, strength=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mix(own, other, strength=1.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert mix(own.half(), other.half(), strength=1.0).dtype == torch.float32


@pytest.mark.parametrize("mix", [window_swap, full_mix])
def test_the_inputs_are_left_as_they_were_and_no_gradient_is_kept(mix):
    own, other = images(2, 1, 12, 12), images(2, 1, 12, 12, seed=1)
    before = own.clone(), other.clone()
    found = mix(own.requires_grad_(), other, strength=1.0)
    assert not found.requires_grad
    assert torch.equal(own, before[0])
    assert torch.equal(other, before[1])


def test_a_slice_of_a_larger_tensor_is_read_rightly():
    whole, other = images(2, 1, 24, 24), images(2, 1, 12, 13, seed=1)
    part = whole[:, :, 3:15, 5:18]
    torch.testing.assert_close(window_swap(part, other, 0.2), window_swap(part.contiguous(), other, 0.2))
    layout = part.to(memory_format=torch.channels_last)
    torch.testing.assert_close(window_swap(layout, other, 0.2), window_swap(part.contiguous(), other, 0.2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: window_swap(images(1, 1, 4, 4), images(2, 1, 4, 4)), "both"),
        (lambda: full_mix(images(4, 4), images(4, 4), 1.0), "both"),
        (lambda: window_swap(images(1, 1, 4, 4), images(1, 1, 4, 4), fraction=0.6), "between 0 and 0.5"),
        (lambda: full_mix(images(1, 1, 4, 4), images(1, 1, 4, 4), 1.0, ratio=2), "between 0 and 1"),
        (lambda: full_mix(images(2, 1, 4, 4), images(2, 1, 4, 4), torch.ones(3)), "one per sample"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mix", [window_swap, full_mix])
@pytest.mark.parametrize("shape", [(3, 2, 300, 300), (2, 1, 5, 65, 90)])
def test_cuda_mixes_as_the_cpu_does_also_under_autocast(mix, shape):
    own, other = images(*shape), images(*shape, seed=1)
    strength = torch.linspace(0.2, 1, shape[0])
    with torch.autocast("cuda", dtype=torch.float16):
        found = mix(own.cuda(), other.cuda(), strength=strength)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), mix(own, other, strength=strength), atol=5e-6, rtol=0)
