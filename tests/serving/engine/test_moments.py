"""Moments: the compiled and the plain form agree with a float64 oracle made of torch's own resize."""

import _ctypes
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import Card, ClassInfo, Readout
from penumbra.serving.engine import kernels
from penumbra.serving.engine.moments import Moments, Statistics
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.steps import HostSteps, WindowInput
from penumbra.serving.engine.windows import cover
from tests.conftest import toy_card

needs_kernels = pytest.mark.skipif(kernels.COMPILED is None, reason="the C kernels are not built on this machine")
FORMS = [pytest.param("compiled", marks=needs_kernels), "plain"]
SHAPES = [((5, 7), (17, 23)), ((9, 9), (9, 9)), ((1, 1), (6, 5)), ((8, 3), (8, 33)), ((33, 65), (129, 257))]


def added(form: str, card: Card, size: tuple[int, int], *chunks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    statistics = Statistics(card, 1, size, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if form == "plain":
            patch.setattr(kernels, "COMPILED", None)
        for logits_SKhw in chunks:
            statistics.add(logits_SKhw[:, None])
        statistics.finish()
    stats_hCw = statistics.stats_BhCw[0].numpy()
    return stats_hCw[:, :-1].transpose(1, 0, 2), stats_hCw[:, -1]


def moments(form: str, logits_SKhw: Tensor, size: tuple[int, int], readout: Readout) -> tuple[np.ndarray, np.ndarray]:
    classes = tuple(ClassInfo(str(k), (k, k, k)) for k in range(logits_SKhw.shape[1]))
    return added(form, replace(toy_card("latent")[0], classes=classes, readout=readout), size, logits_SKhw)


def oracle(logits_SKhw: Tensor, size: tuple[int, int], readout: Readout) -> tuple[np.ndarray, np.ndarray]:
    """Sums of p [K, h, w] and of H(p) in float64."""
    logits = logits_SKhw.double() / readout.temperature
    if readout.softmax_at == "window":
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=readout.align_corners)
    p = torch.softmax(logits, dim=1)
    entropy = -torch.special.xlogy(p, p).sum(1, keepdim=True)
    if readout.softmax_at == "feature":
        p, entropy = (
            F.interpolate(x, size=size, mode="bilinear", align_corners=readout.align_corners) for x in (p, entropy)
        )
    return p.sum(0).numpy(), entropy.sum((0, 1)).numpy()


def random_logits(num_samples: int, num_classes: int, size: tuple[int, int], scale: float = 5.0) -> Tensor:
    return scale * torch.randn(num_samples, num_classes, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("feature", "window"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_both_forms_equal_torchs_resize_and_softmax_in_float64(
    form: str, align_corners: bool, feature: tuple[int, int], window: tuple[int, int], temperature: float
) -> None:
    readout = Readout(align_corners=align_corners, temperature=temperature)
    logits = random_logits(3, 5, feature)
    for ours, wanted in zip(moments(form, logits, window, readout), oracle(logits, window, readout), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=3e-4)  # places between logits of 50 are float32, as torch's


@needs_kernels
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.booleans(),
    st.sampled_from((0.01, 1.0, 30.0)),
)
@settings(max_examples=60)
def test_the_compiled_form_equals_the_plain_one_for_any_shape(
    counts: tuple[int, int], feature: tuple[int, int], window: tuple[int, int], align_corners: bool, scale: float
) -> None:
    readout, logits = Readout(align_corners=align_corners), random_logits(*counts, feature, scale)
    compiled, plain = (moments(form, logits, window, readout) for form in ("compiled", "plain"))
    for ours, theirs in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("align_corners", [True, False])
def test_softmax_at_feature_resolution_is_resized_afterwards(align_corners: bool) -> None:
    readout = Readout(softmax_at="feature", align_corners=align_corners, temperature=1.5)
    logits = random_logits(3, 4, (9, 7))
    for ours, wanted in zip(
        moments("compiled", logits, (33, 21), readout), oracle(logits, (33, 21), readout), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_added_to_what_is_there(form: str) -> None:
    logits = random_logits(4, 3, (6, 6))
    prob, entropy = added(form, toy_card("latent")[0], (20, 20), *torch.split(logits, (1, 3)))
    whole = moments(form, logits, (20, 20), toy_card("latent")[0].readout)
    assert np.array_equal(prob, whole[0]) and np.array_equal(entropy, whole[1])
    np.testing.assert_allclose(prob.sum(0), 4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_two_samples_that_disagree_completely_carry_ln2_nats(form: str) -> None:
    logits = torch.full((2, 3, 4, 4), -60.0)
    logits[0, 0] = logits[1, 1] = 60.0
    prob, entropy = moments(form, logits, (16, 16), Readout())
    mean = prob / 2
    total = -(mean * np.log(np.maximum(mean, 1e-37))).sum(0)
    np.testing.assert_allclose(total, math.log(2), atol=1e-6)
    np.testing.assert_allclose(entropy, 0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_huge_logits_stay_finite_and_a_common_offset_changes_nothing(form: str, offset: float) -> None:
    logits = torch.tensor([1.0, 2.0, 4.0])[None, :, None, None].expand(1, 3, 2, 2) + offset
    prob, entropy = moments(form, logits, (4, 4), Readout())
    wanted_prob, wanted_entropy = oracle(logits - offset, (4, 4), Readout())
    np.testing.assert_allclose(prob, wanted_prob, atol=1e-5)
    np.testing.assert_allclose(entropy, wanted_entropy, atol=1e-5)


@needs_kernels
def test_half_precision_and_strided_logits_are_taken() -> None:
    logits = random_logits(2, 3, (6, 8)).half()
    strided = torch.stack((logits, logits), dim=1)[:, 1]
    wanted = oracle(logits.float(), (12, 16), Readout())
    for ours, theirs in zip(moments("compiled", strided, (12, 16), Readout()), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@needs_kernels
def test_logits_of_another_number_of_classes_never_write_beyond_the_sums() -> None:
    with pytest.raises(AssertionError):
        added("compiled", toy_card("latent")[0], (8, 8), random_logits(1, 5, (4, 4)))


@pytest.mark.parametrize("num_images", [1, 2])
def test_moments_keep_no_windows_of_other_requests(num_images: int) -> None:
    card, device = toy_card("latent")[0], torch.device("cpu")
    statistics = Statistics(card, 2, (8, 9), device)
    logits_SBKhw = torch.stack([random_logits(2, card.num_classes, (4, 4)) for _ in range(2)], dim=1)
    statistics.add(logits_SBKhw)
    images = [Raster(np.zeros((8, 9, 3), np.uint8)) for _ in range(num_images)] * (2 // num_images)
    plan = cover(8, 9, replace(card.window, height=8, width=9))
    noise_SL = np.zeros((2, 4), np.float32)
    inputs = [WindowInput(image, window, plan, noise_SL) for image in images for window in plan]
    answers = HostSteps(card, device).answers(statistics, inputs)
    for moments, stats_hCw in zip(answers, statistics.stats_BhCw, strict=True):
        assert isinstance(moments, Moments) and moments.stats_hCw.equal(stats_hCw)
        kept = moments.stats_hCw.untyped_storage().nbytes() // stats_hCw.nbytes
        assert kept == (2 if num_images == 1 else 1)


@pytest.mark.parametrize("content", [b"no library", Path(_ctypes.__file__).read_bytes()], ids=["damaged", "another"])
def test_kernels_that_were_built_from_other_sources_are_not_called(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_kernels.cpython-311.so").write_bytes(content)
    assert kernels.load(tmp_path) is None
    assert "was not built from these sources; install Penumbra again" in caplog.text
