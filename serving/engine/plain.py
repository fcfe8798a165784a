"""The plain forms of the operators, in torch on any device: where there is no Triton, and as what Triton is held to.

They loop over windows, samples and segments, and wait for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

UNITS = 2.0**24
"""Units of the sums that scores are made of, in one."""
NUM_SUMS = 3
"""Sums of a row: of 1 - confidence, of the entropy, and of the map of the model's own that novelty goes by."""
MOST = 2.0**15
"""A pixel's map of novelty counts for at most so much, that no sum of a row overflows."""


@dataclass(frozen=True, slots=True)
class OnlySample:
    """The only sample of a picture's only window: its logits, the network's own maps at the window's size, and how the
    logits are resized to that.

    place, width: the row and the column of the window where the picture begins, and the picture's width.
    """

    logits_Khw: Tensor
    extras_Ehw: Tensor
    size: tuple[int, int]
    place: tuple[int, int]
    width: int
    align_corners: bool
    temperature: float


def cut(
    pictures: list[Tensor], windows: list[int], size: list[int], factor: Tensor, offset: Tensor, pad: Tensor,
    bounds: Tensor | None, mirror: bool, reversed_channels: bool,
) -> Tensor:  # fmt: skip
    """Cut and normalise window by window; see `operators.cut`."""
    geometries = list(zip(*[iter(windows)] * 6, strict=True))
    shape = (len(geometries), len(factor), *size)
    image_Bchw = torch.empty(shape, device=factor.device, memory_format=torch.channels_last)
    for image_chw, (picture, top, y0, x0, height, width) in zip(image_Bchw, geometries, strict=True):
        ys, inside_y = _within(y0, size[0], height, device=factor.device)
        xs, inside_x = _within(x0, size[1], width, device=factor.device)
        rows = (ys - top).clamp(0, len(pictures[picture]) - 1)
        pixels_hwC = pictures[picture][rows[:, None], xs].float()
        values = (pixels_hwC.flip(2) if reversed_channels else pixels_hwC) * factor + offset
        if bounds is not None:
            values = values.clamp(bounds[0], bounds[1])
        if not mirror:
            values = torch.where((inside_y[:, None] & inside_x)[:, :, None], values, pad)
        image_chw.copy_(values.permute(2, 0, 1))
    return image_Bchw


def _within(start: int, size: int, length: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Find where an image of `length` has the pixels of a window, mirrored into it, and which lie in it anyhow."""
    at = torch.arange(start, start + size, device=device)
    turned = at % (2 * length)
    return torch.minimum(turned, 2 * length - 1 - turned), (at >= 0) & (at < length)


def accumulate(
    logits: Tensor, stats: Tensor, first: bool, align_corners: bool, temperature: float, average_logits: bool
) -> None:
    """Accumulate sample by sample; see `operators.accumulate`."""
    num_classes, size = logits.shape[2], (stats.shape[1], stats.shape[3])
    sums, nats = stats[:, :, :num_classes], stats[:, :, num_classes]
    if first:
        stats[:, :, : num_classes + 1] = 0
    for logits_BKhw in logits.float():
        if not average_logits:  # an offset that all have in common would only cost digits
            logits_BKhw = logits_BKhw - logits_BKhw.amax((1, 2, 3), keepdim=True)
        wide = F.interpolate(logits_BKhw, size=size, mode="bilinear", align_corners=align_corners)
        wide = wide / temperature
        log_p = torch.log_softmax(wide, dim=1)
        p = log_p.exp()
        sums += (wide if average_logits else p).transpose(1, 2)
        nats -= (p * log_p).sum(1)


def blend(
    stats: Tensor, canvases: list[Tensor], weights: list[Tensor], windows: list[int], num_sums: int, scale: float
) -> None:
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
    canvases: list[Tensor], voids: list[Tensor], out: Tensor, segments: list[int], thresholds: list[float],
    num_classes: int, softmax: bool, channel: int,
) -> None:  # fmt: skip
    """Read out segment by segment; see `operators.read_out`."""
    per_segment = len(segments) * num_classes // len(thresholds)
    for (index, y, num_rows, *offsets, void), threshold_K in zip(
        zip(*[iter(segments)] * per_segment, strict=True), zip(*[iter(thresholds)] * num_classes, strict=True),
        strict=True,
    ):  # fmt: skip
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


def answer(
    only: OnlySample, out: Tensor, segment: list[int], thresholds: list[float], voids: list[Tensor], channel: int
) -> None:  # fmt: skip
    """Read a picture's answer out of logits, by a canvas of all rows; the arguments are those of `read_out`, of one
    segment."""
    (height, width), (y0, x0), num_classes = only.size, only.place, len(only.logits_Khw)
    stats_1hCw = torch.empty((1, height, num_classes + 1 + len(only.extras_Ehw), width))
    accumulate(only.logits_Khw[None, None], stats_1hCw, True, only.align_corners, only.temperature, False)
    stats_1hCw[0, :, num_classes + 1 :] = only.extras_Ehw.transpose(0, 1)
    canvas_hCW = stats_1hCw[0, y0:, :, x0 : x0 + only.width]
    read_out([canvas_hCW], voids, out, segment, thresholds, num_classes, False, channel)
