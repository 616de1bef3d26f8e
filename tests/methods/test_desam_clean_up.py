"""Clean-up of masks with several classes, each cleaned by itself."""

from __future__ import annotations

import torch

from nnunet_dgplugins.methods.desam.grid import finished
from nnunet_dgplugins.methods.desam.selection import SelectionRule


def test_a_cavity_inside_a_ring_stays_with_its_own_class() -> None:
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    distance = torch.hypot(y, x)
    cavity = torch.where(distance < 4, 8.0, -8.0)  # smaller than the rule's holes
    ring = torch.where((distance >= 4) & (distance < 12), 9.0, -9.0)
    cleaned = [finished(logits, SelectionRule())[0] for logits in (ring, cavity)]
    assert (cleaned[0] > 0)[distance < 4].all(), "the hole is filled where the class stands alone"
    label = torch.stack([torch.zeros_like(ring), *cleaned]).argmax(0)
    assert (label[distance < 4] == 2).all()
    assert (label[(distance >= 4) & (distance < 12)] == 1).all()
