"""Stitching: windows' moments become rows of an image, in memory of one window's height.

The canvas holds only rows that a coming window can still touch, as [rows, K, W] next to each other; its size
depends on the image's width and not on its height. Windows arrive in the plan's order.
"""

from collections.abc import Iterator

import numpy as np

from penumbra.serving.engine import kernels
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.moments import Moments
from penumbra.serving.engine.windows import Window, WindowPlan


class Canvas:
    """A canvas accumulates windows and hands finished rows out. It is used by one thread: the request's."""

    def __init__(self, plan: WindowPlan, num_classes: int, *, num_extras: int = 0, first_row: int = 0) -> None:
        """first_row: of windows, where the plan is not run from its beginning."""
        self._plan = plan
        self._top = max(plan.starts_y[first_row], 0)
        """Image row of the canvas' first row."""
        rows = 0 if plan.num_windows == 1 else min(plan.window_height, plan.height)
        self._merged_hKW = np.zeros((rows, num_classes, plan.width), np.float32)
        self._entropy_hW = np.zeros((rows, plan.width), np.float32)
        self._extras_hEW = np.zeros((rows, num_extras, plan.width), np.float32)

    @property
    def nbytes(self) -> int:
        return self._merged_hKW.nbytes + self._entropy_hW.nbytes + self._extras_hEW.nbytes

    def add(self, window: Window, moments: Moments) -> None:
        """Blend a window in. Only the part of it that lies in the image counts."""
        plan = self._plan
        inside_y = slice(max(-window.y0, 0), min(plan.height - window.y0, window.height))
        inside_x = slice(max(-window.x0, 0), min(plan.width - window.x0, window.width))
        if plan.num_windows == 1:
            self._take(moments, inside_y, inside_x)
            return
        y = max(window.y0, 0) - self._top
        rows = slice(y, y + inside_y.stop - inside_y.start)
        columns = slice(max(window.x0, 0), window.x0 + inside_x.stop)
        share = plan.weights_y[window.row][inside_y]
        row_weight = share * np.float32(1 / moments.num_samples)
        column_weight = plan.weights_x[window.column][inside_x]
        blend(self._merged_hKW[rows, :, columns], moments.summed_hKw[inside_y, :, inside_x], row_weight, column_weight)
        blend(
            self._entropy_hW[rows, None, columns], moments.entropy_hw[inside_y, None, inside_x],
            row_weight, column_weight,
        )  # fmt: skip
        if moments.extras_hEw is not None:
            blend(self._extras_hEW[rows, :, columns], moments.extras_hEw[inside_y, :, inside_x], share, column_weight)

    def _take(self, moments: Moments, rows: slice, columns: slice) -> None:
        """Take the only window of a plan as the image; there is nothing to blend it with."""
        mean = np.float32(1 / moments.num_samples)
        self._merged_hKW = np.ascontiguousarray(moments.summed_hKw[rows, :, columns])
        self._entropy_hW = np.ascontiguousarray(moments.entropy_hw[rows, columns])
        if moments.num_samples > 1:
            self._merged_hKW, self._entropy_hW = self._merged_hKW * mean, self._entropy_hW * mean
        if moments.extras_hEw is not None:
            self._extras_hEW = np.ascontiguousarray(moments.extras_hEw[rows, :, columns])

    def finished(self, window: Window) -> Iterator[tuple[int, FloatArray, FloatArray, FloatArray]]:
        """Yield rows that no window after `window` touches, as (y0, merged_hKW, expected_hW, extras_hEW).

        At most one band: nothing unless the window was the last of its row. merged is what samples and windows were
        averaged to, probabilities or logits, and a view that is valid until the iterator goes on.
        """
        plan = self._plan
        if window.column + 1 < len(plan.starts_x):
            return
        last = window.row + 1 == len(plan.starts_y)
        num_rows = (plan.height if last else plan.starts_y[window.row + 1]) - self._top
        finished = self._merged_hKW[:num_rows], self._entropy_hW[:num_rows], self._extras_hEW[:num_rows]
        if last:
            yield self._top, *finished
            return
        yield self._top, finished[0], finished[1].copy(), finished[2].copy()
        self._top += num_rows
        for rows in (self._merged_hKW, self._entropy_hW, self._extras_hEW):
            kept = len(rows) - num_rows
            rows[:kept] = rows[num_rows:]
            rows[kept:] = 0


def blend(canvas_hKw: FloatArray, piece_hKw: FloatArray, row_weight: FloatArray, column_weight: FloatArray) -> None:
    """canvas += piece * row_weight * column_weight, in one pass where compiled. Changes canvas."""
    if kernels.COMPILED:
        kernels.blend(canvas_hKw, piece_hKw, row_weight, column_weight)
    else:
        canvas_hKw += piece_hKw * (row_weight[:, None, None] * column_weight)
