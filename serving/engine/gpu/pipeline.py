"""The steps round a network's calls on a GPU: nothing waits for the device, and only finished rows leave it.

How many kernels a batch needs does not depend on how many windows, samples or requests are in it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from penumbra.models.card import Card
from penumbra.serving.engine.gpu import operators
from penumbra.serving.engine.gpu.surface import Landing, Surface, Transfers, Wanted, segments_of
from penumbra.serving.engine.moments import resize, sums_at_features
from penumbra.serving.engine.options import PROBABILITIES
from penumbra.serving.engine.prompts import Boxes, Tags
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.steps import WindowInput
from penumbra.serving.engine.windows import Window, WindowPlan


class DeviceSteps:
    """The steps on a GPU, in place of `penumbra.serving.engine.steps.HostSteps`. Every input has its surface."""

    def __init__(self, card: Card, device: torch.device) -> None:
        self.card, self.transfers = card, Transfers(device)
        factor, offset = (self.transfers.up(np.array(values, np.float32)) for values in card.input.factor_offset)
        self._norm = operators.Norm(
            factor, offset, torch.zeros_like(offset), mirror=card.window.padding == "mirror",
            reversed_channels=card.input.order == "BGR",
        )  # fmt: skip

    def surface(
        self, image_HW3: Raster, plan: WindowPlan, wanted: Wanted, *, most: int, first_row: int = 0
    ) -> Surface:  # fmt: skip
        """Make what a request has on the device. most: windows of a batch; first_row: the first that is run."""
        channels = self.card.num_classes + 1 + len(self.card.extra_maps)
        return Surface(
            image_HW3, plan, wanted, transfers=self.transfers, channels=channels, first_row=first_row, most=most
        )  # fmt: skip

    def cut(self, inputs: Sequence[WindowInput]) -> Tensor:
        """Cut the windows as the network takes them, image_B3hw in channels-last."""
        is_black = [self._is_black(one) for one in inputs]
        order = np.argsort(is_black, kind="stable")
        parts = [self._cut([inputs[i] for i in order if is_black[i] == kind], kind) for kind in sorted({*is_black})]
        return parts[0] if len(parts) == 1 else torch.cat(parts)[self.transfers.up(np.argsort(order))]

    def _is_black(self, one: WindowInput) -> bool:
        """Tell whether black stands beyond a window's image, rather than zeros (`WindowSpec.padding`)."""
        plan, padding = one.plan, self.card.window.padding
        fits = plan.height <= plan.window_height and plan.width <= plan.window_width
        return padding == "black" or (padding == "mean_or_black" and not fits)

    def _cut(self, inputs: Sequence[WindowInput], is_black: bool) -> Tensor:
        pairs, table = placed(inputs), list[int]()
        strips = dict[Surface, tuple[Tensor, int]]()
        for surface in dict.fromkeys(surface for surface, _ in pairs):
            windows = [window for its, window in pairs if its is surface]
            assert len({*windows}) <= surface.most, "the ring is as high as what a batch of so many windows touches"
            end = min(windows[-1].y0 + windows[-1].height, surface.plan.height)
            strips[surface] = surface.strip(max(windows[0].y0, 0), end)
        for surface, w in pairs:
            plan = surface.plan
            table += [list(strips).index(surface), strips[surface][1], w.y0, w.x0, plan.height, plan.width]
        norm = replace(self._norm, pad_C=self._norm.offset_C) if is_black else self._norm
        size = inputs[0].window.height, inputs[0].window.width
        return operators.cut([strip_hWC for strip_hWC, _ in strips.values()], table, size, norm)

    def noise(self, inputs: Sequence[WindowInput]) -> Tensor:
        """Stack the noise of all windows, noise_SBL."""
        return self.transfers.up(np.stack([one.noise_SL for one in inputs], axis=1))

    def prompts(self, inputs: Sequence[WindowInput]) -> tuple[Tensor, ...]:
        """Stack the prompts, as `penumbra.models.contract.Prompt` has them; nothing where there are none."""
        tags = [one.prompt.tags_K for one in inputs if isinstance(one.prompt, Tags)]
        if tags:
            return (self.transfers.up(np.stack(tags)),)
        sources = [one.prompt for one in inputs if isinstance(one.prompt, Boxes)]
        if not sources:
            return ()
        masks_BKhw = self._paint(inputs, sources)
        if sources[0].alpha is None:
            return (masks_BKhw,)
        return masks_BKhw, self.transfers.up(np.array([source.alpha for source in sources], np.float32))

    def _paint(self, inputs: Sequence[WindowInput], sources: Sequence[Boxes]) -> Tensor:
        """Draw boxes as masks [B, K, h, w] as `Boxes.cut` does; what goes up is their corners."""
        boxes = [source.pixels_within(one.window) for one, source in zip(inputs, sources, strict=True)]
        table = np.zeros((len(inputs), max(map(len, boxes)) + 1, 5), np.int32)
        for row, one, found in zip(table, inputs, boxes, strict=True):
            row[0, :4] = one.window.x0, one.window.y0, one.plan.width, one.plan.height
            row[1 : 1 + len(found)] = found
        table_BN5 = self.transfers.up(table)
        place_B4, boxes_BN5 = table_BN5[:, 0, :4], table_BN5[:, 1:]
        size, inside = (inputs[0].window.width, inputs[0].window.height), []
        for axis, length in enumerate(size):
            at_Bl = place_B4[:, axis, None] + torch.arange(length, device=table_BN5.device)
            image_B1 = place_B4[:, 2 + axis, None]
            if sources[0].mirrored:
                at_Bl = at_Bl % (2 * image_B1)
                at_Bl = torch.minimum(at_Bl, 2 * image_B1 - 1 - at_Bl)
            first_BN1, end_BN1 = boxes_BN5[..., axis, None], boxes_BN5[..., 2 + axis, None]
            is_in_image_Bl = (at_Bl >= 0) & (at_Bl < image_B1)
            inside.append((first_BN1 <= at_Bl[:, None]) & (at_Bl[:, None] < end_BN1) & is_in_image_Bl[:, None])
        class_BNK = boxes_BN5[..., 4:] == torch.arange(self.card.num_classes, device=table_BN5.device)
        x_BNw, y_BNh = (one.float() for one in inside)
        return torch.einsum("bnk,bnh,bnw->bkhw", class_BNK.float(), y_BNh, x_BNw).clamp(max=1)

    def statistics(self, inputs: Sequence[WindowInput]) -> "DeviceStatistics":
        """Begin to sum up the samples of these windows, which are of one size."""
        return DeviceStatistics(self, inputs)


