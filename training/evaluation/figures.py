"""The figures of an evaluation: answers are added one by one, and read out under torch-uncertainty's names."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from penumbra.models.card import IGNORE, Calibration, Card
from penumbra.training.evaluate import intersection_over_union
from penumbra.training.evaluation.answers import Answer
from penumbra.training.metrics import Doubles, Floats, Mask, Ranking, Reliability, patch_curve, patches, top_of

PATCH_PX = (4, 8, 16, 32)
UNCERTAINTIES = ("entropy", "mutual_information")
"""Scores of doubt, as far as the answers have them."""
STEPS = np.linspace(0, 1, 101)
"""Where curves are written down."""


class Evaluation:
    """Counts of everything that is measured of one model's answers of so many samples. Memory does not grow with the
    frames."""

    def __init__(self, card: Card, num_samples: int) -> None:
        self.card, self.num_frames = card, 0
        self._confusion = MulticlassConfusionMatrix(card.num_classes, ignore_index=IGNORE, validate_args=False)
        self.reliability = Reliability()
        uncertainties = [name for name in UNCERTAINTIES if name in card.maps(num_samples)]
        extras = tuple(extra.name for extra in card.extra_maps)
        self.rankings = {name: Ranking() for name in ("confidence", *uncertainties, *extras)}
        self.patches = {(name, size): Ranking() for name in uncertainties for size in PATCH_PX}
        self._abstention = Abstention(card.calibration) if card.calibration else None

    def add(self, answer: Answer) -> None:
        """Count one frame; one without any label changes nothing."""
        known_HW, wrong_HW = answer.known_HW, answer.wrong_HW
        if not known_HW.any():
            return
        self.num_frames += 1
        self._confusion.update(torch.from_numpy(answer.labels_HW).long(), torch.from_numpy(answer.truth_HW).long())
        maps = answer.maps | {"confidence": 1 - answer.maps["confidence"]}
        for name, ranking in self.rankings.items():
            ranking.add(maps[name][known_HW], wrong_HW[known_HW])
        for (name, size), ranking in self.patches.items():
            ranking.add(*patches(maps[name], wrong_HW, known_HW, size=size))
        confidence, prob, squares = (
            x_HW[known_HW] for x_HW in (answer.maps["confidence"], answer.prob_HW, answer.squares_HW)
        )
        self.reliability.add(confidence, prob, squares, ~wrong_HW[known_HW])
        if self._abstention:
            self._abstention.add(maps["entropy"][known_HW], wrong_HW[known_HW])

    @property
    def confusion_KK(self) -> torch.Tensor:
        """Counts [truth, prediction] of labelled pixels."""
        return self._confusion.compute().long()

    def figures(self) -> dict[str, float]:
        """All figures by name (docs/evaluation.md); NaN where one is undefined."""
        return {
            **self._segmentation(),
            "seg/NLL": self.reliability.nll(),
            "seg/Brier": self.reliability.brier(),
            "cal/ECE": self.reliability.ece(),
            "cal/aECE": self.reliability.adaptive_ece(),
            **self._selection(),
            **{f"pavpu/{name}/{size}": self._at_mean(ranking) for (name, size), ranking in self._counted()},
            **(self._abstention.figures() if self._abstention else {}),
        }

    def _segmentation(self) -> dict[str, float]:
        confusion_KK = self.confusion_KK
        iou_K, hits_K = intersection_over_union(confusion_KK), confusion_KK.diag().double()
        per_class = {
            f"seg/IoU/{info.name}": float(iou) for info, iou in zip(self.card.classes, iou_K.tolist(), strict=True)
        }
        return {
            "seg/mIoU": float(iou_K.nanmean()),
            "seg/mAcc": float((hits_K / confusion_KK.sum(1)).nanmean()),
            "seg/pixAcc": float(hits_K.sum() / confusion_KK.sum()),
            **per_class,
        }

    def _selection(self) -> dict[str, float]:
        """Answering first what is most certain by confidence (plain names) or by another score (its name behind)."""
        confidence = self.rankings["confidence"]
        figures = {
            "sc/AURC": confidence.aurc().value,
            "sc/E-AURC": confidence.excess_aurc(),
            "sc/Cov@5Risk": confidence.coverage_at(0.05),
            "sc/Risk@80Cov": confidence.risk_at(0.8),
        }
        for name, ranking in self.rankings.items():
            figures |= {f"err/AUROC/{name}": ranking.auroc().value, f"err/FPR95/{name}": ranking.fpr95()}
            if ranking is not confidence:
                figures |= {f"sc/AURC/{name}": ranking.aurc().value, f"sc/E-AURC/{name}": ranking.excess_aurc()}
        return figures

    def _counted(self) -> Iterator[tuple[tuple[str, int], Ranking]]:
        """Sizes of patches that fit into the frames."""
        return ((key, ranking) for key, ranking in self.patches.items() if ranking.counts_2N.any())

    def _at_mean(self, ranking: Ranking) -> float:
        """PAvPU where patches above the mean uncertainty of all patches are uncertain."""
        return float(patch_curve(ranking, np.array([ranking.mean])).pavpu[0])

    def errors(self) -> dict[str, float]:
        """How far binning can move the ranking figures at most."""
        pairs = [(name, ranking.auroc(), ranking.aurc()) for name, ranking in self.rankings.items()]
        return {f"err/AUROC/{name}": auroc.error for name, auroc, _ in pairs} | {
            f"sc/AURC/{name}": aurc.error for name, _, aurc in pairs
        }

    def curves(self) -> dict[str, Any]:
        """What the plots show, as plain lists."""
        return {
            "confusion": self.confusion_KK.tolist(),
            "reliability": dict(
                zip(("pixels", "confidence", "right"), self.reliability.table_3B.tolist(), strict=True)
            ),
            "coverage": STEPS.tolist(),
            "risk": {name: at_steps(ranking).tolist() for name, ranking in self.rankings.items()},
            "pavpu": {f"{name}/{size}": as_lists(ranking) for (name, size), ranking in self._counted()},
        }


def as_lists(ranking: Ranking) -> dict[str, list[float | None]]:
    """The patch curve over thresholds from the least to the largest uncertainty of any patch (`span`)."""
    curve = patch_curve(ranking, span(ranking))
    return {field: [None if np.isnan(x) else float(x) for x in values] for field, values in curve._asdict().items()}


def at_steps(ranking: Ranking) -> Doubles:
    """Risk at the coverages of `STEPS`."""
    risks: Doubles = np.interp(STEPS, *ranking.risk_coverage())
    return risks


def span(ranking: Ranking) -> Doubles:
    """Thresholds from the smallest to the largest score.

    DEVIATION: Mukhoti & Gal step evenly; ours are closer near the smallest, where most patches are.
    """
    places, _, _ = ranking.occupied()
    low, high = top_of(int(places[0])), top_of(int(places[-1]))
    return low + STEPS**3 * (high - low)


class Abstention:
    """What `max_risk` does on these frames: for each calibrated risk, how much is answered and how much is wrong."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration, self._num_frames = calibration, 0
        self._sums_R2 = np.zeros((len(calibration.risks), 2))

    def add(self, entropy: Floats, wrong: Mask) -> None:
        """Add one frame's labelled pixels."""
        self._num_frames += 1
        for sums_2, threshold in zip(self._sums_R2, self._calibration.entropy_nats, strict=True):
            kept = entropy <= threshold
            sums_2 += kept.mean(), (kept & wrong).mean()

    def figures(self) -> dict[str, float]:
        """Means over frames of the share answered (coverage), and of the share answered and wrong (risk)."""
        means_R2 = self._sums_R2 / self._num_frames
        figures: dict[str, float] = {}
        for risk, (coverage, got) in zip(self._calibration.risks, means_R2.tolist(), strict=True):
            figures |= {f"abstain/coverage@{risk:g}": coverage, f"abstain/risk@{risk:g}": got}
        return figures
