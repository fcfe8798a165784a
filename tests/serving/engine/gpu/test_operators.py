"""The operators give what numpy and the CPU's forms give: in torch here, in Triton where `test_kernels` runs this file.

With TRITON_INTERPRET=1 the operators run Triton's kernels, by its interpreter on the CPU.
"""

import math
import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penumbra.models.card import InputSpec, Readout, WindowSpec
from penumbra.serving.engine import kernels, operators, plain, windows
from penumbra.serving.engine.plain import Norm
from tests.serving.engine import oracles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXAMPLES = 4 if INTERPRETED else 60
CLASSES = (1, 2, 19, 255)


@pytest.fixture(autouse=True, params=["triton"] if INTERPRETED else ["c", "plain"])
def in_inference_mode_by_the_form_that_is_meant(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(kernels, "COMPILED", None)
        elif request.param == "c" and kernels.COMPILED is None:
            pytest.skip("the C kernels are not built on this machine")
        yield
    assert not INTERPRETED or "penumbra.serving.engine.gpu.kernels" in sys.modules


def floats(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(scale * rng.standard_normal(shape, np.float32))


def seeded(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


# --- cut


def norm(channels: int, *, mirror: bool = False, reversed_channels: bool = False, bounded: bool = False) -> Norm:
    factor = torch.linspace(0.01, 0.021, channels)
    bounds = torch.stack((factor - 0.8, factor + 0.3)) if bounded else None
    return Norm(factor, -3 * factor - 1, torch.stack((factor + 7, factor - 5)), mirror, reversed_channels, bounds)


def cut_by_numpy(
    image_HWC: np.ndarray, y0: int, x0: int, size: tuple[int, int], norm: Norm, pad: int = 0
) -> np.ndarray:
    """One window [h, w, C]: the whole image normalised in two roundings, padded far enough, and sliced."""
    pixels = image_HWC[:, :, ::-1] if norm.reversed_channels else image_HWC
    values = pixels.astype(np.float32) * norm.factor_C.numpy() + norm.offset_C.numpy()
    if norm.bounds_2C is not None:
        values = values.clip(*norm.bounds_2C.numpy())
    around = [
        (max(-at, 0), max(at + n - have, 0)) for at, n, have in zip((y0, x0), size, image_HWC.shape, strict=False)
    ]
    if norm.mirror:
        padded = np.pad(values, (*around, (0, 0)), mode="symmetric")
    else:
        channels = [
            np.pad(v, around, constant_values=float(p))
            for v, p in zip(values.T, norm.pads_PC[pad], strict=True)
            for v in [v.T]
        ]
        padded = np.stack(channels, axis=2)
    y, x = max(y0, 0), max(x0, 0)
    return padded[y : y + size[0], x : x + size[1]]


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(-20, 8), st.integers(-20, 8)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.sampled_from((1, 2, 3, 5)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from((np.uint8, np.uint16, np.int16, np.float32)),
)
@settings(max_examples=EXAMPLES)
def test_a_window_anywhere_around_an_image_has_numpys_very_bytes(
    image: tuple[int, int], at: tuple[int, int], size: tuple[int, int], channels: int, mirror: bool,
    reversed_channels: bool, bounded: bool, dtype: type[np.generic],
) -> None:  # fmt: skip
    pixels = seeded(3).integers(0, 65536, (*image, channels)).astype(dtype)
    rule = norm(channels, mirror=mirror, reversed_channels=reversed_channels, bounded=bounded)
    with torch.inference_mode():
        image_1chw = operators.cut([torch.from_numpy(pixels)], [0, 0, *at, *image, 0], size, rule)
    assert image_1chw.dtype == torch.float32 and image_1chw.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(image_1chw[0].permute(1, 2, 0).numpy(), cut_by_numpy(pixels, *at, size, rule))


def test_windows_of_several_strips_share_a_batch(rng: np.random.Generator) -> None:
    wide = rng.integers(0, 65536, (40, 50, 3), dtype=np.uint16)
    deep = rng.integers(0, 65536, (33, 21, 3), dtype=np.uint16)
    strips = [torch.from_numpy(wide[10:30].copy()), torch.from_numpy(deep)]
    places = [(0, 10, 14, 3), (1, 0, -4, -2), (0, 10, 10, 40), (1, 0, 20, 8)]
    geometry = [n for i, top, y, x in places for n in (i, top, y, x, *((40, 50), (33, 21))[i], i)]
    image_Bchw = operators.cut(strips, geometry, (16, 17), norm(3))
    for values_chw, (i, _, y, x) in zip(image_Bchw, places, strict=True):
        expected = cut_by_numpy((wide, deep)[i], y, x, (16, 17), norm(3), i)
        np.testing.assert_array_equal(values_chw.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("padding", ["mirror", "mean"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_all_windows_of_a_plan_have_the_bytes_that_the_cpu_cuts(
    rng: np.random.Generator, padding: str, order: str
) -> None:
    image = rng.integers(0, 256, (13, 50, 3), dtype=np.uint8)
    spec = WindowSpec(16, 24, padding=padding, centred=True)  # type: ignore[arg-type]
    card_norm = InputSpec(order=order)  # type: ignore[arg-type]
    plan = windows.cover(13, 50, spec)
    factor, offset = map(torch.tensor, card_norm.factor_offset)
    rule = Norm(factor, offset, torch.zeros(1, 3), padding == "mirror", order == "BGR")
    geometry = [n for window in plan for n in (0, 0, window.y0, window.x0, 13, 50, 0)]
    image_Bchw = operators.cut([torch.from_numpy(image)], geometry, (16, 24), rule)
    for values_chw, window in zip(image_Bchw, plan, strict=True):
        expected = windows.cut(image, window, plan, spec=spec, norm=card_norm)
        np.testing.assert_array_equal(values_chw.permute(1, 2, 0).numpy(), expected)


def test_a_strip_that_lacks_rows_of_a_window_is_a_programmers_mistake() -> None:
    with pytest.raises(AssertionError):
        operators.cut([torch.zeros(8, 9, 3, dtype=torch.uint8)], [0, 4, 2, 0, 40, 9, 0], (4, 4), norm(3))


# --- accumulate


def accumulated(logits_SBKhw: Tensor, size: tuple[int, int], readout: Readout, *, extras: int = 0) -> Tensor:
    stats = torch.full((logits_SBKhw.shape[1], size[0], logits_SBKhw.shape[2] + 1 + extras, size[1]), math.nan)
    operators.accumulate(logits_SBKhw, stats, readout, first=True)
    return stats


def same_moments(stats_BhCw: Tensor, logits_SBKhw: Tensor, readout: Readout) -> None:
    """The mean over samples is that of the plain form to 1e-6."""
    num_samples, _, num_classes, *_ = logits_SBKhw.shape
    expected, channels = torch.empty_like(stats_BhCw), slice(num_classes + 1)
    plain.accumulate(logits_SBKhw, expected, readout, first=True)
    means = [(x[:, :, channels] / num_samples).numpy() for x in (stats_BhCw, expected)]
    np.testing.assert_allclose(*means, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize(
    ("feature", "window"), [((5, 7), (11, 13)), ((1, 1), (3, 2)), ((6, 9), (6, 9)), ((4, 3), (2, 150))]
)
def test_sums_of_probabilities_and_entropies_are_the_cpus(
    rng: np.random.Generator, align_corners: bool, num_classes: int, feature: tuple[int, int], window: tuple[int, int]
) -> None:
    logits = floats(rng, 3, 2, num_classes, *feature)
    readout = Readout(align_corners=align_corners, temperature=1.7)
    same_moments(accumulated(logits, window, readout), logits, readout)


@pytest.mark.parametrize("align_corners", [True, False])
def test_logits_are_averaged_where_the_card_says_so_and_entropies_as_ever(
    rng: np.random.Generator, align_corners: bool
) -> None:
    logits = floats(rng, 3, 2, 5, 4, 6)
    readout = Readout(align_corners=align_corners, temperature=0.8, average="logits")
    same_moments(accumulated(logits, (9, 11), readout), logits, readout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "samples_last"])
def test_logits_of_any_type_and_strides_are_read_as_they_lie(
    rng: np.random.Generator, dtype: torch.dtype, layout: str
) -> None:
    logits = floats(rng, 2, 3, 6, 5, 7).to(dtype)
    lying = {
        "contiguous": logits,
        "channels_last": logits.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "sliced": torch.nn.functional.pad(logits, (1, 2, 3, 4))[:, :, :, 3:-4, 1:-2],
        "samples_last": logits.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    }[layout]
    stats = accumulated(lying, (8, 12), Readout())
    assert torch.equal(stats, accumulated(logits.contiguous(), (8, 12), Readout()))
    same_moments(stats, logits.float(), Readout())


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_chunks_of_samples_give_the_bytes_of_one_call_and_leave_extra_maps_alone(
    rng: np.random.Generator, average: str
) -> None:
    logits, readout = floats(rng, 7, 2, 5, 4, 6), Readout(average=average)  # type: ignore[arg-type]
    whole = accumulated(logits, (9, 11), readout)
    stats = torch.full((2, 9, 8, 11), 4.0)
    stats[:, :, :6] = math.nan
    for begin, end in ((0, 1), (1, 3), (3, 7)):
        operators.accumulate(logits[begin:end], stats, readout, first=begin == 0)
    assert torch.equal(stats[:, :, :6], whole) and (stats[:, :, 6:] == 4).all()


def test_two_samples_that_are_sure_of_different_classes_carry_no_entropy_of_their_own() -> None:
    logits = torch.tensor([[40.0, -40.0], [-40.0, 40.0]])[:, None, :, None, None]
    stats = accumulated(logits, (2, 3), Readout())
    np.testing.assert_allclose(stats[:, :, :2].numpy(), 1, rtol=1e-6)
    np.testing.assert_allclose(stats[:, :, 2].numpy(), 0, atol=1e-6)


# --- blend


def blended_by_numpy(
    stats: np.ndarray, canvases: list[np.ndarray], weights: list[np.ndarray], geometry: list[int], *, num_sums: int,
    scale: float,
) -> None:  # fmt: skip
    """Pixel by pixel, as the sentence says."""
    for piece, numbers in zip(stats, zip(*[iter(geometry)] * 11, strict=True), strict=True):
        i, y0, x0, y1, y2, x1, x2, at_y, at_x, fresh_y, fresh_x = numbers
        share = np.where(np.arange(stats.shape[2]) < num_sums, np.float32(scale), np.float32(1))
        for y in range(y1, y2):
            for x in range(x1, x2):
                pixel = canvases[i][(y0 + y) % len(canvases[i]), :, x0 + x]
                before = 0 if y0 + y >= fresh_y and x0 + x >= fresh_x else pixel.copy()
                pixel[:] = before + piece[y, :, x] * (weights[i][at_y + y] * share * weights[i][at_x + x])


def test_overlapping_windows_of_several_canvases_blend_in_order_on_rings(rng: np.random.Generator) -> None:
    canvases = [np.full((rows, 5, width), np.nan, np.float32) for rows, width in ((13, 300), (9, 11))]
    weights = [rng.random(40, np.float32), rng.random(20, np.float32)]
    size, far = (8, 10), 10**6
    pieces = [
        (0, 20, 100, 0, 8, 0, 10, 0, 8, 0, 0),
        (1, -2, -3, 2, 8, 3, 10, 1, 6, -far, -far),  # begins before the image
        (0, 20, 106, 0, 8, 0, 10, 3, 20, 0, 110),  # overlaps the first, and lies across two tiles
        (0, 20, 125, 0, 8, 0, 10, 3, 20, 0, 116),
        (1, 1, 4, 0, 8, 0, 7, 1, 6, 6, far),  # ends beyond the image, and at the ring's last row
        (0, 25, 104, 0, 8, 0, 10, 0, 30, 28, 0),  # wraps around the ring: rows 26 to 32 of 13
    ]
    canvases[0][:, :, 100:] = rng.random((13, 5, 200), np.float32)
    canvases[1][:, :, 7:] = 2
    stats = rng.standard_normal((len(pieces), size[0], 5, size[1]), np.float32)
    for (_, _, _, y1, y2, x1, x2, *_), piece in zip(pieces, stats, strict=True):
        outside = np.ones(size, bool)
        outside[y1:y2, x1:x2] = False
        piece.transpose(0, 2, 1)[outside] = np.nan
    geometry = [n for piece in pieces for n in piece]
    ours = [torch.from_numpy(canvas.copy()) for canvas in canvases]
    operators.blend(
        torch.from_numpy(stats), ours, list(map(torch.from_numpy, weights)), geometry, num_sums=3, scale=1 / 7
    )
    blended_by_numpy(stats, canvases, weights, geometry, num_sums=3, scale=1 / 7)
    for canvas, expected in zip(ours, canvases, strict=True):
        np.testing.assert_allclose(canvas.numpy(), expected, rtol=1e-6, atol=1e-6)


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 60)),
    st.tuples(st.integers(1, 16), st.integers(1, 20)),
    st.floats(0, 0.8),
    st.integers(1, 9),
    st.booleans(),
)
@settings(max_examples=EXAMPLES)
def test_a_picture_in_batches_on_a_ring_is_the_cpus_canvas(
    image: tuple[int, int], window: tuple[int, int], overlap: float, batch: int, clipped: bool
) -> None:
    spec = WindowSpec(*window, overlap, centred=True, last="clip" if clipped else "shift")
    plan, rng = windows.cover(*image, spec), seeded(5)
    if plan.num_windows in (1, *range(40, 10**6)):
        return
    stats = rng.random((plan.num_windows, window[0], 5, window[1]), np.float32)
    with torch.inference_mode():
        rows = blended_on_a_ring(plan, torch.from_numpy(stats), batch)
    np.testing.assert_allclose(rows.numpy(), oracles.stitched(stats, plan, 4, 0.5), rtol=1e-6, atol=1e-6)


def blended_on_a_ring(plan: windows.WindowPlan, stats_BhCw: Tensor, batch: int) -> Tensor:
    """All rows of a picture, blended in batches; rows leave the ring as soon as no window can touch them."""
    places = list(plan)
    ring = torch.full((plan.window_height * (1 + batch), 5, plan.width), math.nan)
    weights = torch.cat([torch.from_numpy(weight) for weight in (*plan.weights_y, *plan.weights_x)])
    done, rows = 0, []
    for begin in range(0, len(places), batch):
        part = places[begin : begin + batch]
        geometry = [n for place in part for n in piece(place, plan)]
        operators.blend(stats_BhCw[begin : begin + batch], [ring], [weights], geometry, num_sums=4, scale=0.5)
        end = places[begin + batch].y0 if begin + batch < len(places) else plan.height
        rows += [ring[y % len(ring)].clone() for y in range(done, end)]
        done = max(end, done)
    return torch.stack(rows)


def piece(place: windows.Window, plan: windows.WindowPlan) -> tuple[int, ...]:
    rows, columns, _ = windows.clip(place, plan)
    before_y = plan.starts_y[place.row - 1] + plan.window_height if place.row else 0
    before_x = plan.starts_x[place.column - 1] + plan.window_width if place.column else 0
    return (
        0, place.y0, place.x0, rows.start - place.y0, rows.stop - place.y0, columns.start - place.x0,
        columns.stop - place.x0, place.row * plan.window_height,
        len(plan.starts_y) * plan.window_height + place.column * plan.window_width, before_y, before_x,
    )  # fmt: skip


# --- read out


def canvas_of(rng: np.random.Generator, rows: int, num_classes: int, width: int, *, extras: int = 0) -> np.ndarray:
    """A full ring: probabilities, some of them 0 and some tied, their samples' entropy, and a model's own maps."""
    prob = rng.dirichlet(np.full(num_classes, 0.3), (rows, width)).astype(np.float32).transpose(0, 2, 1)
    prob[:, :, ::5] = 1 / num_classes
    prob[:, :, 1::5] = np.arange(num_classes)[:, None] == num_classes // 2
    others = rng.random((rows, 1 + extras, width), np.float32)
    return np.ascontiguousarray(np.concatenate((prob, others), axis=1))


def layout(
    rows: int, width: int, num_classes: int, extras: int, *, start: int, leave: tuple[int, ...] = ()
) -> list[int]:
    """Where the planes of a segment begin, in bytes and one after another; -1 where it is left out."""
    offsets = []
    for plane, channels in enumerate((1, 1, 1, 1, 1, 1, num_classes, *[1] * extras)):
        offsets.append(-1 if plane in leave else start)
        start += 0 if plane in leave else (rows * width + 3) // 4 * 4 if plane == 0 else 4 * channels * rows * width
    return offsets


def planes(out: Tensor, offsets: list[int], rows: int, width: int, num_classes: int) -> list[np.ndarray]:
    found = []
    for plane, offset in enumerate(offsets):
        shape = (rows, num_classes, width) if plane == 6 else (rows, width)
        dtype = np.dtype(np.float32 if plane else np.uint8)
        found.append(out.numpy()[offset : offset + dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape))
    return found


def read_by_the_cpu(rows_hCw: np.ndarray, num_classes: int, *, softmax: bool, above_K: np.ndarray) -> list[np.ndarray]:
    """All planes, in float64: float32 sums over 255 classes differ in the sixth digit."""
    rows_hCw = rows_hCw.astype(np.float64)
    merged, expected = rows_hCw[:, :num_classes], rows_hCw[:, num_classes]
    prob = oracles.softmax(merged) if softmax else merged
    labels, confidence, margin, entropy, disagreement = oracles.read_out(prob, expected)
    labels[entropy > above_K[labels]] = 255
    extras = rows_hCw[:, num_classes + 1 :].transpose(1, 0, 2)
    return [labels, confidence, margin, entropy, expected, disagreement, prob, *extras]


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("softmax", [False, True])
def test_every_plane_of_several_segments_is_the_cpus(rng: np.random.Generator, num_classes: int, softmax: bool) -> None:
    canvases = [canvas_of(rng, 7, num_classes, 45, extras=2), canvas_of(rng, 5, num_classes, 9, extras=2)]
    nothing, above = np.full(num_classes, np.inf), rng.uniform(0, math.log(num_classes + 1), (2, num_classes))
    above[1, ::2] = -math.inf  # these classes are withheld
    segments = [(0, 5, 4, above[0]), (1, 100, 3, nothing), (0, 9, 1, above[1])]  # rows 5 to 8 of 7 wrap in the ring
    out, geometry, start = torch.full((500_000,), 77, dtype=torch.uint8), [], 0
    for index, _, rows, _ in segments:
        geometry.append(layout(rows, canvases[index].shape[2], num_classes, 2, start=start))
        start += 4 * rows * canvases[index].shape[2] * (9 + num_classes)
    placed = [
        ([*numbers, *offsets, -1, -1], above_K.tolist())
        for (*numbers, above_K), offsets in zip(segments, geometry, strict=True)
    ]
    operators.read_out(
        list(map(torch.from_numpy, canvases)), out, placed, num_classes=num_classes, softmax=softmax
    )  # fmt: skip
    for (index, y, rows, above_K), offsets in zip(segments, geometry, strict=True):
        ring = canvases[index]
        taken = ring[np.arange(y, y + rows) % len(ring)]
        expected = read_by_the_cpu(taken, num_classes, softmax=softmax, above_K=above_K)
        for ours, theirs in zip(planes(out, offsets, rows, ring.shape[2], num_classes), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert (out[start:] == 77).all()


def test_planes_that_are_not_requested_are_not_written(rng: np.random.Generator) -> None:
    ring, everything_but = canvas_of(rng, 4, 3, 10, extras=1), (1, 2, 4, 5, 6, 7)
    offsets = layout(4, 10, 3, 1, start=8, leave=everything_but)
    out = torch.full((400,), 77, dtype=torch.uint8)
    segment = [0, 0, 4, *offsets, -1, -1], [math.inf] * 3
    operators.read_out([torch.from_numpy(ring)], out, [segment], num_classes=3, softmax=False)
    expected = read_by_the_cpu(ring, 3, softmax=False, above_K=np.full(3, math.inf))
    np.testing.assert_array_equal(out[8:48].numpy().reshape(4, 10), expected[0])
    np.testing.assert_allclose(out[48:208].numpy().view(np.float32).reshape(4, 10), expected[3], rtol=1e-6, atol=1e-6)
    assert (out[:8] == 77).all() and (out[208:] == 77).all()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("channel", [-1, 4])
def test_what_is_no_number_is_read_as_zero_or_as_the_strangest_in_every_form(
    rng: np.random.Generator, channel: int, softmax: bool
) -> None:
    """Requested sums, of pixels that are sound, have one such probability or logit, have only such, or such a map."""
    canvas = np.zeros((1, 5, 4), np.float32)
    canvas[0, :3] = np.array([[0.2, 0.5, 0.3]] * 4, np.float32).T
    canvas[0, 1, 1] = canvas[0, :3, 2] = canvas[0, 4, 3] = canvas[0, 3, 3] = math.nan
    out = torch.zeros(200, dtype=torch.uint8)
    offsets = [24, 28, 44, 60, 76, 92, 108, 156, 0]  # labels, five maps, probabilities, the model's own map, sums
    operators.read_out(
        [torch.from_numpy(canvas)], out, [([0, 0, 1, *offsets, -1], [math.inf] * 3)], num_classes=3,
        softmax=softmax, channel=channel,
    )  # fmt: skip
    values = out[28:172].numpy().view(np.float32)
    confidence, margin, entropy, expected, disagreement = values[:20].reshape(5, 4)
    gone = [1, 2] if softmax else [2]  # a softmax has no number where one of its logits is none
    assert (
        out[24:28].tolist() == [1, 0 if softmax else 2, 0, 1] and np.isnan(values[20:32].reshape(3, 4)[:, gone]).all()
    )
    assert (confidence[gone] == 0).all() and (margin[gone] == 0).all() and (entropy[gone] == 0).all()
    assert confidence[0] == confidence[3] > 0.3 and np.isnan(expected[3]) and disagreement[3] == 0
    if not softmax:
        assert (confidence[1], margin[1]) == pytest.approx((0.3, 0.1))
    units, own = out[:24].numpy().view(np.int64), 0 if channel < 0 else 2**15
    np.testing.assert_allclose(units / 2**24, ((1 - confidence).sum(), entropy.sum(), own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("channel", [-1, 1])
def test_the_sums_of_rows_are_of_what_was_measured_in_any_tile_and_order(
    rng: np.random.Generator, num_classes: int, channel: int
) -> None:
    """Three segments: one with a void, one without, and one of which no sums are requested."""
    ring, void = canvas_of(rng, 7, num_classes, 301, extras=2), rng.random((4, 301)) < 0.3
    ring[:, num_classes + 1] = 10.0 ** rng.integers(-3, 6, (7, 301)) * rng.choice((-1, 1), (7, 301))
    none = [-1] * 8  # of the planes between labels and sums
    segments = [0, 5, 4, 1000, *none, 0, 0], [0, 3, 2, 2204, *none, 96, -1], [0, 0, 1, 2806, *none, -1, -1]
    out = torch.zeros(3200, dtype=torch.uint8)
    operators.read_out(
        [torch.from_numpy(ring)], out, [(one, [0.1] * num_classes) for one in segments], num_classes=num_classes,
        softmax=False, voids=[torch.from_numpy(void.view(np.uint8))],
        channel=channel if channel < 0 else num_classes + channel,
    )  # fmt: skip
    above_K = np.full(num_classes, np.inf)
    for place, y, measured in ((0, 5, ~void), (96, 3, np.ones((2, 301), bool))):
        taken = ring[np.arange(y, y + len(measured)) % 7]
        _, confidence, _, entropy, *_ = read_by_the_cpu(taken, num_classes, softmax=False, above_K=above_K)
        own = taken[:, num_classes + 1].astype(np.float64).clip(-(2**15), 2**15) * (channel >= 0)
        sums_h3 = out[place : place + 24 * len(measured)].numpy().view(np.int64).reshape(-1, 3) / 2**24
        for ours, values in zip(sums_h3.T, (1 - confidence, entropy, own), strict=True):
            np.testing.assert_allclose(ours, (values * measured).sum(1), rtol=1e-6, atol=3e-4)
    assert not out[144:1000].any(), "nothing is written beyond, nor where no sums are requested"


# --- both in one pass


@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("nats", [math.inf, 0.4])
@pytest.mark.parametrize("leave", [(), (2, 3, 5), (1, 2, 3, 4, 5, 6, 7, 8)], ids=["all", "no entropy", "labels"])
def test_an_only_sample_is_answered_with_the_bytes_of_its_moments(
    rng: np.random.Generator, num_classes: int, nats: float, leave: tuple[int, ...]
) -> None:
    """A picture of 9 x 301 in the middle of its window, in parts void; by either map of novelty, on a CPU alone."""
    if kernels.COMPILED is None:
        pytest.skip("only C answers in one pass")
    logits, extras = floats(rng, num_classes, 5, 40, scale=4), floats(rng, 2, 14, 310)
    void, readout = rng.random((9, 301)) < 0.3, Readout(temperature=1.3)
    stats = torch.empty(1, 14, num_classes + 3, 310)
    kernels.accumulate(logits[None, None], stats, readout, first=True)
    stats[0, :, num_classes + 1 :] = extras.transpose(0, 1)
    canvas = stats[0, 3:12, :, 2:303].contiguous()
    rows, above = [0, 9, *layout(9, 301, num_classes, 2, start=216, leave=leave), 0], [nats] * num_classes
    for channel in (-1, num_classes + 2):
        expected, out = (torch.zeros(150_000 + 12_000 * num_classes, dtype=torch.uint8) for _ in range(2))
        kernels.read_out(
            [canvas], expected, [([0, *rows, 0], above)], num_classes=num_classes, softmax=False,
            voids=[torch.from_numpy(void.view(np.uint8))], channel=channel,
        )  # fmt: skip
        kernels.answer(
            logits, extras, (3, 2), out, readout, segment=[301, *rows], thresholds=above, void_HW=void, channel=channel
        )
        assert torch.equal(out[216:], expected[216:])
        ours, theirs = (x[:216].numpy().view(np.int64).reshape(9, 3) for x in (out, expected))
        assert np.array_equal(ours[:, ::2], theirs[:, ::2])
        np.testing.assert_allclose(ours[:, 1] / 2**24, theirs[:, 1] / 2**24, rtol=1e-6, atol=3e-4)
