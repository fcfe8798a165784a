"""Read-out: the only non-linear lines. From mean probabilities to labels and the maps of uncertainty.

With p_s the softmax of sample s and pbar its mean over s, per pixel, in nats:
    entropy             H[pbar]              total uncertainty
    expected_entropy    mean_s H[p_s]        aleatoric part
    mutual_information  their difference     epistemic part, >= 0: how much the samples disagree
    confidence          max_k pbar
    margin              first minus second of pbar
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.card import MAPS
from serving.engine import kernels
from serving.engine.kernels import FloatArray


@dataclass(frozen=True, slots=True)
class Band:
    """Finished rows of an answer, from row y0 of the image: labels uint8 [h, W] and float32 maps [h, W]."""

    y0: int
    labels: NDArray[np.uint8]
    maps: dict[str, FloatArray]


def read_out(y0: int, prob_hKw: FloatArray, expected_hw: FloatArray) -> Band:
    """Labels and all maps of finished rows; ties between classes go to the lowest."""
    form = kernels.read_out if kernels.COMPILED else read_out_plain
    labels, confidence, margin, entropy, information = form(prob_hKw, expected_hw)
    return Band(y0, labels, dict(zip(MAPS, (confidence, margin, entropy, expected_hw, information), strict=True)))


def read_out_plain(
    prob_hKw: FloatArray, expected_hw: FloatArray
) -> tuple[NDArray[np.uint8], FloatArray, FloatArray, FloatArray, FloatArray]:
    """The plain form: labels, confidence, margin, entropy, mutual information."""
    labels = prob_hKw.argmax(1).astype(np.uint8)
    ranked = np.sort(prob_hKw, axis=1)
    confidence = ranked[:, -1].copy()
    second = ranked[:, -2] if ranked.shape[1] > 1 else np.zeros_like(confidence)
    positive = np.where(prob_hKw > 1e-37, prob_hKw, 1)
    entropy = -(prob_hKw * np.log(positive)).sum(1)
    return labels, confidence, confidence - second, entropy, np.maximum(entropy - expected_hw, 0)
