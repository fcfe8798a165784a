"""`penumbra calibrate`: a temperature, abstention thresholds and a novelty reference, as an artifact's next version.

The frames are split by seed. A quarter, but no more than `MOST_FOR_TEMPERATURE`, fits the temperature (Guo et al. 2017:
least NLL), a quarter checks, and the others, half at least, find the thresholds (`penumbra.training.conformal`) and are
the pictures that novelty is measured against.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from penumbra.models.card import Calibration, Card, Novelty
from penumbra.models.errors import BadData, BadOption
from penumbra.models.references import MOST_MEANS
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact, next_version, write_version
from penumbra.serving.watch import how_to_serve
from penumbra.training.conformal import AbstentionLoss, ClassLoss, find_thresholds, least_frames, too_few
from penumbra.training.evaluation.answers import LIMITS, Answer, Question
from penumbra.training.evaluation.figures import Evaluation
from penumbra.training.evaluation.run import defined, load_frames, segment_frames
from penumbra.training.evaluation.temperature import fit_card
from penumbra.training.frames import FrameSet
from penumbra.training.metrics import Doubles

RISKS = (0.01, 0.02, 0.05, 0.1)
CLASS_RISKS = (0.1, 0.2)
LEAST_FRAMES = 8
LEAST_TO_WARN = 99
"""Pictures, all of which one ordinary picture in a hundred is stranger than."""
LEAST_DEVIATION = 1e-6
"""A mean differs by less only where it rounds differently."""
LEAST_RISK = 1e-6
"""Nobody has the frames for less."""
MOST_FOR_TEMPERATURE = 32
"""Frames have hundreds of thousands of pixels for one number, each is run a dozen times, and thresholds need frames."""


@dataclass(frozen=True, slots=True)
class Split:
    """The frames by what they are for: indices, no frame twice."""

    temperature: list[int]
    thresholds: list[int]
    check: list[int]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The outcome of a calibration. before, after: figures on the check frames. refused: why a risk has none."""

    card: Card
    split: Split
    before: dict[str, float]
    after: dict[str, float]
    refused: dict[str, str]
    temperature_before: float

    def document(self) -> dict[str, Any]:
        """Return everything as JSON values; an undefined figure is null."""
        return {
            "model": self.card.name, "version": self.card.version,
            "temperature_before": self.temperature_before, "temperature": self.card.readout.temperature,
            "calibration": self.card.calibration and dataclasses.asdict(self.card.calibration),
            "novelty": self.card.novelty and dataclasses.asdict(self.card.novelty),
            "refused": self.refused,
            "frames": {name: len(indices) for name, indices in dataclasses.asdict(self.split).items()},
            "before": defined(self.before), "after": defined(self.after),
        }  # fmt: skip


class Evidence:
    """What the frames of the thresholds show of a model, frame by frame."""

    def __init__(self, card: Card) -> None:
        self.card, self.loss, self.class_loss = card, AbstentionLoss(), ClassLoss(card.num_classes)
        self.means: list[tuple[float, ...]] = []
        """By picture, of `Card.maps_of_novelty`."""

    def add(self, answer: Answer) -> None:
        known_HW = answer.known_HW
        entropy, wrong = answer.maps["entropy"][known_HW], answer.wrong_HW[known_HW]
        self.loss.add(entropy, wrong)
        self.class_loss.add(entropy, answer.labels_HW[known_HW].astype(np.int64), wrong)
        if answer.means:  # a wholly void picture has none, and no novelty when it is served either
            self.means.append(answer.means)

    def calibration(
        self, risks: Sequence[float], class_risks: Sequence[float], num_samples: int, data: str
    ) -> tuple[Calibration | None, dict[str, str]]:  # fmt: skip
        """Find the thresholds, and say of each risk why it is not guaranteed, where it is not."""
        thresholds, beyond = find_thresholds(self.loss, risks, num_classes=self.card.num_classes)
        refused = {f"{risk:g}": sentence for risk, sentence in beyond.items()}
        rows = {risk: self.class_loss.thresholds(risk) for risk in class_risks}
        for risk in [risk for risk, row in rows.items() if not any(nats is not None for nats in row)]:
            del rows[risk]
            what = f"a risk of {risk:g} in each class would need withholding every class"
            refused[f"class {risk:g}"] = f"{what}, with these {self.loss.num_frames} frames"
        own, values = (tuple(rows), tuple(rows.values())), (tuple(thresholds), tuple(thresholds.values()))
        found = Calibration(*values, self.loss.num_frames, num_samples, data, *own) if thresholds or rows else None
        return found, refused

    def novelty(self, num_samples: int, data: str) -> Novelty | None:
        """Describe how strange these pictures are to the model, by quantiles where they are many."""
        num = len(self.means)
        if not num:
            return None
        means_NM, own = np.array(self.means), self.card.maps_of_novelty[-1]
        warn_above = 0.99 if num >= LEAST_TO_WARN else 1.0
        novelty = Novelty(own, (), num, num_samples, data, warn_above, find_scales(means_NM))
        # Scales that a picture has a part in make it less strange than it would be as a new one.
        of_others = (find_scales(np.delete(means_NM, i, axis=0) if num > 1 else means_NM) for i in range(num))
        pairs = zip(self.means, of_others, strict=True)
        values = sorted(dataclasses.replace(novelty, scales=scales).strangeness(means) for means, scales in pairs)
        if num > MOST_MEANS:
            values = np.quantile(values, np.linspace(0, 1, MOST_MEANS)).tolist()
        return dataclasses.replace(novelty, means=tuple(values))


