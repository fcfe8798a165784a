"""How far an exported network is from its checkpoint, in the numbers that matter to its users."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.card import Card, Parity
from models.errors import ParityFailed
from serving.engine.moments import accumulate, empty_sums
from serving.engine.uncertainty import read_out

MAX_RELATIVE = 1e-3
"""Of the largest logit: 53-layer random nets differ by 3.5e-4 between engines in fp32."""
MAX_FLIPS_PERCENT = 0.01
MIN_RANK_CORRELATION = 0.9999
VARIANCE_RATIO = (0.99, 1.01)
ENTROPY_RESOLUTION = 1e-5
"""Nats. Entropies that agree to this are the same to every reader of a map, and their order is rounding."""


def measure_parity(wanted_SBKhw: Tensor, got_SBKhw: Tensor, card: Card, *, height: int, width: int) -> Parity:
    """Compare logits of the same input and noise; maps are compared at the window's height x width.

    Raises ParityFailed when the shapes differ or a value is not finite.
    """
    if wanted_SBKhw.shape != got_SBKhw.shape:
        raise ParityFailed(f"the export gives logits {list(got_SBKhw.shape)}; {list(wanted_SBKhw.shape)} are wanted")
    if not torch.isfinite(got_SBKhw).all():
        raise ParityFailed("the export gives logits that are not finite")
    difference = float((wanted_SBKhw - got_SBKhw).abs().max())
    wanted_maps = [_maps(wanted_SBKhw[:, b], card, height, width) for b in range(wanted_SBKhw.shape[1])]
    got_maps = [_maps(got_SBKhw[:, b], card, height, width) for b in range(wanted_SBKhw.shape[1])]
    flips = np.mean([np.mean(w[0] != g[0]) for w, g in zip(wanted_maps, got_maps, strict=True)])
    entropies = [
        np.round(np.concatenate([maps[1].ravel() for maps in side]) / ENTROPY_RESOLUTION)
        for side in (wanted_maps, got_maps)
    ]
    return Parity(
        max_abs=difference,
        relative=relative_error(wanted_SBKhw, got_SBKhw),
        label_flips_percent=100 * float(flips),
        entropy_rank_correlation=rank_correlation(entropies[0], entropies[1]),
        variance_ratio=_variance_ratio(wanted_SBKhw, got_SBKhw),
    )


def relative_error(wanted: Tensor, got: Tensor) -> float:
    """Largest difference over the largest value; infinite where the shapes differ."""
    if wanted.shape != got.shape:
        return float("inf")
    return float((wanted - got).abs().max()) / max(float(wanted.abs().max()), 1e-6)


def worst_parity(figures: Sequence[Parity]) -> Parity:
    """Of each figure the one that is furthest from perfect."""
    return Parity(
        max(parity.max_abs for parity in figures),
        max(parity.relative for parity in figures),
        max(parity.label_flips_percent for parity in figures),
        min(parity.entropy_rank_correlation for parity in figures),
        max((parity.variance_ratio for parity in figures), key=lambda ratio: abs(ratio - 1)),
    )


def check_parity(parity: Parity, card: Card) -> None:
    """Raises ParityFailed naming the first figure that is outside its tolerance."""
    low, high = VARIANCE_RATIO  # a figure that is NaN is outside of every tolerance, hence `not` before each
    failures = {
        f"relative error {parity.relative:.1e}, {MAX_RELATIVE:.0e} allowed": not parity.relative <= MAX_RELATIVE,
        f"{parity.label_flips_percent:.3f} % of labels flip, {MAX_FLIPS_PERCENT} % allowed":
            not parity.label_flips_percent <= MAX_FLIPS_PERCENT,
        f"entropy rank correlation {parity.entropy_rank_correlation:.6f}, {MIN_RANK_CORRELATION} needed":
            not parity.entropy_rank_correlation >= MIN_RANK_CORRELATION,
        f"sample variance is {parity.variance_ratio:.3f} of the checkpoint's, {low} to {high} allowed":
            not low <= parity.variance_ratio <= high,
        f"relative error of its own maps {parity.extras_relative:.1e}, {MAX_RELATIVE:.0e} allowed":
            not parity.extras_relative <= MAX_RELATIVE,
    }  # fmt: skip
    for sentence, failed in failures.items():
        if failed:
            raise ParityFailed(f"{card.name} does not reproduce its checkpoint: {sentence}")


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties broken by position; 1 for equal arrays, also constant ones."""
    if np.array_equal(a, b):
        return 1.0
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _maps(logits_SKhw: Tensor, card: Card, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    prob_hKw, entropy_hw = empty_sums(card.num_classes, height, width)
    accumulate(logits_SKhw, prob_hKw, entropy_hw, readout=card.readout, spread=map)
    samples = np.float32(len(logits_SKhw))
    band = read_out(0, prob_hKw / samples, entropy_hw / samples)
    return band.labels, band.maps["entropy"]


def _variance_ratio(wanted_SBKhw: Tensor, got_SBKhw: Tensor) -> float:
    """Mean variance over samples of the export over the checkpoint's; 1 where a sample axis of 1 has none."""
    if len(wanted_SBKhw) == 1:
        return 1.0
    wanted, got = (float(x.double().var(0).mean()) for x in (wanted_SBKhw, got_SBKhw))
    if wanted == 0:
        raise ParityFailed("the checkpoint's own samples do not differ: its latent has no effect on the logits")
    return got / wanted
