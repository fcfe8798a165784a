"""Compute figures of hundreds of millions of pixels from counts that are added up picture by picture.

Scores are counted in bins that are intervals of the real line with a relative width of 2^-9, so that ranking figures
need no sorted list of all pixels. Pixels of one bin count as tied; how far that can move a figure is part of it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]

KEPT_BITS = 18
"""Leading bits of a float32 that name its bin: sign, exponent and nine of the mantissa."""
NUM_BINS = 2**KEPT_BITS
CONFIDENCE_BINS = 15
"""As torch-uncertainty's and torchmetrics' default."""
LEAST_PROBABILITY = 1e-7
"""A truth that was given no probability at all costs 16.1 nats instead of infinitely many."""
ACCURATE_FROM = 0.5
"""Share of right pixels from which a patch is accurate, as in Mukhoti & Gal 2018."""


class Bounded(NamedTuple):
    """A figure, and how far it is at most from that of ranking every pixel apart."""

    value: float
    error: float


def bins_of(score: Floats) -> Counts:
    """Return the bin of every score, 0 .. NUM_BINS - 1, in the scores' order. score: float32 of any shape, finite."""
    bits = (np.ascontiguousarray(score, np.float32).ravel() + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered >> (32 - KEPT_BITS)).astype(np.int64) + NUM_BINS // 2


def top_of(bin_index: int) -> float:
    """Return the largest float32 in a bin: the scores up to it are those of this bin and the ones below."""
    last = ((bin_index - NUM_BINS // 2 + 1) << (32 - KEPT_BITS)) - 1
    ordered = np.int32(last - (last == -1))  # which is -0.0, and that is in the bin of 0.0
    return float((ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))).view(np.float32))


