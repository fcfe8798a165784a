"""One loaded model on one device: windows and noise in, moments out. Runs in the inference thread only."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from models.card import Card
from models.errors import BadArtifact, ModelFault
from serving.engine.backend import Backend, load_backend
from serving.engine.kernels import FloatArray
from serving.engine.moments import Moments, accumulate, empty_sums
from serving.engine.store import Artifact

log = logging.getLogger("penumbra")

GOLDEN_TOLERANCE = 1e-3
"""Largest difference from the golden logits, relative to their largest value: another processor rounds otherwise."""
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
WORTHWHILE = 0.95
"""A larger batch or chunk must cost at most this share of the time per window, or it is not worth its memory."""


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

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> list[Moments | ModelFault]:
        """Moments of every window, in order. All pieces have one size and one S.

        A window whose logits are not finite is answered with a ModelFault; its neighbours are unharmed.
        """
        height, width = pieces[0].image_hw3.shape[:2]
        num_samples = len(pieces[0].noise_SL)
        image_B3hw = torch.from_numpy(np.stack([p.image_hw3 for p in pieces])).permute(0, 3, 1, 2)
        noise_SBL = torch.from_numpy(np.stack([p.noise_SL for p in pieces], axis=1))
        features = self._backend.encode(image_B3hw)
        sums = [empty_sums(self.card.num_classes, height, width) for _ in pieces]
        finite = [True] * len(pieces)
        for chunk in torch.split(noise_SBL, self._chunk(num_samples)):
            logits_SBKhw = self._backend.decode(features, chunk)
            for b, (prob_hKw, entropy_hw) in enumerate(sums):
                logits_SKhw = logits_SBKhw[:, b]
                finite[b] = finite[b] and bool(torch.isfinite(logits_SKhw).all())
                if finite[b]:
                    accumulate(logits_SKhw, prob_hKw, entropy_hw, readout=self.card.readout, spread=self._rows.map)
        fault = ModelFault(f"{self.card.name} produced values that are not finite for this image")
        return [Moments(*s, num_samples) if ok else fault for s, ok in zip(sums, finite, strict=True)]

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

    def warm_up(self, *, budget_s: float, deterministic: bool) -> None:
        """Measure which chunk of samples and which batch of windows is fastest here, within a time budget.

        deterministic: take only batch sizes up to which every window's result has the same bytes as alone.
        """
        end = time.perf_counter() + budget_s
        pieces = self._golden_pieces()
        self.run(pieces[:1])
        if self.card.sampling.kind in ("latent", "dropout"):
            self._choose("samples_per_call", [s for s in BATCH_SIZES if s <= len(pieces[0].noise_SL)], pieces, end)
        self._choose("windows_per_batch", list(BATCH_SIZES), pieces, end)
        if deterministic:
            self.windows_per_batch = self._largest_identical_batch(pieces)
        log.info(
            "%s: %d windows per batch and %d samples per call measured fastest on %s%s",
            self.card.name, self.windows_per_batch, self.samples_per_call, self._backend.device,
            ", identical to one alone" if deterministic else "",
        )  # fmt: skip

    def _golden_pieces(self) -> list[Piece]:
        images = self._golden.image_B3hw.permute(0, 2, 3, 1).contiguous().numpy()
        repeats = -(-self.card.sampling.default_samples // len(self._golden.noise_SBL))
        noise = self._golden.noise_SBL.repeat(repeats, 1, 1)[: self.card.sampling.default_samples].numpy()
        return [Piece(images[i], np.ascontiguousarray(noise[:, i])) for i in range(len(images))]

    def _choose(self, setting: str, candidates: list[int], pieces: list[Piece], end: float) -> None:
        """Set `setting` to the smallest candidate that no larger one beats clearly; stop when time is up."""
        best_s, best = float("inf"), candidates[0]
        for value in candidates:
            setattr(self, setting, value)
            batch = [pieces[i % len(pieces)] for i in range(self.windows_per_batch)]
            started = time.perf_counter()
            for _ in range(2):
                self.run(batch)
            per_window_s = (time.perf_counter() - started) / 2 / len(batch)
            if per_window_s < WORTHWHILE * best_s:
                best_s, best = per_window_s, value
            spent = time.perf_counter() - started
            if per_window_s > best_s / WORTHWHILE or time.perf_counter() + 2 * spent > end:
                break
        setattr(self, setting, best)

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
