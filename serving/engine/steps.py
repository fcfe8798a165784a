"""What lies around a network's calls: windows become its input, and its logits become what is stitched.

On a CPU these are the steps below, whose moments each request's own thread stitches and reads out; on a GPU they are
those of `penumbra.serving.engine.gpu.pipeline`, which stitches and reads out where the logits are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from penumbra.models.card import Card
from penumbra.models.errors import ModelFault
from penumbra.serving.engine.gpu.surface import Landing, Surface
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.moments import Moments, Spread, accumulate, empty_sums, resize
from penumbra.serving.engine.prompts import PromptSource
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.windows import Window, WindowPlan, cut

Answer = Moments | Landing | ModelFault
"""What becomes of a window."""


@dataclass(frozen=True, slots=True)
class WindowInput:
    """A window's input is its place in an image, its noise_SL, and its prompt if there is one.

    surface: where a GPU keeps what belongs to the request.
    """

    image_HW3: Raster
    window: Window
    plan: WindowPlan
    noise_SL: FloatArray
    prompt: PromptSource | None = None
    surface: Surface | None = None


class HostSteps:
    """The steps on a CPU. `spread` shares bands of rows out to threads (compiled form only)."""

    def __init__(self, card: Card, spread: Spread) -> None:
        self._card, self._spread = card, spread

    def cut(self, inputs: Sequence[WindowInput]) -> Tensor:
        """Cut the windows as the network takes them, image_B3hw."""
        spec, norm = self._card.window, self._card.input
        windows = [cut(one.image_HW3, one.window, one.plan, spec=spec, norm=norm) for one in inputs]
        return torch.from_numpy(np.stack(windows)).permute(0, 3, 1, 2)

    def noise(self, inputs: Sequence[WindowInput]) -> Tensor:
        """Stack the noise of all windows, noise_SBL."""
        return torch.from_numpy(np.stack([one.noise_SL for one in inputs], axis=1))

    def prompts(self, inputs: Sequence[WindowInput]) -> tuple[Tensor, ...]:
        """Stack the prompts, as `penumbra.models.contract.Prompt` has them; nothing where there are none."""
        cuts = [one.prompt.cut(one.window, one.plan) for one in inputs if one.prompt]
        return tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*cuts, strict=True))

    def statistics(self, inputs: Sequence[WindowInput]) -> "HostStatistics":
        """Begin to sum up the samples of these windows, which are of one size."""
        return HostStatistics(self._card, inputs, self._spread)


class HostStatistics:
    """The moments of a batch of windows, while samples are added."""

    def __init__(self, card: Card, inputs: Sequence[WindowInput], spread: Spread) -> None:
        self._card, self._spread = card, spread
        self._size = inputs[0].window.height, inputs[0].window.width
        self._sums = [empty_sums(card.num_classes, *self._size) for _ in inputs]
        self._finite = [True] * len(inputs)
        self._num_samples = 0

    def add(self, logits_SBKhw: Tensor) -> None:
        """Add samples. A window whose logits are not finite keeps its sums, and answers with a fault."""
        self._num_samples += len(logits_SBKhw)
        for b, sums in enumerate(self._sums):
            logits_SKhw = logits_SBKhw[:, b]
            self._finite[b] = self._finite[b] and bool(torch.isfinite(logits_SKhw).all())
            if self._finite[b]:
                accumulate(logits_SKhw, *sums, readout=self._card.readout, spread=self._spread)

    def answers(self, extras_BEhw: Tensor | None) -> list[Answer]:
        """Give every window's moments, with the network's own maps at the window's size, or the fault that ends it."""
        made = [partial(Moments, *sums, self._num_samples) for sums in self._sums]
        if extras_BEhw is None:
            return self._checked([one() for one in made])
        resized_BEhw = resize(extras_BEhw, self._size, self._card.readout)
        extras_BhEw: FloatArray = np.ascontiguousarray(resized_BEhw.permute(0, 2, 1, 3).cpu().numpy())
        self._finite = [
            known and bool(np.isfinite(extras).all()) for known, extras in zip(self._finite, extras_BhEw, strict=True)
        ]
        return self._checked([one(extras) for one, extras in zip(made, extras_BhEw, strict=True)])

    def _checked(self, moments: Sequence[Moments]) -> list[Answer]:
        fault = not_finite(self._card)
        return [one if finite else fault for one, finite in zip(moments, self._finite, strict=True)]


def not_finite(card: Card) -> ModelFault:
    """Say that a network gave infinities or NaN."""
    return ModelFault(f"{card.name} produced values that are not finite for this image")