class Ranking:
    """A measure of how well a score puts wrong ones above right ones: counts_2N of right and wrong ones by its bin."""

    def __init__(self, counts_2N: NDArray[np.generic] | None = None) -> None:
        self.counts_2N = np.zeros((2, NUM_BINS), np.int64) if counts_2N is None else counts_2N
        self._sum = 0.0

    def add(self, score: Floats, wrong: Mask) -> None:
        """Count pixels or patches; both arrays are of one shape."""
        bins = bins_of(score) + NUM_BINS * wrong.ravel()
        self.counts_2N += np.bincount(bins, minlength=2 * NUM_BINS).reshape(2, NUM_BINS)
        self._sum += float(score.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        """The mean of the scores themselves."""
        return self._sum / max(int(self.counts_2N.sum()), 1)

    def occupied(self) -> tuple[Counts, Doubles, Doubles]:
        """Return the bins that hold anything, in ascending order, and how many right and wrong ones."""
        bins = np.flatnonzero(self.counts_2N.sum(0))
        right, wrong = self.counts_2N[:, bins].astype(np.float64)
        return bins, right, wrong

    def auroc(self) -> Bounded:
        """Return the probability that a wrong one scores above a right one; NaN where there is only one kind."""
        _, right, wrong = self.occupied()
        pairs = right.sum() * wrong.sum()
        if pairs == 0:
            return Bounded(float("nan"), 0.0)
        tied = (wrong * right).sum() / 2
        return Bounded(float(((wrong * (right.cumsum() - right)).sum() + tied) / pairs), float(tied / pairs))

    def aupr(self) -> float:
        """Return the average precision of the wrong ones: over them, the mean share of wrong ones among all that score
        no lower; NaN where there are none."""
        _, right, wrong = (x[::-1] for x in self.occupied())
        precision = wrong.cumsum() / (right + wrong).cumsum()
        return float((precision * wrong).sum() / wrong.sum()) if wrong.sum() else float("nan")

    def fpr95(self) -> float:
        """Return the share of the right ones above the score that 95 % of the wrong ones are above."""
        _, right, wrong = self.occupied()
        if right.sum() == 0 or wrong.sum() == 0:
            return float("nan")
        false, true = (np.append(0, x[::-1].cumsum() / x.sum()) for x in (right, wrong))
        return float(np.interp(0.95, true, false))

    def risk_coverage(self) -> tuple[Doubles, Doubles]:
        """Answer only the lowest scores: the share that is answered, ascending, and the share of it that is wrong."""
        _, right, wrong = self.occupied()
        kept = (right + wrong).cumsum()
        return kept / kept[-1:], wrong.cumsum() / kept

    def aurc(self) -> Bounded:
        """Average the risk over coverages (Geifman & El-Yaniv 2017): integrate `risk_coverage` with ties in random
        order, in which the risk within a bin is (E + s x) / (N + x) for N, E counted before it."""
        _, right, wrong = self.occupied()
        num = right + wrong
        before, share = num.cumsum() - num, wrong / num
        first = before == 0
        growth = np.log(num.cumsum() / np.where(first, 1, before))
        area = share * num + np.where(first, 0, (wrong.cumsum() - wrong - share * before) * growth)
        swing = right * wrong / num  # how far a bin's count of errors can be from the straight line
        widest = np.where(first, swing * (1 + np.log(num / np.where(swing > 0, swing, num))), swing * growth)
        return Bounded(float(area.sum() / num.sum()), float(widest.sum() / num.sum()))

    def augrc(self) -> Bounded:
        """Average over coverages the share of all that is answered and wrong (Traub et al. 2024), ties in random order.

        It is (1 - AUROC) r (1 - r) + r^2 / 2 at the error rate r.
        """
        _, right, wrong = self.occupied()
        num = right + wrong
        area, swing = (num * (wrong.cumsum() - wrong / 2)).sum(), (right * wrong).sum() / 2
        return Bounded(float(area / num.sum() ** 2), float(swing / num.sum() ** 2))

    def excess_aurc(self) -> float:
        """Return AURC less that of a score that puts every error last (Geifman et al. 2019)."""
        risk = float(self.counts_2N[1].sum() / self.counts_2N.sum())
        best = risk + (1 - risk) * float(np.log1p(-risk)) if risk < 1 else 1.0
        return self.aurc().value - best

    def coverage_at(self, risk: float) -> float:
        """Return the largest share that can be answered with this risk among the answered."""
        coverage, risks = self.risk_coverage()
        return float(coverage[risks <= risk].max(initial=0))

    def risk_at(self, coverage: float) -> float:
        """Return the risk when this share is answered."""
        return float(np.interp(coverage, *self.risk_coverage()))


class Reliability:
    """A measure of whether probabilities are what they say: confidence against accuracy, and proper scores."""

    def __init__(self) -> None:
        self.table_3B = np.zeros((3, CONFIDENCE_BINS))
        """Sums by confidence in equal steps: pixels, their confidences' sum, and how many are right."""
        self._fine_3N = np.zeros((3, NUM_BINS))
        self.score_sums = np.zeros(2)
        """Sums over pixels of -log p(truth), nats, and of the Brier score."""

    def add(self, confidence: Floats, truth: Floats, squares: Floats, right: Mask) -> None:
        """Count pixels. truth: probability of the true class. squares: sum over classes of p^2."""
        steps = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        bins = bins_of(np.float32(1) - confidence)  # the fine end of the bins is where most pixels are
        for counts, where in ((self.table_3B, steps), (self._fine_3N, bins)):
            for row, weights in zip(counts, (None, confidence, right), strict=True):
                row += np.bincount(where, weights, len(row))
        self.score_sums[0] -= np.log(np.maximum(truth, LEAST_PROBABILITY)).sum(dtype=np.float64)
        self.score_sums[1] += (squares - 2 * truth).sum(dtype=np.float64) + len(truth)

    @property
    def num(self) -> float:
        return float(self.table_3B[0].sum())

    def nll(self) -> float:
        """Return the mean of -log p(truth), nats."""
        return float(self.score_sums[0] / self.num)

    def brier(self) -> float:
        """Return the mean over pixels of the sum over classes of (p - y)^2, 0 .. 2."""
        return float(self.score_sums[1] / self.num)

    def ece(self) -> float:
        """Return the expected calibration error (Guo et al. 2017): mean of |confidence - accuracy| over equal steps."""
        return self._gap(self.table_3B)

    def adaptive_ece(self) -> float:
        """Return the error over steps of equal numbers of pixels (Nguyen & O'Connor 2015); ties are shared evenly."""
        bins = np.flatnonzero(self._fine_3N[0])
        sums = np.pad(self._fine_3N[:, bins].cumsum(1), ((0, 0), (1, 0)))
        edges = np.linspace(0, self.num, CONFIDENCE_BINS + 1)
        return self._gap(np.diff([np.interp(edges, sums[0], row) for row in sums], axis=1))

    def _gap(self, table_3B: Doubles) -> float:
        return float(np.abs(table_3B[1] - table_3B[2]).sum() / self.num)


def patches(score_HW: Floats, wrong_HW: Mask, known_HW: Mask, *, size: int) -> tuple[Floats, Mask]:
    """Return the mean score of every size x size patch, and whether it is inaccurate (Mukhoti & Gal 2018).

    Both are over the patch's labelled pixels; patches with fewer than half of theirs, and the rest beyond the last
    whole patch, are left out.
    """
    known = _sums(known_HW, size)
    enough = 2 * known >= size * size
    score = _sums(np.where(known_HW, score_HW, 0), size)[enough] / known[enough]
    right = _sums(known_HW & ~wrong_HW, size)[enough] / known[enough]
    return score.astype(np.float32), right < ACCURATE_FROM


def _sums(values_HW: NDArray[np.generic], size: int) -> Doubles:
    height, width = (length // size for length in values_HW.shape)
    cut = values_HW[: height * size, : width * size].astype(np.float64)
    return cut.reshape(height, size, width, size).sum((1, 3))


class PatchCurve(NamedTuple):
    """p(accurate | certain), p(uncertain | inaccurate) and PAvPU over uncertainty thresholds; NaN where undefined."""

    thresholds: Doubles
    accurate_if_certain: Doubles
    uncertain_if_inaccurate: Doubles
    pavpu: Doubles


def patch_curve(ranking: Ranking, thresholds: Doubles) -> PatchCurve:
    """Read the three measures of Mukhoti & Gal 2018 off patches counted by uncertainty; up to a threshold is certain.

    PAvPU = (accurate and certain + inaccurate and uncertain) / all patches.
    """
    accurate, inaccurate = ranking.counts_2N.cumsum(1)[:, bins_of(thresholds.astype(np.float32))]
    num_inaccurate, num = ranking.counts_2N[1].sum(), ranking.counts_2N.sum()
    with np.errstate(invalid="ignore"):
        return PatchCurve(
            thresholds,
            accurate / (accurate + inaccurate),
            np.float64(num_inaccurate - inaccurate) / num_inaccurate,
            np.float64(accurate + num_inaccurate - inaccurate) / num,
        )
