"""Counts and times of the requests that came by the Open Inference Protocol, in the form its clients read."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penumbra.serving.engine.answer import Prediction

PHASES = {
    "queue": ("wait", "queue"),
    "compute_input": ("decode",),
    "compute_infer": ("run",),
    "compute_output": ("stitch", "read_out"),
}
"""The protocol's phases -> ours (`Prediction.timing_ms`)."""
DURATIONS = ("success", "fail", *PHASES, "cache_hit", "cache_miss")


@dataclass(slots=True)
class _Tally:
    last_ms: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DURATIONS, 0))
    ns: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DURATIONS, 0))

    def add(self, name: str, seconds: float) -> None:
        self.counts[name] += 1
        self.ns[name] += int(1e9 * seconds)


class Statistics:
    """Tallies by model and version; safe from any thread. Models are loaded ones, so there are few."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, int], _Tally] = {}
        self._lock = threading.Lock()

    def succeeded(self, prediction: Prediction, seconds: float) -> None:
        with self._lock:
            tally = self._tally(prediction.card.name, prediction.card.version)
            tally.last_ms = int(1e3 * time.time())
            tally.add("success", seconds)
            if prediction.age_s is not None:
                tally.add("cache_hit", seconds)
                return
            for name, phases in PHASES.items():
                tally.add(name, sum(prediction.timing_ms.get(phase, 0) for phase in phases) / 1e3)

    def failed(self, model: str, version: int, seconds: float) -> None:
        """Count a request that reached its model."""
        with self._lock:
            self._tally(model, version).add("fail", seconds)

    def _tally(self, model: str, version: int) -> _Tally:
        return self._tallies.setdefault((model, version), _Tally())

    def document(self, model: str, version: int) -> Mapping[str, Any]:
        """What the protocol says of one model; an execution is a request, for its batches are shared by windows."""
        with self._lock:
            tally = self._tally(model, version)
            return {
                "name": model,
                "version": str(version),
                "last_inference": tally.last_ms,
                "inference_count": tally.counts["success"],
                "execution_count": tally.counts["success"],
                "inference_stats": {name: {"count": tally.counts[name], "ns": tally.ns[name]} for name in DURATIONS},
                "response_stats": {},
                "batch_stats": [],
                "memory_usage": [],
            }
