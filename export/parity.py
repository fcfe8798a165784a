"""How far an exported network is from its checkpoint, in the numbers that matter to its users."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penumbra.models.card import Card, Parity
from penumbra.models.errors import ParityFailed
from penumbra.serving.engine.moments import accumulate, empty_sums
from penumbra.serving.engine.uncertainty import read_out


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a user would not notice. relative: of the largest logit. variance: largest change of the samples'."""

    relative: float
    flips_percent: float
    rank_correlation: float
    variance: float


FULL = Tolerance(relative=1e-3, flips_percent=0.01, rank_correlation=0.9999, variance=0.01)
"""53-layer random nets differ by 3.5e-4 between engines in fp32."""
HALF = Tolerance(relative=0.1, flips_percent=0.5, rank_correlation=0.995, variance=0.1)
"""A logit has 8 bits in bf16, and an outlier among millions says little: labels and ranks decide."""
TOLERANCES = {"fp32": FULL, "tf32": HALF, "bf16": HALF, "fp16": HALF}
ENTROPY_RESOLUTION = 1e-5
"""Nats. Entropies that agree to this are the same to every reader of a map, and their order is rounding."""


def measure_parity(wanted_SBKhw: Tensor, got_SBKhw: Tensor, card: Card, *, height: int, width: int) -> Parity:
    """Compare logits of the same input and noise; maps are compared at the window's height x width.

    Raises ParityFailed when the shapes differ or a value is not finite.
    """
    if wanted_SBKhw.shape != got_SBKhw.shape:
        raise ParityFailed(f"the export gives logits {list(got_SBKhw.shape)}; {list(wanted_SBKhw.shape)} are wanted")
    for whose, logits_SBKhw in (("checkpoint", wanted_SBKhw), ("export", got_SBKhw)):
        if not torch.isfinite(logits_SBKhw).all():
            raise ParityFailed(f"the {whose} gives logits that are not finite")
    difference = float((wanted_SBKhw - got_SBKhw).abs().max())
    wanted_maps = [read_maps(wanted_SBKhw[:, b], card, height, width) for b in range(wanted_SBKhw.shape[1])]
    got_maps = [read_maps(got_SBKhw[:, b], card, height, width) for b in range(wanted_SBKhw.shape[1])]
    flips = np.mean([np.mean(w[0] != g[0]) for w, g in zip(wanted_maps, got_maps, strict=True)])
    wanted, got = (np.concatenate([maps[1].ravel() for maps in side]) for side in (wanted_maps, got_maps))
    return Parity(
        max_abs=difference,
        relative=relative_error(wanted_SBKhw, got_SBKhw),
        label_flips_percent=100 * float(flips),
        entropy_rank_correlation=rank_correlation(
            wanted, np.where(np.abs(got - wanted) <= ENTROPY_RESOLUTION, wanted, got)
        ),
        variance_ratio=_variance_ratio(wanted_SBKhw, got_SBKhw),
    )


def relative_error(wanted: Tensor, got: Tensor) -> float:
    """Largest difference over the largest value; infinite where the shapes differ, NaN where a value is."""
    if wanted.shape != got.shape:
        return float("inf")
    return float((wanted - got).abs().max()) / max(float(wanted.abs().max()), 1e-6)


def worst_parity(figures: Sequence[Parity]) -> Parity:
    """The figure of each kind that is furthest from perfect, and NaN where one of them is."""

    def each(name: str) -> np.ndarray:
        return np.array([getattr(parity, name) for parity in figures])  # numpy's max and min give a NaN back

    ratios = each("variance_ratio")
    return Parity(
        max_abs=float(each("max_abs").max()),
        relative=float(each("relative").max()),
        label_flips_percent=float(each("label_flips_percent").max()),
        entropy_rank_correlation=float(each("entropy_rank_correlation").min()),
        variance_ratio=float(ratios[np.abs(ratios - 1).argmax()]),
        extras_relative=float(each("extras_relative").max()),
    )


def check_parity(parity: Parity, card: Card) -> None:
    """Raises ParityFailed naming the first figure that is outside the tolerance of the card's precision."""
    allowed = TOLERANCES[card.export.precision if card.export else "fp32"]
    low, high = 1 - allowed.variance, 1 + allowed.variance
    # a figure that is NaN is outside of every tolerance, hence `not` before each
    failures = {
        f"relative error {parity.relative:.1e}, {allowed.relative:.0e} allowed":
            not parity.relative <= allowed.relative,
        f"{parity.label_flips_percent:.3f} % of labels flip, {allowed.flips_percent} % allowed":
            not parity.label_flips_percent <= allowed.flips_percent,
        f"entropy rank correlation {parity.entropy_rank_correlation:.6f}, {allowed.rank_correlation} needed":
            not parity.entropy_rank_correlation >= allowed.rank_correlation,
        f"sample variance is {parity.variance_ratio:.3f} of the checkpoint's, {low} to {high} allowed":
            not low <= parity.variance_ratio <= high,
        f"relative error of its own maps {parity.extras_relative:.1e}, {allowed.relative:.0e} allowed":
            not parity.extras_relative <= allowed.relative,
        f"largest difference {parity.max_abs}, a number is wanted": not math.isfinite(parity.max_abs),
        f"mean IoU changes by {parity.miou_change} points, a number is wanted":
            not math.isfinite(parity.miou_change or 0),
    }  # fmt: skip
    for sentence, failed in failures.items():
        if failed:
            raise ParityFailed(f"{card.name} does not reproduce its checkpoint: {sentence}")


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation: equal values share the mean of their ranks. 1 for equal arrays, also constant ones;
    NaN where a value is NaN, and where one array is constant and the other is not."""
    if np.isnan(a).any() or np.isnan(b).any():
        return float("nan")
    if np.array_equal(a, b):
        return 1.0
    ranks_a, ranks_b = (_ranks(values) for values in (a, b))
    spread = float(np.sqrt((ranks_a**2).mean() * (ranks_b**2).mean()))
    return float((ranks_a * ranks_b).mean()) / spread if spread else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of every value, less the mean rank; ties have the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(count) - (count + len(values)) / 2)[place]
    return ranks


def read_maps(logits_SKhw: Tensor, card: Card, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and entropy of one window, read out as the card says."""
    summed_hKw, entropy_hw = empty_sums(card.num_classes, height, width)
    accumulate(logits_SKhw, summed_hKw, entropy_hw, readout=card.readout, spread=map)
    num = len(logits_SKhw)
    band = read_out(0, summed_hKw / np.float32(num), entropy_hw / np.float32(num), card=card, num_samples=num)
    return band.labels, band.maps["entropy"]


def _variance_ratio(wanted_SBKhw: Tensor, got_SBKhw: Tensor) -> float:
    """Mean variance over samples of the export over the checkpoint's; 1 where a sample axis of 1 has none."""
    if len(wanted_SBKhw) == 1:
        return 1.0
    wanted, got = (float(x.double().var(0).mean()) for x in (wanted_SBKhw, got_SBKhw))
    if wanted == 0:
        raise ParityFailed("the checkpoint's own samples do not differ: its latent has no effect on the logits")
    return got / wanted
