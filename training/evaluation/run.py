"""`penumbra evaluate`: an artifact and a labelled data set to figures, curves and a document."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from penumbra.models.card import Card
from penumbra.models.errors import BadData, BadOption
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact
from penumbra.serving.files.receipts import check_replaceable
from penumbra.training.data import find_data, load_split
from penumbra.training.evaluation.answers import LIMITS, Answer, check_classes, segment_frame
from penumbra.training.evaluation.figures import Evaluation
from penumbra.training.frames import FrameSet

SAMPLE_COUNTS = (1, 2, 5, 10, 20, 50)
PLOTS = ("reliability", "risk_coverage", "pavpu", "confusion", "contact_sheet", "samples")
"""What `penumbra.training.plots` may draw."""
COMPARED = ("seg/mIoU", "seg/NLL", "cal/ECE", "err/AUROC/entropy", "err/AUROC/mutual_information")
FEW_FRAMES = 16
"""Frames for quality and cost against S, which needs 88 samples of each."""


@dataclass(frozen=True, slots=True)
class Question:
    """The model and frames of an evaluation. version, samples: None is the newest, and the card's. every: n-th only.

    seed: the first frame's; the next has one more.
    """

    name: str
    data: Path
    data_set: str = "camvid"
    split: str = "val"
    version: int | None = None
    samples: int | None = None
    seed: int = 0
    every: int = 1

    def options(self, index: int) -> SegmentOptions:
        """Return the options of one frame. Every frame has draws of its own, or all would share the luck of one."""
        return SegmentOptions(model=self.name, samples=self.samples, seed=self.seed + index)


@dataclass(frozen=True, slots=True)
class Measured:
    """The outcome of an evaluation. accuracies: of the frames in `indices`. against_samples: of `compare_samples`."""

    question: Question
    card: Card
    evaluation: Evaluation
    indices: list[int]
    accuracies: list[float]
    against_samples: list[dict[str, float | None]]

    def document(self) -> dict[str, Any]:
        """Return everything as JSON values; an undefined figure is null."""
        return {
            "model": self.card.name, "version": self.card.version, "set": self.question.data_set,
            "split": self.question.split, "every": self.question.every, "frames": self.evaluation.num_frames,
            "pixels": int(self.evaluation.reliability.num), "seed": self.question.seed,
            "samples": self.question.options(0).num_samples(self.card),
            "temperature": self.card.readout.temperature, "figures": defined(self.evaluation.figures()),
            "errors": self.evaluation.errors(), "against_samples": self.against_samples,
            "curves": self.evaluation.curves(),
        }  # fmt: skip


def defined(figures: dict[str, float]) -> dict[str, float | None]:
    """Put the figures as JSON knows numbers: None where one is undefined."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def load_frames(question: Question, card: Card) -> FrameSet:
    """Load the frames that are asked about. Raises BadOption, BadData."""
    data = find_data(question.data_set, question.data)
    if warning := check_classes(card, data.classes, data=question.data_set):
        Console(stderr=True, markup=False, emoji=False).print(f"warning: {warning}", style="yellow")
    return load_split(data, question.data, question.split)


def segment_frames(
    segmenter: Segmenter, question: Question, frames: FrameSet, indices: list[int], *, title: str
) -> Iterator[Answer]:
    """Answer some frames, one by one, with a progress bar of that title. Raises any PenumbraError."""
    for index in follow(indices, title):
        yield segment_frame(segmenter, frames[index], question.options(index))


