"""Stitching: what is pointwise in the windows is pointwise in the image, in memory that its height does not change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.models.card import InputSpec, WindowSpec
from penumbra.serving.engine import kernels
from penumbra.serving.engine.canvas import Canvas
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.windows import cover, cut
from tests.conftest import picture

needs_kernels = pytest.mark.skipif(kernels.COMPILED is None, reason="the C kernels are not built on this machine")
PLAIN = InputSpec(mean=(0, 0, 0), std=(1, 1, 1))


def stitch(image_HW3: np.ndarray, spec: WindowSpec, overlap: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Every window's pixels as the probabilities of 2 samples, stitched; their sum over channels as the entropy."""
    plan = cover(image_HW3.shape[0], image_HW3.shape[1], spec, overlap)
    canvas, bands = Canvas(plan, 3), []
    for window in plan:
        values_hw3 = cut(image_HW3, window, plan, spec=spec, norm=PLAIN)
        summed_hKw = np.ascontiguousarray(2 * values_hw3.transpose(0, 2, 1))
        canvas.add(window, Moments(summed_hKw, summed_hKw.sum(1), 2))
        bands += [(y0, prob.copy(), entropy) for y0, prob, entropy, _ in canvas.finished(window)]
    tops = [0, *np.cumsum([len(prob) for _, prob, _ in bands])]
    assert [y0 for y0, _, _ in bands] == tops[:-1] and tops[-1] == len(image_HW3)
    return tuple(np.concatenate([band[i] for band in bands]) for i in (1, 2))  # type: ignore[return-value]


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.floats(0, 0.9),
    st.sampled_from(("gaussian", "uniform")),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=60)
def test_pointwise_windows_stitch_to_the_pointwise_image(
    size: tuple[int, int], window: tuple[int, int], overlap: float, blend: str, centred: bool, seed: int
) -> None:
    image = picture(np.random.Generator(np.random.PCG64(seed)), *size)
    prob, entropy = stitch(image, WindowSpec(*window, overlap, blend, centred=centred))  # type: ignore[arg-type]
    wanted = image.transpose(0, 2, 1) / 255
    np.testing.assert_allclose(prob, wanted, atol=1e-5)
    np.testing.assert_allclose(entropy, wanted.sum(1), atol=3e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 200), (200, 5), (31, 47), (32, 48), (33, 49)])
def test_the_plain_form_stitches_alike(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    image, spec = picture(rng, *size), WindowSpec(32, 48)
    compiled = stitch(image, spec)
    monkeypatch.setattr(kernels, "COMPILED", None)
    for ours, theirs in zip(compiled, stitch(image, spec), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_memory_of_a_canvas_depends_on_the_width_and_not_on_the_height() -> None:
    spec = WindowSpec(32, 48)
    low, high, wide = (Canvas(cover(*size, spec), 3).nbytes for size in ((64, 500), (64_000, 500), (64, 1000)))
    assert low == high == 4 * 32 * 500 * (3 + 1)
    assert wide == 2 * low


def test_rows_are_handed_out_as_soon_as_no_coming_window_touches_them() -> None:
    plan = cover(100, 48, WindowSpec(32, 48, overlap=0.5))
    canvas = Canvas(plan, 3)
    handed = []
    for window in plan:
        canvas.add(window, Moments(np.zeros((32, 3, 48), np.float32), np.zeros((32, 48), np.float32), 1))
        handed.append(sum(len(prob) for _, prob, _, _ in canvas.finished(window)))
    assert np.cumsum(handed).tolist() == [*plan.starts_y[1:], 100]
