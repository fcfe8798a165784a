"""Read-out: closed forms of entropy and its relatives, and the compiled form equal to the plain one."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.models.card import MAPS, MAPS_OF_ONE, ClassInfo
from penumbra.serving.engine import kernels
from penumbra.serving.engine.canvas import Wanted, lay_out, read_band
from penumbra.serving.engine.uncertainty import Band
from tests.conftest import toy_card
from tests.serving.engine import oracles

needs_kernels = pytest.mark.skipif(kernels.COMPILED is None, reason="the C kernels are not built on this machine")
Form = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]


def in_plain_torch(prob_hKw: np.ndarray, expected_hw: np.ndarray) -> oracles.Maps:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COMPILED", None)
        return oracles.read_out_here(prob_hKw, expected_hw)


every_form = pytest.mark.parametrize(
    "form", [pytest.param(oracles.read_out_here, marks=needs_kernels), in_plain_torch, oracles.read_out]
)


def pixels(*distributions: list[float]) -> np.ndarray:
    """prob_hKw of one row, a pixel per distribution."""
    return np.ascontiguousarray(np.array(distributions, np.float32).T[None])


def none_expected(prob_hKw: np.ndarray) -> np.ndarray:
    return np.zeros((prob_hKw.shape[0], prob_hKw.shape[2]), np.float32)


@every_form
@pytest.mark.parametrize("num_classes", [2, 3, 21, 255])
def test_a_uniform_distribution_carries_ln_k_nats(form: Form, num_classes: int) -> None:
    prob = pixels([1 / num_classes] * num_classes)
    labels, confidence, margin, entropy, information = form(prob, none_expected(prob))
    assert labels.item() == 0
    np.testing.assert_allclose(entropy, math.log(num_classes), rtol=1e-5)
    np.testing.assert_allclose(information, math.log(num_classes), rtol=1e-5)
    np.testing.assert_allclose(confidence, 1 / num_classes, rtol=1e-6)
    np.testing.assert_allclose(margin, 0, atol=1e-7)


@every_form
@pytest.mark.parametrize("winner", [0, 1, 4])
def test_a_certain_pixel_carries_none_and_zeros_add_none(form: Form, winner: int) -> None:
    prob = pixels([float(k == winner) for k in range(5)])
    labels, confidence, margin, entropy, information = form(prob, none_expected(prob))
    assert labels.item() == winner
    assert entropy.item() == information.item() == 0
    assert confidence.item() == margin.item() == 1


@every_form
def test_a_zero_beside_a_half_adds_no_entropy(form: Form) -> None:
    prob = pixels([0.5, 0, 0.5, 0], [0, 1e-38, 0.5, 0.5])
    np.testing.assert_allclose(form(prob, none_expected(prob))[3], math.log(2), rtol=1e-6)


@every_form
def test_margin_is_first_minus_second_whichever_comes_first(form: Form) -> None:
    prob = pixels([0.7, 0.1, 0.2], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2])
    labels, confidence, margin, *_ = form(prob, none_expected(prob))
    assert labels.tolist() == [[0, 1, 2, 0]]
    np.testing.assert_allclose(confidence, [[0.7, 0.7, 0.7, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(margin, [[0.5, 0.5, 0.5, 0]], atol=1e-6)


@every_form
def test_ties_go_to_the_lowest_class(form: Form) -> None:
    prob = pixels([0.1, 0.45, 0.45], [1 / 3] * 3, [0.25, 0.5, 0.25])
    assert form(prob, none_expected(prob))[0].tolist() == [[1, 0, 1]]


@every_form
def test_one_class_is_certain(form: Form) -> None:
    prob = pixels([1.0], [1.0])
    labels, confidence, margin, entropy, information = form(prob, none_expected(prob))
    assert labels.tolist() == [[0, 0]]
    assert confidence.tolist() == margin.tolist() == [[1, 1]]
    assert entropy.tolist() == information.tolist() == [[0, 0]]


@every_form
def test_mutual_information_is_never_negative(form: Form) -> None:
    prob = pixels([0.9, 0.1], [1.0, 0.0])
    information = form(prob, np.full((1, 2), 0.5, np.float32))[4]
    assert information.tolist() == [[0, 0]]


def random_means(seed: int, num_classes: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of three random distributions per pixel and the mean of their entropies, in float64."""
    rng = np.random.Generator(np.random.PCG64(seed))
    p = rng.dirichlet(np.full(num_classes, 0.3), (3, *shape)).transpose(0, 1, 3, 2)
    expected = -(p * np.log(np.maximum(p, 1e-300))).sum(2).mean(0)
    return p.mean(0), expected


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 5), st.sampled_from((1, 7, 255, 256, 257, 600)))
@settings(max_examples=40)
def test_all_maps_equal_their_formulas_in_float64(seed: int, num_classes: int, height: int, width: int) -> None:
    mean, expected = random_means(seed, num_classes, (height, width))
    prob, card = np.ascontiguousarray(mean, np.float32), toy_card("latent")[0]
    card = replace(card, classes=tuple(ClassInfo(str(k), (k, k, k)) for k in range(num_classes)))
    canvas = torch.from_numpy(np.concatenate((prob, expected.astype(np.float32)[:, None]), axis=1))

    def read(num_samples: int) -> Band:
        """Rows 5 on, which a ring of this height has further round."""
        segment, num_bytes = lay_out(Wanted(card.maps(num_samples)), range(5, 5 + height), width, card, num_samples)
        return read_band(canvas.roll(5, 0).contiguous(), segment, num_bytes, card)

    band = read(3)
    ranked = np.sort(mean, axis=1)
    entropy = -(mean * np.log(np.maximum(mean, 1e-300))).sum(1)
    assert band.y0 == 5 and set(band.maps) == {*MAPS}
    assert (band.labels == mean.astype(np.float32).argmax(1)).all()
    wanted = (ranked[:, -1], ranked[:, -1] - ranked[:, -2], entropy, expected, np.maximum(entropy - expected, 0))
    for name, right in zip(MAPS, wanted, strict=True):
        np.testing.assert_allclose(band.maps[name], right, atol=2e-6)
    assert (band.maps["mutual_information"] >= 0).all()
    single = read(1)
    assert set(single.maps) == {*MAPS_OF_ONE}
    assert np.array_equal(single.maps["seam"], band.maps["mutual_information"])


@needs_kernels
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 4), st.integers(1, 600))
@settings(max_examples=40)
def test_the_compiled_form_equals_the_plain_one(seed: int, num_classes: int, height: int, width: int) -> None:
    mean, expected = random_means(seed, num_classes, (height, width))
    prob, expected = np.ascontiguousarray(mean, np.float32), expected.astype(np.float32)
    compiled, plain = oracles.read_out_here(prob, expected), oracles.read_out(prob, expected)
    assert np.array_equal(compiled[0], plain[0])
    for ours, theirs in zip(compiled[1:], plain[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