def find_scales(means_NM: Doubles) -> tuple[tuple[float, float], ...]:
    """Give each map's mean and standard deviation over pictures; nothing of a single map, which has its own scale."""
    if means_NM.shape[1] == 1:
        return ()
    centres, spreads = means_NM.mean(0), np.maximum(means_NM.std(0), LEAST_DEVIATION)
    return tuple(zip(centres.tolist(), spreads.tolist(), strict=True))


def calibrate_artifact(
    question: Question, store: Path, *, risks: Sequence[float] = RISKS, class_risks: Sequence[float] = CLASS_RISKS
) -> tuple[Calibrated, Path]:
    """Calibrate a stored model and write its next version. Raises any PenumbraError."""
    directory, newest = find_artifact(store, question.name, question.version), find_artifact(store, question.name)
    with Segmenter(limits=LIMITS) as segmenter:
        card = segmenter.load(directory)
        frames = load_frames(question, card)
        calibrated = calibrate(segmenter, question, frames, risks=risks, class_risks=class_risks)
    if (now := find_artifact(store, card.name)) != newest:  # an export or a tuning, which this one would take back
        raise BadOption(f"{card.name} version {now.name} was written meanwhile; calibrate that one")
    target = store / card.name / str(next_version(store, card.name))
    calibrated = dataclasses.replace(calibrated, card=dataclasses.replace(calibrated.card, version=int(target.name)))
    write_version(directory, target, calibrated.card)
    return calibrated, target


def calibrate(
    segmenter: Segmenter, question: Question, frames: FrameSet, *, risks: Sequence[float] = RISKS,
    class_risks: Sequence[float] = CLASS_RISKS,
) -> Calibrated:  # fmt: skip
    """Fit temperature and thresholds of a loaded model, in these views, and check them. Raises BadOption, BadData."""
    card = segmenter.find(question.name, question.version).card
    card = dataclasses.replace(card, views=question.views or card.views)
    num_samples = question.options(0).num_samples(card)
    split = split_frames(range(0, len(frames), question.every), seed=question.seed)
    check_risks(split, risks, class_risks)
    usual = dataclasses.replace(question, samples=None).options(0).num_samples(card)
    if num_samples != usual:
        what = f"samples is {num_samples} and an answer has {usual} where it asks for no other"
        click.echo(f"{what}: such answers will tell no novelty; leave samples out to calibrate those", err=True)

    def try_card(trial: Card, indices: list[int], *, title: str) -> Iterator[Answer]:
        """Answer some frames as if the model had this card; to be read to the end before asking anew."""
        return segment_frames(segmenter, question, frames, dict.fromkeys(indices, trial), title=title)

    new_card = fit_card(segmenter, question, frames, card, split.temperature)
    evidence = Evidence(new_card)
    for answer in try_card(new_card, split.thresholds, title="thresholds"):
        evidence.add(answer)
    text = (
        f"{question.data_set} {question.split}: {len(split.thresholds)} frames for the thresholds, "
        f"{len(split.temperature)} others for the temperature (seed {question.seed}, every {question.every})"
    )
    found, refused = evidence.calibration(sorted({*risks}), sorted({*class_risks}), num_samples, text)
    calibrated_card = dataclasses.replace(new_card, calibration=found, novelty=evidence.novelty(num_samples, text))
    before, after = (
        figures_of(trial, try_card(trial, split.check, title="check"), num_samples=num_samples)
        for trial in (dataclasses.replace(card, calibration=None), calibrated_card)
    )
    return Calibrated(calibrated_card, split, before, after, refused, card.readout.temperature)


