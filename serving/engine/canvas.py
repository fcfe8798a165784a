"""A request's canvas, where windows become rows of the answer, and on a GPU its picture and the way down.

The canvas is a ring of rows, image row y at y modulo its height, as high as what a batch of windows touches: its size
depends on the image's width and not on its height. Nothing in it is ever cleared, since the plan knows which pixels no
window before has touched. A CPU blends window by window, in the request's thread. A GPU blends whole batches, in its
lane, from a picture whose rows went up once, as they came, and finished rows come down.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penumbra.models.card import Card
from penumbra.models.errors import BadImage
from penumbra.serving.engine import operators
from penumbra.serving.engine.options import PROBABILITIES
from penumbra.serving.engine.plain import NUM_SUMS, Rows
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.scale import at_size
from penumbra.serving.engine.uncertainty import Band
from penumbra.serving.engine.windows import Window, WindowPlan, clip

SUMS = "row.sums"
"""Stands for the sums that scores are made of among the outputs by name; no map has a dot in its name."""
STRIP_BYTES = 2**24
"""Rows of a picture go up in strips of so many bytes, unless the windows at hand need more."""
PIECE_PIXELS = 2**20
"""An answer of another size than its canvas is resized in pieces of so many pixels, its and the canvas's."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of an answer leaves the device beside the labels: outputs by name. above_nats_K: the entropy above which the
    label of each class is withheld; empty where no risk is bounded. Where it is -inf labels do leave the device, for
    it to be known whether the class occurs."""

    outputs: tuple[str, ...]
    above_nats_K: tuple[float, ...] = ()

    @property
    def withheld(self) -> tuple[int, ...]:
        """The classes that are withheld altogether."""
        return tuple(k for k, nats in enumerate(self.above_nats_K) if nats == -math.inf)


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes that are copied to the host. done: says when; None where there is nothing to wait for."""

    host: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> NDArray[np.uint8]:
        """Wait for the copy. What failed on the device before it is raised here."""
        if self.done:
            self.done.synchronize()
        copied: NDArray[np.uint8] = self.host.numpy()
        return copied


