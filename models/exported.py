"""What a card says of its artifact: what was exported, how near that is to the checkpoint, and why it was chosen."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the exported graphs are from their checkpoint in eager fp32, sample by sample, same noise and prompt.

    On the golden windows and, where the export was shown some, on labelled frames. entropy_ratio: of mean entropies, on
    which thresholds of risk stand. extras_relative: of the network's own maps. miou_change: of the labels on the
    frames, in percentage points; None where there were no frames.
    """

    max_abs: float
    relative: float
    label_flips_percent: float
    entropy_rank_correlation: float
    variance_ratio: float
    extras_relative: float = 0.0
    miou_change: float | None = None
    num_frames: int = 0
    entropy_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `penumbra tune` found fastest on one machine, under one load; its sizes are followed on that machine alone.

    processor, threads: the machine. windows_per_batch, samples_per_call, lanes: sizes of the engine. load: callers who
    ask as fast as they are answered, or one alone. target_ms: answers that took longer did not count; 0 counts all.
    windows_per_s, p95_ms, memory_mb: as measured then. gate: what the gate was held on. over: what it was chosen over,
    by format and precision: figures, or why it was refused. pictures: a hash of those that were asked for.
    """

    processor: str
    threads: Positive
    windows_per_batch: Positive
    samples_per_call: Positive
    lanes: Positive
    load: Literal["throughput", "latency"]
    target_ms: float
    windows_per_s: float
    p95_ms: float
    memory_mb: float
    gate: str
    over: dict[str, str] = field(default_factory=dict)
    pictures: str = ""


@dataclass(frozen=True, slots=True)
class ExportFacts:
    """What makes a card an artifact's: backend, precision, sha256 per file, and the parity figures.

    checkpoint: sha256 of the file it was exported from; empty for a network that was in memory.
    built_for: facts of the machine that graphs in machine code are bound to, by name; empty where they run anywhere.
    measured: what the figures are of, the artifact's own files, or the graph that its engines were built from, where no
    machine at hand could run them. tuned: by what measurement it was chosen, if by any.
    num_int8: layers that compute in int8. kept: names of those that the gate left out.
    """

    backend: str
    precision: str
    torch: str
    files: dict[str, str]
    parity: Parity
    checkpoint: str = ""
    built_for: dict[str, str] = field(default_factory=dict)
    measured: Literal["files", "graph"] = "files"
    tuned: Tuned | None = None
    num_int8: int = 0
    kept: tuple[str, ...] = ()
