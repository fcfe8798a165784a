"""One loaded model on one device: windows and noise in, moments out. Runs in the inference thread only."""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from models.card import Card
from models.contract import Features
from models.errors import BadArtifact, ModelFault
from serving.engine.backend import Backend, load_backend
from serving.engine.kernels import FloatArray
from serving.engine.moments import Moments, accumulate, empty_sums
from serving.engine.store import Artifact

log = logging.getLogger("penumbra")

GOLDEN_TOLERANCE = 1e-3
"""Largest difference from the golden logits, relative to their largest value: another processor rounds otherwise."""
SIZES = (1, 2, 4, 8, 16, 32)
WORTHWHILE = 0.95
"""A larger batch or chunk must take at most this share of a smaller one's time, or it is not worth its memory."""
FEW = 3
"""Candidates that are always tried, time permitting: one disturbed measurement must not end the search."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How batch and chunk sizes are found.

    windows_per_batch, samples_per_call: fixed sizes; 0 chooses by measurement. budget_s: time for that, per model.
    deterministic: take only batch sizes up to which every window's result has the same bytes as alone.
    """

    windows_per_batch: int = 0
    samples_per_call: int = 0
    deterministic: bool = False
    budget_s: float = 0.4


@dataclass(frozen=True, slots=True)
class Piece:
    """One window's input: pixels normalised to float32 [h, w, 3], and its noise_SL."""

    image_hw3: FloatArray
    noise_SL: FloatArray


