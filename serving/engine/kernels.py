"""Binding of kernels.c: functions that release the GIL while they run, on arrays and tensors of the CPU.

`COMPILED` is None where the extension was not built; callers then use their plain forms. `accumulate`, `blend` and
`read_out` are forms of the operators (`penumbra.serving.engine.operators`).
"""

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penumbra.models.card import Readout
from penumbra.serving.engine.plain import Rows

log = logging.getLogger("penumbra")
FloatArray = NDArray[np.float32]


INTERFACE = 5
"""The number that kernels.c has; both go up when a function's arguments change."""
KINDS = ("uint8", "uint16", "int16", "float32")
"""Types of pictures, as kernels.c counts them."""


def load(directory: Path) -> ctypes.CDLL | None:
    """Load the compiled kernels of a directory; the plain forms are right, only slower."""
    for path in directory.glob("_kernels*.so"):
        try:
            library = ctypes.CDLL(str(path))
            found = ctypes.c_int.in_dll(library, "penumbra_interface").value
        except (OSError, ValueError):  # built for another machine, or before there was a number
            found = None
        if found == INTERFACE:
            return library
        log.warning("%s was not built from these sources; install Penumbra again, or images take longer", path)
    return None


COMPILED = load(Path(__file__).parent)


def normalise(pixels_hwC: NDArray[Any], norm: Sequence[FloatArray]) -> FloatArray:
    """pixels * factor + offset, held within least and most, as float32 [h, w, C]. Views of whole pixels are fine.

    norm: those four, or factor and offset alone, each of the length of a row.
    """
    rows, columns, channels = pixels_hwC.shape
    row_bytes = pixels_hwC.strides[0]
    assert COMPILED and is_packed(pixels_hwC) and {*map(len, norm)} == {columns * channels}
    out = np.empty((rows, columns, channels), np.float32)
    COMPILED.penumbra_normalise(
        _pointer(pixels_hwC), *_longs(KINDS.index(pixels_hwC.dtype.name), row_bytes, rows, columns * channels),
        *map(_pointer, norm), *(None,) * (4 - len(norm)), _pointer(out),
    )  # fmt: skip
    return out


def is_packed(pixels_hwC: NDArray[Any]) -> bool:
    """Tell whether the values of a row lie one behind the other."""
    return pixels_hwC.strides[1:] == (pixels_hwC.shape[2] * pixels_hwC.itemsize, pixels_hwC.itemsize)


@cache
def _rows() -> ThreadPoolExecutor:
    """Make the threads of a batch that has several cores."""
    return ThreadPoolExecutor(thread_name_prefix="rows")


def accumulate(logits: Tensor, stats: Tensor, readout: Readout, *, first: bool) -> None:
    """Accumulate window by window, bands of rows in as many threads as torch has in this one."""
    assert COMPILED and readout.average == "probabilities"
    _, height, channels, width = stats.shape
    rule = int(first), int(readout.align_corners), ctypes.c_float(1 / readout.temperature)
    for b, stats_hCw in enumerate(stats):
        logits_SKhw = logits[:, b].float().contiguous()
        of_window = _address(logits_SKhw), *_longs(*logits_SKhw.shape), _address(stats_hCw)
        _in_bands(COMPILED.penumbra_accumulate, height, (*of_window, *_longs(channels, height, width)), rule)


def blend(
    stats: Tensor, canvases: Sequence[Tensor], weights: Sequence[Tensor], windows: Sequence[int], *, num_sums: int,
    scale: float,
) -> None:  # fmt: skip
    """Blend window by window."""
    assert COMPILED
    geometries = zip(*[iter(windows)] * 11, strict=True)
    for stats_hCw, (index, y, x, i0, i1, j0, j1, row, column, fresh_y, fresh_x) in zip(stats, geometries, strict=True):
        COMPILED.penumbra_blend(
            _address(canvases[index]), *_longs(*canvases[index].shape), _address(stats_hCw),
            *_longs(stats_hCw.shape[2], y, x, i0, i1, j0, j1), _address(weights[index], row),
            _address(weights[index], column), *_longs(fresh_y, fresh_x, num_sums), ctypes.c_float(scale),
        )  # fmt: skip


