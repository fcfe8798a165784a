"""Losses against closed forms, and gradients that flow where the papers let them."""

import copy
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from penumbra.models.blocks.losses import at_grid
from penumbra.models.card import IGNORE
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.models.np_semiseg.net import NpNetwork
from penumbra.models.np_semiseg.objective import (
    CONTEXT,
    NpObjective,
    NpOptions,
    gaussian_kl,
    multi_sample_loss,
    push,
)
from penumbra.training.loop import build_network
from penumbra.training.objective import build_objective, update_average
from tests.training import tiny


def _np(**options: float) -> NpObjective:
    network = build_network(tiny.recipe("np_semiseg", tiny.Path(), steps=1), 3)
    assert isinstance(network, NpNetwork)
    settings = NpOptions(start=0.0, full=0.0, **options)  # type: ignore[arg-type]
    return NpObjective(network, copy.deepcopy(network).requires_grad_(False).eval(), settings).train()


def test_the_multi_sample_loss_is_minus_the_log_mean_of_likelihoods_to_the_power_b() -> None:
    log_prob_SB = torch.tensor([[-0.1, -2.0], [-0.5, -2.0], [-0.3, -2.0]])
    by_hand = -math.log(sum(math.exp(20 * x) for x in (-0.1, -0.5, -0.3)) / 3) / 20
    assert multi_sample_loss(log_prob_SB, 20.0).tolist() == pytest.approx([by_hand, 2.0])


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 50.0])
def test_the_multi_sample_loss_lies_between_the_mean_and_the_best_sample(sharpness: float) -> None:
    log_prob_SB = -torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    loss_B = multi_sample_loss(log_prob_SB, sharpness)
    assert (loss_B <= -log_prob_SB.mean(0) + 1e-4).all()
    assert (loss_B >= -log_prob_SB.max(0).values - 1e-6).all()


def test_the_gaussian_divergence_equals_torchs() -> None:
    mean_q, mean_p, sigma_q, sigma_p = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    reference = kl_divergence(Normal(mean_q, sigma_q), Normal(mean_p, sigma_p)).sum(-1)
    assert torch.allclose(gaussian_kl((mean_q, sigma_q), (mean_p, sigma_p)), reference, rtol=1e-5)
    assert torch.equal(gaussian_kl((mean_q, sigma_q), (mean_q, sigma_q)), torch.zeros(3))


def test_a_full_bank_forgets_its_oldest_rows() -> None:
    bank_QL, count = torch.zeros(4, 1), torch.zeros((), dtype=torch.int64)
    for rows in ([1.0, 2.0, 3.0], [4.0, 5.0]):
        push(bank_QL, count, torch.tensor(rows)[:, None])
    assert bank_QL[:, 0].tolist() == [5.0, 2.0, 3.0, 4.0] and int(count) == 5


def test_class_centres_are_the_means_of_the_pixels_that_the_banks_hold() -> None:
    objective = _np(bank_rows=64)
    query_BLhw = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    label_Bhw = torch.tensor([0, 1, 0, IGNORE]).expand(1, 4, 4)
    objective._remember(query_BLhw, label_Bhw, num_labelled=1, generator=torch.Generator())
    centres_KL = objective.network.head.latent.context_centres
    assert torch.allclose(centres_KL[0], query_BLhw[0][:, label_Bhw[0] == 0].mean(1), atol=1e-6)
    assert torch.allclose(centres_KL[1], query_BLhw[0][:, label_Bhw[0] == 1].mean(1), atol=1e-6)
    assert torch.equal(centres_KL[2], torch.zeros(8))


def test_pseudo_labelled_pixels_enter_the_target_bank_but_not_the_context_bank() -> None:
    objective = _np()
    query_BLhw, label_Bhw = torch.ones(2, 8, 4, 4), torch.stack((torch.zeros(4, 4), torch.ones(4, 4))).long()
    objective._remember(query_BLhw, label_Bhw, num_labelled=1, generator=torch.Generator())
    assert objective.count_2K.tolist()[CONTEXT] == [16, 0, 0]
    assert objective.count_2K.tolist()[1 - CONTEXT] == [16, 16, 0]


def test_the_latents_path_leaves_the_host_alone_and_the_teacher_learns_nothing() -> None:
    objective = _np(confidence=0.0)
    losses = objective(tiny.batch(), 0.5, torch.Generator().manual_seed(0))
    assert {"unlabelled", "kl", "kept"} <= losses.keys() and losses["kept"].item() == 1
    losses["total"].backward()
    assert all(p.grad is not None for p in objective.network.parameters())
    assert all(p.grad is None for p in objective.average.parameters())
    objective.zero_grad()
    objective(tiny.batch(), 0.5, torch.Generator().manual_seed(0))["kl"].backward()
    assert all(p.grad is None or not p.grad.any() for p in objective.network.encoder.parameters())


def test_an_unsure_teacher_adds_nothing_to_the_loss() -> None:
    losses = _np(confidence=1.1)(tiny.batch(), 0.5, torch.Generator().manual_seed(0))
    assert losses["kept"].item() == losses["unlabelled"].item() == 0


def test_labels_are_taken_where_the_corner_aligned_grid_lies() -> None:
    label_Bhw = torch.arange(7)[None, None].expand(1, 3, 7)
    assert at_grid(label_Bhw, 2, 4)[0].tolist() == [[0, 2, 4, 6]] * 2


def test_the_average_moves_towards_the_network_by_one_minus_decay() -> None:
    average, network = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    network.running_mean = torch.tensor([1.0, 2.0])
    update_average(average, network, decay=0.75)
    assert average.running_mean is not None and average.running_mean.tolist() == [0.25, 0.5]


def test_an_unknown_objective_option_is_named() -> None:
    network = build_network(tiny.recipe("cps", tiny.Path(), steps=1), 3)
    with pytest.raises(BadArtifact, match=r"recipe.objective has an unknown field 'lambda'"):
        build_objective("cps", network, network, {"lambda": 1})


def test_a_method_without_objective_says_so() -> None:
    with pytest.raises(BadOption, match="'toy' has no objective"):
        build_objective("toy", torch.nn.Identity(), torch.nn.Identity(), {})  # type: ignore[arg-type]
