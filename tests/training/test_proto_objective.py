"""ProtoSeg's clustering, its two prototype losses and its moving prototypes, against closed forms."""

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F

from penumbra.models.card import IGNORE, WindowSpec
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.models.proto_seg.net import ProtoNetwork
from penumbra.models.proto_seg.objective import (
    ProtoObjective,
    assign,
    build_objective,
    move_prototypes,
    prototype_head,
    prototype_losses,
    sinkhorn,
)
from penumbra.training.data import find_data
from penumbra.training.loop import Training, build_network
from penumbra.training.recipe import Recipe
from tests.training import tiny

CONFIG: dict[str, Any] = {
    "num_prototypes": 4,
    "normalise": "channel",
    "hrnet": {"width": 4, "stem": 8, "bottlenecks": 1, "modules": [1, 1, 1], "blocks": 1},
}
OPTIONS: dict[str, Any] = {"momentum": 0.9, "pseudo": 1.0, "confidence": 0.5, "start": 0.0, "full": 0.1}


def _recipe(**config: Any) -> Recipe:
    return Recipe(
        name="proto_seg-shapes",
        method="proto_seg",
        config=CONFIG | config,
        data="shapes",
        checkpoint="unused.safetensors",
        window=WindowSpec(48, 64),
        crop=(48, 64),
        steps=8,
        scale=(0.9, 1.1),
        average_decay=0.9,
        precision="32-true",
        objective=OPTIONS,
    )


def _objective(**options: float) -> ProtoObjective:
    network = build_network(_recipe(), 3)
    assert isinstance(network, ProtoNetwork)
    average = copy.deepcopy(network).requires_grad_(False).eval()
    return build_objective(network, average, options).train()


def _cosines(num: int, num_prototypes: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(num, num_prototypes, generator=torch.Generator().manual_seed(seed)) - 1


def _units(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.mark.parametrize("kappa", [0.001, 0.05, 1.0])
def test_every_pixel_hands_out_one(kappa: float) -> None:
    share_NM = sinkhorn(_cosines(37, 5), kappa=kappa, iterations=3)
    assert torch.allclose(share_NM.sum(1), torch.ones(37), atol=1e-5) and (share_NM >= 0).all()


def test_with_many_iterations_every_prototype_gets_an_equal_part() -> None:
    share_NM = sinkhorn(_cosines(40, 5), kappa=0.5, iterations=200)
    assert torch.allclose(share_NM.sum(0), torch.full((5,), 8.0), atol=1e-3)
    assert torch.allclose(share_NM.sum(1), torch.ones(40), atol=1e-5)


def test_the_clustering_only_scales_the_kernels_rows_and_columns() -> None:
    cosine_NM = _cosines(6, 3)
    log_scaling_NM = sinkhorn(cosine_NM, kappa=0.5, iterations=3).log() - cosine_NM / 0.5
    rank_one_NM = log_scaling_NM[:, :1] + log_scaling_NM[:1] - log_scaling_NM[:1, :1]
    assert torch.allclose(log_scaling_NM, rank_one_NM, atol=1e-5)


def test_clusters_come_out_equal_though_one_prototype_is_nearest_to_all_pixels() -> None:
    place_N = torch.arange(30) % 3
    cosine_NM = 0.2 * F.one_hot(place_N, 3) + torch.tensor([0.5, 0.0, -0.1])
    assert (cosine_NM.argmax(1) == 0).all()
    share_NM = sinkhorn(cosine_NM, kappa=0.05, iterations=20)
    assert torch.equal(share_NM.argmax(1), place_N)


def test_pixels_are_assigned_within_their_own_class() -> None:
    cosine_PKM = _cosines(50, 12).view(50, 3, 4)
    label_P = torch.arange(50) % 2  # nothing of class 2
    place_P = assign(cosine_PKM, label_P, kappa=0.05, iterations=3)
    assert torch.equal(place_P // 4, label_P)
    alone_P = sinkhorn(cosine_PKM[label_P == 1, 1], kappa=0.05, iterations=3).argmax(1)
    assert torch.equal(place_P[label_P == 1], 4 + alone_P)


def test_contrast_and_distance_of_hand_made_cosines() -> None:
    cosine_PQ = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]])
    contrast, distance = prototype_losses(cosine_PQ, torch.tensor([0, 2]), temperature=0.5)
    first = math.log(math.exp(2) + 1 + math.exp(-2)) - 2
    second = math.log(2 * math.exp(1) + 1)
    assert contrast.item() == pytest.approx((first + second) / 2)
    assert distance.item() == pytest.approx((0 + 1) / 2)


