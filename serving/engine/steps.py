"""What lies around a network's calls: windows become its input, and its logits become what is stitched.

On a CPU these are the steps below, whose moments each request's own thread stitches and reads out; on a GPU they are
those of `penumbra.serving.engine.gpu.pipeline`, which stitches and reads out where the logits are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from penumbra.models.card import Card
from penumbra.models.errors import PenumbraError
from penumbra.serving.engine import kernels
from penumbra.serving.engine.canvas import Copied, Landing, Surface, Transfers, Wanted, channel_of_novelty, lay_out
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.moments import Moments, Statistics, not_finite
from penumbra.serving.engine.prompts import PromptSource
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.windows import Window, WindowPlan, cut

Answer = Moments | Landing | PenumbraError
"""What becomes of a window."""


@dataclass(frozen=True, slots=True)
class WindowInput:
    """A window's input is its place in an image, its noise_SL, and its prompt if there is one.

    surface: where a GPU keeps what belongs to the request. views: in which it is run (`penumbra.serving.engine.views`).
    wanted: what of the answer is read out, where the window is the picture's only one.
    """

    image_HWC: Raster
    window: Window
    plan: WindowPlan
    noise_SL: FloatArray
    prompt: PromptSource | None = None
    surface: Surface | None = None
    views: str = "none"
    wanted: Wanted | None = None


class Steps:
    """The steps that are the same on every device."""

    def __init__(self, card: Card, device: torch.device) -> None:
        self.card, self.transfers = card, Transfers(device)

    def noise(self, inputs: Sequence[WindowInput]) -> Tensor:
        """Stack the noise of all windows, noise_SBL."""
        return self.transfers.up(np.stack([one.noise_SL for one in inputs], axis=1))

    def is_only(self, one: WindowInput) -> bool:
        """Tell whether a window's one sample is all of an answer, which is read out of its logits (`answer`)."""
        return False


class HostSteps(Steps):
    """The steps on a CPU."""

    def cut(self, inputs: Sequence[WindowInput]) -> Tensor:
        """Cut the windows as the network takes them, image_B3hw."""
        spec, norm = self.card.window, self.card.input
        windows = [cut(one.image_HWC, one.window, one.plan, spec=spec, norm=norm) for one in inputs]
        stacked = np.stack(windows) if len(windows) > 1 else windows[0][None]
        return torch.from_numpy(stacked).permute(0, 3, 1, 2)

    def prompts(self, inputs: Sequence[WindowInput]) -> tuple[Tensor, ...]:
        """Stack the prompts, as `penumbra.models.contract.Prompt` has them; nothing where there are none."""
        cuts = [one.prompt.cut(one.window, one.plan) for one in inputs if one.prompt]
        return tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*cuts, strict=True))

    def is_only(self, one: WindowInput) -> bool:
        rule = self.card.readout.softmax_at, self.card.readout.average
        is_one = len(one.noise_SL) == 1 and one.views == "none" and one.wanted is not None
        return kernels.COMPILED is not None and is_one and rule == ("window", "probabilities")

    def answers(self, statistics: Statistics, inputs: Sequence[WindowInput]) -> list[Answer]:
        """Give every window's moments, or the fault that ends it; each request's own thread stitches them."""
        fault, num_samples = not_finite(statistics.card), statistics.num_samples
        assert statistics.flags_B is not None
        is_shared = any(one.image_HWC is not inputs[0].image_HWC for one in inputs)
        return [
            # Else a caller who reads slowly would keep the windows of all others in these batches.
            Moments(stats_hCw.clone() if is_shared else stats_hCw, num_samples) if flag == 0 else fault
            for stats_hCw, flag in zip(statistics.stats_BhCw, statistics.flags_B.tolist(), strict=True)
        ]


def answer(one: WindowInput, logits_Khw: Tensor, extras_Ehw: Tensor, card: Card) -> Landing:
    """Answer a picture whose only window and sample this is. extras: the network's own maps, at the window's size."""
    window, (height, width) = one.window, one.image_HWC.shape[:2]
    assert one.wanted and len(logits_Khw) == card.num_classes
    segment, num_bytes = lay_out(one.wanted, range(height), width, card, 1, start=4)  # behind the float of `is_finite`
    void_hW = one.image_HWC.void(slice(0, height))
    out = torch.empty(num_bytes, dtype=torch.uint8)
    out[:4] = 0
    kernels.answer(
        logits_Khw, extras_Ehw, (max(-window.y0, 0), max(-window.x0, 0)), out, card.readout,
        segment=[width, *segment.table], thresholds=segment.thresholds_K, void_HW=void_hW,
        channel=channel_of_novelty(card),
    )  # fmt: skip
    return Landing(1, Copied(out, None), 0, [replace(segment, void_hW=(void_hW, None))])
