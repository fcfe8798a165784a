"""`penumbra evaluate --shift`: what a model says of pictures unlike those it was measured on.

The frames are corrupted (eight kinds, three severities), rescaled, and have objects pasted in; `--hidden CLASS` asks
for the pixels of a class that the model has not learnt. A frame's chance depends on the seed and its index alone.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from penumbra.models.card import IGNORE, Card
from penumbra.models.errors import BadOption
from penumbra.serving.engine.scale import find_scale
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.corruptions import CORRUPTIONS, SEVERITIES, Picture, paste_object, rescale
from penumbra.training.evaluation.figures import Evaluation
from penumbra.training.evaluation.intervals import figures_of, find_intervals
from penumbra.training.evaluation.run import Measured, defined, evaluate, segment_frames
from penumbra.training.frames import Frame, FrameSet
from penumbra.training.metrics import Ranking

NUM_OBJECTS = 2
"""Pasted into each frame."""
Change = Callable[[Picture, Picture, np.random.Generator], tuple[Picture, Picture]]
"""From a picture and its label to others."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A data set's split whose frames are changed when they are asked for. scale: at which one is then to be run."""

    frames: FrameSet
    change: Change
    seed: int
    scale: Callable[[Frame], float | None] = lambda frame: None

    @property
    def names(self) -> tuple[str, ...]:
        return self.frames.names

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Frame:
        """Give a frame as it is changed; its void pixels stay where they were."""
        image_3HW, label_HW, void_HW, place, _ = frame = self.frames[index]
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        image_HW3, new_label_HW = self.change(image_3HW.permute(1, 2, 0).contiguous().numpy(), label_HW.numpy(), rng)
        if void_HW is not None:
            size = new_label_HW.shape
            void_HW = F.interpolate(void_HW[None, None].float(), size=size, mode="nearest-exact")[0, 0].bool()
        new_3HW = torch.from_numpy(image_HW3).permute(2, 0, 1)
        return Frame(new_3HW, torch.from_numpy(new_label_HW), void_HW, place, self.scale(frame))


def paste_objects(image_HW3: Picture, label_HW: Picture, rng: np.random.Generator) -> tuple[Picture, Picture]:
    """Paste `NUM_OBJECTS` objects; their pixels lose their label."""
    for _ in range(NUM_OBJECTS):
        image_HW3, label_HW, _ = paste_object(image_HW3, label_HW, rng)
    return image_HW3, label_HW


def _corrupt(
    kind: str, severity: int, image_HW3: Picture, label_HW: Picture, rng: np.random.Generator
) -> tuple[Picture, Picture]:
    return CORRUPTIONS[kind](image_HW3, severity, rng), label_HW


def _rescale(factor: float, image_HW3: Picture, label_HW: Picture, rng: np.random.Generator) -> tuple[Picture, Picture]:
    return rescale(image_HW3, label_HW, factor)


SCALES: dict[str, Change] = {f"scale-{factor:g}": partial(_rescale, factor) for factor in (2, 0.5)}
VARIANTS: dict[str, Change] = SCALES | {
    f"{kind}-{severity}": partial(_corrupt, kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES
}


def measure_shift(
    segmenter: Segmenter, clean: Measured, frames: FrameSet, *, seen: Collection[str] | None = None
) -> dict[str, Any]:
    """Measure the variants of the frames of an evaluation, as JSON values: rows by variant, and of pasted objects.

    The row `corruptions` is of all corruptions together, `corruptions-unseen` of the kinds that no training has `seen`
    (by the card, if left out), and `clean` of the frames as they are.
    """
    seen = find_seen(clean.card) if seen is None else seen
    rows, blocks = {"clean": _row(clean.evaluation, clean)}, {}

    def as_before(frame: Frame) -> float:
        """A card's rule of scale would undo another scale, of which the network is to see all."""
        return find_scale(clean.card, clean.question.scale, *frame.label_HW.shape, frame.place)[0]

    for name, change in VARIANTS.items():
        changed = Changed(frames, change, clean.question.seed, *([as_before] if name in SCALES else []))
        measured = evaluate(segmenter, clean.question, changed, cards=clean.cards, title=name)
        rows[name], blocks[name] = _row(measured.evaluation, clean), np.stack(measured.evaluation.blocks)
    unseen = [kind for kind in CORRUPTIONS if kind not in seen]
    for name, kinds in {"corruptions": list(CORRUPTIONS), "corruptions-unseen": unseen}.items():
        if kinds:
            pooled = np.sum([blocks[f"{kind}-{severity}"] for kind in kinds for severity in SEVERITIES], axis=0)
            figures = defined(figures_of(pooled.sum(0), clean.card.num_classes))
            intervals = find_intervals(list(pooled), clean.card.num_classes, seed=clean.question.seed)
            rows[name] = {"figures": figures, "intervals": intervals}
    pasted = Changed(frames, paste_objects, clean.question.seed)
    return {"seen": sorted(seen), "variants": rows, "objects": find_strange(segmenter, clean, frames, pasted)}


def find_seen(card: Card) -> list[str]:
    """Find the kinds of corruption that a model's card says it was trained on, or what it learnt from was."""
    return sorted({*CORRUPTIONS}.intersection(re.findall(r"\w+", card.provenance.data)))


def _row(evaluation: Evaluation, clean: Measured) -> dict[str, Any]:
    """Summarise a variant: figures, its pictures' means of all scores, and how well those tell them from clean ones."""
    shown = ("seg/mIoU", "seg/NLL", "seg/Brier", "cal/", "sc/AURC", "sc/AUGRC", "err/AUROC", "pic/")
    figures = {name: value for name, value in evaluation.figures().items() if name.startswith(shown)}
    separation = {}
    for name, values in evaluation.pictures.items():
        ranking, usual = Ranking(), clean.evaluation.pictures[name]
        ranking.add(np.array(usual + values, np.float32), np.repeat([False, True], (len(usual), len(values))))
        separation[name] = ranking.auroc().value
    means = {name: float(np.mean(values)) for name, values in evaluation.pictures.items()}
    return {
        "figures": defined(figures), "intervals": evaluation.intervals(seed=clean.question.seed),
        "means": means, "separation": defined(separation),
    }  # fmt: skip


def find_strange(
    segmenter: Segmenter, clean: Measured, frames: FrameSet, changed: FrameSet
) -> dict[str, dict[str, float | None]]:
    """Measure for each map how well it finds the pixels that have a label in `frames` and none in `changed`.

    All other labelled pixels are what they must stand out from.
    """
    rankings: dict[str, Ranking] = {}
    answers = segment_frames(segmenter, clean.question, changed, clean.cards, title="strange pixels")
    for index, answer in zip(clean.cards, answers, strict=True):
        counted_HW = frames[index].label_HW.numpy() != IGNORE
        for name, score_HW in answer.uncertainties.items():
            ranking = rankings.setdefault(name, Ranking())
            ranking.add(score_HW[counted_HW], ~answer.known_HW[counted_HW])
    return {
        name: defined({"AUROC": ranking.auroc().value, "AUPR": ranking.aupr(), "FPR95": ranking.fpr95()})
        for name, ranking in rankings.items()
    }


def find_class(card: Card, name: str) -> int:
    """Find the index of a class by its name. Raises BadOption: the model has no such class."""
    names = [info.name for info in card.classes]
    if name not in names:
        raise BadOption(f"hidden is {name!r}; the classes are {', '.join(names)}")
    return names.index(name)
