"""Four operators on batches of windows: each is one call, and in Triton one launch, whatever the batch holds.

Triton runs them on CUDA (and on the CPU where TRITON_INTERPRET=1) and compiled C on the CPU; where there is neither,
the forms of `plain` do. Nothing waits for the device.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from penumbra.models.card import Readout
from penumbra.serving.engine import kernels, plain
from penumbra.serving.engine.plain import Norm, Rows

log = logging.getLogger("penumbra")


def cut(pictures: Sequence[Tensor], windows: Sequence[int], size: tuple[int, int], norm: Norm) -> Tensor:
    """Cut windows out of pictures and normalise them: float32 [B, C, h, w], channels_last.

    pictures: uint8, uint16, int16 or float32 [rows, W, C], contiguous strips of images, all of one type. windows, seven
    numbers each: picture, image row of the strip's first row, y0 and x0 of the window in the image, maybe negative,
    height and width of the image, and which of norm.pads_PC lies beyond it, if not its mirror (numpy's "symmetric").
    The strip has all rows that the window reads.
    """
    assert len({strip.dtype for strip in pictures}) == 1
    for picture, top, y0, _, height, *_ in zip(*[iter(windows)] * 7, strict=True):
        strip = pictures[picture]
        assert strip.is_contiguous() and top <= max(y0, 0) and min(y0 + size[0], height) <= top + len(strip)
    image_Bchw: Tensor = _form(norm.factor_C, in_c=False).cut(pictures, windows, size, norm)
    return image_Bchw


def accumulate(logits_SBKhw: Tensor, stats_BhCw: Tensor, readout: Readout, *, first: bool) -> None:
    """Add to stats, per pixel, the sum over S of the softmax of resized logits / temperature, and of its entropy.

    logits: any float dtype and strides, 1 to 255 classes. stats: float32, contiguous; channels [0, K) take
    probabilities (logits / temperature where those are averaged), channel K nats, the others are left alone. first:
    store instead of adding. Samples are added in order: chunks of S give the bytes of one call.
    """
    assert stats_BhCw.is_contiguous() and stats_BhCw.dtype == torch.float32
    assert stats_BhCw.shape[2] > logits_SBKhw.shape[2] and len(stats_BhCw) == logits_SBKhw.shape[1]
    form = _form(stats_BhCw, in_c=readout.average == "probabilities")
    form.accumulate(logits_SBKhw, stats_BhCw, readout, first=first)


def blend(
    stats_BhCw: Tensor, canvases: Sequence[Tensor], weights: Sequence[Tensor], windows: Sequence[int], *,
    num_sums: int, scale: float,
) -> None:  # fmt: skip
    """Add windows to canvases: canvas = (0 where fresh, else canvas) + stats * weight, in the order of windows.

    canvases: float32 [R, C, W], contiguous rings of rows: image row y lies at y % R. windows, eleven numbers each:
    canvas, y0 and x0 of the window in the image, maybe negative, first and end row, first and end column of its part
    in the image (window coordinates), where its weights per row and per column begin in the canvas' weights, and
    fresh_y, fresh_x: pixels at or beyond both are fresh, and what lies there is never read. Windows of one canvas come
    in the plan's order, and rows of one batch fit its ring. weight = (row * scale) * column in the first num_sums
    channels, row * column in the others.
    """
    assert len(windows) == 11 * len(stats_BhCw) and stats_BhCw.is_contiguous()
    assert all(canvas.shape[1] == stats_BhCw.shape[2] and canvas.is_contiguous() for canvas in canvases)
    _form(stats_BhCw).blend(stats_BhCw, canvases, weights, windows, num_sums=num_sums, scale=scale)


def read_out(
    canvases: Sequence[Tensor], out: Tensor, segments: Sequence[Rows], *, num_classes: int, softmax: bool,
    voids: Sequence[Tensor] = (), channel: int = -1,
) -> None:  # fmt: skip
    """Read labels and maps out of finished rows of canvases [R, C, W], into planes of `out` (uint8 [bytes]).

    segments, each its places: canvas, first image row, number of rows, then where in `out` its planes begin: labels
    (uint8 [rows, W]), confidence, margin, entropy, expected_entropy, disagreement (float32 [rows, W], at multiples of
    four), probabilities (float32 [rows, K, W]), the extra maps (channels K + 1 on), and sums (int64 [rows, 3], at a
    multiple of eight, where `out` holds zeros); -1: not requested. The last number is the segment's of `voids`, or -1.
    And its K thresholds: the label of a pixel is 255 where its entropy is above that of its class. softmax: the
    channels hold logits.

    Sums are those of a row's 1 - confidence, of its entropy, and of the extra map at `channel` or, where that is -1, 0,
    in units of 2^-24: whole numbers, which add up to the same in any order. Left out is where a void (uint8 [rows, W])
    is not 0, and the map is taken as at most 2^15 from 0. A probability that is no number counts as 0 in all that is
    read out but itself, and such a value of the map as 2^15.
    """
    sizes = 11 + canvases[0].shape[1] - num_classes, num_classes
    assert (
        all((len(places), len(threshold_K)) == sizes for places, threshold_K in segments) and out.dtype == torch.uint8
    )
    assert all(canvas.is_contiguous() and canvas.shape[1] == canvases[0].shape[1] for canvas in canvases)
    assert all(void.is_contiguous() and void.dtype == torch.uint8 for void in voids)
    _form(out).read_out(canvases, out, segments, num_classes=num_classes, softmax=softmax, voids=voids, channel=channel)


def _form(tensor: Tensor, *, in_c: bool = True) -> ModuleType:
    """Choose what runs an operator where a tensor lies. in_c: whether C has it; what is rare it has not."""
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return _triton()
    return kernels if in_c and kernels.COMPILED is not None else plain


@cache
def _triton() -> ModuleType:
    """Import Triton's kernels, which takes its time, with the first batch; the plain forms where it does not run."""
    if not find_spec("triton"):
        return plain
    module = import_module("penumbra.serving.engine.gpu.kernels")
    try:
        module.make_ready()
    except Exception as error:  # of subprocesses, linkers and drivers
        log.warning("Triton does not run here, and what is round networks on the GPU is slow without it: %s", error)
        return plain
    return module
