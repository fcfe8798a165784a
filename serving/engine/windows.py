"""Geometry as a value: which windows cover an image, and with what weight each counts at every pixel.

The blend weight of a window is separable, and so is the sum of all weights over a grid of windows. So rows
and columns are normalised apart, and the weighted sum over windows is a mean without a division per pixel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import InputSpec, WindowSpec
from penumbra.serving.engine import kernels
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.raster import Pixels


@dataclass(frozen=True, slots=True)
class Window:
    """A window is a part of an image: its number in the plan, where its first pixel lies in the image, and its size.

    y0 and x0 are negative where a window centred on a smaller image begins before it.
    """

    index: int
    row: int
    column: int
    y0: int
    x0: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """A plan has all windows of one image, in row-major order. clipped: they end at the border, and are smaller there.

    starts_y, starts_x: first pixel of every row and column of windows. weights_y[r], weights_x[c]: normalised
    blend weights [window height] and [window width]; over all windows they sum to 1 at every pixel. answer: height and
    width of the image where that is run at another size, whose the other numbers then are.
    """

    height: int
    width: int
    window_height: int
    window_width: int
    starts_y: tuple[int, ...]
    starts_x: tuple[int, ...]
    weights_y: tuple[FloatArray, ...]
    weights_x: tuple[FloatArray, ...]
    clipped: bool = False
    answer: tuple[int, int] | None = None

    @property
    def num_windows(self) -> int:
        return len(self.starts_y) * len(self.starts_x)

    @property
    def size(self) -> tuple[int, int]:
        """Give height and width of the answer."""
        return self.answer or (self.height, self.width)

    def rows_above(self, y: int) -> int:
        """Count the answer's rows that depend on nothing from row y on: fewer than y's own where it is interpolated."""
        if not self.answer or y == self.height:
            return self.size[0] if self.answer else y
        return max(0, math.ceil((y - 0.5) * self.answer[0] / self.height - 0.5))

    def band_of(self, y: int) -> int:
        """Find the row at which the band that holds the answer's row y begins: bands begin where rows of windows do."""
        return max([0, *(y0 for y0 in self.starts_y if self.rows_above(max(y0, 0)) <= y)])

    def row_before(self, y: int) -> int:
        """Find the first row of windows that an answer from row y on needs; windows before it end above y, or above the
        row before where rows are interpolated."""
        return next(row for row, y0 in enumerate(self.starts_y) if y0 + self.window_height > y - bool(self.answer))

    def __iter__(self) -> Iterator[Window]:
        return self.windows(0)

    def windows(self, first_row: int) -> Iterator[Window]:
        """Yield the windows from a row of windows on."""
        for row, y0 in list(enumerate(self.starts_y))[first_row:]:
            for column, x0 in enumerate(self.starts_x):
                height = min(self.window_height, self.height - y0) if self.clipped else self.window_height
                width = min(self.window_width, self.width - x0) if self.clipped else self.window_width
                yield Window(row * len(self.starts_x) + column, row, column, y0, x0, height, width)


def cover(height: int, width: int, spec: WindowSpec, overlap: float | None = None) -> WindowPlan:
    """Lay out the windows of a height x width image. `overlap` in [0, 0.9] overrides the card's.

    Every pixel is covered; the last row and column of windows end at the border, shifted inward or clipped.
    """
    if spec.height == 0:
        spec = replace(spec, height=height, width=width)
    share = spec.overlap if overlap is None else overlap
    starts_y, starts_x = _starts(height, spec.height, share, spec=spec), _starts(width, spec.width, share, spec=spec)
    return WindowPlan(
        height, width, spec.height, spec.width, starts_y, starts_x,
        _weights(height, spec.height, starts_y, spec.blend), _weights(width, spec.width, starts_x, spec.blend),
        clipped=spec.last == "clip",
    )  # fmt: skip


def count_windows(height: int, width: int, spec: WindowSpec, overlap: float | None = None) -> int:
    """Count the windows that `cover` would give, without making the plan."""
    share = spec.overlap if overlap is None else overlap
    return _count(height, spec.height or height, share) * _count(width, spec.width or width, share)


def plan_bytes(height: int, width: int, spec: WindowSpec, overlap: float | None = None) -> int:
    """Predict the bytes of memory that the plan takes: windows' starts and weights, and those of rows and columns."""
    share, num_bytes = spec.overlap if overlap is None else overlap, 8 * (height + width)
    for length, window in ((height, spec.height or height), (width, spec.width or width)):
        num_bytes += _count(length, window, share) * (4 * window + 150)
    return num_bytes