def evaluate(segmenter: Segmenter, question: Question, frames: FrameSet, *, compare: bool = False) -> Measured:
    """Measure a loaded model. compare: also quality and cost against S, where S is free. Raises BadData."""
    card = segmenter.find(question.name, question.version).card
    evaluation, accuracies = Evaluation(card, question.options(0).num_samples(card)), []
    indices = list(range(0, len(frames), question.every))
    for answer in segment_frames(segmenter, question, frames, indices, title=f"evaluating {card.name}"):
        evaluation.add(answer)
        accuracies.append(answer.accuracy)
    if not evaluation.num_frames:
        raise BadData(f"no pixel of {question.data} {question.split} has a label; there is nothing to measure against")
    few = indices[:: -(-len(indices) // FEW_FRAMES)]
    is_free = card.sampling.is_stochastic
    rows = compare_samples(segmenter, question, frames, few) if compare and is_free else []
    return Measured(question, card, evaluation, indices, accuracies, rows)


def compare_samples(
    segmenter: Segmenter, question: Question, frames: FrameSet, indices: list[int]
) -> list[dict[str, float | None]]:
    """Measure figures and time per S on these frames, frame by frame in turns; time is a multiple of that of S = 1.

    One sample has no mutual information: its figure is None.
    """
    card = segmenter.find(question.name, question.version).card
    counts = [count for count in SAMPLE_COUNTS if count <= segmenter.limits.samples]
    evaluations, seconds = {count: Evaluation(card, count) for count in counts}, dict.fromkeys(counts, 0.0)
    for index in follow(indices, "comparing numbers of samples"):
        frame, options = frames[index], question.options(index)
        for count in counts:
            answer = segment_frame(segmenter, frame, dataclasses.replace(options, samples=count))
            evaluations[count].add(answer)
            seconds[count] += answer.seconds
    rows: list[dict[str, float | None]] = []
    for count, evaluation in evaluations.items():
        figures = evaluation.figures()
        compared = {name: figures.get(name) for name in COMPARED}
        rows.append({"samples": count, "time_ratio": seconds[count] / seconds[1], **compared})
    return rows


def typical(measured: Measured, segmenter: Segmenter, frames: FrameSet) -> list[tuple[str, Answer]]:
    """Choose the frames of least, lower-quartile, median and highest accuracy: a title and the answer of each."""
    ranked = sorted(
        zip(measured.accuracies, measured.indices, strict=True), key=lambda pair: (math.isnan(pair[0]), pair[0])
    )
    last, shown = len(ranked) - 1, []
    for title, rank in {"worst": 0, "lower quartile": last // 4, "median": last // 2, "best": last}.items():
        index = ranked[rank][1]
        answer = segment_frame(segmenter, frames[index], measured.question.options(index))
        shown.append((f"{title}: {frames.names[index]}", answer))
    return shown


def evaluate_artifact(question: Question, store: Path, *, plots: Path | None = None) -> Measured:
    """Load an artifact, measure it, and draw what was measured. Raises any PenumbraError."""
    if question.every < 1:
        raise BadOption(f"every is {question.every}; 1 or more is possible")
    if plots:
        check_replaceable([plots / f"{name}.png" for name in PLOTS])
    with Segmenter(limits=LIMITS) as segmenter:
        card = segmenter.load(find_artifact(store, question.name, question.version))
        frames = load_frames(question, card)
        measured = evaluate(segmenter, question, frames, compare=plots is not None)
        if plots:
            from penumbra.training.plots import draw_all  # matplotlib is only needed here

            draw_all(measured.document(), card, typical(measured, segmenter, frames), plots)
    return measured


def check_document(path: Path) -> None:
    """Raise BadOption where an evaluation's document would take the place of a file that is none."""
    if not path.is_file():  # there is none yet, or it is a pipe
        return
    try:
        document = json.loads(path.read_bytes() or '{"figures": 0, "curves": 0}')  # nothing is lost with an empty file
        is_own = {"figures", "curves"} <= document.keys()
    except (ValueError, AttributeError):
        is_own = False
    if not is_own:
        raise BadOption(f"{path} is in the way, and is no evaluation; move it, or name another file")


def follow(indices: list[int], title: str) -> Iterable[int]:
    """Go through the indices with a progress bar, where stderr is a terminal."""
    console = Console(stderr=True)
    return track(indices, title, console=console, transient=True, disable=not console.is_terminal)


def report(measured: Measured) -> None:
    """Print the figures as a table."""
    document, console = measured.document(), Console(markup=False, emoji=False)
    console.print(
        f"{document['model']} version {document['version']} on {document['set']} {document['split']}: "
        f"{document['frames']} frames, {document['pixels']:,} labelled pixels, {document['samples']} samples, "
        f"seed {document['seed']}", highlight=False,
    )  # fmt: skip
    table = Table("figure", "value", "binning error at most")
    for name, value in document["figures"].items():
        error = document["errors"].get(name)
        table.add_row(name, "undefined" if value is None else f"{value:.4f}", "" if error is None else f"{error:.0e}")
    console.print(table)
    if rows := document["against_samples"]:
        against = Table(*(Column(name.removeprefix("err/").replace("_", " "), overflow="fold") for name in rows[0]))
        for row in rows:
            against.add_row(*("" if value is None else f"{value:.4g}" for value in row.values()))
        console.print(against)
