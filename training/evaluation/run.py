"""Ask a loaded model about labelled frames, and put what was measured into one document."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from penumbra.models.card import RGB, Card, InputSpec
from penumbra.models.errors import BadData, BadOption
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.data import DataSet, find_data, find_left_out, has_no_class, has_no_frames, load_split
from penumbra.training.evaluation.answers import Answer, Labels, Question, check_classes, segment_frame
from penumbra.training.evaluation.figures import Evaluation
from penumbra.training.evaluation.intervals import find_blocks
from penumbra.training.frames import FrameSet

SAMPLE_COUNTS = (1, 2, 5, 10, 20, 50)
COMPARED = ("seg/mIoU", "seg/NLL", "cal/ECE", "err/AUROC/entropy", "err/AUROC/mutual_information")
FEW_FRAMES = 16
"""Frames for quality and cost against S, which needs 88 samples of each."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The outcome of an evaluation. cards: as which the model answered, by the frame's index. accuracies: of these
    frames. against_samples: of `compare_samples`. beyond: further parts of the document, of shifts, by name."""

    question: Question
    cards: Mapping[int, Card]
    evaluation: Evaluation
    accuracies: list[float]
    against_samples: list[dict[str, float | None]]
    beyond: dict[str, Any] = field(default_factory=dict)

    @property
    def card(self) -> Card:
        return self.evaluation.card

    def document(self) -> dict[str, Any]:
        """Return everything as JSON values; an undefined figure is null."""
        return {
            "model": self.card.name, "version": self.card.version, "set": self.question.data_set,
            "split": self.question.split, "every": self.question.every, "frames": self.evaluation.num_frames,
            "pixels": int(self.evaluation.reliability.num), "seed": self.question.seed,
            "samples": self.question.options(0).num_samples(self.card), "views": self.question.views or self.card.views,
            "temperatures": sorted({card.readout.temperature for card in self.cards.values()}),
            "figures": defined(self.evaluation.figures()), "errors": self.evaluation.errors(),
            "intervals": self.evaluation.intervals(seed=self.question.seed), "pictures": self.evaluation.pictures,
            "against_samples": self.against_samples,
            "curves": self.evaluation.curves(), **self.beyond,
        }  # fmt: skip


def defined(figures: dict[str, float]) -> dict[str, float | None]:
    """Put the figures as JSON knows numbers: None where one is undefined."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def load_frames(question: Question, card: Card) -> FrameSet:
    """Load the frames that are asked about, and warn of what they do not fit. Raises BadOption, BadData."""
    data = find_data(question.data_set, question.data)
    of_classes = check_classes(card, data.classes, data=question.data_set)
    warnings = (of_classes, check_unseen(card, data, question.split), check_hidden(card, data, question.hidden))
    for warning in filter(None, warnings):
        Console(stderr=True, markup=False, emoji=False).print(f"warning: {warning}", style="yellow")
    return load_split(data, question.data, question.split)


def as_rasters(frames: FrameSet, spec: InputSpec, *, every: int) -> list[tuple[Raster, Labels]]:
    """Give every n-th frame as a raster and label_HW. Raises BadOption for a network that reads other pictures."""
    if (spec.bands, spec.dtype) != (RGB, "uint8"):
        raise BadOption(f"the network reads {', '.join(spec.bands)[:200]} as {spec.dtype}, and labelled frames are "
                        f"{', '.join(RGB)} as uint8; leave --data out, and name --pictures")  # fmt: skip
    chosen = (frames[i] for i in range(0, len(frames), every))
    return [(frame.raster(), frame.label_HW.numpy()) for frame in chosen]


def check_unseen(card: Card, data: DataSet, split: str) -> str:
    """Return a warning where the card says that a training had frames of this split and did not leave them out."""
    split, _, prefix = split.partition("/")
    if all(has_no_frames(left_out, prefix, data) for left_out in find_left_out(card, data, split)):
        return ""
    return (
        f"{card.name} was trained on {card.provenance.data.partition(';')[0]}; what is measured on frames that a "
        "training has seen, with labels or without, says little of others"
    )