class Transfers:
    """Copies between the host and a device that hold up neither: through pinned memory, downward on a stream of their
    own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def up(self, array: NDArray[np.generic]) -> Tensor:
        """Copy an array to the device, ahead of all that is queued there later."""
        kind = torch.from_numpy(np.empty(0, array.dtype))
        host = kind.new_empty(array.shape, pin_memory=self._stream is not None)
        host.numpy()[...] = array
        return host.to(self.device, non_blocking=True)

    def room(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """Make room for bytes on the device, zeros there, and on the host."""
        there = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        return there, torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) if self._stream else there

    def down(self, there: Tensor, host: Tensor) -> Copied:
        """Copy bytes to the host once all that is queued now is done, while what is queued later runs."""
        if not self._stream:
            return Copied(host, None)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(there, non_blocking=True)
            done.record()
        there.record_stream(self._stream)
        return Copied(host, done)


class Surface:
    """A request's picture, blend weights and canvas on a device. It is used by one lane at a time, in the plan's order.

    canvas_RCW: a ring of rows; weights: those of all rows of windows, and then of all columns. blended: the index of
    the last window that is in the canvas.
    """

    def __init__(
        self, image_HWC: Raster, plan: WindowPlan, wanted: Wanted, *, transfers: Transfers, channels: int,
        first_y: int = 0, most: int,
    ) -> None:  # fmt: skip
        """first_y: the row of the image whose band is the first to be finished. most: windows of a batch."""
        self.plan, self.wanted, self.most, self.blended = plan, wanted, most, -1
        self._image_HWC, self._transfers = at_size(image_HWC, (plan.height, plan.width)), transfers
        self._original_HWC = image_HWC
        self._first_y, self._first_row = first_y, plan.row_before(first_y)
        self._top = self._end = max(plan.starts_y[self._first_row], 0)
        self._strip_hWC: Tensor | None = None
        self.weights = transfers.up(np.concatenate((*plan.weights_y, *plan.weights_x)))
        size = ring_height(plan, most), channels, plan.width
        self.canvas_RCW = torch.empty(size, device=transfers.device)

    def strip(self, y0: int, y1: int) -> tuple[Tensor, int]:
        """Give a strip of the picture with its rows [y0, y1), and its first row; rows before y0 are forgotten."""
        if y1 > self._end or self._strip_hWC is None:
            height, width, num_bands = self._image_HWC.shape
            end = min(height, max(y1, self._end + STRIP_BYTES // (self._image_HWC.dtype.itemsize * num_bands * width)))
            try:
                rows_hWC = self._image_HWC[self._end : end, :]
            except BadImage:  # what is sound before the damage is answered first, as on a CPU
                end = y1
                rows_hWC = self._image_HWC[self._end : end, :]
            fresh_hWC = self._transfers.up(rows_hWC)
            kept = [] if self._strip_hWC is None else [self._strip_hWC[y0 - self._top :]]
            self._strip_hWC = torch.cat((*kept, fresh_hWC)) if kept and len(kept[0]) else fresh_hWC
            self._top, self._end = y0 if kept else self._top, end
        return self._strip_hWC, self._top

    def place(self, window: Window) -> list[int]:
        """Say where the canvas takes a window: its origin, the part of it that lies in the image, the places of its
        row's and its column's weights, and the row and column from which on no window has been before.

        Raises RuntimeError for a window that is in the canvas already, as after a batch that failed too late."""
        plan = self.plan
        if window.index <= self.blended and (window.row, window.column) != (self._first_row, 0):
            raise RuntimeError(f"window {window.index} is in the canvas already, and cannot be added again")
        ((above, below), (left, right)) = clip(window, plan)[2]
        place_y = window.row * plan.window_height
        place_x = len(plan.starts_y) * plan.window_height + window.column * plan.window_width
        fresh_y = 0 if window.row == self._first_row else plan.starts_y[window.row - 1] + plan.window_height
        fresh_x = 0 if window.column == 0 else plan.starts_x[window.column - 1] + plan.window_width
        inside = above, window.height - below, left, window.width - right
        return [window.y0, window.x0, *inside, place_y, place_x, fresh_y, fresh_x]

    def lay_out(self, rows: range, card: Card, num_samples: int, start: int = 0) -> "tuple[Segment, int]":
        """Lay out what is wanted of finished rows; see `lay_out`."""
        segment, end = lay_out(self.wanted, rows, self.plan.size[1], card, num_samples, start)
        void_hW = self._original_HWC.void(slice(rows.start, rows.stop))
        there_hW = None if void_hW is None else self._transfers.up(void_hW.view(np.uint8))
        return replace(segment, void_hW=(void_hW, there_hW)), end

    def finished(self, window: Window) -> range:
        """Give the rows that no window after this one touches; none unless it is the last of its row of windows, nor
        those above the first that is asked for."""
        plan, first = self.plan, max(self.plan.starts_y[window.row], 0)
        if window.column + 1 < len(plan.starts_x) or first < self._first_y:
            return range(0)
        end = plan.height if window.row + 1 == len(plan.starts_y) else plan.starts_y[window.row + 1]
        return range(plan.rows_above(first), plan.rows_above(end))

    def pieces(self, window: Window) -> list[range]:
        """Cut the rows that a window finishes into pieces as large as are read out at once."""
        rows = self.finished(window)
        step = rows_of_piece(self.plan) if self.plan.answer else max(1, len(rows))
        return [rows[first : first + step] for first in range(0, len(rows), step)]

    def rows_of(self, rows: range, card: Card) -> Tensor:
        """Give a ring that has these rows of the answer: the canvas, or where that is of another size a part of it,
        resized bilinearly.

        What samples disagree about is resized as it is, and the expected entropy is what it leaves of the entropy: a
        mean of pixels of two classes is unsure of its class, and no sample disagrees with another about that, nor one
        window with its neighbour.
        """
        if not self.plan.answer:
            return self.canvas_RCW
        first, last = (self._above(y) for y in (rows.start, rows.stop - 1))
        ys = torch.arange(first, min(last + 2, self.plan.height), device=self.canvas_RCW.device)
        canvas_RCw, k = self.canvas_RCW[ys % len(self.canvas_RCW)], card.num_classes
        resized_hCW = self._resized(canvas_RCw, rows)
        if {"expected_entropy", "mutual_information", "seam"} & {*self.wanted.outputs}:
            disagreement_R1w = entropy_of(canvas_RCw, card) - canvas_RCw[:, k : k + 1]
            resized_hCW[:, k : k + 1] = entropy_of(resized_hCW, card) - self._resized(disagreement_R1w, rows)
        return resized_hCW

    def _above(self, y: int) -> int:
        return int(max((y + 0.5) * (self.plan.height / self.plan.size[0]) - 0.5, 0))

    def _resized(self, near_RCw: Tensor, rows: range) -> Tensor:
        plan, (height, width), device = self.plan, self.plan.size, near_RCw.device
        ys = torch.arange(rows.start, rows.stop, device=device).roll(rows.start)
        above, below, part_h = between(ys, plan.height, height)
        left, right, part_W = between(torch.arange(width, device=device), plan.width, width)
        top, part_h11 = self._above(rows.start), part_h[:, None, None]
        rows_hCw = torch.lerp(near_RCw[above - top], near_RCw[below - top], part_h11)
        return torch.lerp(rows_hCw[..., left], rows_hCw[..., right], part_W)


def rows_of_piece(plan: WindowPlan) -> int:
    """Count the rows of an answer of another size that are read out at once."""
    height, width = plan.size
    return max(1, PIECE_PIXELS // max(width, plan.width * plan.height // height))


def entropy_of(stats_hCW: Tensor, card: Card) -> Tensor:
    """Compute the entropy [h, 1, W] of mean probabilities, or where a card averages logits of mean logits, in nats."""
    merged_hKW = stats_hCW[:, : card.num_classes]
    prob_hKW = torch.softmax(merged_hKW, 1) if card.readout.average == "logits" else merged_hKW
    nats_hKW: Tensor = torch.special.entr(prob_hKW)
    return nats_hKW.sum(1, keepdim=True)


def between(places: Tensor, length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find between which of `length` pixels those of an image of `size` lie, and how far from the first."""
    at = ((places.double() + 0.5) * (length / size) - 0.5).clamp(0, length - 1)
    first = at.floor().long()
    return first, (first + 1).clamp(max=length - 1), (at - first).float()