class DeviceStatistics:
    """The statistics of a batch of windows, while samples are added: stats_BhCw, of which C are the classes' sums, the
    sum of entropies, and the network's own maps."""

    def __init__(self, steps: DeviceSteps, inputs: Sequence[WindowInput]) -> None:
        self._steps, self._card, self._inputs = steps, steps.card, inputs
        self._size = inputs[0].window.height, inputs[0].window.width
        self._num_sums = self._card.num_classes + 1
        channels = self._num_sums + len(self._card.extra_maps)
        self._stats_BhCw = torch.empty(
            (len(inputs), self._size[0], channels, self._size[1]), device=steps.transfers.device
        )  # fmt: skip
        self._features_BhCw: Tensor | None = None
        """The sums at the features' size, where the card takes the softmax there."""
        self._flags_B: Tensor | None = None
        """0 for a window whose values are all finite, else NaN."""
        self._num_samples = 0

    def add(self, logits_SBKhw: Tensor) -> None:
        """Add samples."""
        readout, stats_BhCw, is_first = self._card.readout, self._stats_BhCw, self._num_samples == 0
        if sums_at_features(readout):
            if self._features_BhCw is None:
                size = len(self._inputs), logits_SBKhw.shape[3], self._num_sums, logits_SBKhw.shape[4]
                self._features_BhCw = stats_BhCw.new_empty(size)
            stats_BhCw = self._features_BhCw
        operators.accumulate(
            logits_SBKhw, stats_BhCw, first=is_first, align_corners=readout.align_corners,
            temperature=readout.temperature, average_logits=readout.average == "logits",
        )  # fmt: skip
        self._flag(logits_SBKhw.transpose(0, 1))
        self._num_samples += len(logits_SBKhw)

    def _flag(self, values: Tensor) -> None:
        flags_B = values.mul(0).sum(tuple(range(1, values.dim())), dtype=torch.float32)
        self._flags_B = flags_B if self._flags_B is None else self._flags_B + flags_B

    def _set(self, first: int, maps_BChw: Tensor) -> None:
        resized_BChw = resize(maps_BChw, self._size, self._card.readout)
        self._stats_BhCw[:, :, first : first + maps_BChw.shape[1]] = resized_BChw.transpose(1, 2)

    def answers(self, extras_BEhw: Tensor | None) -> list[Landing]:
        """Stitch the windows into their requests' canvases, and send the rows that they finish on their way down.

        All memory is asked for before a canvas changes, so that a batch that does not fit can be run again in halves.
        """
        if self._features_BhCw is not None:
            self._set(0, self._features_BhCw.transpose(1, 2))
        if extras_BEhw is not None:
            self._set(self._num_sums, extras_BEhw)
            self._flag(extras_BEhw)
        pairs = placed(self._inputs)
        segments, num_bytes = segments_of(pairs, self._card, self._num_samples)
        there, host = self._steps.transfers.room(num_bytes)
        surfaces = list(dict.fromkeys(surface for surface, _ in pairs))
        canvases = [surface.canvas_RCW for surface in surfaces]
        windows = [number for surface, w in pairs for number in (surfaces.index(surface), *surface.place(w))]
        operators.blend(
            self._stats_BhCw, canvases, [surface.weights for surface in surfaces], windows,
            num_sums=self._num_sums, scale=1 / self._num_samples,
        )  # fmt: skip
        for surface, window in pairs:
            surface.blended = window.index
        assert self._flags_B is not None
        there[: 4 * len(pairs)].view(torch.float32).copy_(self._flags_B)
        finished = [
            (surfaces.index(pair[0]), segment) for pair, segment in zip(pairs, segments, strict=True) if segment
        ]
        if finished:
            maps = self._card.maps(self._num_samples)
            names = ("labels", *maps[:5], PROBABILITIES, *maps[5:])
            table = [
                n for i, s in finished for n in (i, s.rows.start, len(s.rows), *(s.places.get(m, -1) for m in names))
            ]
            operators.read_out(
                canvases, there, table, [surfaces[i].wanted.above_nats for i, _ in finished],
                num_classes=self._card.num_classes, softmax=self._card.readout.average == "logits",
            )  # fmt: skip
        copied = self._steps.transfers.down(there, host)
        return [Landing(self._num_samples, copied, 4 * b, segment) for b, segment in enumerate(segments)]


def placed(inputs: Sequence[WindowInput]) -> list[tuple[Surface, Window]]:
    """Give the windows with what their requests have on the device."""
    return [(one.surface, one.window) for one in inputs if one.surface]
