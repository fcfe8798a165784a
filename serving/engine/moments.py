"""From logits to what the samples' distribution needs: per pixel, the sum of p and the sum of H(p).

Both are linear, so they add up over samples, over chunks of samples and, weighted, over windows; memory does
not grow with S. The softmax is taken at window resolution in bands of rows: softmax at feature resolution and
a resize afterwards makes the mutual information wrong by several times its own mean.
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
from penumbra.serving.engine.kernels import FloatArray

BAND = 16
"""Rows per band of the plain form: measured best in memory, and in time with the default allocator."""

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

    logits: any device and float dtype; `spread` shares bands of rows out to threads (compiled form only).
    """
    if readout.average == "logits":
        _accumulate_logits(logits_SKhw, summed_hKw, entropy_hw, readout=readout)
    elif readout.softmax_at == "feature":
        _accumulate_features(logits_SKhw, summed_hKw, entropy_hw, readout=readout)
    elif kernels.COMPILED and logits_SKhw.device.type == "cpu":
        _accumulate_compiled(logits_SKhw, summed_hKw, entropy_hw, readout=readout, spread=spread)
    else:
        accumulate_banded(logits_SKhw, summed_hKw, entropy_hw, readout=readout)


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


def accumulate_banded(logits_SKhw: Tensor, prob_hKw: FloatArray, entropy_hw: FloatArray, *, readout: Readout) -> None:
    """Accumulate in the plain form: resize, softmax and entropy, one band of output rows after another, on any device.

    Bands are summed where the logits are, and leave the device once.
    """
    height, width = entropy_hw.shape
    logits = logits_SKhw.float() / readout.temperature
    below, above, fraction = _sources(logits.shape[2], height, align_corners=readout.align_corners)
    fraction_h1 = fraction.to(logits.device)[:, None]
    prob, entropy = logits.new_empty(prob_hKw.shape), logits.new_empty(entropy_hw.shape)
    for y in range(0, height, BAND):
        rows = slice(y, min(y + BAND, height))
        low, high = logits[:, :, below[rows]], logits[:, :, above[rows]]
        lines = low + (high - low) * fraction_h1[rows]
        wide = _resize_columns(lines, width, align_corners=readout.align_corners)
        log_p = torch.log_softmax(wide, dim=1)
        p_SKhw = log_p.exp()
        prob[rows] = p_SKhw.sum(0).permute(1, 0, 2)
        entropy[rows] = -(p_SKhw * log_p).sum((0, 1))
    prob_hKw += prob.cpu().numpy()
    entropy_hw += entropy.cpu().numpy()


def _resize_columns(lines_SKhw: Tensor, width: int, *, align_corners: bool) -> Tensor:
    if lines_SKhw.shape[3] == width:
        return lines_SKhw
    size = (lines_SKhw.shape[2], width)
    return F.interpolate(lines_SKhw, size=size, mode="bilinear", align_corners=align_corners)


def _sources(length: int, size: int, *, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Find the input positions around every output position, and how far it is from the first (as torch)."""
    at = torch.arange(size, dtype=torch.float32)
    if align_corners:
        at = at * (torch.tensor(length - 1.0) / max(size - 1, 1))
    else:
        at = (at + 0.5) * (torch.tensor(float(length)) / size) - 0.5
    at = at.clamp(0, length - 1)
    below = at.long()
    return below, (below + 1).clamp(max=length - 1), at - below


def _accumulate_features(
    logits_SKhw: Tensor, prob_hKw: FloatArray, entropy_hw: FloatArray, *, readout: Readout
) -> None:
    """Follow a published protocol's order: softmax at feature resolution, mean over samples, then the resize."""
    log_p = torch.log_softmax(logits_SKhw.float() / readout.temperature, dim=1)
    p_SKhw = log_p.exp()
    entropy_hw_low = -(p_SKhw * log_p).sum((0, 1))
    sums = torch.cat((p_SKhw.sum(0), entropy_hw_low[None]))[None]
    full = resize(sums, entropy_hw.shape, readout)[0]
    prob_hKw += full[:-1].permute(1, 0, 2).cpu().numpy()
    entropy_hw += full[-1].cpu().numpy()


def _accumulate_logits(logits_SKhw: Tensor, sum_hKw: FloatArray, entropy_hw: FloatArray, *, readout: Readout) -> None:
    """Average logits as a published protocol does: their sum in place of the probabilities'; entropies as ever."""
    for logits_Khw in logits_SKhw.float() / readout.temperature:
        full = resize(logits_Khw[None], entropy_hw.shape, readout)[0]
        log_p = torch.log_softmax(full, dim=0)
        sum_hKw += full.permute(1, 0, 2).cpu().numpy()
        entropy_hw -= (log_p.exp() * log_p).sum(0).cpu().numpy()


def resize(x_NDhw: Tensor, size: tuple[int, ...], readout: Readout) -> Tensor:
    """Resize bilinearly by the card's rule."""
    return F.interpolate(x_NDhw.float(), size=size, mode="bilinear", align_corners=readout.align_corners)