def _stride(window: int, overlap: float) -> int:
    """ceil(window * (1 - overlap)), at least 1; the epsilon keeps 513 * (1 - 1/3) at 342."""
    return max(1, math.ceil(window * (1 - overlap) - 1e-6))


def _count(length: int, window: int, overlap: float) -> int:
    return 1 if length <= window else math.ceil((length - window) / _stride(window, overlap)) + 1


def _starts(length: int, window: int, overlap: float, *, spec: WindowSpec) -> tuple[int, ...]:
    stride, last = _stride(window, overlap), length - window
    if last <= 0:
        return (-(-last // 2) if spec.centred and spec.last == "shift" else 0,)
    return tuple(
        i * stride if spec.last == "clip" else min(i * stride, last) for i in range(_count(length, window, overlap))
    )


def _weights(length: int, window: int, starts: tuple[int, ...], blend: str) -> tuple[FloatArray, ...]:
    weight = np.ones(window)
    if blend == "gaussian":
        centre = (window - 1) / 2
        weight = np.maximum(np.exp(-0.5 * ((np.arange(window) - centre) / (window / 8)) ** 2), 1e-3)
    first = min(starts[0], 0)
    total = np.zeros(max(length, starts[-1] + window) - first)
    for start in starts:
        total[start - first : start - first + window] += weight
    return tuple((weight / total[s - first : s - first + window]).astype(np.float32) for s in starts)


def cut(image_HWC: Pixels, window: Window, plan: WindowPlan, *, spec: WindowSpec, norm: InputSpec) -> FloatArray:
    """Cut one window as the network takes it: normalised float32 [h, w, C], padded as the card says."""
    rows, columns, beyond = clip(window, plan)
    pixels = normalise(image_HWC[rows, columns], norm)
    if not any(map(any, beyond)):
        return pixels
    if spec.padding == "mirror":
        return np.pad(pixels, (*beyond, (0, 0)), mode="symmetric")
    padded = np.zeros((window.height, window.width, norm.num_bands), np.float32)
    if is_black_beyond(plan, spec):
        padded += black(norm)
    inside = tuple(slice(before, size - after) for (before, after), size in zip(beyond, padded.shape[:2], strict=True))
    padded[inside] = pixels
    return padded


def clip(window: Window, plan: WindowPlan) -> tuple[slice, slice, tuple[tuple[int, int], tuple[int, int]]]:
    """Clip a window to the image: the rows and columns it holds, and how much of it lies before and beyond them."""
    y0, x0 = max(window.y0, 0), max(window.x0, 0)
    y1, x1 = min(window.y0 + window.height, plan.height), min(window.x0 + window.width, plan.width)
    beyond = ((y0 - window.y0, window.y0 + window.height - y1), (x0 - window.x0, window.x0 + window.width - x1))
    return slice(y0, y1), slice(x0, x1), beyond


def is_black_beyond(plan: WindowPlan, spec: WindowSpec) -> bool:
    """Tell whether black stands beyond an image, rather than zeros (`WindowSpec.padding`)."""
    fits = plan.height <= plan.window_height and plan.width <= plan.window_width
    return spec.padding == "black" or (spec.padding == "mean_or_black" and not fits)


def black(norm: InputSpec) -> FloatArray:
    """Give what the network sees where all values are 0, per band: float32 [C]."""
    black_C: FloatArray = normalise(np.zeros((1, 1, norm.num_bands), norm.dtype), norm)[0, 0]
    return black_C


def normalise(pixels_hwC: NDArray[Any], norm: InputSpec) -> FloatArray:
    """Make network input of values by the card's rule, in its channel order: float32 [h, w, C]."""
    if norm.order == "BGR":
        pixels_hwC = pixels_hwC[:, :, ::-1]
    height, width, num_bands = pixels_hwC.shape
    rows = [np.tile(np.asarray(values, np.float32), width) for values in (*norm.factor_offset, *(norm.bounds or ()))]
    if kernels.COMPILED and kernels.is_packed(pixels_hwC):
        return kernels.normalise(pixels_hwC, rows)
    normalised: FloatArray = pixels_hwC.reshape(height, num_bands * width) * rows[0]  # whole rows: five times as fast
    normalised += rows[1]
    return (normalised.clip(*rows[2:]) if norm.clip else normalised).reshape(height, width, num_bands)
