"""Stitching: what is pointwise in the windows is pointwise in the image, in memory that its height does not change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.models.card import InputSpec, WindowSpec
from penumbra.serving.engine import kernels
from penumbra.serving.engine.canvas import (
    Surface,
    Transfers,
    Wanted,
    read_band,
    ring_height,
    stitch,
)
from penumbra.serving.engine.options import PROBABILITIES
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.uncertainty import Band
from penumbra.serving.engine.windows import Window, WindowPlan, cover, cut
from tests.conftest import picture, toy_card

needs_kernels = pytest.mark.skipif(kernels.COMPILED is None, reason="the C kernels are not built on this machine")
PLAIN = InputSpec(mean=(0, 0, 0), std=(1, 1, 1))


CARD = toy_card("latent")[0]


def canvas_of(plan: WindowPlan) -> Surface:
    image = Raster(np.zeros((plan.height, plan.width, 3), np.uint8))
    wanted, transfers = Wanted((PROBABILITIES, "expected_entropy")), Transfers(torch.device("cpu"))
    return Surface(image, plan, wanted, transfers=transfers, channels=4, most=1)


def add(canvas: Surface, window: Window, stats_hCw: np.ndarray) -> Band | None:
    """Blend one window of two samples in, and read out the band that it finishes."""
    stitch(torch.from_numpy(np.ascontiguousarray(stats_hCw))[None], [(canvas, window)], CARD, 2)
    rows = canvas.finished(window)
    return read_band(canvas.canvas_RCW, *canvas.lay_out(rows, CARD, 2), CARD) if rows else None


def stitched(image_HW3: np.ndarray, spec: WindowSpec, overlap: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Every window's pixels as the probabilities of 2 samples, stitched; their sum over channels as the entropy."""
    plan = cover(image_HW3.shape[0], image_HW3.shape[1], spec, overlap)
    canvas, bands = canvas_of(plan), list[Band]()
    for window in plan:
        values_hw3 = cut(image_HW3, window, plan, spec=spec, norm=PLAIN)
        sums_hKw = 2 * values_hw3.transpose(0, 2, 1)
        band = add(canvas, window, np.concatenate((sums_hKw, sums_hKw.sum(1, keepdims=True)), axis=1))
        bands += [band] if band else []
    tops = [0, *np.cumsum([len(band.labels) for band in bands])]
    assert [band.y0 for band in bands] == tops[:-1] and tops[-1] == len(image_HW3)
    maps = [band.maps["expected_entropy"] for band in bands]
    return np.concatenate([band.prob_hKW for band in bands if band.prob_hKW is not None]), np.concatenate(maps)


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
    prob, entropy = stitched(image, WindowSpec(*window, overlap, blend, centred=centred))  # type: ignore[arg-type]
    wanted = image.transpose(0, 2, 1) / 255
    np.testing.assert_allclose(prob, wanted, atol=1e-5)
    np.testing.assert_allclose(entropy, wanted.sum(1), atol=3e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 200), (200, 5), (31, 47), (32, 48), (33, 49)])
def test_the_plain_form_stitches_alike(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    image, spec = picture(rng, *size), WindowSpec(32, 48)
    compiled = stitched(image, spec)
    monkeypatch.setattr(kernels, "COMPILED", None)
    for ours, theirs in zip(compiled, stitched(image, spec), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_memory_of_a_canvas_depends_on_the_width_and_not_on_the_height() -> None:
    spec = WindowSpec(32, 48)
    low, high, wide = (
        canvas_of(cover(*size, spec)).canvas_RCW.nbytes for size in ((64, 500), (64_000, 500), (64, 1000))
    )
    assert low == high == 4 * 32 * 500 * (3 + 1)
    assert wide == 2 * low


def test_rows_are_handed_out_as_soon_as_no_coming_window_touches_them() -> None:
    plan = cover(100, 48, WindowSpec(32, 48, overlap=0.5))
    canvas = canvas_of(plan)
    bands = [add(canvas, window, np.zeros((32, 4, 48), np.float32)) for window in plan]
    assert np.cumsum([len(band.labels) if band else 0 for band in bands]).tolist() == [*plan.starts_y[1:], 100]


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.floats(0, 0.9),
    st.integers(1, 40),
    st.sampled_from(("shift", "clip")),
)
def test_a_ring_holds_all_rows_that_a_batch_touches_and_no_more(
    size: tuple[int, int], window: tuple[int, int], overlap: float, most: int, last: str
) -> None:
    plan = cover(*size, WindowSpec(*window, overlap, last=last))  # type: ignore[arg-type]
    windows, touched = list(plan), 0
    for first in range(len(windows)):
        batch = windows[first : first + most]
        end = max(min(one.y0 + one.height, plan.height) for one in batch)
        touched = max(touched, end - plan.starts_y[batch[0].row])
    assert ring_height(plan, most) == touched
