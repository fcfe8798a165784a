"""Read-out: the only non-linear lines. From mean probabilities to labels and the maps of uncertainty.

With p_s the softmax of sample s and pbar its mean over s, per pixel, in nats:
    entropy             H[pbar]              total uncertainty
    expected_entropy    mean_s H[p_s]        aleatoric part
    mutual_information  their difference     epistemic part, >= 0: how much the samples disagree
    seam                the same difference of one sample: how much overlapping windows disagree, 0 where none overlap
    confidence          max_k pbar
    margin              first minus second of pbar
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import IGNORE
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.plain import NUM_SUMS

NUM_COLUMNS = NUM_SUMS + 2
"""Numbers of a finished row: the sums, its pixels without a measurement, and with them all that have no label."""


@dataclass(frozen=True, slots=True)
class Band:
    """A band is finished rows of an answer, from row y0 of the image: labels uint8 [h, W] and float32 maps [h, W].

    maps: those that were asked for. prob_hKW: the probabilities, where they were. sums_hN: what scores are made of, as
    `penumbra.serving.engine.operators.read_out` has it, and NUM_COLUMNS once it is `counted`.
    void_hW: pixels without a measurement, where there can be such.
    """

    y0: int
    labels: NDArray[np.uint8]
    maps: dict[str, FloatArray]
    prob_hKW: FloatArray | None
    sums_hN: NDArray[np.int64]
    void_hW: NDArray[np.bool_] | None = None


def counted(band: Band) -> Band:
    """Count in each row the pixels that have no measurement, and those that have no label."""
    num_ignored_h = np.count_nonzero(band.labels == IGNORE, 1)
    num_void_h = 0 * num_ignored_h if band.void_hW is None else np.count_nonzero(band.void_hW, 1)
    return replace(band, sums_hN=np.column_stack((band.sums_hN, num_void_h, num_ignored_h)))


def withhold_classes(band: Band, classes: tuple[int, ...]) -> set[int]:
    """Withhold all that is called one of some classes, and tell which of them occur. Changes the band's labels."""
    found = {k for k in classes if (band.labels == k).any()}
    band.labels[np.isin(band.labels, [*found])] = IGNORE
    return found


def withhold_void(band: Band) -> None:
    """Say nothing where the image has no measurement. Changes the band's labels, maps and probabilities."""
    void_hW = band.void_hW
    if void_hW is None:
        return
    band.labels[void_hW] = IGNORE
    for values_hW in band.maps.values():
        values_hW[void_hW] = np.nan
    if band.prob_hKW is not None:
        band.prob_hKW.transpose(0, 2, 1)[void_hW] = np.nan
