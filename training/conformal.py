"""From the labelled frames of a calibration to entropy thresholds whose risk is bounded: conformal risk control.

With a loss L_i(t) of frame i in [0, 1] that never falls with the threshold t, and n frames that the network's
temperature has not seen (Angelopoulos et al. 2024, theorem 1; arXiv 2208.02814),

    t = the largest with  n / (n + 1) * mean_i L_i(t) + 1 / (n + 1) <= risk   gives   E[L_{n + 1}(t)] <= risk

for a further frame that is exchangeable with the n. What is controlled is an expectation over frames and calibrations.
A risk below 1 / (n + 1) is thus beyond n frames, whatever they show.
"""

import math
from collections.abc import Sequence
from itertools import count

import numpy as np

from penumbra.serving.engine.options import NUM_CANDIDATES, class_candidates
from penumbra.training.metrics import NUM_BINS, Counts, Floats, Mask, bins_of, top_of


class AbstentionLoss:
    """The loss of `max_risk`: the share of a frame's labelled pixels that are answered and wrong.

    losses_N: its sum over frames, by the bin of the entropy at which each wrong pixel begins to count.
    """

    def __init__(self) -> None:
        self.losses_N, self.num_frames = np.zeros(NUM_BINS), 0

    def add(self, entropy: Floats, wrong: Mask) -> None:
        """Add one frame's labelled pixels; a frame without any adds nothing."""
        if entropy.size:
            self.losses_N += np.bincount(bins_of(entropy[wrong]), minlength=NUM_BINS) / entropy.size
            self.num_frames += 1


class ClassLoss:
    """The losses of `max_class_risk`: the wrong share of the labelled pixels that are called class k and answered.

    Its frames are those in which k is called at all, answered or not, and where nothing is answered nothing is wrong.
    The share may fall as t grows, which would void the theorem (its proposition 1); the loss is therefore the largest
    share at any candidate up to t, and what holds of it holds of the share. It holds of any smaller candidate too, and
    so t is also made small enough that all pixels of these frames together have no larger share wrong than the risk.
    """

    def __init__(self, num_classes: int) -> None:
        self.candidates_T = class_candidates(num_classes)
        self.pixels_2KT = np.zeros((2, num_classes, NUM_CANDIDATES), np.int64)
        """Answered, and of these wrong, in all frames together."""
        self.losses_KT, self.num_frames_K = np.zeros((num_classes, NUM_CANDIDATES)), np.zeros(num_classes, np.int64)

    def add(self, entropy: Floats, labels: Counts, wrong: Mask) -> None:
        """Add one frame's labelled pixels. labels: what they are called, before anything is withheld."""
        (num_classes, length), first = self.losses_KT.shape, np.searchsorted(self.candidates_T, entropy)
        cells = (wrong * num_classes + labels) * length + first
        right_KT, wrong_KT = np.bincount(cells, minlength=2 * self.losses_KT.size).reshape(2, -1, length).cumsum(2)
        answered_KT = right_KT + wrong_KT
        self.losses_KT += np.maximum.accumulate(wrong_KT / np.maximum(answered_KT, 1), axis=1)
        self.pixels_2KT += np.stack((answered_KT, wrong_KT))
        self.num_frames_K += answered_KT[:, -1] > 0

    def thresholds(self, risk: float) -> tuple[float | None, ...]:
        """Find for each class the largest candidate whose risk is bounded; None where there is none that answers."""
        bound_KT = (self.losses_KT + 1) / (self.num_frames_K[:, None] + 1)
        answered_KT, wrong_KT = self.pixels_2KT
        fits_KT = (bound_KT <= risk) & (wrong_KT <= risk * answered_KT) & (answered_KT > 0)
        return tuple(float(self.candidates_T[fits_T.nonzero()[0][-1]]) if fits_T.any() else None for fits_T in fits_KT)


def find_thresholds(
    loss: AbstentionLoss, risks: Sequence[float], *, num_classes: int
) -> tuple[dict[float, float], dict[float, str]]:
    """Find entropy thresholds in nats by risk, and for each risk that cannot be guaranteed a sentence why.

    A bin of entropies is answered as a whole or not at all, so binning costs coverage and never the guarantee.
    """
    thresholds: dict[float, float] = {}
    refused: dict[float, str] = {}
    num = loss.num_frames
    bound_N = (loss.losses_N.cumsum() + 1) / (num + 1)
    least, most = bins_of(np.array([0, 1.01 * math.log(num_classes)], np.float32)).tolist()
    for risk in risks:
        last = int(np.searchsorted(bound_N, risk, side="right")) - 1  # up to which pixels may be answered
        if num < least_frames(risk):
            refused[risk] = too_few(risk, num)
        elif last < least:
            refused[risk] = f"a risk of {risk:g} would need abstaining from every pixel, with these {num} frames"
        else:
            thresholds[risk] = max(top_of(min(last, most)), 0.0)
    return thresholds, refused


def least_frames(risk: float) -> int:
    """Say how many frames a risk needs for its thresholds: the least n with 1 / (n + 1) <= risk."""
    return next(n for n in count(max(math.floor(1 / risk) - 2, 0)) if 1 / (n + 1) <= risk)


def too_few(risk: float, num_frames: int) -> str:
    """Say that a risk cannot be guaranteed with so many frames, and how many it needs."""
    needed = least_frames(risk)
    return f"a risk of {risk:g} cannot be guaranteed with {num_frames} frames; at least {needed} are needed"
