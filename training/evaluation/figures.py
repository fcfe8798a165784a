"""Count the figures of an evaluation: answers are added one by one, figures have torch-uncertainty's names."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from penumbra.models.card import IGNORE, Calibration, Card, ClassInfo
from penumbra.models.confusion import confusion, intersection_over_union
from penumbra.training.evaluation.answers import Answer, Labels
from penumbra.training.evaluation.intervals import find_intervals, flatten_sums
from penumbra.training.metrics import Doubles, Floats, Mask, Ranking, Reliability, patch_curve, patches, top_of

PATCH_PX = (4, 8, 16, 32)
UNCERTAINTIES = ("entropy", "mutual_information")
"""Maps whose ranking of wrong pixels and patches is measured, as far as the answers have them."""
STEPS = np.linspace(0, 1, 101)
"""Where curves are written down."""


class Evaluation:
    """The counts of all that is measured of one model's answers; a frame adds a few numbers and a block 14 kB.

    pictures: of every frame the share of wrong pixels, the expected one, the means of the other maps, and its novelty.
    blocks: the sums of each block of frames.
    """

    def __init__(self, card: Card, num_samples: int, views: str | None = None, *, hidden: str = "") -> None:
        """views: in which every sample sees the windows, the card's by default. hidden: a class without an IoU."""
        self.card, self.num_frames = card, 0
        self._hidden = [k for k, info in enumerate(card.classes) if info.name == hidden]
        self.confusion_KK = torch.zeros(card.num_classes, card.num_classes, dtype=torch.int64)
        """Counts [truth, answer] of labelled pixels."""
        self.reliability = Reliability()
        uncertainties = [name for name in UNCERTAINTIES if name in card.maps(card.num_members(num_samples, views))]
        extras = tuple(extra.name for extra in card.extra_maps)
        self.rankings = {name: Ranking() for name in ("confidence", *uncertainties, *extras)}
        self.patches = {(name, size): Ranking() for name in uncertainties for size in PATCH_PX}
        self._abstentions: tuple[Abstention | ClassAbstention, ...] = ()
        if card.calibration:
            self._abstentions = Abstention(card.calibration), ClassAbstention(card.calibration, card.classes)
        reference, asked = card.novelty, (num_samples, views or card.views)
        is_told = reference and (not reference.needs_equals or asked == (reference.num_samples, card.views))
        self._novelty = reference if is_told else None
        scores = ("error", *self.rankings, *(["novelty"] if self._novelty else []))
        self.pictures: dict[str, list[float]] = {name: [] for name in scores}
        self.blocks: list[Doubles] = []

    def add(self, answer: Answer) -> None:
        """Count one frame; one without any label changes nothing."""
        known_HW, wrong_HW = answer.known_HW, answer.wrong_HW
        if not known_HW.any():
            return
        self.num_frames += 1
        labels_HW, truth_HW = map(torch.from_numpy, (answer.labels_HW, answer.truth_HW))
        self.confusion_KK += confusion(labels_HW, truth_HW, num_classes=self.card.num_classes)
        maps, measured_HW = answer.uncertainties, answer.labels_HW != IGNORE
        self.pictures["error"].append(1 - answer.accuracy)
        for name, ranking in self.rankings.items():
            ranking.add(maps[name][known_HW], wrong_HW[known_HW])
            self.pictures[name].append(float(maps[name][measured_HW].mean()))
        if self._novelty:
            self.pictures["novelty"].append(self._novelty.share_below(answer.means))
        for (name, size), ranking in self.patches.items():
            ranking.add(*patches(maps[name], wrong_HW, known_HW, size=size))
        counted = (answer.maps["confidence"], answer.prob_HW, answer.squares_HW, ~wrong_HW)
        self.reliability.add(*(x_HW[known_HW] for x_HW in counted))
        for abstention in self._abstentions:
            abstention.add(maps["entropy"][known_HW], answer.labels_HW[known_HW], wrong_HW[known_HW])

    def end_block(self) -> None:
        """End a block of frames for the intervals."""
        total = flatten_sums(self.confusion_KK, self.reliability, self.rankings["confidence"])
        total[[k * (self.card.num_classes + 1) for k in self._hidden]] = np.nan  # of its IoU, and of no other
        self.blocks.append(total - np.sum(self.blocks, axis=0))

    def intervals(self, *, seed: int) -> dict[str, tuple[float, float]]:
        """Return the 95 % intervals of some figures by their names."""
        return find_intervals(self.blocks, self.card.num_classes, seed=seed)

    def figures(self) -> dict[str, float]:
        """Return all figures by name (docs/measure/evaluation.md); NaN where one is undefined."""
        iou_K, hits_K = intersection_over_union(self.confusion_KK), self.confusion_KK.diag().double()
        iou_K[self._hidden] = np.nan  # what is called it is wrong, and no class of the frames
        return {
            "seg/mIoU": float(iou_K.nanmean()),
            "seg/mAcc": float((hits_K / self.confusion_KK.sum(1)).nanmean()),
            "seg/pixAcc": float(hits_K.sum() / self.confusion_KK.sum()),
            **{f"seg/IoU/{info.name}": iou for info, iou in zip(self.card.classes, iou_K.tolist(), strict=True)},
            "seg/NLL": self.reliability.nll(),
            "seg/Brier": self.reliability.brier(),
            "cal/ECE": self.reliability.ece(),
            "cal/aECE": self.reliability.adaptive_ece(),
            **self._selection(),
            **self._pictures(),
            # patches above the mean uncertainty of all patches are uncertain
            **{f"pavpu/{key}": float(patch_curve(r, np.array([r.mean])).pavpu[0]) for key, r in self._counted()},
            **{name: value for abstention in self._abstentions for name, value in abstention.figures().items()},
        }

    def _selection(self) -> dict[str, float]:
        """Judge answering first what is most certain by confidence (plain names) or another score (its name behind)."""
        confidence = self.rankings["confidence"]
        figures = {
            "sc/AURC": confidence.aurc().value,
            "sc/E-AURC": confidence.excess_aurc(),
            "sc/AUGRC": confidence.augrc().value,
            "sc/Cov@5Risk": confidence.coverage_at(0.05),
            "sc/Risk@80Cov": confidence.risk_at(0.8),
        }
        for name, ranking in self.rankings.items():
            figures |= {f"err/AUROC/{name}": ranking.auroc().value, f"err/FPR95/{name}": ranking.fpr95()}
            if ranking is not confidence:
                figures |= {f"sc/AURC/{name}": ranking.aurc().value, f"sc/E-AURC/{name}": ranking.excess_aurc()}
                figures[f"sc/AUGRC/{name}"] = ranking.augrc().value
        return figures

    def _pictures(self) -> dict[str, float]:
        """Judge how well a picture's expected error, the mean of 1 - confidence, says its share of wrong pixels."""
        error, expected = np.array(self.pictures["error"]), np.array(self.pictures["confidence"])
        varied = len(error) > 2 and np.ptp(error) > 0 and np.ptp(expected) > 0
        return {
            "pic/expected_error/MAE": float(np.abs(expected - error).mean()),
            "pic/expected_error/Spearman": float(spearmanr(expected, error).statistic) if varied else float("nan"),
        }

    def _counted(self) -> Iterator[tuple[str, Ranking]]:
        """Yield the patches of the sizes that fit into the frames."""
        return (
            (f"{name}/{size}", ranking) for (name, size), ranking in self.patches.items() if ranking.counts_2N.any()
        )

    def errors(self) -> dict[str, float]:
        """Return how far binning can move the ranking figures at most."""
        return {f"err/AUROC/{name}": ranking.auroc().error for name, ranking in self.rankings.items()} | {
            f"sc/AURC/{name}": ranking.aurc().error for name, ranking in self.rankings.items()
        }

    def curves(self) -> dict[str, Any]:
        """Return what the plots show, as plain lists; a patch curve is None where it is undefined."""
        pixels, confidence, right = self.reliability.table_3B.tolist()
        return {
            "confusion": self.confusion_KK.tolist(),
            "reliability": {"pixels": pixels, "confidence": confidence, "right": right},
            "coverage": STEPS.tolist(),
            "risk": {n: np.interp(STEPS, *ranking.risk_coverage()).tolist() for n, ranking in self.rankings.items()},
            "pavpu": {key: _patch_curve(ranking) for key, ranking in self._counted()},
        }