def check_hidden(card: Card, data: DataSet, name: str) -> str:
    """Return a warning where the card does not say that every training went without the labels of this class."""
    if not name or all(has_no_class(left_out, name) for left_out in find_left_out(card, data) or [""]):
        return ""
    return f"the card of {card.name} does not say that {name} was void in training; a known class is not strange"


def segment_frames(
    segmenter: Segmenter, question: Question, frames: FrameSet, cards: Mapping[int, Card], *, title: str
) -> Iterator[Answer]:
    """Answer the frames of these indices, one by one, as if the model had the card beside the index; to be read to the
    end before asking anew. title: of the progress bar. Raises any PenumbraError."""
    runtime = segmenter.find(question.name, question.version)
    own = runtime.card
    try:
        for index in follow(list(cards), title):
            runtime.card = cards[index]
            yield segment_frame(segmenter, frames[index], question.options(index))
    finally:
        runtime.card = own


def evaluate(
    segmenter: Segmenter, question: Question, frames: FrameSet, *, compare: bool = False,
    cards: Mapping[int, Card] | None = None, title: str = "evaluating",
) -> Measured:  # fmt: skip
    """Measure a loaded model on its frames in the order of their names. compare: also quality and cost against S, where
    S is free. cards: as which it is to answer these frames, in the place of its own and every n-th. Raises BadData."""
    own = segmenter.find(question.name, question.version).card
    cards = cards or dict.fromkeys(range(0, len(frames), question.every), own)
    blocks = find_blocks(frames.names, cards)
    cards, ends = {index: cards[index] for block in blocks for index in block}, {block[-1] for block in blocks}
    card = cards[min(cards)]
    num_samples = question.options(0).num_samples(card)
    evaluation, accuracies = Evaluation(card, num_samples, question.views, hidden=question.hidden), []
    answers = segment_frames(segmenter, question, frames, cards, title=f"{title} {card.name}")
    for index, answer in zip(cards, answers, strict=True):
        evaluation.add(answer)
        accuracies.append(answer.accuracy)
        if index in ends:
            evaluation.end_block()
    if not evaluation.num_frames:
        raise BadData(f"no pixel of {question.data} {question.split} has a label; there is nothing to measure against")
    labelled = [index for index, accuracy in zip(cards, accuracies, strict=True) if not math.isnan(accuracy)]
    few = labelled[:: -(-len(labelled) // FEW_FRAMES)]
    is_free = card.sampling.is_stochastic and card is own
    rows = compare_samples(segmenter, question, frames, few) if compare and is_free else []
    return Measured(question, cards, evaluation, accuracies, rows)


def compare_samples(
    segmenter: Segmenter, question: Question, frames: FrameSet, indices: list[int]
) -> list[dict[str, float | None]]:
    """Measure figures and time per S on these frames, of which some have a label, frame by frame in turns; time is a
    multiple of that of S = 1. A figure is None where it is undefined, as that of one sample's mutual information is.
    """
    card = segmenter.find(question.name, question.version).card
    counts = [count for count in SAMPLE_COUNTS if count <= segmenter.limits.samples]
    evaluations = {count: Evaluation(card, count, question.views, hidden=question.hidden) for count in counts}
    seconds = dict.fromkeys(counts, 0.0)
    for index in follow(indices, "comparing numbers of samples"):
        frame, options = frames[index], question.options(index)
        for count in counts:
            answer = segment_frame(segmenter, frame, dataclasses.replace(options, samples=count))
            evaluations[count].add(answer)
            seconds[count] += answer.seconds
    rows = {count: defined(evaluation.figures()) for count, evaluation in evaluations.items()}
    return [
        {"samples": count, "time_ratio": seconds[count] / seconds[1], **{name: row.get(name) for name in COMPARED}}
        for count, row in rows.items()
    ]


def follow(indices: list[int], title: str) -> Iterable[int]:
    """Go through the indices with a progress bar, where stderr is a terminal."""
    console = Console(stderr=True)
    return track(indices, title, console=console, transient=True, disable=not console.is_terminal)
