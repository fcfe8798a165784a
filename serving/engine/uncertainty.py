"""Read-out: the only non-linear lines. From mean probabilities to labels and the maps of uncertainty.

With p_s the softmax of sample s and pbar its mean over s, per pixel, in nats:
    entropy             H[pbar]              total uncertainty
    expected_entropy    mean_s H[p_s]        aleatoric part
    mutual_information  their difference     epistemic part, >= 0: how much the samples disagree
    seam                the same difference of one sample: how much overlapping windows disagree, 0 where none overlap
    confidence          max_k pbar
    margin              first minus second of pbar
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import IGNORE, Card
from penumbra.serving.engine import kernels
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.raster import Raster


@dataclass(frozen=True, slots=True)
class Band:
    """A band is finished rows of an answer, from row y0 of the image: labels uint8 [h, W] and float32 maps [h, W].

    merged_hKW: what samples and windows were averaged to, probabilities or logits (`Readout.average`). prob_hKW: the
    probabilities. Both are views that are valid until the next band; a GPU keeps the first, and the second unless it
    is an output.
    """

    y0: int
    labels: NDArray[np.uint8]
    maps: dict[str, FloatArray]
    merged_hKW: FloatArray | None
    prob_hKW: FloatArray | None


def read_out(y0: int, merged_hKw: FloatArray, expected_hw: FloatArray, *, card: Card, num_samples: int) -> Band:
    """Read labels and all maps but the model's own out of finished rows; ties between classes go to the lowest.

    merged: what the card averages, of so many samples.
    """
    form = kernels.read_out if kernels.COMPILED else read_out_plain
    prob_hKw = softmax(merged_hKw) if card.readout.average == "logits" else merged_hKw
    labels, confidence, margin, entropy, disagreement = form(prob_hKw, expected_hw)
    maps = dict(zip(card.maps(num_samples), (confidence, margin, entropy, expected_hw, disagreement), strict=False))
    return Band(y0, labels, maps, merged_hKw, prob_hKw)


def abstain(band: Band, *, above_nats: float) -> int:
    """Set the labels of pixels whose entropy is above the threshold to IGNORE; returns how many. Changes labels."""
    unsure_hW = band.maps["entropy"] > above_nats
    band.labels[unsure_hW] = IGNORE
    return int(unsure_hW.sum())


def withhold_void(band: Band, image: Raster) -> None:
    """Say nothing where the image has no measurement. Changes the band's labels, maps and probabilities."""
    void_hW = image.void(slice(band.y0, band.y0 + len(band.labels)))
    if void_hW is None:
        return
    band.labels[void_hW] = IGNORE
    for values_hW in band.maps.values():
        values_hW[void_hW] = np.nan
    if band.prob_hKW is not None:
        band.prob_hKW.transpose(0, 2, 1)[void_hW] = np.nan


def softmax(logits_hKw: FloatArray) -> FloatArray:
    """Compute the softmax over the classes."""
    powers: FloatArray = np.exp(logits_hKw - logits_hKw.max(1, keepdims=True))
    return np.ascontiguousarray(powers / powers.sum(1, keepdims=True))


def read_out_plain(
    prob_hKw: FloatArray, expected_hw: FloatArray
) -> tuple[NDArray[np.uint8], FloatArray, FloatArray, FloatArray, FloatArray]:
    """Compute in the plain form labels, confidence, margin, entropy, and the entropy beyond the expected one."""
    labels = prob_hKw.argmax(1).astype(np.uint8)
    ranked = np.sort(prob_hKw, axis=1)
    confidence = ranked[:, -1].copy()
    second = ranked[:, -2] if ranked.shape[1] > 1 else np.zeros_like(confidence)
    positive = np.where(prob_hKw > 1e-37, prob_hKw, 1)
    entropy = -(prob_hKw * np.log(positive)).sum(1)
    return labels, confidence, confidence - second, entropy, np.maximum(entropy - expected_hw, 0)
