"""Equivariant CAMs: what the released arrays do not show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_dgplugins.methods import cam
from nnunet_dgplugins.methods.equivariant import losses, transforms
from nnunet_dgplugins.methods.equivariant.maps import KINDS, Found, foreground_maps, fuse, fuse_positive
from nnunet_dgplugins.methods.equivariant.network import UNetCAM, grouped_pass, separate_pass
from nnunet_dgplugins.methods.equivariant.step import branches, one_graph_at_a_time

TAGS = torch.tensor([1, 0, 1])
SHAPE = (3, 3, 24, 24)  # N, M, H, W


def networks(count: int = 3) -> list[UNetCAM]:
    torch.manual_seed(0)
    return [UNetCAM(width_divisor=16).double().train() for _ in range(count)]


def images(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def drawn(family: str, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> transforms.Transform:
    return transforms.sample(shape[0], *shape[2:], torch.Generator().manual_seed(seed), family)


def gradients(found: list[UNetCAM]) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for one in found for parameter in one.parameters()])


def running(found: list[UNetCAM]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for one in found for value in one.buffers()])


def loss_of(found: list[UNetCAM], run) -> torch.Tensor:
    plain, transformed = branches(found, images(), drawn("rotation"), run, torch.contiguous_format)
    return losses.terms(plain, transformed, TAGS).total()


def test_published_widths_have_the_published_numbers_of_parameters():
    counts = [sum(p.numel() for p in UNetCAM(divisor).parameters()) for divisor in (1, 4)]
    assert counts == [3_398_144, 213_632]


def test_the_grouped_pass_has_the_loops_results_gradients_and_running_statistics():
    loop, grouped = networks(), networks()
    first, second = loss_of(loop, separate_pass), loss_of(grouped, grouped_pass)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=0)
    first.sum().backward()
    second.sum().backward()
    torch.testing.assert_close(gradients(loop), gradients(grouped), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(running(loop), running(grouped), rtol=1e-10, atol=0)


def test_one_graph_at_a_time_gives_the_same_gradients_and_running_statistics():
    together, apart = networks(), networks()
    total = loss_of(together, separate_pass)
    total.sum().backward()
    values = []
    each = one_graph_at_a_time(
        apart, images(), drawn("rotation"), separate_pass, torch.contiguous_format, TAGS, losses.TEMPERATURE, "mean"
    )
    for i, found in enumerate(each):
        found.total()[i].backward()
        values.append(found.total()[i].detach())
    torch.testing.assert_close(torch.stack(values), total.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(together), gradients(apart), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(running(together), running(apart), rtol=1e-10, atol=0)


def test_sides_that_the_poolings_cannot_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        separate_pass(networks(1), images((1, 1, 36, 44)))


@pytest.mark.parametrize("family", ["flipping", "rotation"])
def test_maps_of_single_pixels_move_with_the_image_exactly(family):
    torch.manual_seed(0)
    pixelwise = nn.Conv2d(2, 2, 1).double()
    move, shown = drawn(family, (3, 2, 24, 24)), images((3, 2, 24, 24))
    moved_map, map_of_moved = move(cam.normalise(pixelwise(shown))), cam.normalise(pixelwise(move(shown)))
    torch.testing.assert_close(moved_map, map_of_moved, rtol=0, atol=1e-12)
    plain = losses.Branch(torch.zeros(2, 3, 2), moved_map.transpose(0, 1))
    assert float(losses.equivariance(plain.maps, map_of_moved.transpose(0, 1), TAGS).abs().max()) < 1e-20


def test_slices_without_the_target_leave_the_maps_alone():
    found = networks()
    plain, transformed = branches(found, images(), drawn("translation"), separate_pass, torch.contiguous_format)
    result = losses.terms(plain, transformed, torch.zeros(3, dtype=torch.long))
    assert not result.er.any()
    assert not result.cmer.any()
    result.total().sum().backward()
    assert torch.isfinite(gradients(found)).all()


def test_a_black_slice_and_a_black_modality_stay_finite():
    found, shown = networks(), images()
    shown[0] = 0
    shown[:, 1] = 0.3
    plain, transformed = branches(found, shown, drawn("scaling"), separate_pass, torch.contiguous_format)
    losses.terms(plain, transformed, TAGS, cmer_reduction="sum").total().sum().backward()
    assert torch.isfinite(gradients(found)).all()


def test_a_single_modality_has_no_partner_and_its_own_two_terms():
    found = networks(1)
    plain, transformed = branches(found, images((3, 1, 24, 24)), drawn("flipping"), separate_pass,
                                  torch.contiguous_format)  # fmt: skip
    result = losses.terms(plain, transformed, TAGS)
    assert not result.kd.any()
    assert not result.cmer.any()
    assert float(result.ce) > 0
    assert float(result.er) > 0


def test_the_sum_over_pixels_is_two_minus_two_cosines():
    first, second = (images((3, 3, 24, 24))[i] for i in (0, 1))
    found = losses.distance(first, second, torch.ones(3), "sum")
    cosine = torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1))
    torch.testing.assert_close(found, (2 - 2 * cosine).mean())
    torch.testing.assert_close(losses.distance(first, second, torch.ones(3)), found / (24 * 24))
    with pytest.raises(ValueError, match="one of"):
        losses.distance(first, second, torch.ones(3), "median")


def test_terms_are_computed_in_float32_whatever_came_in():
    plain, transformed = (losses.Branch(torch.randn(2, 3, 2).half(), torch.rand(2, 3, 8, 8).half()) for _ in range(2))
    result = losses.terms(plain, transformed, TAGS)
    assert {term.dtype for term in (result.ce, result.er, result.kd, result.cmer)} == {torch.float32}
    assert torch.isfinite(result.total()).all()


def test_every_family_is_drawn_and_one_seed_draws_one_transform():
    kinds = [drawn("all", seed=seed) for seed in range(80)]
    assert {kind.family for kind in kinds} == set(transforms.FAMILIES)
    assert {kind.flip_axis for kind in kinds if kind.family == "flipping"} == {-1, -2}
    turns = {int(x) for kind in kinds if kind.quarter_turns is not None for x in kind.quarter_turns}
    assert turns == {1, 2, 3}
    shown = images()
    assert torch.equal(drawn("all", seed=3)(shown), drawn("all", seed=3)(shown))
    with pytest.raises(ValueError, match="one of"):
        drawn("shearing")


def test_shifts_reach_three_tenths_and_content_moves_right_and_down():
    generator = torch.Generator().manual_seed(0)
    shift = transforms.sample(2000, 50, 100, generator, "translation").shift
    assert shift is not None
    assert 29 < float(shift[:, 0].max()) <= 30
    assert -15 <= float(shift[:, 1].min()) < -14.5
    shown = torch.zeros(1, 1, 8, 8)
    shown[0, 0, 2, 3] = 1
    assert transforms.translate(shown, torch.tensor([[2.0, 1.0]])).nonzero().tolist() == [[0, 0, 3, 5]]


def test_scaled_sizes_are_the_published_ones_and_keep_proportions():
    assert transforms.scaled_sizes(240, 240) == [(side, side) for side in range(192, 289, 8)]
    assert all(size[0] % 8 == size[1] % 8 == 0 for size in transforms.scaled_sizes(160, 128))
    assert transforms.scaled_sizes(160, 128)[-1] == (192, 152)


def test_images_that_are_not_square_turn_upside_down_only():
    turned = drawn("rotation", (20, 1, 16, 24)).quarter_turns
    assert turned is not None
    assert turned.tolist() == [2] * 20


def test_maps_of_several_modalities_are_gated_by_their_own_network_and_fused():
    found = [one.float().eval() for one in networks()]
    shown = images((5, 3, 24, 32)).float()
    for kind in KINDS:
        made = foreground_maps(found, shown, kind)
        assert made.maps.shape == (5, 3, 24, 32)
        assert float(made.maps.max()) <= 1
        for i in range(3):
            (alone,) = foreground_maps([found[i]], shown[:, i : i + 1], kind).maps.unbind(1)
            torch.testing.assert_close(made.maps[:, i], alone)
        gated = made.gated()
        kept = made.present.bool()
        assert torch.equal(gated[kept], made.maps[kept])
        assert not gated[~kept].any()
    torch.testing.assert_close(fuse(gated), gated.mean(1))
    torch.testing.assert_close(fuse(gated, "max"), gated.max(1).values)
    torch.testing.assert_close(fuse(gated, 2), gated[:, 2])
    for wrong in (3, "median"):
        with pytest.raises(ValueError, match="mean, max or the number"):
            fuse(gated, wrong)


def test_grad_cam_from_a_backward_pass_is_the_map_from_the_forward_pass_alone():
    (one,) = (network.eval() for network in networks(1))
    shown = cam.standardise(images((2, 1, 24, 24)))
    features = one.features(shown)
    logits = one.classifier(features).mean((2, 3))
    (slopes,) = torch.autograd.grad(logits[:, 1].sum(), features)
    for kind, raw in (
        ("grad_cam", cam.grad_cam(features, slopes)),
        ("grad_cam_plus_plus", cam.grad_cam_plus_plus(features, slopes, logits[:, 1])),
    ):
        found = foreground_maps([one], images((2, 1, 24, 24)), kind).maps[:, 0]
        torch.testing.assert_close(found, cam.normalise(raw), rtol=0, atol=1e-10)


def test_in_a_positive_slice_a_network_that_calls_it_negative_counts_only_where_all_do():
    maps = torch.rand((3, 2, 4, 4), generator=torch.Generator().manual_seed(2))
    present = torch.tensor([[0, 1], [1, 1], [0, 0]])  # one silent, none, all
    logits = torch.stack([1 - present, present], -1).transpose(0, 1).float()
    found = Found(logits, maps)
    assert torch.equal(found.present, present)
    for fusion, both in (("mean", maps.mean(1)), ("max", maps.amax(1))):
        fused = fuse_positive(found, fusion)
        torch.testing.assert_close(fused, torch.stack([maps[0, 1], both[1], both[2]]))
        assert not torch.equal(fused[0], both[0])
    assert torch.equal(fuse_positive(found, 0), maps[:, 0])  # asked for by name, silent or not