def _patch_curve(ranking: Ranking) -> dict[str, list[float | None]]:
    """Draw the patch curve over thresholds from the least to the largest uncertainty of any patch.

    DEVIATION: Mukhoti & Gal step evenly; ours are closer near the smallest, where most patches are.
    """
    bins, _, _ = ranking.occupied()
    low, high = top_of(int(bins[0])), top_of(int(bins[-1]))
    curve = patch_curve(ranking, low + STEPS**3 * (high - low))
    return {field: [None if np.isnan(x) else float(x) for x in values] for field, values in curve._asdict().items()}


class Abstention:
    """The effect of `max_risk` on the frames: for each calibrated risk, how much is answered and how much is wrong."""

    def __init__(self, calibration: Calibration) -> None:
        self._risks, self._num_frames = calibration.risks, 0
        self._threshold_R1 = np.array(calibration.entropy_nats, np.float32)[:, None]
        self._sums_2R = np.zeros((2, len(calibration.risks)))

    def add(self, entropy: Floats, labels: Labels, wrong: Mask) -> None:
        """Add one frame's labelled pixels."""
        self._num_frames += 1
        kept_RN = entropy <= self._threshold_R1
        self._sums_2R += kept_RN.mean(1), (kept_RN & wrong).mean(1)

    def figures(self) -> dict[str, float]:
        """Average over frames the share answered (coverage), and the share answered and wrong (risk)."""
        figures: dict[str, float] = {}
        for risk, coverage, wrong in zip(self._risks, *(self._sums_2R / self._num_frames).tolist(), strict=True):
            figures |= {f"abstain/coverage@{risk:g}": coverage, f"abstain/risk@{risk:g}": wrong}
        return figures


