"""nnU-Net's augmentation gives the same image for the same seed, whatever the clock says."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise import gaussian_blur
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dgplugins.data.augmentation import without_timing


def images(transforms: Any, calls: int = 24) -> torch.Tensor:
    """Return augmented images of one seed; a tenth of them is blurred."""
    np.random.seed(0)
    torch.manual_seed(0)
    image, label = torch.rand(1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int16)
    return torch.stack([transforms(image=image.clone(), segmentation=label.clone())["image"] for _ in range(calls)])


def made() -> Any:
    return nnUNetTrainer.get_training_transforms((32, 32), (-0.1, 0.1), None, (0, 1), False)


def let_one_win(monkeypatch: pytest.MonkeyPatch, fft: bool) -> None:
    """Make nnU-Net's comparison (nine times convolution, nine times FFT) come out as wanted."""
    ticks = count()

    def clock() -> float:
        tick = next(ticks)
        round_of_fft = (tick // 18) % 2 == 1
        return 1000.0 * (tick // 2) + (tick % 2) * (1.0 if round_of_fft == fft else 2.0)

    monkeypatch.setattr(gaussian_blur, "time", clock)


@pytest.mark.parametrize(("prepare", "equal"), [(without_timing, True), (lambda found: found, False)])
def test_the_same_seed_gives_the_same_images_only_without_timing(
    monkeypatch: pytest.MonkeyPatch, prepare: Any, equal: bool
):
    let_one_win(monkeypatch, fft=True)
    one = images(prepare(made()))
    let_one_win(monkeypatch, fft=False)
    other = images(prepare(made()))
    assert torch.equal(one, other) == equal
    assert torch.allclose(one, other, atol=1e-4)