def ring_height(plan: WindowPlan, most: int) -> int:
    """Count the rows from the first that a batch may leave unfinished before it begins, to the last that it touches."""
    further = (most + len(plan.starts_x) - 2) // len(plan.starts_x)
    ends = [min(y0 + plan.window_height, plan.height) for y0 in plan.starts_y]
    ends = ends[further:] or ends[-1:]
    return bool(plan.answer) + max(
        end - max(y0, 0) for y0, end in zip(plan.starts_y, ends + ends[-1:] * further, strict=False)
    )


@dataclass(frozen=True, slots=True)
class Segment:
    """Finished rows, and where their outputs lie in the bytes that come down, by name, with `labels` and `SUMS`.

    table, thresholds_K: the rows and places, and the entropy above which the label of each class is withheld, as
    `operators.read_out` takes them. void_hW: which of their pixels hold no measurement, here and, uint8, on the
    device.
    """

    rows: range
    width: int
    num_classes: int
    places: dict[str, int]
    table: list[int]
    thresholds_K: list[float]
    void_hW: tuple[NDArray[np.bool_] | None, Tensor | None] = (None, None)

    def band(self, copied: NDArray[np.uint8]) -> Band:
        """Read the rows of an answer from the bytes."""
        size = len(self.rows), self.width
        arrays, places = {}, dict(self.places)
        sums_h3 = np.ndarray((size[0], NUM_SUMS), np.int64, copied, offset=places.pop(SUMS))
        for name, place in places.items():
            shape = (size[0], self.num_classes, size[1]) if name == PROBABILITIES else size
            kind = np.dtype(np.uint8 if name == "labels" else np.float32)
            arrays[name] = np.ndarray(shape, kind, copied, offset=place)
        labels, prob_hKW = arrays.pop("labels"), arrays.pop(PROBABILITIES, None)
        return Band(self.rows.start, labels, arrays, prob_hKW, sums_h3, self.void_hW[0])


