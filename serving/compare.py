"""The process beside a server in which two versions of a model answer one picture, in time that is left over.

`penumbra.serving.shadow` starts it and asks it over a socket, so that a candidate that fails, takes all memory or ends
its process leaves the server as it is.
"""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import IGNORE, Card
from penumbra.models.errors import BadArtifact, PenumbraError, first_line
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.signature import read_public_keys
from penumbra.serving.engine.store import artifact_card
from penumbra.serving.process import end_with_parent
from penumbra.serving.settings import read_settings

if TYPE_CHECKING:
    from penumbra.serving.engine.segmenter import Segmenter


@dataclass(frozen=True, slots=True)
class Question:
    """A question names the directories of two versions and the request that both are to answer; a question without an
    image loads the versions alone."""

    served: Path
    candidate: Path
    image: bytes | NDArray[Any] | None = None
    options: SegmentOptions = field(default_factory=SegmentOptions)


@dataclass(frozen=True, slots=True)
class Compared:
    """Says how two answers to one request differ.

    num_pixels: those that hold a measurement. num_flipped: of these, whose label is another. entropy_nats: mean entropy
    of the candidate's answer less that of the served version's. seconds: of processor time (on a GPU, of the clock:
    is_by_clock) that each took, the served version first.
    """

    num_pixels: int
    num_flipped: int
    entropy_nats: float
    seconds: tuple[float, float]
    is_by_clock: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """Says why there is no comparison. is_refused: the candidate itself must not be used, whatever the picture is."""

    why: str
    is_refused: bool = False


Reply = Compared | Failed | None


def main(descriptor: int) -> None:
    """Answer questions until the server is gone."""
    step_back()
    import torch

    from penumbra.serving.engine.segmenter import Segmenter

    torch.set_num_threads(1)
    settings = read_settings()
    trusted = read_public_keys(settings.trusted_keys_file) if settings.trusted_keys_file else None
    engine = Segmenter(
        limits=replace(settings.limits, model_bytes=0), device=settings.device, threads=1, lanes=1, trusted_keys=trusted
    )  # fmt: skip
    with Connection(descriptor) as connection, engine as segmenter, suppress(EOFError):
        while True:
            connection.send(reply(segmenter, connection.recv()))


def step_back() -> None:
    """Take only processor time that is left over, be the first to go where memory is short, and end with the server."""
    end_with_parent(signal.SIGKILL)  # which ends a stopped process, too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's to answer
    os.nice(19)
    with suppress(AttributeError, OSError):  # where the system has no such class, or does not let us in
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def reply(segmenter: "Segmenter", question: Question) -> Reply:
    """Answer one question; None where it was to load the versions alone."""
    from penumbra.serving.engine.runtime import is_out_of_memory

    try:
        try:
            candidate = _card(segmenter, question.candidate)
        except BadArtifact as error:
            return Failed(str(error), is_refused=not is_out_of_memory(error.__context__ or error))
        served = _card(segmenter, question.served)  # second: what is loaded by its number stays until the next load
        if question.image is None:
            return None
        return compare(segmenter, (served, candidate), question.image, question.options)
    except PenumbraError as error:
        return Failed(str(error))
    except Exception as error:  # whatever a graph raises
        return Failed(f"{type(error).__name__}: {first_line(error)}")


def _card(segmenter: "Segmenter", directory: Path) -> Card:
    """Load a version unless it is; another artifact that has come under its number is another version."""
    card = artifact_card(directory)
    return card if card in segmenter.cards() else segmenter.load(directory)


def compare(
    segmenter: "Segmenter", cards: tuple[Card, Card], image: bytes | NDArray[Any], options: SegmentOptions
) -> Compared:
    """Answer one request with the served version and with the candidate. Raises any PenumbraError."""
    from penumbra.serving.engine.decode import open_image

    answers, seconds = [], []
    is_on_gpu = segmenter.find(cards[0].name, cards[0].version).stays_on_device
    clock = time.perf_counter if is_on_gpu else time.process_time
    for card in cards:
        own = options_for(card, options, served=cards[0])
        pixels: Any = image
        if isinstance(image, bytes):
            pixels = open_image(image, segmenter.limits, segmenter.reading(own)).load()
        started = clock()
        answers.append(segmenter.segment(pixels, own))
        seconds.append(clock() - started)
    served, candidate = answers
    is_measured = served.labels_HW != IGNORE
    flipped = (served.labels_HW != candidate.labels_HW) & is_measured
    shift = sum(candidate.scores.means[:1]) - sum(served.scores.means[:1])
    return Compared(int(is_measured.sum()), int(np.count_nonzero(flipped)), shift, (seconds[0], seconds[1]), is_on_gpu)


def options_for(card: Card, options: SegmentOptions, *, served: Card) -> SegmentOptions:
    """Ask a version what was asked of the served one, with the same seed: what its caller left to the model is left to
    each, and nothing is withheld, for a threshold is a version's own.

    options: as `penumbra.serving.engine.plan.resolve` gives them for the served version.
    """
    left = replace(options, samples=None, views=None)
    return replace(
        options, model=card.name, version=card.version, outputs=(), max_risk=None, max_class_risk=None,
        deadline_ms=None, anytime=False, views=None if options.views == served.views else options.views,
        samples=None if options.samples == left.num_samples(served) else options.samples,
    )  # fmt: skip