def read_out(
    canvases: Sequence[Tensor], out: Tensor, segments: Sequence[Rows], *, num_classes: int, softmax: bool,
    voids: Sequence[Tensor], channel: int,
) -> None:  # fmt: skip
    """Read out segment by segment."""
    assert COMPILED
    for (index, y, num_rows, *planes, void), threshold_K in segments:
        canvas = canvases[index]
        if softmax:  # not in torch, whose threads are for networks
            ring = canvas.numpy()[np.arange(y, y + num_rows) % len(canvas)]
            powers = np.exp(ring[:, :num_classes] - ring[:, :num_classes].max(1, keepdims=True))
            ring[:, :num_classes] = powers / powers.sum(1, keepdims=True)
            canvas, y = torch.from_numpy(ring), 0
        height, channels, width = canvas.shape
        COMPILED.penumbra_read_out(
            _address(canvas), *_longs(height, channels, num_classes, width, y, num_rows),
            (ctypes.c_float * num_classes)(*threshold_K), _address(out), (ctypes.c_int64 * len(planes))(*planes),
            None if void < 0 else _address(voids[void]), *_longs(channel),
        )  # fmt: skip


def answer(
    logits_Khw: Tensor, extras_Ehw: Tensor, place: tuple[int, int], out: Tensor, readout: Readout, *,
    segment: Sequence[int], thresholds: Sequence[float], void_HW: NDArray[np.bool_] | None, channel: int,
) -> None:  # fmt: skip
    """Read a picture's answer out of the logits of its only sample in its only window, row by row, with the bytes of
    `accumulate` and `read_out` but for the sum of entropies: a sample's own stands for that of the mean, the same
    rounded otherwise.

    extras: the network's own maps, at the window's size. place: row and column of the window where the picture begins.
    segment: the picture's width, and what `read_out` is given but for canvas and void.
    """
    assert COMPILED
    logits_Khw, extras_Ehw = logits_Khw.float().contiguous(), extras_Ehw.contiguous()
    hidden = None if void_HW is None else np.ascontiguousarray(void_HW)
    num_classes, (width, _, num_rows, *planes) = len(logits_Khw), segment
    before = (
        _address(logits_Khw), *_longs(num_classes + 1 + len(extras_Ehw), *logits_Khw.shape), _address(extras_Ehw),
        *_longs(*extras_Ehw.shape[1:], *place, width),
    )  # fmt: skip
    after = (
        int(readout.align_corners), ctypes.c_float(1 / readout.temperature),
        (ctypes.c_float * num_classes)(*thresholds), _address(out), (ctypes.c_int64 * len(planes))(*planes),
        None if hidden is None else _pointer(hidden), *_longs(channel),
    )  # fmt: skip
    _in_bands(COMPILED.penumbra_answer, num_rows, before, after)


def _in_bands(
    function: Callable[..., int], num_rows: int, before: tuple[object, ...], after: tuple[object, ...]
) -> None:  # fmt: skip
    """Call a function of a band of rows, in as many threads as torch has in this one: `before` and `after` are what it
    takes before the band's first row and end, and after them."""
    num_bands = torch.get_num_threads()
    edges = [num_rows * band // num_bands for band in range(num_bands + 1)]

    def run(begin: int, end: int) -> None:
        if function(*before, *_longs(begin, end), *after):
            raise MemoryError("no memory for the scratch rows of a kernel")

    deque((_rows().map if num_bands > 1 else map)(run, edges, edges[1:]), maxlen=0)


def _address(tensor: Tensor, first: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + first * tensor.element_size())


def _longs(*values: int) -> tuple[ctypes.c_long, ...]:
    return tuple(map(ctypes.c_long, values))


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """Point at an array's data; its own `ctypes` would be a cycle, which waits for the collector."""
    return ctypes.c_void_p(array.ctypes.data)