class Runtime:
    """Encodes each window once and decodes its samples in chunks, so memory is bounded by batch and chunk.

    windows_per_batch, samples_per_call: chosen by `warm_up` from measurement.
    """

    def __init__(self, artifact: Artifact, *, device: torch.device, threads: int) -> None:
        self.card: Card = artifact.card
        self.windows_per_batch = 1
        self.samples_per_call = 1
        self._golden = artifact.golden
        self._backend: Backend = load_backend(artifact.card, artifact.directory, device)
        self._rows = ThreadPoolExecutor(threads, thread_name_prefix="rows")

    def run(self, pieces: Sequence[Piece]) -> list[Moments | ModelFault]:
        """Moments of every window, in order. All pieces have one size and one S.

        A window whose logits are not finite is answered with a ModelFault; its neighbours are unharmed.
        """
        return self._sample(self._encode(pieces), pieces)

    def _encode(self, pieces: Sequence[Piece]) -> Features:
        image_Bhw3 = torch.from_numpy(np.stack([piece.image_hw3 for piece in pieces]))
        return self._backend.encode(image_Bhw3.permute(0, 3, 1, 2))

    def _sample(self, features: Features, pieces: Sequence[Piece]) -> list[Moments | ModelFault]:
        height, width = pieces[0].image_hw3.shape[:2]
        noise_SBL = torch.from_numpy(np.stack([piece.noise_SL for piece in pieces], axis=1))
        sums = [empty_sums(self.card.num_classes, height, width) for _ in pieces]
        finite = [True] * len(pieces)
        for chunk_SBL in torch.split(noise_SBL, self._chunk(len(noise_SBL))):
            logits_SBKhw = self._backend.decode(features, chunk_SBL)
            for b, (prob_hKw, entropy_hw) in enumerate(sums):
                logits_SKhw = logits_SBKhw[:, b]
                finite[b] = finite[b] and bool(torch.isfinite(logits_SKhw).all())
                if finite[b]:
                    accumulate(logits_SKhw, prob_hKw, entropy_hw, readout=self.card.readout, spread=self._rows.map)
        fault = ModelFault(f"{self.card.name} produced values that are not finite for this image")
        return [Moments(*s, len(noise_SBL)) if ok else fault for s, ok in zip(sums, finite, strict=True)]

    def _chunk(self, num_samples: int) -> int:
        """Members come out of one call together; draws are cut into measured chunks."""
        return num_samples if self.card.sampling.kind == "members" else self.samples_per_call

    def check_golden(self) -> None:
        """Run the golden window. Raises BadArtifact when this machine does not reproduce it."""
        golden = self._golden
        got = self._backend.decode(self._backend.encode(golden.image_B3hw), golden.noise_SBL).float().cpu()
        scale = golden.logits_SBKhw.abs().max().clamp(min=1e-6)
        if got.shape[2] != self.card.num_classes:
            raise BadArtifact(
                f"{self.card.name} gives logits of {got.shape[2]} classes; its card names {self.card.num_classes}"
            )
        if got.shape != golden.logits_SBKhw.shape or not torch.isfinite(got).all():
            raise BadArtifact(f"{self.card.name} does not reproduce its golden window: wrong shape or not finite")
        error = float((got - golden.logits_SBKhw).abs().max() / scale)
        if error > GOLDEN_TOLERANCE:
            raise BadArtifact(
                f"{self.card.name} does not reproduce its golden window on this machine: relative error {error:.1e}, "
                f"{GOLDEN_TOLERANCE:.0e} allowed; export the checkpoint here"
            )

    def warm_up(self, tuning: Tuning) -> None:
        """Run once, and set the chunk of samples and the batch of windows: as told, or what is fastest here."""
        pieces = self._golden_pieces()
        self.run(pieces[:1])
        if tuning.samples_per_call:
            self.samples_per_call = tuning.samples_per_call
        elif self.card.sampling.kind in ("latent", "dropout"):
            features = self._encode(pieces[:1])
            chunks = [size for size in SIZES if size <= len(pieces[0].noise_SL)]
            share_s = tuning.budget_s / 3
            self._choose("samples_per_call", chunks, lambda: self._sample(features, pieces[:1]), budget_s=share_s)
        if tuning.windows_per_batch:
            self.windows_per_batch = tuning.windows_per_batch
        else:
            share_s = tuning.budget_s * 2 / 3
            self._choose("windows_per_batch", SIZES, lambda: self._run_full_batch(pieces), budget_s=share_s)
        if tuning.deterministic:
            self.windows_per_batch = self._largest_identical_batch(pieces)
        log.info(
            "%s: %d windows per batch and %d samples per call on %s%s",
            self.card.name, self.windows_per_batch, self.samples_per_call, self._backend.device,
            ", each with the same bytes as alone" if tuning.deterministic else "",
        )  # fmt: skip

    def _golden_pieces(self) -> list[Piece]:
        images = self._golden.image_B3hw.permute(0, 2, 3, 1).contiguous().numpy()
        repeats = -(-self.card.sampling.default_samples // len(self._golden.noise_SBL))
        noise = self._golden.noise_SBL.repeat(repeats, 1, 1)[: self.card.sampling.default_samples].numpy()
        return [Piece(images[i], np.ascontiguousarray(noise[:, i])) for i in range(len(images))]

    def _choose(self, setting: str, sizes: Sequence[int], work: Callable[[], object], *, budget_s: float) -> None:
        """Set `setting` to the smallest size within 5 % of the fastest; `work` runs one full unit of that size."""
        end = time.perf_counter() + budget_s
        best_s: dict[int, float] = {}

        def measure(size: int) -> float:
            setattr(self, setting, size)
            started = time.perf_counter()
            work()
            windows = size if setting == "windows_per_batch" else 1
            return (time.perf_counter() - started) / windows

        for size in sizes:  # the first few, then up as long as it pays
            fastest = min(best_s.values(), default=float("inf"))
            best_s[size] = measure(size)
            if time.perf_counter() > end or (len(best_s) >= FEW and best_s[size] >= fastest):
                break
        for size in itertools.cycle(list(best_s)):  # again and interleaved: a disturbance can only add time
            if time.perf_counter() > end:
                break
            best_s[size] = min(best_s[size], measure(size))
        limit = min(best_s.values()) / WORTHWHILE
        setattr(self, setting, min(size for size, seconds in best_s.items() if seconds <= limit))

    def _run_full_batch(self, pieces: list[Piece]) -> None:
        self.run([pieces[i % len(pieces)] for i in range(self.windows_per_batch)])

    def _largest_identical_batch(self, pieces: list[Piece]) -> int:
        alone = [self.run([piece])[0] for piece in pieces]
        for size in range(2, self.windows_per_batch + 1):
            together = self.run([pieces[i % len(pieces)] for i in range(size)])
            for i, moments in enumerate(together):
                if not _same_bytes(moments, alone[i % len(pieces)]):
                    return size - 1
        return self.windows_per_batch

    def close(self) -> None:
        self._rows.shutdown()


def _same_bytes(one: Moments | ModelFault, other: Moments | ModelFault) -> bool:
    return (
        isinstance(one, Moments)
        and isinstance(other, Moments)
        and one.prob_hKw.tobytes() == other.prob_hKw.tobytes()
        and one.entropy_hw.tobytes() == other.entropy_hw.tobytes()
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a smaller batch may succeed (CUDA, and the CPU allocator's RuntimeError)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
