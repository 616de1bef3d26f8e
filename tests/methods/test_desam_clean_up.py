"""Clean-up of masks with several classes: a ring's cavity belongs to the class inside it."""

from __future__ import annotations

import torch

from nnunet_dgplugins.methods.desam.grid import finished, select_lazily
from nnunet_dgplugins.methods.desam.selection import SelectionRule

Y, X = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
DISTANCE = torch.hypot(Y, X)
CAVITY = torch.where(DISTANCE < 4, 8.0, -8.0)  # smaller than the rule's holes
RING = torch.where((DISTANCE >= 4) & (DISTANCE < 22), 9.0, -9.0)  # larger than the rule's islands
BLOB = torch.where(DISTANCE < 20, 5.0, -5.0)


def test_a_cavity_inside_a_ring_stays_with_its_own_class():
    decoded = torch.stack([RING, CAVITY])
    cleaned = [finished(decoded, k, SelectionRule())[0] for k in range(2)]
    label = torch.stack([torch.zeros_like(RING), *cleaned]).argmax(0)
    assert (label[DISTANCE < 4] == 2).all()
    assert (label[(DISTANCE >= 4) & (DISTANCE < 22)] == 1).all()
    assert not finished(decoded, 0, SelectionRule())[1], "a true ring needs no clean-up"
    alone, changed = finished(RING[None], 0, SelectionRule())
    assert (alone > 0)[DISTANCE < 4].all(), "the hole is filled where the class stands alone, as published"
    assert changed


def test_a_true_ring_of_high_score_beats_a_clean_blob_of_low_score():
    decodes = torch.stack([torch.stack([RING, CAVITY]), torch.stack([BLOB, -BLOB])])
    iou = torch.tensor([[0.95, 0.9], [0.55, 0.1]])
    found, points = select_lazily(iou, lambda wanted: decodes[list(wanted)], (64, 64), SelectionRule())
    assert points == (0, 0)
    assert torch.equal(found[0] > 0, RING > 0)