class ClassAbstention:
    """The effect of `max_class_risk` on the frames: how much is answered; of what is called a class and answered how
    much is wrong, as a mean over the frames in which it is called (where all of it is withheld, nothing is); and how
    much of what is called a class in all frames together is withheld."""

    def __init__(self, calibration: Calibration, classes: Sequence[ClassInfo]) -> None:
        self._names, num_classes = [info.name for info in classes], len(classes)
        rows = [[-np.inf if nats is None else nats for nats in row] for row in calibration.class_entropy_nats]
        self._above = dict(zip(calibration.class_risks, np.array(rows, np.float32), strict=True))
        self._coverage, self._num_frames = dict.fromkeys(self._above, 0.0), 0
        self._sums_2K = {risk: np.zeros((2, num_classes)) for risk in self._above}
        """By risk the wrong shares of the frames, and the pixels that are answered."""
        self._called_K, self._num_frames_K = np.zeros((2, num_classes), np.int64)

    def add(self, entropy: Floats, labels: Labels, wrong: Mask) -> None:
        """Add one frame's labelled pixels."""
        num_classes = len(self._num_frames_K)
        self._num_frames += 1
        called_K = np.bincount(labels, minlength=num_classes)
        self._called_K += called_K
        self._num_frames_K += called_K > 0
        for risk, above_K in self._above.items():
            kept = entropy <= above_K[labels]
            answered_K, wrong_K = (np.bincount(labels[which], minlength=num_classes) for which in (kept, kept & wrong))
            self._sums_2K[risk] += wrong_K / np.maximum(answered_K, 1), answered_K
            self._coverage[risk] += float(kept.mean())

    def figures(self) -> dict[str, float]:
        """Average over frames, and over pixels; NaN for a class that none of them was called."""
        figures = {f"abstain/class_coverage@{risk:g}": sum / self._num_frames for risk, sum in self._coverage.items()}
        num_frames_K, called_K = (np.where(self._called_K, x_K, np.nan) for x_K in (self._num_frames_K, self._called_K))
        for risk, (share_K, answered_K) in self._sums_2K.items():
            for what, values_K in (("risk", share_K / num_frames_K), ("withheld", 1 - answered_K / called_K)):
                figures |= {
                    f"abstain/class_{what}@{risk:g}/{n}": x for n, x in zip(self._names, values_K.tolist(), strict=True)
                }
        return figures
