"""Send one labelled frame through the serving engine, and keep band by band what figures are made of."""

import logging
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import IGNORE, Card, ClassInfo
from penumbra.models.errors import BadData
from penumbra.serving.engine.options import PILLOW_PIXELS, PROBABILITIES, Limits, SegmentOptions
from penumbra.serving.engine.plain import NUM_SUMS
from penumbra.serving.engine.scores import score
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.frames import Frame
from penumbra.training.metrics import Floats, Mask

log = logging.getLogger("penumbra")
Labels = NDArray[np.uint8]
LIMITS = Limits(pixels=4 * PILLOW_PIXELS, probability_bytes=2**40, memory_bytes=2**40)
"""Probabilities are read band by band, and shifts make pictures twice as high and wide."""


@dataclass(frozen=True, slots=True)
class Question:
    """The model and frames of an evaluation. version, samples, views, scale: None is the newest, and the card's.

    every: n-th only. seed: the first frame's; the next has one more. hidden: a class that is void in the frames.
    """

    name: str
    data: Path
    data_set: str = "camvid"
    split: str = "val"
    version: int | None = None
    samples: int | None = None
    seed: int = 0
    every: int = 1
    views: str | None = None
    scale: float | None = None
    hidden: str = ""

    def options(self, index: int) -> SegmentOptions:
        """Return the options of one frame. Every frame has draws of its own, or all would share the luck of one."""
        return SegmentOptions(
            self.name, samples=self.samples, seed=self.seed + index, views=self.views, scale=self.scale
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The engine's answer to one frame, beside the picture and the truth; everything at the frame's size.

    truth_HW: class ids, IGNORE where there is no label. prob_HW: probability of the true class, 0 without a label.
    squares_HW: sum over classes of p^2. maps: all maps by name; NaN where the picture holds no measurement, as in what
    is served. seconds: the engine's time. means: of `Card.maps_of_novelty`, as the engine's scores have them.
    """

    image_HW3: Labels
    labels_HW: Labels
    truth_HW: Labels
    prob_HW: Floats
    squares_HW: Floats
    maps: dict[str, Floats]
    seconds: float
    means: tuple[float, ...]

    @property
    def known_HW(self) -> Mask:
        return np.not_equal(self.truth_HW, IGNORE)

    @property
    def wrong_HW(self) -> Mask:
        """The labelled pixels that are answered with another class."""
        return np.not_equal(self.labels_HW, self.truth_HW) & self.known_HW

    @property
    def uncertainties(self) -> dict[str, Floats]:
        """All maps by name, confidence as 1 - confidence, so that all are high where the answer is unsure."""
        return self.maps | {"confidence": 1 - self.maps["confidence"]}

    @property
    def accuracy(self) -> float:
        """The share of the labelled pixels that are right; NaN where none is labelled."""
        num = self.known_HW.sum()
        return float(1 - self.wrong_HW.sum() / num) if num else float("nan")


def segment_frame(segmenter: Segmenter, frame: Frame, options: SegmentOptions) -> Answer:
    """Segment one frame. Class probabilities are held for one band of rows only.

    Raises any PenumbraError.
    """
    image, truth_HW = frame.raster(), frame.label_HW.numpy()
    if frame.void_HW is not None:
        truth_HW = np.where(frame.void_HW.numpy(), np.uint8(IGNORE), truth_HW)
    if frame.scale is not None:
        options = replace(options, scale=frame.scale)
    card = segmenter.find(options.model, options.version).card
    names = (*options.maps(card), *(extra.name for extra in card.extra_maps))
    request = segmenter.bands(image, replace(options, outputs=(*names, PROBABILITIES)))
    for sentence in request.plan.of_scale:
        _warn(sentence)
    labels_HW = np.empty_like(truth_HW)
    maps = {name: np.empty(truth_HW.shape, np.float32) for name in names}
    prob_HW, squares_HW = np.empty((2, *truth_HW.shape), np.float32)
    sums = []
    with request.clock("total"), closing(request.bands()) as bands:
        for band in bands:
            rows = slice(band.y0, band.y0 + len(band.labels))
            labels_HW[rows] = band.labels
            assert band.prob_hKW is not None
            known_hW = truth_HW[rows] != IGNORE
            class_h1W = np.where(known_hW, truth_HW[rows], 0)[:, None].astype(np.int64)
            prob_HW[rows] = np.where(known_hW, np.take_along_axis(band.prob_hKW, class_h1W, 1)[:, 0], 0)
            squares_HW[rows] = np.einsum("hkw,hkw->hw", band.prob_hKW, band.prob_hKW)
            for name, values in maps.items():
                values[rows] = band.maps[name]
            sums.append(band.sums_hN)
    num = np.count_nonzero(labels_HW != IGNORE)
    totals = [int(total) for total in np.concatenate(sums).sum(0, dtype=object)[:NUM_SUMS]]
    means = score(card, totals, num, num_samples=request.num_samples, is_usual=False).means
    return Answer(image[:, :], labels_HW, truth_HW, prob_HW, squares_HW, maps, request.timing_ms["total"] / 1e3, means)


@cache
def _warn(sentence: str) -> None:
    """Log a warning once, of however many frames it is."""
    log.warning(sentence)


def check_classes(card: Card, classes: tuple[ClassInfo, ...], *, data: str) -> str:
    """Compare a data set's classes with the model's: returns a warning where names differ, or raises BadData."""
    ours, theirs = [info.name for info in card.classes], [info.name for info in classes]
    if len(ours) != len(theirs):
        raise BadData(f"{data} has {len(theirs)} classes and {card.name} has {len(ours)}; other labels are wanted")
    apart = [f"{k} is {a} here and {b} there" for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    return f"the classes of {card.name} and {data} have different names: {apart[0]}" if apart else ""
