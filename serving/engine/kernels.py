"""Binding of kernels.c: functions on numpy arrays that release the GIL while they run.

`COMPILED` is None where the extension was not built; callers then use their plain forms.
"""

import ctypes
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def _load() -> ctypes.CDLL | None:
    for path in Path(__file__).parent.glob("_kernels*.so"):
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # built for another machine: the plain forms are right, only slower
            continue
    return None


COMPILED = _load()


def normalise(pixels_hw3: NDArray[np.uint8], factor: FloatArray, offset: FloatArray) -> FloatArray:
    """pixels * factor + offset, as float32 [h, w, 3]; both have the length of a row. Views of whole pixels are fine."""
    rows, columns, channels = pixels_hw3.shape
    assert COMPILED and pixels_hw3.strides[1:] == (channels, 1) and len(factor) == len(offset) == columns * channels
    out = np.empty((rows, columns, channels), np.float32)
    COMPILED.penumbra_normalise(
        _pointer(pixels_hw3), *_longs(pixels_hw3.strides[0], rows, columns * channels), _pointer(factor),
        _pointer(offset), _pointer(out),
    )  # fmt: skip
    return out


def accumulate(
    logits_SKhw: FloatArray, prob_hKw: FloatArray, entropy_hw: FloatArray, rows: range, *,
    align_corners: bool, temperature: float,
) -> None:  # fmt: skip
    """Add, for output rows `rows`, softmax and entropy of every resized sample. Changes prob and entropy."""
    assert COMPILED and logits_SKhw.flags.c_contiguous and prob_hKw.flags.c_contiguous
    samples, classes, height, width = logits_SKhw.shape
    assert prob_hKw.shape == (len(entropy_hw), classes, entropy_hw.shape[1]) and rows.stop <= len(entropy_hw)
    failed = COMPILED.penumbra_accumulate(
        _pointer(logits_SKhw), *_longs(samples, classes, height, width), _pointer(prob_hKw), _pointer(entropy_hw),
        *_longs(*entropy_hw.shape, rows.start, rows.stop), int(align_corners), ctypes.c_float(1 / temperature),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the scratch rows of the moments kernel")


def blend(canvas_hKw: FloatArray, piece_hKw: FloatArray, row_weight: FloatArray, column_weight: FloatArray) -> None:
    """canvas += piece * row_weight * column_weight. Views with unit stride along w are fine. Changes canvas."""
    assert COMPILED and canvas_hKw.shape == piece_hKw.shape == (len(row_weight), piece_hKw.shape[1], len(column_weight))
    rows, classes, columns = piece_hKw.shape
    COMPILED.penumbra_blend(
        _pointer(canvas_hKw), *_longs(canvas_hKw.strides[0] // 4, canvas_hKw.strides[1] // 4),
        _pointer(piece_hKw), *_longs(piece_hKw.strides[0] // 4, piece_hKw.strides[1] // 4),
        *_longs(rows, classes, columns), _pointer(row_weight), _pointer(column_weight),
    )  # fmt: skip


def read_out(
    prob_hKw: FloatArray, expected_hw: FloatArray
) -> tuple[NDArray[np.uint8], FloatArray, FloatArray, FloatArray, FloatArray]:
    """Compute labels, confidence, margin, entropy and mutual information, each [h, w]."""
    assert COMPILED and prob_hKw.flags.c_contiguous and expected_hw.flags.c_contiguous
    rows, classes, columns = prob_hKw.shape
    assert expected_hw.shape == (rows, columns)
    labels = np.empty((rows, columns), np.uint8)
    maps = [np.empty((rows, columns), np.float32) for _ in range(4)]
    COMPILED.penumbra_read_out(
        _pointer(prob_hKw), _pointer(expected_hw), *_longs(rows, classes, columns), _pointer(labels),
        *map(_pointer, maps),
    )  # fmt: skip
    return labels, maps[0], maps[1], maps[2], maps[3]


def _pointer(array: NDArray[np.float32] | NDArray[np.uint8]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _longs(*values: int) -> tuple[ctypes.c_long, ...]:
    return tuple(map(ctypes.c_long, values))
