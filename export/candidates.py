"""What `penumbra tune` begins with and chooses among: formats in their precisions, sizes, and their figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from penumbra.export.load import Answers
from penumbra.export.zoo import ZOO
from penumbra.models.card import Card, ExportFacts
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.serving.engine.backends import find_format
from penumbra.serving.engine.runtime import SIZES, Runtime, Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact, sha256_of, versions
from penumbra.serving.engine.throughput import Cores
from penumbra.serving.files.predict import IN_MEMORY

MOST_WINDOWS, MOST_SAMPLES = 8, 16
"""Larger batches have not paid on any processor so far."""
PRECISIONS = ("bf16", "fp32", "tf32", "fp16", "int8")
"""The order of trying: what promises most first, but int8, whose search takes what time is left, after all others."""
Say = Callable[[str], object]


class Sizes(NamedTuple):
    """Sizes with which the engine runs a model."""

    windows_per_batch: int
    samples_per_call: int
    lanes: int


@dataclass(eq=False, slots=True)
class Candidate:
    """A format in a precision: its artifact, what was measured of it, or why it was refused.

    settings: measurements with each of the sizes that were tried; None is what a server finds itself.
    """

    backend: str
    precision: str
    refused: str = ""
    directory: Path = Path()
    facts: ExportFacts | None = None
    memory_mb: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    settings: dict[Sizes | None, list[Answers]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}".strip()


Setting = tuple[Candidate, Sizes | None]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a candidate in its fastest sizes. changes: of figures of accuracy, by name."""

    name: str
    sizes: Sizes | None
    windows_per_s: float
    p95_ms: float
    memory_mb: float
    label_flips_percent: float
    variance_ratio: float
    changes: dict[str, float]

    def dominates(self, other: "Row") -> bool:
        """Tell whether it is nowhere worse, and better in something."""
        pairs = list(zip(self._costs, other._costs, strict=True))
        return all(own <= its for own, its in pairs) and any(own < its for own, its in pairs)

    @property
    def _costs(self) -> tuple[float, ...]:
        """List what should be small; of mean IoU, which should be large, the negative."""
        accuracy = (-value if name == "mIoU" else value for name, value in self.changes.items())
        of_gate = (self.label_flips_percent, abs(self.variance_ratio - 1))
        return (-self.windows_per_s, self.p95_ms, self.memory_mb, *of_gate, *accuracy)

    def __str__(self) -> str:
        return f"{self.windows_per_s:.1f} windows/s, p95 {self.p95_ms:.0f} ms, {self.label_flips_percent:.3f} % flips"


def find_loadable(store: Path, name: str, device: str, say: Say, threads: int = 0) -> Path:
    """Find a model's newest version that loads, and say why newer ones do not. Raises UnknownModel, BadArtifact."""
    for version in reversed(versions(store).get(name) or [0]):
        directory = find_artifact(store, name, version or None)
        try:
            with Segmenter(limits=IN_MEMORY, device=device, tuning=Tuning(1, 1), threads=threads) as segmenter:
                segmenter.load(directory)
            return directory
        except BadArtifact as error:
            say(f"version {version} is passed over, since it does not load: {error}")
    raise BadArtifact(f"no version of {name} in {store} loads here; export its checkpoint again")


def find_checkpoint(card: Card, given: Path | None) -> Path:
    """Find the very file that an artifact was exported from: the given one, here by its name, or in the zoo."""
    assert card.export
    if not card.export.checkpoint:
        raise BadOption(f"{card.name} was exported from memory, and formats are built from a file; export a checkpoint")
    file = f"{card.name}.safetensors"
    places = [given] if given else [Path(file), ZOO / file]
    for path in places:
        if path.is_file() and sha256_of(path) == card.export.checkpoint:
            return path
    raise BadOption(
        f"{card.name} version {card.version} was exported from a file of sha256 {card.export.checkpoint[:12]}..., "
        f"which is not {' or '.join(map(str, places))}; name it with --checkpoint"
    )


def find_candidates(backends: Sequence[str], device: torch.device, *, machine_code: bool) -> list[Candidate]:
    """List what is installed, what promises most first, and what is not with the reason."""
    found: list[Candidate] = []
    for backend in backends:
        try:
            precisions = find_format("penumbra.export", backend).PRECISIONS
            bound = find_format("penumbra.serving.engine.backends", backend).target(device)
        except BadOption as error:
            found.append(Candidate(backend, "", str(error)))
            continue
        why = f"is bound to {' and '.join(bound)}; --machine-code measures it too" if bound and not machine_code else ""
        if backend.startswith("tensorrt") and device.type != "cuda":
            why = "runs on a GPU"
        found += [Candidate(backend, "", why)] if why else [Candidate(backend, one) for one in precisions]
    return sorted(found, key=lambda one: (*PRECISIONS, "").index(one.precision))


def find_sizes(runtime: Runtime, cores: Cores) -> list[Sizes]:
    """List all sizes that a model can be run with here, the smallest first. On a GPU lanes are not a model's."""
    lanes = {cores.threads // share or 1 for share in (1, 2, 4, cores.threads)} if cores.widen else {cores.lanes}
    sampling = runtime.card.sampling
    most = min(sampling.default_samples, MOST_SAMPLES) if sampling.is_stochastic else 1
    windows, samples = ([size for size in SIZES if size <= limit] for limit in (MOST_WINDOWS, most))
    windows = [size for size in windows if size in runtime.batch_sizes]
    return [Sizes(*sizes) for sizes in product(windows, samples, sorted(lanes))]


def settings_of(candidates: Sequence[Candidate]) -> list[Setting]:
    """List all that was measured of candidates."""
    return [(candidate, sizes) for candidate in candidates for sizes in candidate.settings]
