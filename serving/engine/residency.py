"""Which models are in memory: the least recently used leave it for those that are asked for, within a budget of bytes.

A model that is out is served all the same: its card, its speed and its sizes of batches are kept, and requests for it
wait in the queue, where the first of them has its graphs brought back from its artifact.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

from penumbra.models.errors import PenumbraError
from penumbra.serving.engine.allocator import give_memory_back
from penumbra.serving.engine.request import QueuedRequest
from penumbra.serving.engine.runtime import Runtime

log = logging.getLogger("penumbra")
STAY, NEVER = 4, float("inf")
"""Times as long as its load took a model that has work stays, whoever waits: where more models are asked for than there
is room for, most of the time is for running them."""


class Observer(Protocol):
    """An observer hears what the engine does, from any lane; `penumbra.serving.telemetry` makes metrics of it."""

    def batch_done(self, model: str, *, windows: int, capacity: int, samples: int) -> None:
        """A batch of `windows` out of `capacity` windows, with `samples` samples in all, in every view, was run."""

    def out_of_memory(self, model: str) -> None:
        """A batch did not fit and is run again in halves."""

    def model_loaded(self, model: str, *, seconds: float) -> None:
        """A model was loaded and checked, for the first time or again."""

    def model_evicted(self, model: str) -> None:
        """A model left memory to make room for another."""


@dataclass(slots=True)
class Stay:
    """A stay is what is known of a model's memory. load_s: how long its load took. until: it stays if it has work, from
    its first batch on so long. used: when the last one began or ended. num_batches: at work."""

    directory: Path
    num_bytes: int
    load_s: float
    used: float
    until: float = NEVER
    is_in: bool = True
    num_batches: int = 0


class Residency:
    """A residency says which models may run, and which come and leave next. Any thread may call it; its condition is
    the scheduler's own."""

    def __init__(
        self, limit_bytes: int = 0, *, load: Callable[[Runtime, Path], None] = lambda runtime, directory: None,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        """limit_bytes: of the files of all models in memory; 0 is none. load: brings a model's graphs back from its
        directory, or raises PenumbraError."""
        self.condition = threading.Condition()
        self._limit_bytes, self._load, self._observer = limit_bytes, load, observer
        self._stays: WeakKeyDictionary[Runtime, Stay] = WeakKeyDictionary()
        self._coming: Runtime | None = None
        self._leaving: list[Runtime] = []
        self._is_swapping = False

    @property
    def resident(self) -> tuple[int, int]:
        """Count the models in memory, and the bytes of their files."""
        with self.condition:
            sizes = [stay.num_bytes for stay in self._stays.values() if stay.is_in]
        return len(sizes), sum(sizes)

    def is_in(self, runtime: Runtime) -> bool:
        with self.condition:
            return runtime not in self._stays or self._stays[runtime].is_in

    def directory(self, runtime: Runtime) -> Path:
        """Return where a model that was added lies."""
        return self._stays[runtime].directory

    def may_run(self, runtime: Runtime) -> bool:
        """Tell whether a batch of a model may begin."""
        return not self._limit_bytes or (self.is_in(runtime) and runtime not in self._leaving)

    def add(self, runtime: Runtime, directory: Path, *, load_s: float) -> None:
        """Note a model that was loaded. Raises OSError where its files have gone."""
        num_bytes = sum(path.stat().st_size for path in directory.glob("*"))
        with self.condition:
            self._stays[runtime] = Stay(directory, num_bytes, load_s, time.perf_counter())

    def count_batch(self, runtime: Runtime, change: int) -> None:
        """Note that a batch of a model began (1) or ended (-1)."""
        if stay := self._stays.get(runtime):
            stay.num_batches, stay.used = stay.num_batches + change, time.perf_counter()
            stay.until = min(stay.until, stay.used + STAY * stay.load_s)

    def choose(self, requests: Sequence[QueuedRequest]) -> bool:
        """Choose which model comes back next, that of the request to be served first, and which leave: what has no work
        and was used least recently, then what was in for longest. On these no batch begins any more; once they are at
        rest this returns True, and `swap` is to be called. One model may be larger than the limit."""
        if not self._limit_bytes or self._is_swapping:
            return False
        wanted = {request.plan.runtime for request in requests if request.untaken}
        waiting = [request for request in requests if request.has_room and not self.is_in(request.plan.runtime)]
        self._coming = min(waiting, key=lambda request: request.precedence).plan.runtime if waiting else None
        inside = [(one, stay) for one, stay in self._stays.items() if stay.is_in]
        inside.sort(key=lambda pair: (pair[0] in wanted, pair[1].until if pair[0] in wanted else pair[1].used))
        over = sum(stay.num_bytes for one, stay in self._stays.items() if stay.is_in or one is self._coming)
        self._leaving, now = [], time.perf_counter()
        for runtime, stay in inside if self._coming else inside[:-1]:
            if (over := over - stay.num_bytes) + stay.num_bytes <= self._limit_bytes:
                break
            if runtime in wanted and now < stay.until:
                self._leaving = []
                return False
            self._leaving.append(runtime)
        self._is_swapping = not any(self._stays[one].num_batches for one in self._leaving)
        self._is_swapping &= bool(self._leaving or self._coming)
        for runtime in self._leaving if self._is_swapping else ():
            self._stays[runtime].is_in = False
        return self._is_swapping

    def swap(self) -> tuple[Runtime | None, str]:
        """Evict and bring back what was chosen. Returns what came back, or was to, and what kept it from that."""
        started, why, coming = time.perf_counter(), "", self._coming
        try:
            for runtime in self._leaving:
                runtime.leave_memory()
                if self._observer:
                    self._observer.model_evicted(runtime.card.name)
            give_memory_back()
            if coming:
                self._load(coming, self._stays[coming].directory)
        except PenumbraError as error:
            why = str(error)
        except Exception as error:  # a device's, a full memory: the next model may come all the same
            log.error("%s did not come back to memory", coming.card.name if coming else "a model", exc_info=error)
            why = "the model could not be loaded again; the server's log says why"
        with self.condition:
            self._is_swapping, self._leaving, now = False, [], time.perf_counter()
            if coming and not why:
                self._stays[coming] = replace(
                    self._stays[coming], load_s=now - started, used=now, until=NEVER, is_in=True
                )
        return coming, why