def check_risks(split: Split, risks: Sequence[float], class_risks: Sequence[float]) -> None:
    """Say, before any picture is run, which risks need more frames. Raises BadOption: no share, or all of them do."""
    asked, num = sorted({*risks, *class_risks}), len(split.thresholds)
    if not asked or not all(LEAST_RISK <= risk < 1 for risk in asked):
        raise BadOption(
            f"risks are {', '.join(map(str, asked)) or 'none'}; shares from {LEAST_RISK:f} to below 1 are wanted"
        )
    beyond = [risk for risk in asked if num < least_frames(risk)]
    sentences = [f"{too_few(risk, num)} for the thresholds, {frames_in_all(risk)} in all" for risk in beyond]
    if beyond == asked:
        raise BadOption(sentences[-1])
    if num < LEAST_TO_WARN:
        sentences.append(
            f"of ordinary pictures about one in {num + 1} is stranger than all of {num}, so answers tell their novelty "
            f"and do not warn of it; with {LEAST_TO_WARN} for the thresholds they do"
        )
    for sentence in sentences:
        click.echo(sentence, err=True)


def frames_in_all(risk: float) -> int:
    """Say how many frames a risk needs, so that enough of them are for the thresholds."""
    needed = least_frames(risk)
    return next(num for num in count(max(needed * 4 // 3, LEAST_FRAMES)) if len(range(*split_places(num))) >= needed)


def figures_of(card: Card, answers: Iterable[Answer], *, num_samples: int) -> dict[str, float]:
    """Measure all figures of the answers, abstention by the card's thresholds among them."""
    evaluation = Evaluation(card, num_samples)
    for answer in answers:
        evaluation.add(answer)
    if not evaluation.num_frames:
        raise BadData("none of the frames to check on has a label; give it more frames")
    return evaluation.figures()


def split_frames(indices: Sequence[int], *, seed: int) -> Split:
    """Draw by the seed who fits the temperature, the thresholds, and who checks. Raises BadOption: too few frames."""
    if len(indices) < LEAST_FRAMES:
        raise BadOption(f"there are {len(indices)} frames to calibrate on; at least {LEAST_FRAMES} are wanted")
    order = [indices[i] for i in np.random.Generator(np.random.PCG64(seed)).permutation(len(indices))]
    first, last = split_places(len(order))
    return Split(*(sorted(part) for part in (order[:first], order[first:last], order[last:])))


def split_places(num: int) -> tuple[int, int]:
    """Say where the frames of the thresholds begin and end: a quarter before them, if not more than can be used, and a
    quarter behind them."""
    return min(num // 4, MOST_FOR_TEMPERATURE), num - (num + 3) // 4


def report(calibrated: Calibrated, target: Path) -> None:
    """Print what was found, and how it does on the check frames."""
    console, document = Console(markup=False, emoji=False), calibrated.document()
    before, after, frames = document["before"], document["after"], document["frames"]
    console.print(
        f"temperature {calibrated.temperature_before:g} -> {calibrated.card.readout.temperature:g} "
        f"({frames['temperature']} frames); on {frames['check']} check frames:", highlight=False,
    )  # fmt: skip
    table = Table("figure", "before", "after")
    for name in ("seg/mIoU", "seg/NLL", "seg/Brier", "cal/ECE", "cal/aECE", "err/AUROC/entropy"):
        table.add_row(name, *("undefined" if row[name] is None else f"{row[name]:.4f}" for row in (before, after)))
    console.print(table)
    if calibration := calibrated.card.calibration:
        risks = Table("max_risk", "entropy above, nats", "answered, check frames", "answered and wrong")
        for risk, threshold in zip(calibration.risks, calibration.entropy_nats, strict=True):
            shares = (after[f"abstain/{what}@{risk:g}"] for what in ("coverage", "risk"))
            risks.add_row(f"{risk:g}", f"{threshold:.4f}", *(f"{share:.4f}" for share in shares))
        console.print(risks)
        for risk, row in zip(calibration.class_risks, calibration.class_entropy_nats, strict=True):
            heads = ("entropy above, nats", "wrong of answered, check frames", "withheld")
            classes = Table(f"max_class_risk {risk:g}: called", *heads)
            for info, nats in zip(calibrated.card.classes, row, strict=True):
                shares = (after[f"abstain/class_{what}@{risk:g}/{info.name}"] for what in ("risk", "withheld"))
                shown = ("never called" if share is None else f"{share:.4f}" for share in shares)
                classes.add_row(info.name, "withheld" if nats is None else f"{nats:.4f}", *shown)
            console.print(classes)
    for sentence in calibrated.refused.values():
        console.print(f"not guaranteed: {sentence}", style="yellow", highlight=False)
    console.print(f"wrote {target}", highlight=False)
    click.echo(how_to_serve(calibrated.card.name), err=True)
