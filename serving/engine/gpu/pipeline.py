"""The steps round a network's calls on a GPU: nothing waits for the device, and only finished rows leave it.

How many kernels a batch needs does not depend on how many windows, samples or requests are in it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penumbra.models.card import Card
from penumbra.serving.engine import operators
from penumbra.serving.engine.canvas import Landing, Segment, Surface, read_out, stitch
from penumbra.serving.engine.moments import Statistics
from penumbra.serving.engine.plain import Norm
from penumbra.serving.engine.prompts import Boxes, Tags
from penumbra.serving.engine.steps import Steps, WindowInput
from penumbra.serving.engine.windows import Window, black, is_black_beyond

BOXES = 64
"""Boxes that are drawn together; each takes a row of every class in every window while they are."""


class DeviceSteps(Steps):
    """The steps on a GPU. Every input has its surface."""

    def __init__(self, card: Card, device: torch.device) -> None:
        super().__init__(card, device)
        spec = card.input
        factor, offset = (self.transfers.up(np.array(values, np.float32)) for values in spec.factor_offset)
        bounds = self.transfers.up(np.array(spec.bounds, np.float32)) if spec.clip else None
        pads_2C = self.transfers.up(np.stack((np.zeros_like(black(spec)), black(spec))))
        self._norm = Norm(factor, offset, pads_2C, card.window.padding == "mirror", spec.order == "BGR", bounds)

    def cut(self, inputs: Sequence[WindowInput]) -> Tensor:
        """Cut the windows as the network takes them, image_B3hw in channels-last."""
        pairs, table = placed(inputs), list[int]()
        strips = dict[Surface, tuple[Tensor, int]]()
        for surface in dict.fromkeys(surface for surface, _ in pairs):
            windows = [window for its, window in pairs if its is surface]
            assert len({*windows}) <= surface.most, "the ring is as high as what a batch of so many windows touches"
            end = min(windows[-1].y0 + windows[-1].height, surface.plan.height)
            strips[surface] = surface.strip(max(windows[0].y0, 0), end)
        for surface, w in pairs:
            plan = surface.plan
            pad = int(is_black_beyond(plan, self.card.window))
            table += [list(strips).index(surface), strips[surface][1], w.y0, w.x0, plan.height, plan.width, pad]
        size = inputs[0].window.height, inputs[0].window.width
        return operators.cut([strip_hWC for strip_hWC, _ in strips.values()], table, size, self._norm)

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
        parts = [torch.split(one, BOXES, dim=1) for one in (class_BNK.float(), y_BNh, x_BNw)]
        masks = [torch.einsum("bnk,bnh,bnw->bkhw", *part) for part in zip(*parts, strict=True)]
        return torch.stack(masks).sum(0).clamp(max=1) if len(masks) > 1 else masks[0].clamp(max=1)

    def answers(self, statistics: Statistics, inputs: Sequence[WindowInput]) -> list[Landing]:
        """Stitch the windows into their requests' canvases, and send the rows that they finish on their way down.

        But for answers of another size, all memory is asked for before a canvas changes, so halves can be run again.
        """
        card, num_samples, pairs = statistics.card, statistics.num_samples, placed(inputs)
        segments, num_bytes = list[list[Segment]](), 4 * len(pairs)  # the windows' flags come first, a float32 each
        for surface, window in pairs:
            segments.append([])
            for rows in surface.pieces(window):
                segment, num_bytes = surface.lay_out(rows, card, num_samples, num_bytes)
                segments[-1].append(segment)
        there, host = self.transfers.room(num_bytes)
        stitch(statistics.stats_BhCw, pairs, card, num_samples)
        assert statistics.flags_B is not None
        there[: 4 * len(pairs)].view(torch.float32).copy_(statistics.flags_B)
        finished = [(its, one) for (its, _), own in zip(pairs, segments, strict=True) for one in own]
        if whole := [(its.canvas_RCW, one) for its, one in finished if not its.plan.answer]:
            read_out(whole, there, card)
        for its, one in finished:
            if its.plan.answer:  # one after another: a piece that is resized takes more than it is read out into
                read_out([(its.rows_of(one.rows, card), one)], there, card)
        copied = self.transfers.down(there, host)
        return [Landing(num_samples, copied, b, own) for b, own in enumerate(segments)]


def placed(inputs: Sequence[WindowInput]) -> list[tuple[Surface, Window]]:
    """Give the windows with what their requests have on the device."""
    return [(one.surface, one.window) for one in inputs if one.surface]
