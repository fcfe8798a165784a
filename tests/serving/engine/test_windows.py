"""Geometry: every pixel is covered, and the normalised weights sum to one everywhere."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.models.card import InputSpec, WindowSpec
from penumbra.serving.engine import kernels
from penumbra.serving.engine.windows import WindowPlan, count_windows, cover, cut, normalise
from tests.conftest import picture

PLAIN = InputSpec(mean=(0, 0, 0), std=(1, 1, 1))

specs = st.builds(
    WindowSpec,
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    overlap=st.floats(0, 0.9),
    blend=st.sampled_from(("gaussian", "uniform")),
    centred=st.booleans(),
)
lengths = st.integers(1, 150)


def weight_sums(plan: WindowPlan) -> np.ndarray:
    """Sum of all windows' weights at every pixel of the image, added up window by window."""
    total = np.zeros((plan.height, plan.width))
    for window in plan:
        weight = np.outer(plan.weights_y[window.row], plan.weights_x[window.column])
        y0, x0 = max(window.y0, 0), max(window.x0, 0)
        inside = weight[y0 - window.y0 : plan.height - window.y0, x0 - window.x0 : plan.width - window.x0]
        total[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] += inside
    return total


@given(lengths, lengths, specs)
def test_weights_of_all_windows_sum_to_one_at_every_pixel(height: int, width: int, spec: WindowSpec) -> None:
    plan = cover(height, width, spec)
    assert np.abs(weight_sums(plan) - 1).max() <= 1e-5
    assert all((weights > 0).all() for weights in (*plan.weights_y, *plan.weights_x))


@given(lengths, lengths, specs, st.none() | st.floats(0, 0.9))
def test_counting_windows_equals_making_them(height: int, width: int, spec: WindowSpec, overlap: float | None) -> None:
    plan = cover(height, width, spec, overlap)
    windows = list(plan)
    assert count_windows(height, width, spec, overlap) == len(windows) == plan.num_windows
    assert [window.index for window in windows] == list(range(len(windows)))
    assert [(w.y0, w.x0) for w in windows] == [(y, x) for y in plan.starts_y for x in plan.starts_x]


@given(lengths, lengths, specs)
def test_the_last_window_ends_at_the_border_and_none_beyond_it(height: int, width: int, spec: WindowSpec) -> None:
    plan = cover(height, width, spec)
    for length, window, starts in ((height, spec.height, plan.starts_y), (width, spec.width, plan.starts_x)):
        if length > window:
            assert starts[0] == 0 and starts[-1] == length - window
            assert list(starts) == sorted(set(starts))
        else:
            assert len(starts) == 1 and starts[0] <= 0


@given(lengths, specs)
def test_neighbours_overlap_at_least_as_much_as_asked(length: int, spec: WindowSpec) -> None:
    starts = cover(length, 1, spec).starts_y
    for first, second in pairwise(starts):
        assert second - first <= np.ceil(spec.height * (1 - spec.overlap) + 1e-6)


@given(lengths, lengths)
def test_a_window_of_zero_means_the_whole_image(height: int, width: int) -> None:
    plan = cover(height, width, WindowSpec(0, 0))
    assert (plan.num_windows, plan.window_height, plan.window_width) == (1, height, width)
    assert count_windows(height, width, WindowSpec(0, 0)) == 1


def test_a_third_of_513_overlap_strides_by_342_as_published() -> None:
    plan = cover(1024, 2048, WindowSpec(513, 513, overlap=1 / 3))
    assert plan.starts_y[:2] == (0, 342)


def test_a_centred_window_begins_half_of_the_missing_pixels_before_the_image() -> None:
    assert cover(10, 11, WindowSpec(16, 16, centred=True)).starts_y == (-3,)
    assert cover(10, 11, WindowSpec(16, 16, centred=True)).starts_x == (-2,)
    assert cover(10, 11, WindowSpec(16, 16)).starts_y == (0,)


# -- cutting -------------------------------------------------------------------------------------


