"""An export and its checkpoint side by side on labelled pictures: the parity gate's figures on real data."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from penumbra.export.parity import measure_parity, read_maps, worst_parity
from penumbra.models.card import IGNORE, Card, Parity
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption
from penumbra.serving.engine.backends import Backend
from penumbra.serving.engine.noise import SeededNoise
from penumbra.serving.engine.windows import Window, WindowPlan, cover, cut, place

Pixels = NDArray[np.uint8]
Frame = tuple[Pixels, Pixels]
"""image_HW3 and label_HW, IGNORE where nothing is labelled."""


@torch.inference_mode()
def measure_frames(network: Network, graphs: Backend, card: Card, frames: Iterable[Frame]) -> Parity:
    """The worst figure of all windows of all frames, the mean of label flips, and the change of mean IoU.

    Pixels where windows overlap count as often as they are covered. Raises BadOption: there is no frame, or no label.
    """
    figures, num_frames = [], 0
    confusion_KK = [np.zeros((card.num_classes,) * 2, np.int64) for _ in range(2)]
    for image_HW3, label_HW in frames:
        num_frames += 1
        plan = cover(label_HW.shape[0], label_HW.shape[1], card.window)
        for window in plan:
            image = torch.from_numpy(cut(image_HW3, window, plan, spec=card.window, norm=card.input)).permute(2, 0, 1)
            noise = SeededNoise(card.sampling, seed=0, num_samples=card.sampling.default_samples).draw(window.index)
            noise_SBL = torch.from_numpy(noise)[:, None]
            wanted, got = (half.decode(half.encode(image[None]), noise_SBL).cpu() for half in (network, graphs))
            size = {"height": window.height, "width": window.width}
            figures.append(measure_parity(wanted, got, card, **size))
            truth = _truth(label_HW, window, plan)
            for counts_KK, logits_SBKhw in zip(confusion_KK, (wanted, got), strict=True):
                counts_KK += _confusion(truth, read_maps(logits_SBKhw[:, 0], card, **size)[0], card.num_classes)
    if not confusion_KK[0].any():
        raise BadOption("there is no labelled frame to measure the export on, or none of their pixels has a label")
    before, after = map(_mean_iou, confusion_KK)
    flips = float(np.mean([parity.label_flips_percent for parity in figures]))
    return dataclasses.replace(
        worst_parity(figures), label_flips_percent=flips, miou_change=100 * (after - before), num_frames=num_frames
    )


def _truth(label_HW: Pixels, window: Window, plan: WindowPlan) -> Pixels:
    rows, columns, beyond = place(window, plan)
    return np.pad(label_HW[rows, columns], beyond, constant_values=IGNORE)


def _confusion(truth_hw: Pixels, label_hw: Pixels, num_classes: int) -> NDArray[np.int64]:
    """Pixels by true and by answered class, [K, K]."""
    known = truth_hw != IGNORE
    pairs = truth_hw[known].astype(np.int64) * num_classes + label_hw[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def _mean_iou(counts_KK: NDArray[np.int64]) -> float:
    """The mean over the classes that occur in the truth or in the answer."""
    union_K = counts_KK.sum(0) + counts_KK.sum(1) - counts_KK.diagonal()
    return float((counts_KK.diagonal()[union_K > 0] / union_K[union_K > 0]).mean())
