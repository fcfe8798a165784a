"""What comes back, as the server's OpenAPI document describes it."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self, cast
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

NO_LABEL = 255
"""The label of pixels that were withheld for a risk, or hold no measurement."""
NPZ = "application/x-npz"
"""The form of answers that holds everything of them."""


class Scores(NamedTuple):
    """Two numbers about a whole picture, 0 to 1; None where the model has none.

    expected_error: the share of its pixels that is wrong, as far as the model can tell. novelty: the share of the
    pictures that the model was calibrated on that were less strange.
    """

    expected_error: float | None
    novelty: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """A prediction is one picture's answer, at the picture's size.

    labels: uint8 [H, W], class ids, 255 for none. maps: float32 [H, W] by name; entropies in nats; NaN where nothing
    was measured. probabilities: float32 [classes, H, W], where `outputs` asked for them. warning: what to know of this
    answer, in sentences; empty where there is nothing. members: names of the samples, where they have names.
    abstained: the share of pixels withheld, where a risk was given. samples_asked: where `anytime` may have drawn
    fewer. views: which ones each sample was the mean of. classes: names by id; empty where the server serves that
    version of the model no more. timing_ms: milliseconds by phase.
    """

    labels: NDArray[np.uint8]
    maps: Mapping[str, NDArray[np.float32]]
    probabilities: NDArray[np.float32] | None
    model: str
    version: int
    seed: int
    samples: int
    samples_asked: int | None
    views: str
    members: tuple[str, ...]
    abstained: float | None
    scores: Scores
    warning: str
    classes: tuple[str, ...]
    timing_ms: Mapping[str, float]

    def mask(self, name: str | int) -> NDArray[np.bool_]:
        """Give the pixels [H, W] of a class, by its name or id. Raises ValueError for a class that there is not."""
        return np.equal(self.labels, self.classes.index(name) if isinstance(name, str) else name)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each class that occurs among the pixels that have a label, the largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=NO_LABEL + 1)[:NO_LABEL]
        total = max(int(counts.sum()), 1)
        order = sorted(np.flatnonzero(counts), key=lambda k: -counts[k])
        return {self.classes[k] if k < len(self.classes) else str(k): float(counts[k]) / total for k in order}


FACTS = (
    "model", "version", "seed", "samples", "samples_asked", "views", "members", "abstained", "warning", *Scores._fields,
)  # fmt: skip
"""What the headers `X-Penumbra-*` of an answer say, in the words of `Prediction` and `Scores`."""


def header_of(fact: str) -> str:
    """Name the header that has a fact."""
    return f"X-Penumbra-{fact.replace('_', '-').title()}"


def read_prediction(content: bytes, headers: Mapping[str, str], classes: Sequence[str]) -> Prediction:
    """Read an answer of the form `NPZ`. headers: of the answer, by names of any case."""
    said = {name: headers.get(header_of(name), "") for name in FACTS}
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    labels, probabilities = arrays.pop("labels"), arrays.pop("probabilities", None)
    return Prediction(
        labels, arrays, probabilities, said["model"], int(said["version"]), int(said["seed"]), int(said["samples"]),
        int(said["samples_asked"]) if said["samples_asked"] else None, said["views"] or "none",
        tuple(unquote(name) for name in said["members"].split(",") if name), _share(said["abstained"]),
        Scores(*(_share(said[name]) for name in Scores._fields)), unquote(said["warning"]), tuple(classes),
        {phase: float(ms) for phase, ms in re.findall(r"(\w+);dur=([\d.]+)", headers.get("Server-Timing", ""))},
    )  # fmt: skip


def _share(text: str) -> float | None:
    return float(text) if text else None


@dataclass(frozen=True, slots=True)
class Job:
    """A job is work that takes longer than a caller waits; this is how it stood when the server was asked.

    state: queued, running, writing, done or failed. created, finished, expires: seconds since 1970. error: why it
    failed. target: the object that its answer is copied to. url, result: where the server has it, and its answer once
    there is one.
    """

    id: str
    state: str
    percent: float
    windows_done: int
    windows: int
    media_type: str
    options: Mapping[str, str]
    error: str | None
    created: float
    finished: float | None
    expires: float | None
    target: str | None
    url: str
    result: str | None

    @property
    def is_over(self) -> bool:
        """Whether it is done or failed."""
        return self.finished is not None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Read what the server says; what a later server says beside it is passed over."""
        return cls(**{field.name: document[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served.

    classes: names by id. maps: the names of those that answers of a `single` sample and of `several` have.
    """

    name: str
    version: int
    classes: tuple[str, ...]
    maps: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Read an entry of `GET /models`."""
        return cls(document["name"], document["version"], tuple(document["classes"]), cast(Any, document["maps"]))
