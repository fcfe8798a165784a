"""Answers that were given before, in bounded memory: an equal request is not run again.

What is kept is the prediction and not its bytes, so every surface and format shares it. With its seed an answer is a
function of picture, model and options, so nothing expires: the least recently used makes room.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import Card
from penumbra.models.errors import Cancelled, DeadlineExceeded
from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.request import Cancellation

Key = tuple[bytes, tuple[int | str, ...], SegmentOptions]


def key_of(image: bytes | NDArray[Any], card: Card, options: SegmentOptions) -> Key:
    """Make a key of everything that changes an answer, and nothing that does not: deadline and priority are left out.

    options: as `penumbra.serving.engine.plan.resolve` gives them.
    """
    compared = replace(options, outputs=options.named(card), deadline_ms=None, anytime=False, priority=0)
    shape = () if isinstance(image, bytes) else (*image.shape, image.dtype.str)
    data = image if isinstance(image, bytes) else np.ascontiguousarray(image).data
    return hashlib.sha256(data).digest(), shape, compared


@dataclass(slots=True)
class Leader:
    """A leader is the one of several equal requests that works; outcome: what has become of it."""

    outcome: Literal["", "done", "given up"] = ""


class AnswerCache:
    """A cache keeps predictions by key, and is safe from any thread. Arrays of those that are kept can only be read."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._bytes = limit_bytes, 0
        self._kept: OrderedDict[Key, tuple[Prediction, float, int]] = OrderedDict()
        self._in_work: dict[Key, Leader] = {}
        self._changed = threading.Condition()

    @contextmanager
    def first(self, key: Key, *, timeout_s: float, cancelled: Cancellation | None = None) -> Iterator[None]:
        """Let one of several equal requests work; the others come in when it is done, and find its answer or work.

        Where its caller leaves or its deadline passes, the next of them takes its place. Whoever is cancelled, or has
        waited for so long, comes in at once.
        """
        cancelled = cancelled or Cancellation()
        with cancelled.waking(self._wake):
            mine = self._join(key, cancelled, until=time.monotonic() + timeout_s)
        if mine is None:
            yield
            return
        outcome: Literal["done", "given up"] = "done"
        try:
            yield
        except (Cancelled, DeadlineExceeded):
            outcome = "given up"
            raise
        finally:
            with self._changed:
                mine.outcome = outcome
                del self._in_work[key]
                self._changed.notify_all()

    def _join(self, key: Key, cancelled: Cancellation, *, until: float) -> "Leader | None":
        """Return a leader for the one that is to work; None for one that has waited for another."""
        with self._changed:
            while leader := self._in_work.get(key):
                while not leader.outcome and not cancelled.is_set() and (left_s := until - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                if leader.outcome != "given up":
                    return None
            return self._in_work.setdefault(key, Leader())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def find(self, key: Key, card: Card) -> Prediction | None:
        """Find a prediction of the very artifact that is loaded, with its age; None where there is none."""
        with self._changed:
            if key not in self._kept or self._kept[key][0].card is not card:
                return None
            self._kept.move_to_end(key)
            prediction, kept_s, _ = self._kept[key]
        return replace(prediction, age_s=time.monotonic() - kept_s)

    def keep(self, key: Key, prediction: Prediction, *, image_bytes: int) -> None:
        """Keep a prediction if it is what the key asks for and has room. image_bytes: of the picture as it was sent."""
        arrays: list[NDArray[Any]] = [prediction.labels_HW, *prediction.maps.values()]
        arrays += [] if prediction.prob_KHW is None else [prediction.prob_KHW]
        pixel_bytes = prediction.image.num_bytes if prediction.image else 0
        size = image_bytes + pixel_bytes + sum(array.nbytes for array in arrays)
        if prediction.num_samples != key[2].samples or size > self._limit_bytes:
            return
        for array in arrays:
            array.setflags(write=False)
        with self._changed:
            self._bytes += size - self._kept.pop(key, (None, 0, 0))[2]
            self._kept[key] = prediction, time.monotonic(), size
            while self._bytes > self._limit_bytes:
                self._bytes -= self._kept.popitem(last=False)[1][2]
