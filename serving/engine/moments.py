"""From logits to what the samples' distribution needs: per pixel, the sum of p and the sum of H(p).

Both are linear, so they add up over samples, over chunks of samples and, weighted, over windows; memory does
not grow with S. The softmax is taken at window resolution: softmax at feature resolution and a resize afterwards makes
the mutual information wrong by several times its own mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import Card, Readout
from penumbra.models.errors import ModelFault
from penumbra.serving.engine import operators


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments are sums over `num_samples` samples of one window: stats_hCw, as `Statistics` has them."""

    stats_hCw: Tensor
    num_samples: int


class Statistics:
    """Statistics of a batch of windows of one size, while samples are added.

    stats_BhCw: of C the first K are sums of what the card averages (`Readout.average`), probabilities or logits, the
    next is the sum of H(p) in nats, and the others are the network's own maps, no sums. flags_B: 0 for a window whose
    values are all finite, else NaN.
    """

    def __init__(self, card: Card, num_windows: int, size: tuple[int, int], device: torch.device) -> None:
        self.card, self.size, self.num_samples = card, size, 0
        self.stats_BhCw = torch.empty((num_windows, size[0], channels(card), size[1]), device=device)
        self.flags_B: Tensor | None = None
        self._features_BhCw: Tensor | None = None
        """The sums at the features' size, where a published protocol takes the softmax there."""

    def add(self, logits_SBKhw: Tensor) -> None:
        """Add samples of all windows, of any float type."""
        readout, stats_BhCw = self.card.readout, self.stats_BhCw
        if readout.softmax_at == "feature" and readout.average == "probabilities":
            if self._features_BhCw is None:
                size = len(stats_BhCw), logits_SBKhw.shape[3], self.card.num_classes + 1, logits_SBKhw.shape[4]
                self._features_BhCw = stats_BhCw.new_empty(size)
            stats_BhCw = self._features_BhCw
        operators.accumulate(logits_SBKhw, stats_BhCw, readout, first=self.num_samples == 0)
        self._flag(logits_SBKhw.transpose(0, 1))
        self.num_samples += len(logits_SBKhw)

    def finish(self) -> None:
        """Bring sums at the features' size to the window's."""
        if self._features_BhCw is not None:
            self._set(0, self._features_BhCw.transpose(1, 2))

    def set_extras(self, extras_BEhw: Tensor) -> None:
        """Set the network's own maps."""
        self._set(self.card.num_classes + 1, extras_BEhw)
        self._flag(extras_BEhw)

    def _flag(self, values: Tensor) -> None:
        flags_B = flags_of(values)
        self.flags_B = flags_B if self.flags_B is None else self.flags_B + flags_B

    def _set(self, first: int, maps_BDhw: Tensor) -> None:
        resized_BDhw = resize(maps_BDhw, self.size, self.card.readout)
        self.stats_BhCw[:, :, first : first + maps_BDhw.shape[1]] = resized_BDhw.transpose(1, 2)


def flags_of(values: Tensor) -> Tensor:
    """Give 0 for each window whose values [B, ...] are all finite, else NaN."""
    others = tuple(range(1, values.dim()))
    if values.is_cuda:
        return values.mul(0).sum(others, dtype=torch.float32)
    return (values.amin(others) * 0 + values.amax(others) * 0).float()  # no operator that takes as much memory


def channels(card: Card) -> int:
    """Count the channels of a model's statistics."""
    return card.num_classes + 1 + len(card.extra_maps)


def not_finite(card: Card) -> ModelFault:
    """Say that a network gave infinities or NaN."""
    return ModelFault(f"{card.name} produced values that are not finite for this image")


def resize(x_NDhw: Tensor, size: tuple[int, ...], readout: Readout) -> Tensor:
    """Resize bilinearly by the card's rule."""
    return F.interpolate(x_NDhw.float(), size=size, mode="bilinear", align_corners=readout.align_corners)
