"""From logits to what the samples' distribution needs: per pixel, the sum of p and the sum of H(p).

Both are linear, so they add up over samples, over chunks of samples and, weighted, over windows; memory does
not grow with S. The softmax is taken at window resolution: softmax at feature resolution and a resize afterwards makes
the mutual information wrong by several times its own mean.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from penumbra.models.card import Readout
from penumbra.serving.engine import kernels
from penumbra.serving.engine.gpu import plain
from penumbra.serving.engine.kernels import FloatArray

Spread = Callable[[Callable[[range], None], Iterable[range]], Iterable[None]]
"""Runs a function on every range: `map`, or that of a thread pool."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments are sums over `num_samples` samples of one window.

    summed_hKw: of what the card averages (`Readout.average`), probabilities or logits. entropy_hw: of H(p) in nats.
    extras_hEw: a method's own maps, no sums.
    """

    summed_hKw: FloatArray
    entropy_hw: FloatArray
    num_samples: int
    extras_hEw: FloatArray | None = None


def empty_sums(num_classes: int, height: int, width: int) -> tuple[FloatArray, FloatArray]:
    """Make zeroed summed_hKw and entropy_hw to accumulate into."""
    return np.zeros((height, num_classes, width), np.float32), np.zeros((height, width), np.float32)


def accumulate(
    logits_SKhw: Tensor, summed_hKw: FloatArray, entropy_hw: FloatArray, *, readout: Readout, spread: Spread
) -> None:
    """Add what the card averages of the samples, and their entropy, at the size of the sums. Changes both sums.

    logits: any float dtype; `spread` shares bands of rows out to threads (compiled form only).
    """
    is_usual = readout.average == "probabilities" and readout.softmax_at == "window"
    if is_usual and kernels.COMPILED:
        _accumulate_compiled(logits_SKhw, summed_hKw, entropy_hw, readout=readout, spread=spread)
    else:
        accumulate_plain(logits_SKhw, summed_hKw, entropy_hw, readout=readout)


def _accumulate_compiled(
    logits_SKhw: Tensor, prob_hKw: FloatArray, entropy_hw: FloatArray, *, readout: Readout, spread: Spread
) -> None:
    logits = logits_SKhw.float().contiguous().numpy()

    def add(rows: range) -> None:
        kernels.accumulate(
            logits, prob_hKw, entropy_hw, rows,
            align_corners=readout.align_corners, temperature=readout.temperature,
        )  # fmt: skip

    height, num_bands = len(prob_hKw), torch.get_num_threads()
    edges = [height * band // num_bands for band in range(num_bands + 1)]
    deque(spread(add, map(range, edges, edges[1:])), maxlen=0)


def accumulate_plain(logits_SKhw: Tensor, summed_hKw: FloatArray, entropy_hw: FloatArray, *, readout: Readout) -> None:
    """Accumulate in the plain form, and as published protocols do: the softmax at feature resolution and then the
    resize, or the sum of logits in place of that of probabilities."""
    num_classes, at_features = logits_SKhw.shape[1], sums_at_features(readout)
    height, width = logits_SKhw.shape[2:] if at_features else entropy_hw.shape
    stats_BhCw = torch.empty(1, height, num_classes + 1, width)
    plain.accumulate(
        logits_SKhw[:, None], stats_BhCw, True, readout.align_corners, readout.temperature, readout.average == "logits"
    )  # fmt: skip
    if at_features:
        stats_BhCw = resize(stats_BhCw.transpose(1, 2), entropy_hw.shape, readout).transpose(1, 2)
    summed_hKw += stats_BhCw[0, :, :num_classes].numpy()
    entropy_hw += stats_BhCw[0, :, num_classes].numpy()


def sums_at_features(readout: Readout) -> bool:
    """Tell whether probabilities are summed up at the features' size, and the sums resized."""
    return readout.softmax_at == "feature" and readout.average == "probabilities"


def resize(x_NDhw: Tensor, size: tuple[int, ...], readout: Readout) -> Tensor:
    """Resize bilinearly by the card's rule."""
    return F.interpolate(x_NDhw.float(), size=size, mode="bilinear", align_corners=readout.align_corners)
