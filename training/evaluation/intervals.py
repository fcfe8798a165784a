"""Put intervals round figures by a block bootstrap: blocks of consecutive frames are drawn anew, with replacement.

Neighbours in a drive are nearly one picture, so frames that are drawn one by one would make the intervals far too
narrow (Künsch 1989). Of a block only sums are kept, 14 kB, whatever its pixels.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import torch

from penumbra.models.confusion import intersection_over_union
from penumbra.training.metrics import CONFIDENCE_BINS, Doubles, Ranking, Reliability, bins_of

BLOCK_FRAMES = 10
RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)
LEAST_SCORE = 2.0**-25
"""Below it float32 knows no other 1 - confidence than 0."""
WITH_INTERVALS = ("seg/mIoU", "seg/NLL", "seg/Brier", "cal/ECE", "sc/AURC", "sc/AUGRC")
"""The figures that have intervals, where there is more than one block."""
FINE_BINS = 16
"""Bins of a ranking that are one bin here, of a relative width of 2^-5."""


def find_blocks(names: Sequence[str], indices: Iterable[int]) -> list[list[int]]:
    """Group the chosen frames into blocks: what is chosen of `BLOCK_FRAMES` frames of a drive that follow each other by
    name, in whatever order they are listed. Blocks and frames come in the order of the names.

    A drive's frames have one name up to the first underscore, as 0016E5_08001 does; of Cityscapes it is a city, through
    which one car drove, for most of its sequences are a single labelled frame.
    """
    drives = [name.partition("_")[0] if "_" in name else "" for name in names]
    # The parts of a name are text and numbers in turns, so that frame_2 comes before frame_10.
    parts = [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in names]
    order = sorted(range(len(names)), key=lambda i: (drives[i], parts[i]))
    chosen, blocks = set(indices), list[list[int]]()
    for _, drive in groupby(order, key=lambda i: drives[i]):
        rows = list(drive)
        blocks += (rows[at : at + BLOCK_FRAMES] for at in range(0, len(rows), BLOCK_FRAMES))
    return [some for block in blocks if (some := [i for i in block if i in chosen])]


def flatten_sums(confusion_KK: torch.Tensor, reliability: Reliability, by_confidence: Ranking) -> Doubles:
    """Put all sums that `figures_of` needs into one vector."""
    first, last = bins_of(np.array([LEAST_SCORE, 1], np.float32))
    counts = by_confidence.counts_2N
    coarse_2M = counts[:, first:last].reshape(2, -1, FINE_BINS).sum(2)
    coarse_2M[:, 0] += counts[:, :first].sum(1)
    parts = (confusion_KK.numpy(), reliability.table_3B, reliability.score_sums, coarse_2M)
    return np.concatenate([part.ravel() for part in parts]).astype(np.float64)


def figures_of(sums: Doubles, num_classes: int) -> dict[str, float]:
    """Compute from such sums the figures that have intervals, by their names."""
    sizes = (num_classes**2, 3 * CONFIDENCE_BINS, 2)
    confusion, table, scores, counts = np.split(sums, np.cumsum(sizes))
    ranking, (pixels, confidence, right) = Ranking(counts.reshape(2, -1)), table.reshape(3, -1)
    iou_K = intersection_over_union(torch.from_numpy(confusion.reshape(num_classes, num_classes)))
    nll, brier, ece = (float(x / pixels.sum()) for x in (*scores, np.abs(confidence - right).sum()))
    values = (float(iou_K.nanmean()), nll, brier, ece, ranking.aurc().value, ranking.augrc().value)
    return dict(zip(WITH_INTERVALS, values, strict=True))


def find_intervals(blocks: Sequence[Doubles], num_classes: int, *, seed: int) -> dict[str, tuple[float, float]]:
    """Return each figure's 2.5th and 97.5th percentile over resamples of the blocks; nothing of a single block."""
    if len(blocks) < 2:
        return {}
    rng = np.random.Generator(np.random.PCG64(seed))
    times_RN = rng.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=RESAMPLES)
    drawn = [figures_of(times @ np.stack(blocks), num_classes) for times in times_RN.astype(np.float64)]
    low, high = np.nanpercentile([list(figures.values()) for figures in drawn], PERCENTILES, axis=0).tolist()
    return dict(zip(drawn[0], zip(low, high, strict=True), strict=True))
