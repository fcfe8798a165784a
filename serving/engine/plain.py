"""The plain forms of the operators, in torch on any device: where there is no Triton, and as what Triton is held to.

They loop over windows, samples and segments, and wait for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import Readout

UNITS = 2.0**24
"""Units of the sums that scores are made of, in one."""
NUM_SUMS = 3
"""Sums of a row: of 1 - confidence, of the entropy, and of the map of the model's own that novelty goes by."""
MOST = 2.0**15
"""A pixel's map of novelty counts for at most so much, that no sum of a row overflows."""

Rows = tuple[Sequence[int], Sequence[float]]
"""Where rows are in a canvas and in what is read out of it, and the thresholds of their classes: `operators.read_out`
says how."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm is how pixels become what the network sees: pixel * factor + offset, both float32 [C] on the device.

    pads_PC: what may lie beyond images, normalised already, unless `mirror`. reversed_channels: channel c is read from
    the picture's channel C - 1 - c. bounds_2C: least and most of what the network sees, where that is bounded.
    """

    factor_C: Tensor
    offset_C: Tensor
    pads_PC: Tensor
    mirror: bool = False
    reversed_channels: bool = False
    bounds_2C: Tensor | None = None


def cut(pictures: Sequence[Tensor], windows: Sequence[int], size: tuple[int, int], norm: Norm) -> Tensor:
    """Cut and normalise window by window; see `operators.cut`."""
    geometries, device = list(zip(*[iter(windows)] * 7, strict=True)), norm.factor_C.device
    shape = (len(geometries), len(norm.factor_C), *size)
    image_Bchw = torch.empty(shape, device=device, memory_format=torch.channels_last)
    for image_chw, (picture, top, y0, x0, height, width, pad) in zip(image_Bchw, geometries, strict=True):
        ys, inside_y = _within(y0, size[0], height, device=device)
        xs, inside_x = _within(x0, size[1], width, device=device)
        rows = (ys - top).clamp(0, len(pictures[picture]) - 1)
        pixels_hwC = pictures[picture][rows[:, None], xs].float()
        values = (pixels_hwC.flip(2) if norm.reversed_channels else pixels_hwC) * norm.factor_C + norm.offset_C
        if norm.bounds_2C is not None:
            values = values.clamp(*norm.bounds_2C)
        if not norm.mirror:
            values = torch.where((inside_y[:, None] & inside_x)[:, :, None], values, norm.pads_PC[pad])
        image_chw.copy_(values.permute(2, 0, 1))
    return image_Bchw


def _within(start: int, size: int, length: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Find where an image of `length` has the pixels of a window, mirrored into it, and which lie in it anyhow."""
    at = torch.arange(start, start + size, device=device)
    turned = at % (2 * length)
    return torch.minimum(turned, 2 * length - 1 - turned), (at >= 0) & (at < length)


def accumulate(logits: Tensor, stats: Tensor, readout: Readout, *, first: bool) -> None:
    """Accumulate sample by sample; see `operators.accumulate`."""
    num_classes, size, average_logits = logits.shape[2], (stats.shape[1], stats.shape[3]), readout.average == "logits"
    sums, nats = stats[:, :, :num_classes], stats[:, :, num_classes]
    if first:
        stats[:, :, : num_classes + 1] = 0
    for logits_BKhw in logits.float():
        if not average_logits:  # an offset that all have in common would only cost digits
            logits_BKhw = logits_BKhw - logits_BKhw.amax((1, 2, 3), keepdim=True)
        wide = F.interpolate(logits_BKhw, size=size, mode="bilinear", align_corners=readout.align_corners)
        wide = wide / readout.temperature
        log_p = torch.log_softmax(wide, dim=1)
        p = log_p.exp()
        sums += (wide if average_logits else p).transpose(1, 2)
        nats -= (p * log_p).sum(1)


def blend(
    stats: Tensor, canvases: Sequence[Tensor], weights: Sequence[Tensor], windows: Sequence[int], *, num_sums: int,
    scale: float,
) -> None:  # fmt: skip
    """Blend window by window; see `operators.blend`."""
    geometries = zip(*[iter(windows)] * 11, strict=True)
    for stats_hCw, (index, y0, x0, y1, y2, x1, x2, at_y, at_x, fresh_y, fresh_x) in zip(stats, geometries, strict=True):
        canvas, weight = canvases[index], weights[index]
        row = weight[at_y + y1 : at_y + y2, None, None]
        column = weight[at_x + x1 : at_x + x2]
        piece = stats_hCw[y1:y2, :, x1:x2]
        piece = torch.cat((piece[:, :num_sums] * (row * scale * column), piece[:, num_sums:] * (row * column)), dim=1)
        ys = torch.arange(y0 + y1, y0 + y2, device=canvas.device)
        xs = torch.arange(x0 + x1, x0 + x2, device=canvas.device)
        fresh_hw = (ys >= fresh_y)[:, None] & (xs >= fresh_x)
        here = canvas[:, :, x0 + x1 : x0 + x2]
        before = here[ys % len(canvas)].masked_fill(fresh_hw[:, None], 0)
        here[ys % len(canvas)] = before + piece


def read_out(
    canvases: Sequence[Tensor], out: Tensor, segments: Sequence[Rows], *, num_classes: int, softmax: bool,
    voids: Sequence[Tensor], channel: int,
) -> None:  # fmt: skip
    """Read out segment by segment; see `operators.read_out`."""
    for (index, y, num_rows, *offsets, void), threshold_K in segments:
        canvas = canvases[index]
        rows = canvas[torch.arange(y, y + num_rows, device=canvas.device) % len(canvas)]
        merged, expected, extras = rows[:, :num_classes], rows[:, num_classes], rows[:, num_classes + 1 :]
        prob = torch.softmax(merged, dim=1) if softmax else merged
        positive = torch.where(prob > 0, prob, 0)
        confidence, labels = positive.max(1)
        entropy = -torch.where(prob > 1e-37, prob * prob.log(), 0).sum(1)
        second = positive.topk(2, dim=1).values[:, 1] if num_classes > 1 else 0
        disagreement = torch.where(entropy > expected, entropy - expected, 0)
        is_above = torch.stack([entropy > threshold for threshold in threshold_K], dim=1)
        labels = labels.to(torch.uint8).masked_fill(is_above.gather(1, labels[:, None])[:, 0], 255)
        floats = (confidence, confidence - second, entropy, expected, disagreement, prob)
        own = torch.zeros_like(entropy) if channel < 0 else rows[:, channel]
        sums = _row_sums((1 - confidence, entropy, own), voids[void : void + 1])
        for plane, offset in zip((labels, *floats, *extras.unbind(1), sums), offsets, strict=True):
            if offset >= 0:
                begin, flat = int(offset), plane.contiguous().view(-1)
                out[begin : begin + flat.nbytes].copy_(flat.view(torch.uint8))


def _row_sums(maps: Sequence[Tensor], void: Sequence[Tensor]) -> Tensor:
    """Add up maps [h, W] in whole units, int64 [h, maps], where nothing is void."""
    units_hWM = (torch.stack([*maps], 2).nan_to_num(MOST).clamp(-MOST, MOST).double() * UNITS).long()
    for void_hW in void:
        units_hWM = units_hWM.masked_fill(void_hW[:, :, None] != 0, 0)
    return units_hWM.sum(1)
