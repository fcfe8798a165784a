"""The linear head of np_semiseg: samples round a frozen answer, and the density of features in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from penumbra.models.errors import BadOption
from penumbra.models.np_semiseg.linear import ClassGaussians, LinearHead, class_products
from penumbra.models.np_semiseg.net import NpNetwork
from tests.models.small import SMALL, close, image, noise, seeded

NAME = "np_semiseg linear"


def head_of(name: str) -> tuple[NpNetwork, LinearHead]:
    network = seeded(name)
    assert isinstance(network, NpNetwork) and isinstance(network.head, LinearHead)
    return network, network.head


@pytest.mark.parametrize("name", [NAME, "np_semiseg linear-kept"])
@torch.inference_mode()
def test_a_fresh_head_answers_at_zero_as_its_host_does(name: str) -> None:
    network, _ = head_of(name)
    host = NpNetwork(SMALL["np_semiseg film"]).eval()
    host.load_state_dict({key: value for key, value in network.state_dict().items() if key in host.state_dict()})
    zero_1BL = torch.zeros(1, 2, 4)
    assert close(network(image(), zero_1BL), host(image(), torch.zeros(1, 2, 8)))


@torch.inference_mode()
def test_logits_are_linear_in_the_noise_and_pairs_cancel_in_their_mean() -> None:
    network, _ = head_of(NAME)
    features, draws = network.encode(image()), noise(NAME, 6)
    logits = network.decode(features, draws)
    assert close(logits.mean(0), features[0])
    assert close(network.decode(features, 3 * draws) - features[0], 3 * (logits - features[0]))


@torch.inference_mode()
def test_samples_are_those_of_the_matrix_that_is_never_made() -> None:
    network, head = head_of(NAME)
    features, draws = network.encode(image()), noise(NAME, 5)
    matrix_BLKhw = head.last(features[1])[:, 3:].unflatten(1, (4, 3))
    plain = features[0] + torch.einsum("sbl,blkhw->sbkhw", draws, matrix_BLKhw) / 2
    assert close(network.decode(features, draws), plain)
    assert float(matrix_BLKhw.abs().amax(2).min()) > 1e-3  # every column moves the logits at every pixel


@torch.inference_mode()
def test_the_answer_that_is_kept_is_the_hosts_whatever_was_learnt() -> None:
    network, head = head_of("np_semiseg linear-kept")
    torch.nn.init.normal_(head.last.weight)
    x_BDhw = network.host(image())
    assert torch.equal(head.encode(x_BDhw)[0], head.answer(x_BDhw)[0])


def test_the_linear_head_has_no_dropout() -> None:
    with pytest.raises(BadOption, match="'dropout'; the linear head of np_semiseg has only 'latent'"):
        NpNetwork(replace(SMALL[NAME], dropout=0.1, sampling="dropout"))


# -- density ----------------------------------------------------------------------------------------------------------


def fitted(g_BMhw: Tensor, label_Bhw: Tensor, *, shrinkage: float, num_classes: int = 3) -> ClassGaussians:
    gaussians = ClassGaussians(num_classes, g_BMhw.shape[1])
    parts = [class_products(g_BMhw[b : b + 1], label_Bhw[b : b + 1], num_classes) for b in range(2)]
    gaussians.fit(torch.stack(parts).sum(0), shrinkage=shrinkage)
    return gaussians


def example() -> tuple[Tensor, Tensor]:
    """Correlated features of four channels about another mean per class; every 7th pixel has no label."""
    generator = torch.Generator().manual_seed(0)
    label_Bhw = torch.randint(3, (2, 20, 20), generator=generator)
    mix = torch.randn(4, 4, generator=generator)
    g_BMhw = (torch.randn(2, 20, 20, 4, generator=generator) @ mix + 3 * label_Bhw[..., None]).movedim(-1, 1)
    label_Bhw.view(-1)[::7] = 255
    return g_BMhw, label_Bhw


def test_the_density_is_the_mixture_of_the_classes_normal_distributions() -> None:
    g_BMhw, label_Bhw = example()
    g_PM, label_P = g_BMhw.movedim(1, -1).flatten(0, 2).double(), label_Bhw.flatten()
    log_p = []
    for k in range(3):
        rows = g_PM[label_P == k]
        normal = MultivariateNormal(rows.mean(0), torch.cov(rows.T, correction=0))
        log_p.append(normal.log_prob(g_PM) + math.log(len(rows) / int((label_P != 255).sum())))
    by_hand = -torch.stack(log_p).logsumexp(0).view(2, 1, 20, 20)
    found = fitted(g_BMhw, label_Bhw, shrinkage=0.0)(g_BMhw)
    assert found.shape == (2, 1, 20, 20) and torch.allclose(found.double(), by_hand, rtol=1e-4, atol=1e-4)


def test_a_density_of_cells_is_that_of_their_mean_features_between_their_centres() -> None:
    g_BMhw, label_Bhw = example()
    fine = fitted(g_BMhw, label_Bhw, shrinkage=0.05)
    coarse = ClassGaussians(3, 4, stride=2)
    coarse.load_state_dict(fine.state_dict())
    cells = fine(g_BMhw.unflatten(3, (10, 2)).unflatten(2, (10, 2)).mean((3, 5)))
    found = coarse(g_BMhw)
    assert found.shape == (2, 1, 20, 20)
    assert torch.allclose(found[..., 0, 0], cells[..., 0, 0], rtol=1e-5)  # beyond the outermost centres it stays
    between = (9 * cells[..., 3, 3] + 3 * cells[..., 3, 4] + 3 * cells[..., 4, 3] + cells[..., 4, 4]) / 16
    assert torch.allclose(found[..., 7, 7], between, rtol=1e-4)


def test_the_density_is_finite_far_from_every_class_and_for_classes_without_a_pixel() -> None:
    g_BMhw, label_Bhw = example()
    label_Bhw[label_Bhw == 2] = 255
    gaussians = fitted(g_BMhw, label_Bhw, shrinkage=0.05)
    near, far = gaussians(g_BMhw), gaussians(g_BMhw + 1000)
    assert torch.isfinite(far).all() and float(far.min()) > float(near.max())


def test_a_class_without_a_pixel_makes_nothing_familiar() -> None:
    g_BMhw, label_Bhw = example()
    label_Bhw[label_Bhw == 2] = 255
    with_it, without = (fitted(g_BMhw, label_Bhw, shrinkage=0.05, num_classes=num) for num in (3, 2))
    for x in (g_BMhw, torch.zeros_like(g_BMhw)):
        assert torch.allclose(with_it(x), without(x), rtol=1e-5)


def test_the_density_survives_storage_in_half_precision() -> None:
    g_BMhw, label_Bhw = example()
    gaussians = fitted(g_BMhw, label_Bhw, shrinkage=0.05)
    exact = gaussians(g_BMhw)
    halved = gaussians.half()(g_BMhw.half())
    assert halved.dtype == torch.float32
    assert float((halved - exact).abs().max()) < 0.01 * float(exact.abs().max())