def test_without_a_labelled_pixel_both_losses_are_zero() -> None:
    losses = prototype_losses(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), temperature=1.0)
    assert [loss.item() for loss in losses] == [0, 0]


def test_a_prototype_moves_towards_its_pixels_direction_and_keeps_unit_length() -> None:
    prototypes_KMD, e_PD = _units(2, 2, 8), _units(3, 8)
    before_KMD = prototypes_KMD.clone()
    move_prototypes(prototypes_KMD, e_PD, torch.tensor([3, 3, 0]), momentum=0.75)
    pixels = e_PD[0] + e_PD[1]
    moved = 0.75 * before_KMD[1, 1] + 0.25 * pixels / pixels.norm()
    assert torch.allclose(prototypes_KMD[1, 1], moved / moved.norm(), atol=1e-6)
    assert torch.allclose(prototypes_KMD.norm(dim=2), torch.ones(2, 2), atol=1e-6)
    assert torch.equal(prototypes_KMD[0, 1], before_KMD[0, 1]) and torch.equal(prototypes_KMD[1, 0], before_KMD[1, 0])
    assert not torch.equal(prototypes_KMD[0, 0], before_KMD[0, 0])


def _move_in_a_group(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
    prototypes_KMD = _units(2, 2, 8)
    pixels, place_P = _units(4, 8).chunk(2), torch.tensor([[0, 3], [3, 1]])
    move_prototypes(prototypes_KMD, pixels[rank], place_P[rank], momentum=0.75)
    torch.save(prototypes_KMD, folder / f"{rank}.pt")
    distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo may abort or hold a process whose interpreter has ended


@pytest.mark.slow
def test_two_processes_move_their_prototypes_as_one_with_the_pixels_of_both(tmp_path: Path) -> None:
    multiprocessing.spawn(_move_in_a_group, (tmp_path,), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    alone_KMD = _units(2, 2, 8)
    move_prototypes(alone_KMD, _units(4, 8), torch.tensor([0, 3, 3, 1]), momentum=0.75)
    for rank in range(2):
        assert torch.allclose(torch.load(tmp_path / f"{rank}.pt"), alone_KMD, atol=1e-6)


def test_prototypes_move_but_no_gradient_nor_decay_moves_them() -> None:
    objective = _objective(momentum=1.0)
    prototypes_KMD = prototype_head(objective.network).prototypes_KMD
    before_KMD = prototypes_KMD.clone()
    optimizer = torch.optim.AdamW(objective.network.parameters(), lr=0.1, weight_decay=0.5)
    objective(tiny.batch(), 0.5, torch.Generator())["total"].backward()
    optimizer.step()
    others = [p for p in objective.network.parameters() if p is not prototypes_KMD]
    assert prototypes_KMD.grad is None and all(p.grad is not None for p in others)
    assert torch.allclose(prototypes_KMD, before_KMD, atol=1e-6)
    objective.options = build_objective(objective.network, objective.average, {"momentum": 0.5}).options
    objective(tiny.batch(), 0.5, torch.Generator())
    assert not torch.allclose(prototypes_KMD, before_KMD, atol=1e-3)


@pytest.mark.parametrize(("label", "moves"), [(1, True), (2, False), (IGNORE, False)])
def test_only_correctly_classified_pixels_move_prototypes(label: int, moves: bool) -> None:
    objective = _objective(momentum=0.5)
    prototypes_KMD = prototype_head(objective.network).prototypes_KMD
    before_KMD = prototypes_KMD.clone()
    e_BDhw = torch.zeros(1, prototypes_KMD.shape[2], 2, 2)
    e_BDhw[:, 0] = 1
    logits_BKhw = torch.tensor([0.0, 1.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2)
    cosine_BKMhw = prototype_head(objective.network).compare(e_BDhw)
    objective._cluster(e_BDhw, cosine_BKMhw, logits_BKhw, torch.full((1, 8, 8), label))
    moved_K = (prototypes_KMD - before_KMD).abs().amax((1, 2)) > 1e-3
    assert moved_K.tolist() == [False, moves, False]


def test_the_supervised_method_looks_at_no_unlabelled_picture_and_ours_does() -> None:
    batch = tiny.batch()
    other = batch._replace(weak_B3hw=batch.weak_B3hw + 1, strong_B3hw=batch.strong_B3hw - 1)
    first, again = (_objective()(views, 0.9, torch.Generator().manual_seed(0)) for views in (batch, other))
    assert "pseudo" not in first and first["total"].item() == again["total"].item()
    generator = torch.Generator()
    losses = _objective(pseudo=1.0, confidence=0.0)(batch, 0.9, generator)
    assert losses["kept"].item() == 1 and losses["pseudo"].item() > 0


def test_an_unsure_teacher_adds_nothing_to_the_loss() -> None:
    losses = _objective(pseudo=1.0, confidence=1.1)(tiny.batch(), 0.9, torch.Generator())
    assert losses["kept"].item() == losses["pseudo"].item() == 0


def test_pseudo_labels_are_the_averages_and_are_mixed_as_the_pictures_are() -> None:
    objective, batch = _objective(pseudo=1.0, confidence=0.0), tiny.batch()
    plain_B3hw, plain_Bhw = objective._mixed(batch._replace(mix_B1hw=torch.zeros_like(batch.mix_B1hw)))
    swapped_B3hw, swapped_Bhw = objective._mixed(batch._replace(mix_B1hw=torch.ones_like(batch.mix_B1hw)))
    assert torch.equal(plain_B3hw.roll(1, 0), swapped_B3hw) and torch.equal(plain_Bhw.roll(1, 0), swapped_Bhw)
    logits_BKhw = objective.average.encode(batch.weak_B3hw)[0]
    logits_BKhw = F.interpolate(logits_BKhw, batch.mix_B1hw.shape[-2:], mode="bilinear", align_corners=True)
    assert torch.equal(plain_Bhw, logits_BKhw.argmax(1))
    beyond = batch._replace(inside_Bhw=torch.zeros_like(batch.inside_Bhw))
    assert (objective._mixed(beyond)[1] == IGNORE).all()


def test_dropout_takes_its_masks_from_the_generator_given() -> None:
    totals = [
        _objective()(tiny.batch(), 0.5, torch.Generator().manual_seed(seed))["total"].item() for seed in (0, 0, 1)
    ]
    assert totals[0] == totals[1] != totals[2]


def test_cosines_are_float32_under_autocast() -> None:
    objective = _objective()
    with torch.autocast("cpu", torch.bfloat16):
        e_BDhw, cosine_BKMhw = objective._compare(tiny.batch().image_B3hw, torch.Generator())
    exact = torch.einsum("bdhw,kmd->bkmhw", e_BDhw, prototype_head(objective.network).prototypes_KMD)
    assert torch.allclose(cosine_BKMhw, exact, atol=1e-5)


def test_a_head_without_prototypes_and_an_unknown_option_are_named() -> None:
    network: Any = build_network(_recipe(head="parametric"), 3)
    with pytest.raises(BadOption, match="head is 'parametric'"):
        build_objective(network, network, {})
    network = build_network(_recipe(), 3)
    with pytest.raises(BadArtifact, match=r"recipe.objective has an unknown field 'mu'"):
        build_objective(network, network, {"mu": 1})


def _training(folder: Path) -> Training:
    data = find_data("shapes")
    return Training(_recipe(), data.load(folder, "train"), len(data.classes))


def test_a_killed_run_goes_on_with_identical_numbers(tmp_path: Path) -> None:
    whole, killed, resumed = (_training(tmp_path) for _ in range(3))
    expected = [whole.advance(step / 4) for step in range(4)]
    first = [killed.advance(step / 4) for step in range(2)]
    killed.save(tmp_path / "state.ckpt")
    resumed.resume(tmp_path / "state.ckpt")
    assert first + [resumed.advance(step / 4) for step in (2, 3)] == expected
    ours, theirs = whole.objective.state_dict(), resumed.objective.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_few_steps_lower_the_loss(tmp_path: Path) -> None:
    training = _training(tmp_path)
    losses = [training.advance(0.2)["supervised"] for _ in range(40)]
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
