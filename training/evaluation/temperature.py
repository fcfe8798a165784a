"""Fit a temperature, and make the control that sampling is held against: one pass at a temperature of its own."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize_scalar

from penumbra.models.card import Card
from penumbra.models.errors import BadData, BadOption
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.training.evaluation.answers import Answer, Question
from penumbra.training.evaluation.intervals import find_blocks
from penumbra.training.evaluation.run import segment_frames
from penumbra.training.frames import FrameSet
from penumbra.training.metrics import LEAST_PROBABILITY

TEMPERATURES = (0.2, 5.0)
"""Searched between; a temperature at an end means that the network is not to be mended by one."""
TOLERANCE = 0.01
"""Relative tolerance of the temperature."""
CONTROL_FRAMES = 8
"""Frames of each half that fit the control's temperature, each answered about twelve times."""
NOTHING_KEPT = 2.0**-60
"""A share of a mask's entries that is kept: of so few, none."""


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


def fit_temperature(nll: Callable[[float], float]) -> float:
    """Find the temperature with the least NLL, within `TEMPERATURES`; every call of `nll` is a run over the frames."""
    low, high = np.log(TEMPERATURES)
    best = minimize_scalar(lambda x: nll(math.exp(x)), bounds=(low, high), options={"xatol": TOLERANCE})
    return math.exp(best.x)


def set_temperature(card: Card, temperature: float) -> Card:
    """Give the card another temperature, to four digits; what was calibrated at the old one is dropped."""
    readout = replace(card.readout, temperature=float(f"{temperature:.4g}"))
    return replace(card, readout=readout, calibration=None, novelty=None)


def fit_card(segmenter: Segmenter, question: Question, frames: FrameSet, card: Card, indices: list[int]) -> Card:
    """Give a card the temperature that fits these frames best, answered as if the model had the card."""

    def nll(temperature: float) -> float:
        trials = dict.fromkeys(indices, set_temperature(card, temperature))
        return mean_nll(segment_frames(segmenter, question, frames, trials, title=f"temperature {temperature:.3f}"))

    return set_temperature(card, fit_temperature(nll))


def control_cards(segmenter: Segmenter, question: Question, frames: FrameSet, indices: list[int]) -> dict[int, Card]:
    """Give each frame the card of the control: one pass at the mean of the noise, at the temperature that fits the
    other half of the frames. Blocks go to the halves in turns, since a frame's neighbours are nearly itself, and two
    temperatures far apart would spoil the order of all pixels; a single block is cut in its middle.

    Raises BadOption: a number of samples is asked for as well, or there are fewer than two frames.
    """
    if question.samples is not None:
        raise BadOption(f"samples is {question.samples} and the control is a single pass; leave one of both out")
    if len(indices) < 2:
        raise BadOption(f"half of the frames fit the control's temperature, of {len(indices)}; at least 2 are wanted")
    card = single_pass(segmenter.find(question.name, question.version).card)
    blocks = find_blocks(frames.names, indices)
    if len(blocks) == 1:
        blocks = [blocks[0][: len(indices) // 2], blocks[0][len(indices) // 2 :]]
    halves = [[index for block in blocks[first::2] for index in block] for first in (0, 1)]
    few = [half[:: -(-len(half) // CONTROL_FRAMES)] for half in halves]
    fitted = [fit_card(segmenter, question, frames, card, indices) for indices in few]
    return {index: other for half, other in zip(halves, reversed(fitted), strict=True) for index in half}


def single_pass(card: Card) -> Card:
    """Make a card of one pass at the mean of its noise: nothing dropped, or the latent's mean. Of members, all stay.

    Zeros, a normal latent's mean, are what a dropout mask that keeps nothing holds, so the engine needs no other law.
    """
    if not card.sampling.is_stochastic:
        return card
    keep = 1.0 if card.sampling.kind == "dropout" else NOTHING_KEPT
    drawn = replace(card.sampling, kind="dropout", keep=keep, keeps=(), law="independent", default_samples=1)
    return replace(card, sampling=drawn)