def cut_first(image_HW3: np.ndarray, spec: WindowSpec, norm: InputSpec = PLAIN) -> np.ndarray:
    plan = cover(image_HW3.shape[0], image_HW3.shape[1], spec)
    return cut(image_HW3, next(iter(plan)), plan, spec=spec, norm=norm)


def test_windows_cut_from_a_large_image_are_its_pixels(rng: np.random.Generator) -> None:
    image, spec = picture(rng, 50, 61), WindowSpec(16, 24)
    plan = cover(50, 61, spec)
    for window in plan:
        expected = image[window.y0 : window.y0 + 16, window.x0 : window.x0 + 24] / np.float32(255)
        np.testing.assert_allclose(cut(image, window, plan, spec=spec, norm=PLAIN), expected, atol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (3, 20), (16, 1)])
def test_mirror_padding_repeats_the_picture(rng: np.random.Generator, size: tuple[int, int], centred: bool) -> None:
    image, spec = picture(rng, *size), WindowSpec(16, 16, padding="mirror", centred=centred)
    window = cut_first(image, spec)
    assert window.shape == (16, 16, 3)
    period_y, period_x = (np.concatenate((np.arange(n), np.arange(n)[::-1])) for n in size)
    before = [(16 - n) // 2 if centred and n < 16 else 0 for n in size]
    y = period_y[(np.arange(16) - before[0]) % len(period_y)]
    x = period_x[(np.arange(16) - before[1]) % len(period_x)]
    np.testing.assert_allclose(window, image[np.ix_(y, x)] / np.float32(255), atol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("padding", ["mean", "black"])
def test_constant_padding_is_zero_after_or_before_normalisation(
    rng: np.random.Generator, padding: str, centred: bool
) -> None:
    image, norm = picture(rng, 5, 7), InputSpec()
    window = cut_first(image, WindowSpec(12, 16, padding=padding, centred=centred), norm)  # type: ignore[arg-type]
    beyond = np.zeros(3) if padding == "mean" else -np.array(norm.mean) / np.array(norm.std)
    expected = np.broadcast_to(beyond, (12, 16, 3)).copy()
    y, x = (3, 4) if centred else (0, 0)
    expected[y : y + 5, x : x + 7] = (image / 255 - norm.mean) / norm.std
    np.testing.assert_allclose(window, expected, atol=1e-5)


RULES = {
    "divided": InputSpec((0.1, 0.2, 0.3, 0.4), (1, 2, 3, -4), 10_000.0),
    "ranged": InputSpec((0,) * 4, (1,) * 4, low=(0, -5, 100, 7), high=(1000, 5, 300, 8000)),
    "clipped": InputSpec(
        (0.1, 0.2, 0.3, 0.4), (1, 2, 3, -4), low=(0, -5, 100, 7), high=(1000, 5, 300, 8000), clip=True
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_values_of_every_type_follow_the_cards_rule_in_c_and_plainly(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: Any, rule: str
) -> None:
    spec = replace(RULES[rule], bands=("blue", "green", "red", "nir"), dtype=dtype)
    values = rng.integers(0, 9000, (5, 9, 4)).astype(dtype)
    shares = (values - np.array(spec.low)) / (np.array(spec.high) - spec.low) if spec.low else values / spec.scale
    expected = ((shares.clip(0, 1) if spec.clip else shares) - spec.mean) / spec.std
    part = values[1:, 2:7]
    compiled = normalise(part, spec)
    monkeypatch.setattr(kernels, "COMPILED", None)
    np.testing.assert_allclose(compiled, expected[1:, 2:7], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(compiled, normalise(part, spec))


def test_normalisation_follows_the_formula_in_the_cards_channel_order(rng: np.random.Generator) -> None:
    image = picture(rng, 4, 6)
    norm = InputSpec(mean=(1, 2, 3), std=(4, 5, 6), scale=10, order="BGR")
    expected = (image[:, :, ::-1] / 10 - np.array((1, 2, 3))) / np.array((4, 5, 6))
    result = normalise(image, norm)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