def lay_out(
    wanted: Wanted, rows: range, width: int, card: Card, num_samples: int, start: int = 0
) -> tuple[Segment, int]:  # fmt: skip
    """Lay out what is wanted of finished rows in the bytes from `start` on, and say where the next may begin."""
    maps, num_classes, places = card.maps(num_samples), card.num_classes, {SUMS: -(-start // 8) * 8}
    start = places[SUMS] + 8 * NUM_SUMS * len(rows)
    for name in sorted({*maps, PROBABILITIES} & {*wanted.outputs}):
        places[name] = start
        start += 4 * len(rows) * width * (num_classes if name == PROBABILITIES else 1)
    places["labels"] = start
    planes = ("labels", *maps[:5], PROBABILITIES, *maps[5:], SUMS)
    table = [rows.start, len(rows), *(places.get(name, -1) for name in planes)]
    above_K = [math.inf if nats == -math.inf else nats for nats in wanted.above_nats_K or (math.inf,) * num_classes]
    return Segment(rows, width, num_classes, places, table, above_K), start + -(-len(rows) * width // 4) * 4


@dataclass(frozen=True, slots=True)
class Landing:
    """What a window on a device is answered with, and on a CPU the only one of a picture that has a single sample: the
    rows of the answer that it finished, on their way to the host.

    index: of the window in its batch, and of the float32 that is 0 where all its values are finite.
    """

    num_samples: int
    copied: Copied
    index: int
    segments: Sequence[Segment]

    @property
    def is_finite(self) -> bool:
        """Tell whether all values of the window are finite, once they are there."""
        return bool(self.copied.wait()[4 * self.index :][:4].view(np.float32)[0] == 0)

    def bands(self) -> Iterator[Band]:
        """Yield the finished rows."""
        for segment in self.segments:
            yield segment.band(self.copied.wait())


def stitch(stats_BhCw: Tensor, pairs: Sequence[tuple[Surface, Window]], card: Card, num_samples: int) -> None:
    """Blend windows into their canvases."""
    surfaces = list(dict.fromkeys(surface for surface, _ in pairs))
    windows = [number for surface, window in pairs for number in (surfaces.index(surface), *surface.place(window))]
    operators.blend(
        stats_BhCw, [surface.canvas_RCW for surface in surfaces], [surface.weights for surface in surfaces], windows,
        num_sums=card.num_classes + 1, scale=1 / num_samples,
    )  # fmt: skip
    for surface, window in pairs:
        surface.blended = window.index


def read_band(canvas_RCW: Tensor, segment: Segment, num_bytes: int, card: Card) -> Band:
    """Read finished rows out of a canvas on a CPU."""
    out = torch.zeros(num_bytes, dtype=torch.uint8)
    read_out([(canvas_RCW, segment)], out, card)
    return segment.band(out.numpy())


def read_out(finished: Sequence[tuple[Tensor, Segment]], out: Tensor, card: Card) -> None:
    """Read finished rows out of canvases into `out`."""
    canvases = [canvas for canvas, _ in finished]
    segments, voids = list[Rows](), list[Tensor]()
    for i, (_, segment) in enumerate(finished):
        void_hW = segment.void_hW[1]
        segments.append(([i, *segment.table, -1 if void_hW is None else len(voids)], segment.thresholds_K))
        voids += [] if void_hW is None else [void_hW]
    operators.read_out(
        canvases, out, segments, num_classes=card.num_classes, softmax=card.readout.average == "logits",
        channel=channel_of_novelty(card), voids=voids,
    )  # fmt: skip


def channel_of_novelty(card: Card) -> int:
    """Find the channel of the model's own map that novelty goes by; -1 where there is none."""
    extras, own = [extra.name for extra in card.extra_maps], card.maps_of_novelty[-1]
    return card.num_classes + 1 + extras.index(own) if own in extras else -1
