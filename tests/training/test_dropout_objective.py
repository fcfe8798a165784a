"""The MC-dropout baseline: its masks have the declared law, and its loss is the one that it states."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.blocks.layers import draw_masks, draw_noise
from penumbra.models.blocks.losses import at_grid
from penumbra.models.card import Sampling
from penumbra.models.contract import Features
from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.net import NpNetwork
from penumbra.training.loop import build_network
from penumbra.training.objective import build_objective
from tests.training import tiny
from tests.training.kinds import losses_of, objective_of, recipe_of


@pytest.mark.parametrize("keep", [0.5, 0.75])
def test_masks_are_zero_or_one_by_keep_with_mean_one_and_depend_on_the_generator_alone(keep: float) -> None:
    first, second = (draw_masks((4, 50, 200), keep, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.unique().tolist() == pytest.approx([0, 1 / keep])
    assert first.mean().item() == pytest.approx(1, abs=5 * math.sqrt((1 - keep) / keep / first.numel()))
    rows = first.flatten(0, 1)
    assert rows.mean(1).std() > 0 and not torch.equal(rows[0], rows[1])  # pictures have their own


def test_validation_draws_masks_for_a_dropout_network_and_normal_noise_for_a_latent() -> None:
    generator = torch.Generator().manual_seed(0)
    mask_SBL = draw_noise(Sampling(kind="dropout", noise_length=500, keep=0.8), 4, 1, generator)
    assert mask_SBL.shape == (4, 1, 500) and mask_SBL.unique().tolist() == pytest.approx([0, 1.25])
    noise_SBL = draw_noise(Sampling(kind="latent", noise_length=500), 4, 1, generator)
    assert noise_SBL.min() < -2 and noise_SBL.std().item() == pytest.approx(1, abs=0.1)


def test_the_network_sees_one_mask_per_picture_and_the_teacher_several(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of("dropout", samples=3)
    seen: list[Tensor] = []
    decode = NpNetwork.decode_dropped

    def listen(network: NpNetwork, features: Features, mask_SBD: Tensor) -> Tensor:
        seen.append(mask_SBD)
        return decode(network, features, mask_SBD)

    monkeypatch.setattr(NpNetwork, "decode_dropped", listen)
    objective(tiny.batch(), 1.0, torch.Generator().manual_seed(0))
    assert [tuple(mask.shape) for mask in seen] == [(3, 2, 16), (1, 4, 16)]
    assert all(mask.unique().tolist() == pytest.approx([0, 1 / 0.75]) for mask in seen)


def test_the_dropout_loss_is_the_cross_entropy_under_the_drawn_mask_on_the_grid_of_the_loss() -> None:
    objective, batch = objective_of("dropout", start=0.5), tiny.batch()
    losses = objective(batch, 0.3, torch.Generator().manual_seed(0))
    mask_1BL = draw_masks((1, 2, 16), 0.75, torch.Generator().manual_seed(0))
    logits_BKhw = objective.network(batch.image_B3hw, mask_1BL)[0]
    fine_BKhw = F.interpolate(logits_BKhw, size=(16, 24), mode="bilinear", align_corners=True)
    by_hand = F.cross_entropy(fine_BKhw, at_grid(batch.label_Bhw, 16, 24))
    assert torch.allclose(losses["supervised"], by_hand, rtol=1e-5)


def test_an_unsure_teacher_adds_nothing_to_the_dropout_loss() -> None:
    losses = losses_of("dropout", tiny.batch(), confidence=1.1)
    assert losses["kept"] == losses["unlabelled"] == 0 and losses["total"] == losses["supervised"]


def test_the_dropout_network_answers_differently_under_different_masks() -> None:
    network = objective_of("dropout").network.eval()
    noise_SBL = draw_masks((2, 2, 16), 0.75, torch.Generator().manual_seed(0))
    one, two = network(tiny.batch().weak_B3hw, noise_SBL)
    assert not torch.allclose(one, two)
    assert torch.equal(*network(tiny.batch().weak_B3hw, torch.ones(2, 2, 16)))


@pytest.mark.parametrize(("name", "kind"), [("dropout", "np"), ("dropout", "cps")])
def test_a_latent_objective_does_not_train_a_dropout_network(name: str, kind: str) -> None:
    network = build_network(recipe_of(name), 3)
    with pytest.raises(
        BadOption, match=r"sampling is 'dropout'; the objective 'np' trains 'latent'|one of np, dropout"
    ):
        build_objective("np_semiseg", network, network, {"kind": kind})
