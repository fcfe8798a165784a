"""`penumbra calibrate`: a temperature and abstention thresholds for an artifact, as its next version.

The frames are split by seed. A quarter fits the temperature (Guo et al. 2017: least NLL), half the thresholds, and
the last quarter checks both. The thresholds come from conformal risk control (Angelopoulos et al. 2022): with loss
L_i(t) = share of frame i's labelled pixels whose entropy is at most t and whose label is wrong, in [0, 1] and never
falling with t, and n frames that the temperature has not seen,

    t = the largest with  n / (n + 1) * mean_i L_i(t) + 1 / (n + 1) <= risk   gives   E[L_{n + 1}(t)] <= risk

for a further frame that is exchangeable with the n. What is controlled is an expectation over frames.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize_scalar

from penumbra.models.card import Calibration, Card, dump_card, parse_card
from penumbra.models.errors import BadData, BadOption
from penumbra.models.files import whole_directory
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import CARD, find_artifact, next_version
from penumbra.serving.watch import how_to_serve
from penumbra.training.evaluation.answers import LIMITS, Answer
from penumbra.training.evaluation.figures import Evaluation
from penumbra.training.evaluation.run import Question, defined, load_frames, segment_frames
from penumbra.training.frames import FrameSet
from penumbra.training.metrics import LEAST_PROBABILITY, NUM_BINS, Floats, Mask, bins_of, top_of

RISKS = (0.01, 0.02, 0.05, 0.1)
LEAST_FRAMES = 8
TEMPERATURES = (0.2, 5.0)
"""Searched between; a temperature at an end means that the network is not to be mended by one."""
TOLERANCE = 0.01
"""Relative tolerance of the temperature."""


@dataclass(frozen=True, slots=True)
class Split:
    """The frames by what they are for: indices, no frame twice."""

    temperature: list[int]
    thresholds: list[int]
    check: list[int]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The outcome of a calibration. before, after: figures on the check frames. refused: why, by risk."""

    card: Card
    split: Split
    before: dict[str, float]
    after: dict[str, float]
    refused: dict[float, str]
    temperature_before: float

    def document(self) -> dict[str, Any]:
        """Return everything as JSON values; an undefined figure is null."""
        return {
            "model": self.card.name, "version": self.card.version,
            "temperature_before": self.temperature_before, "temperature": self.card.readout.temperature,
            "calibration": self.card.calibration and dataclasses.asdict(self.card.calibration),
            "refused": {f"{risk:g}": sentence for risk, sentence in self.refused.items()},
            "frames": {name: len(indices) for name, indices in dataclasses.asdict(self.split).items()},
            "before": defined(self.before), "after": defined(self.after),
        }  # fmt: skip


class AbstentionLoss:
    """The sum over frames of L_i by the bin of the entropy at which each wrong pixel begins to count."""

    def __init__(self) -> None:
        self.losses_N, self.num_frames = np.zeros(NUM_BINS), 0

    def add(self, entropy: Floats, wrong: Mask) -> None:
        """Add one frame's labelled pixels; a frame without any adds nothing."""
        if entropy.size:
            self.losses_N += np.bincount(bins_of(entropy[wrong]), minlength=NUM_BINS) / entropy.size
            self.num_frames += 1


def calibrate_artifact(question: Question, store: Path, *, risks: Sequence[float] = RISKS) -> tuple[Calibrated, Path]:
    """Calibrate a stored model and write its next version. Raises any PenumbraError."""
    directory = find_artifact(store, question.name, question.version)
    with Segmenter(limits=LIMITS) as segmenter:
        card = segmenter.load(directory)
        calibrated = calibrate(segmenter, question, load_frames(question, card), risks=risks)
    target = store / card.name / str(next_version(store, card.name))
    calibrated = dataclasses.replace(calibrated, card=dataclasses.replace(calibrated.card, version=int(target.name)))
    write_version(directory, target, calibrated.card)
    return calibrated, target


def calibrate(segmenter: Segmenter, question: Question, frames: FrameSet, *, risks: Sequence[float]) -> Calibrated:
    """Fit temperature and thresholds of a loaded model and check them. Raises BadOption, BadData."""
    if not risks or not all(0 < risk < 1 for risk in risks):
        raise BadOption(f"risks are {', '.join(map(str, risks)) or 'none'}; shares between 0 and 1 are wanted")
    runtime = segmenter.find(question.name, question.version)
    card, num_samples = runtime.card, question.options(0).num_samples(runtime.card)
    split = split_frames(range(0, len(frames), question.every), seed=question.seed)

    def try_card(trial: Card, indices: list[int], *, title: str) -> Iterator[Answer]:
        """Answer some frames as if the model had this card; to be read to the end before asking anew."""
        runtime.card = trial
        return segment_frames(segmenter, question, frames, indices, title=title)

    def nll(temperature: float) -> float:
        return mean_nll(
            try_card(set_temperature(card, temperature), split.temperature, title=f"temperature {temperature:.3f}")
        )

    new_card = set_temperature(card, fit_temperature(nll))
    loss = AbstentionLoss()
    for answer in try_card(new_card, split.thresholds, title="thresholds"):
        loss.add(answer.maps["entropy"][answer.known_HW], answer.wrong_HW[answer.known_HW])
    thresholds, refused = find_thresholds(loss, sorted(set(risks)), num_classes=card.num_classes)
    text = (
        f"{question.data_set} {question.split}: {loss.num_frames} frames for the thresholds, "
        f"{len(split.temperature)} others for the temperature (seed {question.seed}, every {question.every})"
    )
    values = (tuple(thresholds), tuple(thresholds.values()), loss.num_frames, num_samples, text)
    calibrated_card = dataclasses.replace(new_card, calibration=Calibration(*values) if thresholds else None)
    before, after = (
        figures_of(trial, try_card(trial, split.check, title="check"), num_samples=num_samples)
        for trial in (dataclasses.replace(card, calibration=None), calibrated_card)
    )
    return Calibrated(calibrated_card, split, before, after, refused, card.readout.temperature)


