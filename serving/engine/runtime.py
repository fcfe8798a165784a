"""One loaded model on one device: windows and noise in, moments out. Runs in the scheduler's lanes."""

import itertools
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penumbra.models.card import Card
from penumbra.models.contract import Features
from penumbra.models.errors import BadArtifact
from penumbra.serving.engine.backends import Backend, load_backend
from penumbra.serving.engine.canvas import Landing, Surface, Wanted
from penumbra.serving.engine.device import stays_on
from penumbra.serving.engine.gpu.pipeline import DeviceSteps
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.moments import Moments, Statistics, channels, flags_of, not_finite, resize
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.steps import Answer, HostSteps, WindowInput, answer
from penumbra.serving.engine.store import Artifact, Recorded
from penumbra.serving.engine.views import AS_IS, VIEWS, View
from penumbra.serving.engine.windows import WindowPlan, cover

log = logging.getLogger("penumbra")

GOLDEN_TOLERANCE = 1e-3
"""Largest difference from the golden logits, relative to their largest value: another processor rounds otherwise.
In half precision it is twice what the export measured, if that is more."""
SIZES = (1, 2, 4, 8, 16, 32)
WORTHWHILE = 0.95
"""A larger batch or chunk must take at most this share of a smaller one's time, or it is not worth its memory."""
BATCH_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Moments of one batch of windows at most; a request holds those of up to three."""
SLOW = 2
"""Times the budget of tuning that a window takes of one core."""
SHORTAGE = re.compile(
    r"out[ _]?of[ _](host_|device_|gpu )?memory|OutOfMemory|bad_alloc|(can't|cannot|failed to|unable to) allocate"
    r"|could not be allocated|alloc(ation)?_fail(ed|ure)|available memory of \d+ is smaller than requested"
    r"|unable to find (an engine to execute|a valid cudnn algorithm)|could not create a memory",
    re.IGNORECASE,
)
"""What allocators say. Only torch outside TorchScript has a type for it: TorchScript and AOTInductor raise RuntimeError
around the allocator's text, OpenVINO a RuntimeError and onnxruntime exceptions of its own (`Fail`, `RuntimeException`)
around theirs; cuBLAS and cuDNN name a status, and cuDNN without room for any algorithm says that it found none."""
FEW = 3
"""Candidates that are always tried, time permitting: one disturbed measurement must not end the search."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """A tuning says how batch and chunk sizes are found.

    windows_per_batch, samples_per_call: fixed sizes; 0 chooses by measurement. budget_s: time for that, per model.
    lanes: batches of the model at a time, which share all cores out; 0 is as many as there are lanes.
    deterministic: take only batch sizes up to which every window's result has the same bytes as alone.
    target_s: time that a request of one window may take, which bounds batches while they run; 0 bounds none.
    cuda_graphs: capture the calls of the sizes that were found, and of single windows.
    """

    windows_per_batch: int = 0
    samples_per_call: int = 0
    lanes: int = 0
    deterministic: bool = False
    budget_s: float = 0.4
    target_s: float = 0.0
    cuda_graphs: bool = False


class Runtime:
    """A runtime encodes each window once and decodes its samples in chunks, so memory is bounded by batch and chunk.

    windows_per_batch, samples_per_call: chosen by `warm_up` from measurement. lanes: as `Tuning` has them.
    """

    def __init__(self, artifact: Artifact, *, device: torch.device) -> None:
        self.card: Card = artifact.card
        self.windows_per_batch = self.samples_per_call = 1
        self.lanes = 0
        self._window_core_s, self._window_samples = 0.0, 0
        """Seconds times cores of one window with so many samples, as measured while getting ready."""
        self._golden = artifact.golden
        self._backend: Backend = load_backend(artifact.card, artifact.directory, device)
        self.device = self._backend.device
        self.stays_on_device = stays_on(self.device)
        """Whether `run` stitches, rather than the requests' threads."""
        kind = DeviceSteps if self.stays_on_device else HostSteps
        self._steps: DeviceSteps | HostSteps = kind(self.card, self.device)

    def surface(self, image_HWC: Raster, plan: WindowPlan, wanted: Wanted, *, first_y: int = 0) -> Surface:
        """Make a request's canvas. first_y: the row of the image whose band is the first to be finished."""
        most = self.windows_per_batch if self.stays_on_device else 1  # a request's thread stitches one by one
        transfers, size = self._steps.transfers, channels(self.card)
        return Surface(image_HWC, plan, wanted, transfers=transfers, channels=size, first_y=first_y, most=most)

    def run(self, inputs: Sequence[WindowInput]) -> list[Answer]:
        """Answer every window, in order. All inputs have one size, one S and the same views, and all have a prompt or
        none has. Sample s in view v is the member v * S + s: every view is asked with the same noise.

        A window whose logits or own maps are not finite is answered with a ModelFault; its neighbours are unharmed. On
        a GPU what is given is on its way when this returns, and so is that fault (`Landing`).
        """
        return list(self._sample(self._encode(inputs), inputs))

    def _encode(self, inputs: Sequence[WindowInput]) -> Iterator[tuple[View, Features]]:
        """Encode a view when the one before it was decoded, so that views take no memory of their own."""
        image_B3hw, prompts = self._steps.cut(inputs), self._steps.prompts(inputs)
        aligned = self.card.readout.align_corners
        for view in VIEWS[inputs[0].views]:
            seen_B3hw = view.turn(image_B3hw, aligned=aligned)
            features = self._backend.encode(seen_B3hw)
            if prompts:
                turned = (p for p in prompts if p.dim() == 4 and view != AS_IS)  # masks come first
                masks = [view.turn_mask(mask_BKhw, aligned=aligned) for mask_BKhw in turned]
                features = self._backend.take_prompt(seen_B3hw, features, (*masks, *prompts[len(masks) :]))
            yield view, features

    def _sample(self, encoded: Iterable[tuple[View, Features]], inputs: Sequence[WindowInput]) -> Sequence[Answer]:
        """Decode what was encoded, and add it up. The network's own maps are those of the first view."""
        noise_SBL = self._steps.noise(inputs)
        if any(map(self._steps.is_only, inputs)):
            ((_, features),) = encoded
            return self._answer_each(features, noise_SBL, inputs)
        sampling = self.card.sampling_with(prompt=inputs[0].prompt is not None)
        chunk = len(noise_SBL) if sampling.kind == "members" else self.samples_per_call  # members come out together
        size = inputs[0].window.height, inputs[0].window.width
        statistics = Statistics(self.card, len(inputs), size, self._backend.device)
        for view, features in encoded:
            if self.card.extra_maps and not statistics.num_samples:
                statistics.set_extras(features[-1])
            for chunk_SBL in torch.split(noise_SBL, chunk):
                logits_SBKhw = self._backend.decode(features, chunk_SBL)
                statistics.add(view.turn_back(logits_SBKhw, aligned=self.card.readout.align_corners))
        statistics.finish()
        return self._steps.answers(statistics, inputs)

    def _answer_each(self, features: Features, noise_1BL: Tensor, inputs: Sequence[WindowInput]) -> list[Answer]:
        """Answer windows of one sample on a CPU: those that are all of a picture by their logits, others by moments."""
        size, card, answers = (inputs[0].window.height, inputs[0].window.width), self.card, list[Answer]()
        logits_1BKhw = self._backend.decode(features, noise_1BL)
        flags_B, extras_BEhw = flags_of(logits_1BKhw[0]), torch.empty((len(inputs), 0, *size))
        if card.extra_maps:
            flags_B, extras_BEhw = flags_B + flags_of(features[-1]), resize(features[-1], size, card.readout)
        for b, one in enumerate(inputs):
            if flags_B[b] != 0:
                answers.append(not_finite(card))
            elif self._steps.is_only(one):
                answers.append(answer(one, logits_1BKhw[0, b], extras_BEhw[b], card))
            else:
                statistics = Statistics(card, 1, size, self.device)
                if card.extra_maps:
                    statistics.set_extras(features[-1][b : b + 1])
                statistics.add(logits_1BKhw[:, b : b + 1])
                answers += self._steps.answers(statistics, [one])
        return answers

    def check_golden(self, least: int = 0) -> None:
        """Run the golden window, without and with its prompt, and its own maps. Raises BadArtifact when this machine
        does not reproduce it.

        least: cores of a lane while all are at work; graphs that are opened for that are checked as well.
        """
        self._check_golden()
        if self.prepare(least):
            torch.set_num_threads(least)
            self._check_golden()

    def prepare(self, cores: int) -> bool:
        """Have graphs opened for batches of so many cores, where their format wants that, and tell whether any was; 0
        is none."""
        return bool(cores) and self._backend.prepare(cores)

    def _check_golden(self) -> None:
        golden, started = self._golden, time.perf_counter()
        features = self._backend.encode(golden.image_B3hw)
        self._check_answer(features, golden.plain)
        assert self.card.export
        if golden.extras_BEhw is not None:
            self._check_near(features[-1].cpu(), golden.extras_BEhw, self.card.export.parity.extras_relative)
        self._window_core_s = _core_seconds(started) / len(golden.image_B3hw)
        self._window_samples = len(golden.plain.noise_SBL)
        if golden.prompted:
            self._check_answer(self._backend.take_prompt(golden.image_B3hw, features, golden.prompt), golden.prompted)

    def _check_answer(self, features: Features, recorded: Recorded) -> None:
        found = self._backend.decode(features, recorded.noise_SBL).float().cpu()
        if found.shape[2] != self.card.num_classes:
            raise BadArtifact(
                f"{self.card.name} gives logits of {found.shape[2]} classes; its card names {self.card.num_classes}"
            )
        if self.card.extra_maps and features[-1].shape[1] != len(self.card.extra_maps):
            raise BadArtifact(
                f"{self.card.name} gives {features[-1].shape[1]} maps of its own; its card names "
                f"{len(self.card.extra_maps)}"
            )
        assert self.card.export
        self._check_near(found, recorded.logits_SBKhw, self.card.export.parity.relative)

    def _check_near(self, found: Tensor, recorded: Tensor, measured: float) -> None:
        """Check a tensor. measured: the relative error at export, which half precisions may have twice."""
        assert self.card.export
        if found.shape != recorded.shape or not torch.isfinite(found).all():
            raise BadArtifact(f"{self.card.name} does not reproduce its golden window: wrong shape or not finite")
        error = float((found - recorded).abs().max() / recorded.abs().max().clamp(min=1e-6))
        allowed = GOLDEN_TOLERANCE
        if self.card.export.precision != "fp32":
            allowed = max(allowed, 2 * measured)
        if not error <= allowed:
            raise BadArtifact(
                f"{self.card.name} does not reproduce its golden window on this machine: relative error {error:.1e}, "
                f"{allowed:.0e} allowed; export the checkpoint here"
            )

    def warm_up(self, tuning: Tuning) -> None:
        """Set the chunk of samples and the batch of windows: as tuned, or what is fastest here, after a first run.

        A network that is slow on a CPU keeps one of each: more gain nothing there, and its golden window was its run.
        """
        inputs, self.lanes = self.golden_inputs(), tuning.lanes
        is_slow = self._backend.device.type == "cpu" and self._window_core_s > SLOW * tuning.budget_s
        if not is_slow:
            settle(self.run(inputs[:1]))
        if tuning.samples_per_call:
            self.samples_per_call = tuning.samples_per_call
        elif self.card.sampling.is_stochastic and not is_slow:
            encoded = list(self._encode(inputs[:1]))
            chunks = [size for size in SIZES if size <= len(inputs[0].noise_SL)]
            share_s = tuning.budget_s / 3
            self._choose("samples_per_call", chunks, lambda: self._sample(encoded, inputs[:1]), budget_s=share_s)
        if tuning.windows_per_batch:
            self.windows_per_batch = tuning.windows_per_batch
        elif self.card.window.height and not is_slow:
            share_s = tuning.budget_s * 2 / 3
            run = partial(self._run_batch, inputs)
            self._choose("windows_per_batch", self.batch_sizes, lambda: run(self.windows_per_batch), budget_s=share_s)
        if not is_slow:
            started = time.perf_counter()
            settle(self.run(inputs[:1]))
            self._window_core_s, self._window_samples = _core_seconds(started), len(inputs[0].noise_SL)
        if tuning.deterministic:
            self.windows_per_batch = self._largest_identical_batch(inputs)
        self._capture(tuning, inputs)
        log.info(
            "%s: %d windows per batch and %d samples per call on %s%s",
            self.card.name, self.windows_per_batch, self.samples_per_call, self._backend.device,
            ", each with the same bytes as alone" if tuning.deterministic else "",
        )  # fmt: skip

    def _capture(self, tuning: Tuning, inputs: list[WindowInput]) -> None:
        if tuning.cuda_graphs and self.card.window.height:
            self._backend.capture(self._run_batch(inputs, size) for size in (self.windows_per_batch, 1))

    def leave_memory(self) -> None:
        """Let go of the graphs: until `come_back` nothing can be run."""
        del self._backend, self._golden
        if self.stays_on_device:
            torch.cuda.empty_cache()

    def come_back(self, artifact: Artifact, tuning: Tuning, least: int) -> None:
        """Load the graphs again, and run as before. least: as `check_golden` has it.

        Raises BadArtifact where the golden window is not reproduced.
        """
        self._golden = artifact.golden
        self._backend = load_backend(artifact.card, artifact.directory, self.device)
        try:
            self.check_golden(least)
            self._capture(tuning, self.golden_inputs())
        except BaseException:
            self.leave_memory()
            raise

    @property
    def batch_sizes(self) -> list[int]:
        """List the numbers of windows that a batch can sensibly have: those whose moments are not too much memory."""
        window, maps = self.card.window, channels(self.card)
        if not window.height:  # images that are seen whole differ in size: what pays for one may not fit another
            return [1]
        window_bytes = 4 * window.height * window.width * maps
        most = BATCH_BYTES.get(self._backend.device.type, BATCH_BYTES["cpu"]) // window_bytes
        return [size for size in SIZES if size == 1 or size <= most]

    def core_seconds_per_pixel(self) -> Iterator[tuple[int, float]]:
        """Measure a window with one sample, where that is possible, and with the usual number of them.

        A slow network never ran with the usual number: what that takes is computed from its encoder and one sample.
        """
        window = self.golden_inputs()[0]
        num_pixels, usual = window.window.height * window.window.width, len(window.noise_SL)
        usual_core_s = self._window_core_s
        if self.card.sampling.is_stochastic and usual > 1:
            alone = replace(window, noise_SL=window.noise_SL[:1])
            started = time.perf_counter()
            if self._window_samples == usual:
                settle(self.run([alone]))
            else:
                encoded = list(self._encode([alone]))
                encode_core_s = _core_seconds(started)
                settle(self._sample(encoded, [alone]))
                usual_core_s = encode_core_s + usual * (_core_seconds(started) - encode_core_s)
            yield 1, _core_seconds(started) / num_pixels
        yield usual, usual_core_s / num_pixels

    def golden_inputs(self) -> list[WindowInput]:
        """Make pictures of the golden windows again, each a request of one window with the usual number of samples."""
        factor, offset = (np.array(values, np.float32) for values in self.card.input.factor_offset)
        images = (self._golden.image_B3hw.permute(0, 2, 3, 1).numpy() - offset) / factor
        noise_SBL, num_samples = self._golden.plain.noise_SBL.numpy(), self.card.sampling.default_samples
        noise_SBL = np.tile(noise_SBL, (-(-num_samples // len(noise_SBL)), 1, 1))[:num_samples]
        height, width = images.shape[1:3]
        plan = cover(height, width, replace(self.card.window, height=height, width=width))
        wanted, inputs = Wanted(self.card.maps(num_samples)), []
        for b, pixels in enumerate(as_type(images, np.dtype(self.card.input.dtype))):
            image, noise_SL = Raster(np.ascontiguousarray(pixels)), np.ascontiguousarray(noise_SBL[:, b])
            (window,) = plan
            inputs.append(WindowInput(image, window, plan, noise_SL, surface=self.surface(image, plan, wanted)))
        return inputs

    def _choose(
        self, setting: str, sizes: Sequence[int], work: Callable[[], Sequence[Answer]], *, budget_s: float
    ) -> None:
        """Set `setting` to the smallest size within 5 % of the fastest; `work` runs one full unit of that size."""
        end = time.perf_counter() + budget_s
        best_s: dict[int, float] = {}

        def measure(size: int) -> float:
            setattr(self, setting, size)
            started = time.perf_counter()
            settle(work())
            return (time.perf_counter() - started) / (size if setting == "windows_per_batch" else 1)

        for size in sizes:  # the first few, then up as long as it pays
            fastest = min(best_s.values(), default=float("inf"))
            try:
                best_s[size] = measure(size)
            except Exception as error:
                if not (best_s and is_out_of_memory(error)):
                    raise
                break
            if time.perf_counter() > end or (len(best_s) >= FEW and best_s[size] >= fastest):
                break
        for size in itertools.cycle(list(best_s)):  # again and interleaved: a disturbance can only add time
            if time.perf_counter() > end:
                break
            best_s[size] = min(best_s[size], measure(size))
        limit = min(best_s.values()) / WORTHWHILE
        setattr(self, setting, min(size for size, seconds in best_s.items() if seconds <= limit))

    def _run_batch(self, inputs: list[WindowInput], size: int) -> list[Answer]:
        return self.run([inputs[i % len(inputs)] for i in range(size)])

    def _largest_identical_batch(self, inputs: list[WindowInput]) -> int:
        alone = [_bytes_of(self.run([window])[0]) for window in inputs]
        for size in range(2, self.windows_per_batch + 1):
            for i, one in enumerate(self._run_batch(inputs, size)):
                if _bytes_of(one) != alone[i % len(inputs)]:
                    return size - 1
        return self.windows_per_batch


def as_type(values: FloatArray, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Make the nearest values of a type."""
    if dtype.kind == "f":
        return values.astype(dtype)
    ends = np.iinfo(dtype)
    return values.round().clip(ends.min, ends.max).astype(dtype)


def _core_seconds(started: float) -> float:
    """Give the time since then, times the cores of this lane."""
    return (time.perf_counter() - started) * torch.get_num_threads()


def settle(answers: Sequence[Answer]) -> None:
    """Wait until a device has computed answers."""
    for one in answers:
        if isinstance(one, Landing):
            one.copied.wait()


def _bytes_of(answer: Answer) -> list[bytes]:
    if isinstance(answer, Moments):
        return [answer.stats_hCw.numpy().tobytes()]
    bands = list(answer.bands()) if isinstance(answer, Landing) else []
    return [band.labels.tobytes() + b"".join(map(np.ndarray.tobytes, band.maps.values())) for band in bands]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that a smaller batch may succeed, whichever backend or device raises it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(SHORTAGE.search(str(error)))
