"""The operators in Triton: one launch each for a whole batch. Imported only where Triton is.

What a batch holds goes up as one table of int64: its geometry, and three numbers for each listed tensor: address,
length and width. Only types and constexprs make Triton compile anew, not the sizes of a batch.
"""

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from penumbra.models.card import Readout
from penumbra.serving.engine.plain import Norm, Rows

BLOCK = 1024
"""Values of a program of `cut`."""
CHANNELS, COLUMNS = 16, 128
"""The tile of a program of `blend`."""
IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def _kernel(function: Callable[..., None]) -> Any:
    code = function.__code__
    sizes = [name for name in code.co_varnames[: code.co_argcount] if name not in function.__annotations__]
    return triton.jit(function, do_not_specialize=sizes, do_not_specialize_on_alignment=sizes)


@triton.jit
def _mirror(at, length):
    at = (at % (2 * length) + 2 * length) % (2 * length)
    return tl.minimum(at, 2 * length - 1 - at)


@_kernel
def _cut(
    table, factor, offset, pads, bounds, out, h, w, C: tl.constexpr, MIRROR: tl.constexpr, REVERSED: tl.constexpr,
    BOUNDED: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    window = table + tl.program_id(2) * 7
    picture = table + tl.num_programs(2) * 7 + tl.load(window) * 3
    H, W = tl.load(window + 4), tl.load(window + 5)
    values = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = values % C
    y, x = tl.load(window + 2) + tl.program_id(1), tl.load(window + 3) + values // C
    row = values < w * C
    if MIRROR:
        inside = row
        y, x = _mirror(y, H), _mirror(x, W)
    else:
        inside = row & (x >= 0) & (x < tl.where((y >= 0) & (y < H), W, 0))
    at = ((y - tl.load(window + 1)) * W + x) * C + (C - 1 - c if REVERSED else c)
    pixels = tl.load(tl.load(picture).to(tl.pointer_type(TYPE)) + at, mask=inside, other=0).to(tl.float32)
    normal = pixels * tl.load(factor + c) + tl.load(offset + c)
    if BOUNDED:
        normal = tl.minimum(tl.maximum(normal, tl.load(bounds + c)), tl.load(bounds + C + c))
    normal = tl.where(inside, normal, tl.load(pads + tl.load(window + 6) * C + c))
    tl.store(out + (tl.program_id(2).to(tl.int64) * h + tl.program_id(1)) * w * C + values, normal, mask=row)


@triton.jit
def _source(i, length, size, ALIGN: tl.constexpr):
    """The input pixels before and after output pixel i of `size`, and how far it is from the first; in float32."""
    if ALIGN:
        at = i.to(tl.float32) * tl.div_rn((length - 1).to(tl.float32), tl.maximum(size - 1, 1).to(tl.float32))
    else:
        at = (i.to(tl.float32) + 0.5) * tl.div_rn(length.to(tl.float32), size.to(tl.float32)) - 0.5
    at = tl.maximum(at, 0.0)
    below = tl.minimum(at.to(tl.int32), length - 1)
    return below.to(tl.int64), tl.minimum(below + 1, length - 1).to(tl.int64), at - below.to(tl.float32)


@triton.jit
def _powers(z, real):
    """For a softmax over axis 0: e^(z - max z), the sum of that, and the entropy in nats."""
    z = tl.where(real, z, -1e30)
    d = z - tl.max(z, 0)[None]
    e = tl.exp(d)
    total = tl.sum(e, 0)
    return e, total, tl.log(total) - tl.sum(e * d, 0) / total


@_kernel
def _accumulate(
    logits, stats, stride_s, stride_b, stride_k, stride_y, stride_x, S, C, fh, fw, h, w, inverse_temperature, first,
    K: tl.constexpr, ALIGN: tl.constexpr, LOGITS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, y = tl.program_id(2).to(tl.int64), tl.program_id(1)
    k, x = tl.arange(0, CLASSES)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    low, high, part_y = _source(y, fh, h, ALIGN)
    left, right, part_x = _source(x, fw, w, ALIGN)
    valid = (k < K) & (x < w)[None]
    left = k.to(tl.int64) * stride_k + (left * stride_x)[None]
    right = k.to(tl.int64) * stride_k + (right * stride_x)[None]
    out = stats + (b * h + y) * C * w + x
    sums, nats = tl.zeros((CLASSES, COLUMNS), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    if first == 0:
        sums, nats = tl.load(out[None] + k * w, mask=valid, other=0.0), tl.load(out + K * w, mask=x < w, other=0.0)
    logits += b * stride_b
    for _ in range(S):
        above, beneath = logits + low * stride_y, logits + high * stride_y
        z = tl.load(above + left, mask=valid, other=0.0).to(tl.float32)
        z += (tl.load(above + right, mask=valid, other=0.0).to(tl.float32) - z) * part_x[None]
        z_next = tl.load(beneath + left, mask=valid, other=0.0).to(tl.float32)
        z_next += (tl.load(beneath + right, mask=valid, other=0.0).to(tl.float32) - z_next) * part_x[None]
        z = (z + (z_next - z) * part_y) * inverse_temperature
        e, total, entropy = _powers(z, k < K)
        sums += z if LOGITS else e * (1 / total)[None]
        nats += entropy
        logits += stride_s
    tl.store(out[None] + k * w, sums, mask=valid)
    tl.store(out + K * w, nats, mask=x < w)


@_kernel
def _blend(
    table, stats, B, C, h, w, num_canvases, num_sums, scale, WINDOWS: tl.constexpr, CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    window, blocks = table + tl.program_id(2) * 11, tl.cdiv(C, CHANNELS)
    y = tl.load(window + 1) + tl.load(window + 3) + tl.program_id(1)
    begin = ((tl.load(window + 2) + tl.load(window + 5)) // COLUMNS + tl.program_id(0) // blocks) * COLUMNS
    n = tl.arange(0, WINDOWS)
    each, real = table + n * 11, n < B
    y0, x0 = tl.load(each + 1, mask=real, other=0), tl.load(each + 2, mask=real, other=0)
    touching = real & (tl.load(each, mask=real, other=0) == tl.load(window))
    touching &= (y >= y0 + tl.load(each + 3, mask=real, other=0)) & (y < y0 + tl.load(each + 4, mask=real, other=0))
    touching &= begin + COLUMNS > x0 + tl.load(each + 5, mask=real, other=0)
    touching &= begin < x0 + tl.load(each + 6, mask=real, other=0)
    i = tl.min(tl.where(touching, n, WINDOWS), 0)
    if i == tl.program_id(2):  # no earlier window touches the tile: it is this program's
        ring = table + B * 11 + tl.load(window) * 3
        weights = tl.load(ring + num_canvases * 3).to(tl.pointer_type(tl.float32))
        c = ((tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
        x = begin + tl.arange(0, COLUMNS)
        here = tl.load(ring).to(tl.pointer_type(tl.float32)) + (y % tl.load(ring + 1) * C + c) * tl.load(ring + 2) + x
        held, values = x < 0, tl.zeros((CHANNELS, COLUMNS), tl.float32)
        while i < WINDOWS:
            its = table + i * 11
            row, column = y - tl.load(its + 1), x - tl.load(its + 2)
            inside = (column >= tl.load(its + 5)) & (column < tl.load(its + 6))
            fresh = inside & (x >= tl.where(y >= tl.load(its + 9), tl.load(its + 10), 2**62))
            values = tl.where(fresh[None], 0.0, values)
            values += tl.load(here, mask=(inside & ~fresh & ~held)[None] & (c < C), other=0.0)
            weight_y = tl.load(weights + tl.load(its + 7) + row)
            weight_x = tl.load(weights + tl.load(its + 8) + column, mask=inside, other=0.0)[None]
            piece = stats + ((i.to(tl.int64) * h + row) * C + c) * w + column
            piece = tl.load(piece, mask=inside[None] & (c < C), other=0.0)
            values += piece * (tl.where(c < num_sums, weight_y * scale, weight_y) * weight_x)
            held |= inside
            i = tl.min(tl.where(touching & (n > i), n, WINDOWS), 0)
        tl.store(here, values, mask=held[None] & (c < C))


@triton.jit
def _store(out, plane, index, values, mask):
    if tl.load(plane) >= 0:
        address = (out + tl.load(plane)).to(tl.pointer_type(values.dtype))
        tl.store(address + index, values, mask=mask)


@triton.jit
def _units(values, measured):
    """Add values up in units of 2^-24; what is no number counts for the most."""
    values = tl.maximum(tl.where(values < 32768.0, values, 32768.0), -32768.0) * 16777216.0
    return tl.sum(tl.where(measured, values.to(tl.int64), 0), 0)


@triton.jit
def _add_sums(out, plane, row, void, at, measured, error, entropy, own):
    """Add to a row's sums what is measured. void: the first of the listed voids."""
    if tl.load(plane) >= 0:
        index = tl.load(plane + 1)
        if index >= 0:
            void_hW = tl.load(void + index * 3).to(tl.pointer_type(tl.uint8))
            measured &= tl.load(void_hW + at, mask=measured, other=1) == 0
        sums = (out + tl.load(plane)).to(tl.pointer_type(tl.int64)) + row * 3
        tl.atomic_add(sums, _units(error, measured), sem="relaxed")
        tl.atomic_add(sums + 1, _units(entropy, measured), sem="relaxed")
        tl.atomic_add(sums + 2, _units(own, measured), sem="relaxed")


@_kernel
def _read_out(
    table, C, voids, channel, K: tl.constexpr, SOFTMAX: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    count = tl.num_programs(1)
    above = (table + 1).to(tl.pointer_type(tl.float32)) + tl.program_id(1) * K
    segments = table + 1 + tl.cdiv(count * K, 2)
    segment = segments + tl.program_id(1) * (11 + C - K)
    tensors, planes = segments + count * (11 + C - K), segment + 3
    ring, out = tensors + tl.load(segment) * 3, tl.load(table)
    W = tl.load(ring + 2)
    row, tile = tl.program_id(0) // tl.cdiv(W, COLUMNS), tl.program_id(0) % tl.cdiv(W, COLUMNS)
    if row < tl.load(segment + 2):
        k, x = tl.arange(0, CLASSES)[:, None], tile * COLUMNS + tl.arange(0, COLUMNS)
        at, real, known = row * W + x, x < W, k < K
        y = (tl.load(segment + 1) + row) % tl.load(ring + 1)
        here = tl.load(ring).to(tl.pointer_type(tl.float32)) + y * C * W + x
        p = tl.load(here[None] + k * W, mask=known & real[None], other=0.0)
        if SOFTMAX:
            e, total, entropy = _powers(p, known)
            p = e * (1 / total)[None]
            entropy = tl.where(entropy == entropy, entropy, 0.0)
        else:
            entropy = -tl.sum(tl.where(p > 1e-37, p * tl.log(tl.maximum(p, 1e-37)), 0.0), 0)
        _store(out, planes + 6, (row * K + k) * W + x[None], p, known & real[None])
        p = tl.where(known, tl.where(p > 0, p, 0.0), -1.0)
        confidence, label = tl.max(p, 0, return_indices=True)
        second = tl.maximum(tl.max(tl.where(k == label[None], -1.0, p), 0), 0.0)
        expected = tl.load(here + K * W, mask=real, other=0.0)
        threshold = tl.load(above + label)
        _store(out, planes, at, tl.where(entropy > threshold, 255, label).to(tl.uint8), real)
        _store(out, planes + 1, at, confidence, real)
        _store(out, planes + 2, at, confidence - second, real)
        _store(out, planes + 3, at, entropy, real)
        _store(out, planes + 4, at, expected, real)
        _store(out, planes + 5, at, tl.where(entropy > expected, entropy - expected, 0.0), real)
        for extra in range(1, C - K):
            _store(out, planes + 6 + extra, at, tl.load(here + (K + extra) * W, mask=real, other=0.0), real)
        own = tl.load(here + tl.maximum(channel, 0) * W, mask=real, other=0.0)
        own = tl.where(channel < 0, 0.0, own)
        _add_sums(out, planes + 6 + C - K, row, tensors + voids * 3, at, real, 1.0 - confidence, entropy, own)


def make_ready() -> None:
    """Let Triton compile what it needs of itself. Raises whatever it raises, as where there is no C compiler."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        triton.runtime.driver.active.get_current_target()


def tile(num_classes: int) -> dict[str, int]:
    """Choose the tile of a program of four warps, so that at most a few registers spill.

    Up to 24 classes of a column lie in one thread, which does no work for what rounds them up; of more, it has 16.
    Triton 3.6 lays tiles over threads otherwise, and spills kilobytes of a thread that has more than eight values.
    """
    classes = triton.next_power_of_2(num_classes)
    values = 1024 if IS_OLD else 4096 if num_classes <= 24 else 2048
    return {"CLASSES": classes, "COLUMNS": min(128, values // classes)}


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **{"num_warps": 4, "enable_fp_fusion": True} | constants)


def _table(numbers: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
    listed = [n for x in tensors for n in (x.data_ptr(), len(x), x.shape[-1])]
    table = torch.tensor([*numbers, *listed], dtype=torch.int64, pin_memory=tensors[0].is_cuda)
    return table.to(tensors[0].device, non_blocking=True)


def cut(pictures: Sequence[Tensor], windows: Sequence[int], size: tuple[int, int], norm: Norm) -> Tensor:
    """Cut and normalise a batch; see `operators.cut`. Multiply and add round apart, as on the CPU."""
    (h, w), num_bands, bounds = size, len(norm.factor_C), norm.bounds_2C
    kind = getattr(tl, str(pictures[0].dtype).removeprefix("torch."))
    shape = (len(windows) // 7, num_bands, h, w)
    image_Bchw = torch.empty(shape, device=norm.factor_C.device, memory_format=torch.channels_last)
    _launch(
        _cut, (triton.cdiv(w * num_bands, BLOCK), h, shape[0]), _table(windows, pictures), norm.factor_C, norm.offset_C,
        norm.pads_PC, norm.pads_PC if bounds is None else bounds, image_Bchw, h, w, C=num_bands, MIRROR=norm.mirror,
        REVERSED=norm.reversed_channels, BOUNDED=bounds is not None, TYPE=kind, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return image_Bchw


def accumulate(logits: Tensor, stats: Tensor, readout: Readout, *, first: bool) -> None:
    """Accumulate a batch; see `operators.accumulate`."""
    (num_samples, num_windows, num_classes, fh, fw), (_, h, channels, w) = logits.shape, stats.shape
    shape = tile(num_classes)
    _launch(
        _accumulate, (triton.cdiv(w, shape["COLUMNS"]), h, num_windows), logits, stats, *logits.stride(), num_samples,
        channels, fh, fw, h, w, 1 / readout.temperature, int(first), K=num_classes, ALIGN=readout.align_corners,
        LOGITS=readout.average == "logits", **shape,
    )  # fmt: skip


def blend(
    stats: Tensor, canvases: Sequence[Tensor], weights: Sequence[Tensor], windows: Sequence[int], *, num_sums: int,
    scale: float,
) -> None:  # fmt: skip
    """Blend a batch; see `operators.blend`. Each tile of an image belongs to the first window that touches it."""
    num_windows, h, channels, w = stats.shape
    _launch(
        _blend, (triton.cdiv(channels, CHANNELS) * (triton.cdiv(w, COLUMNS) + 1), h, num_windows),
        _table(windows, [*canvases, *weights]), stats, num_windows, channels, h, w, len(canvases), num_sums, scale,
        WINDOWS=max(triton.next_power_of_2(num_windows), 64), CHANNELS=CHANNELS, COLUMNS=COLUMNS,
    )  # fmt: skip


def read_out(
    canvases: Sequence[Tensor], out: Tensor, segments: Sequence[Rows], *, num_classes: int, softmax: bool,
    voids: Sequence[Tensor], channel: int,
) -> None:  # fmt: skip
    """Read out all segments; see `operators.read_out`. Programs beyond a segment's end do nothing."""
    shape, numbers = tile(num_classes), [number for places, _ in segments for number in places]
    tiles = max(rows * triton.cdiv(canvases[i].shape[2], shape["COLUMNS"]) for (i, _, rows, *_), _ in segments)
    thresholds = [nats for _, threshold_K in segments for nats in threshold_K]
    pairs = struct.pack(f"{len(thresholds)}f{len(thresholds) % 2 * 4}x", *thresholds)
    table = _table([out.data_ptr(), *struct.unpack(f"{len(pairs) // 8}q", pairs), *numbers], [*canvases, *voids])
    _launch(
        _read_out, (tiles, len(segments)), table, canvases[0].shape[1], len(canvases), channel, K=num_classes,
        SOFTMAX=softmax, **shape,
    )  # fmt: skip