def mean_nll(answers: Iterable[Answer]) -> float:
    """Average -log p(truth) over labelled pixels, nats. Raises BadData: there are none; any temperature would do."""
    total, num = 0.0, 0
    for answer in answers:
        prob = answer.prob_HW[answer.known_HW]
        total -= float(np.log(np.maximum(prob, LEAST_PROBABILITY)).sum(dtype=np.float64))
        num += len(prob)
    if num == 0:
        raise BadData("none of the frames for the temperature has a label; give it more frames")
    return total / num


def figures_of(card: Card, answers: Iterable[Answer], *, num_samples: int) -> dict[str, float]:
    """Measure all figures of the answers, abstention by the card's thresholds among them."""
    evaluation = Evaluation(card, num_samples)
    for answer in answers:
        evaluation.add(answer)
    if not evaluation.num_frames:
        raise BadData("none of the frames to check on has a label; give it more frames")
    return evaluation.figures()


def split_frames(indices: Sequence[int], *, seed: int) -> Split:
    """Draw a quarter, a half and a quarter of the frames by the seed. Raises BadOption: too few frames."""
    if len(indices) < LEAST_FRAMES:
        raise BadOption(f"there are {len(indices)} frames to calibrate on; at least {LEAST_FRAMES} are wanted")
    order = [indices[i] for i in np.random.Generator(np.random.PCG64(seed)).permutation(len(indices))]
    quarter, half = len(order) // 4, len(order) // 2
    parts = (order[:quarter], order[quarter : quarter + half], order[quarter + half :])
    return Split(*(sorted(part) for part in parts))


def fit_temperature(nll: Callable[[float], float]) -> float:
    """Find the temperature with the least NLL, within `TEMPERATURES`; every call of `nll` is a run over the frames."""
    low, high = np.log(TEMPERATURES)
    best = minimize_scalar(lambda x: nll(math.exp(x)), bounds=(low, high), options={"xatol": TOLERANCE})
    return math.exp(best.x)


def set_temperature(card: Card, temperature: float) -> Card:
    """Give the card another temperature, to four digits; a calibration made at the old one is dropped."""
    readout = dataclasses.replace(card.readout, temperature=float(f"{temperature:.4g}"))
    return dataclasses.replace(card, readout=readout, calibration=None)


def find_thresholds(
    loss: AbstentionLoss, risks: Sequence[float], *, num_classes: int
) -> tuple[dict[float, float], dict[float, str]]:
    """Find entropy thresholds in nats by risk, and for each risk that cannot be guaranteed a sentence why.

    A bin of entropies is answered as a whole or not at all, so binning costs coverage and never the guarantee.
    """
    thresholds: dict[float, float] = {}
    refused: dict[float, str] = {}
    num = loss.num_frames
    bound_N = (loss.losses_N.cumsum() + 1) / (num + 1)
    least, most = bins_of(np.array([0, 1.01 * math.log(num_classes)], np.float32)).tolist()
    for risk in risks:
        last = int(np.searchsorted(bound_N, risk, side="right")) - 1  # up to which pixels may be answered
        if 1 / (num + 1) > risk:
            needed = math.ceil(1 / risk) - 1
            refused[risk] = f"a risk of {risk:g} cannot be guaranteed with {num} frames; at least {needed} are needed"
        elif last < least:
            refused[risk] = f"a risk of {risk:g} would need abstaining from every pixel, with these {num} frames"
        else:
            thresholds[risk] = max(top_of(min(last, most)), 0.0)
    return thresholds, refused


def write_version(source: Path, target: Path, card: Card) -> None:
    """Write an artifact beside another one: the same files, hard-linked where possible, under another card."""
    parse_card(dump_card(card))
    assert card.export
    with whole_directory(target) as draft:
        for name in card.export.files:
            try:
                os.link(source / name, draft / name)
            except OSError:  # a file system without hard links
                shutil.copy2(source / name, draft / name)
        (draft / CARD).write_text(dump_card(card), "utf-8")
        (draft / CARD).chmod(0o644)


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
    for sentence in calibrated.refused.values():
        console.print(f"not guaranteed: {sentence}", style="yellow", highlight=False)
    console.print(f"wrote {target}", highlight=False)
    click.echo(how_to_serve(calibrated.card.name), err=True)
