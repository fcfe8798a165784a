"""The engine's front: pictures in, predictions out. The server uses exactly this, and so can a notebook.

from serving.engine.segmenter import Segmenter
with Segmenter.open(Path("store")) as segmenter:
    prediction = segmenter.segment(image_HW3, SegmentOptions(model="np_semiseg-camvid", samples=8))
    prediction.labels_HW, prediction.maps["mutual_information"]
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from models.card import IGNORE, Card
from models.errors import BadArtifact, BadOption, TooLarge, UnknownModel
from serving.engine.allocator import keep_freed_memory
from serving.engine.canvas import Canvas
from serving.engine.decode import check_array
from serving.engine.kernels import FloatArray
from serving.engine.noise import NoiseSource, SeededNoise
from serving.engine.observer import Observer
from serving.engine.options import PROBABILITIES, Limits, SegmentOptions, abstain_above, check_options
from serving.engine.prompts import PromptSource, check_prompt
from serving.engine.raster import Pixels, Raster
from serving.engine.runtime import Runtime, Tuning
from serving.engine.scheduler import Scheduler
from serving.engine.store import find_artifact, open_artifact, versions
from serving.engine.uncertainty import Band, abstain, read_out
from serving.engine.windows import WindowPlan, count_windows, cover
from serving.engine.work import NORMAL, Work

log = logging.getLogger("penumbra")

KEPT_VERSIONS = 2
"""Of a model: the newest, and the one before it for callers who name it. Older ones would fill the memory."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One image's answer at the image's size.

    labels_HW: uint8 class ids. maps: float32 [H, W] by name, uncertainties in nats (`serving.engine.uncertainty`).
    timing_ms: milliseconds by phase. num_windows: windows that were run. members: names of the samples, where they
    have names. warnings: sentences about what the caller should know of this answer. abstained: share of the pixels
    whose label is IGNORE because of `max_risk`; None where that was not asked for. image: what it is an answer to.
    prob_KHW: mean probabilities of all classes, float32, where the output PROBABILITIES was asked for. num_asked: of
    samples, where `anytime` lets the answer have fewer. age_s: of an answer that was kept (`serving.cache`).
    """

    card: Card
    seed: int
    num_samples: int
    num_windows: int
    members: tuple[str, ...]
    warnings: tuple[str, ...]
    labels_HW: NDArray[np.uint8]
    maps: dict[str, FloatArray]
    timing_ms: dict[str, float]
    abstained: float | None = None
    image: Pixels | None = None
    prob_KHW: FloatArray | None = None
    num_asked: int | None = None
    age_s: float | None = None


class BandStream:
    """The rows of one answer as they become final, and how long each phase took.

    The work is submitted when the first row is asked for and withdrawn when the caller stops, so that nothing stays
    in the queue that nobody waits for. Iterate once. abstain_above: entropy in nats above which a label is withheld.
    num_done: windows so far; each: called after every one. Pixels without a measurement (`Raster.nodata`) have the
    label IGNORE. first_y: bands before this row are left out; not all of their windows are run.
    work: with the samples that the answer has. Where it is `anytime` they can become fewer while it runs; bands then
    come from the first one again, and those before are void.
    """

    def __init__(
        self, scheduler: Scheduler, work: Work, *, abstain_above: float | None = None, first_y: int = 0
    ) -> None:
        self._scheduler, self.work, self._first_y = scheduler, work, first_y
        self.abstain_above = abstain_above
        self.num_done = work.plan.num_windows - work.num_windows
        self.each: Callable[[], object] = lambda: None
        self.timing_ms: dict[str, float] = {"queue": 0.0, "run": 0.0, "stitch": 0.0, "read_out": 0.0, "total": 0.0}

    def __iter__(self) -> Iterator[Band]:
        started = time.perf_counter()
        card = self.work.runtime.card
        names = [extra.name for extra in card.extra_maps]
        work = self.work
        new_canvas = partial(Canvas, work.plan, card.num_classes, num_extras=len(names), first_row=work.first_row)
        canvas = new_canvas()
        with self._scheduler.submit(work) as finished_windows:
            for window, moments in finished_windows:
                if moments.num_samples != self.work.num_samples:
                    self.work, canvas, self.num_done = replace(work, num_samples=moments.num_samples), new_canvas(), 0
                self.num_done += 1
                self.each()
                with self._clock("stitch"):
                    canvas.add(window, moments)
                for y0, merged_hKW, expected_hW, extras_hEW in canvas.finished(window):
                    if y0 < self._first_y:
                        continue
                    with self._clock("read_out"):
                        band = read_out(y0, merged_hKW, expected_hW, average=card.readout.average)
                        band.maps.update(zip(names, extras_hEW.transpose(1, 0, 2), strict=True))
                        if self.abstain_above is not None:
                            abstain(band, above_nats=self.abstain_above)
                        withhold_void(band, work.image_HW3)
                    yield band
        self.timing_ms["queue"] = 1e3 * finished_windows.queue_s
        self.timing_ms["run"] = 1e3 * finished_windows.run_s
        self.timing_ms["total"] = 1e3 * (time.perf_counter() - started)

    def _clock(self, phase: str) -> "_Clock":
        return _Clock(self.timing_ms, phase)


class _Clock:
    """Adds the time spent in a `with` block to a phase."""

    def __init__(self, timing_ms: dict[str, float], phase: str) -> None:
        self._timing_ms, self._phase = timing_ms, phase

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._timing_ms[self._phase] += 1e3 * (time.perf_counter() - self._started)


class Segmenter:
    """Loaded models and the scheduler that runs them. Methods may be called from any thread."""

    def __init__(
        self, *, limits: Limits | None = None, device: str | None = None, threads: int | None = None,
        tuning: Tuning | None = None, observer: Observer | None = None,
    ) -> None:  # fmt: skip
        """device: "cpu" or "cuda[:n]", by default CUDA where there is one. threads: of the inference thread, by
        default one per core this process may use."""
        keep_freed_memory()
        self.limits = limits or Limits()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._threads = threads or len(os.sched_getaffinity(0))
        self._tuning = tuning or Tuning()
        self._observer = observer or Observer()
        self._runtimes: dict[str, dict[int, Runtime]] = {}
        self.refused: dict[str, str] = {}
        self.scheduler = Scheduler(
            queue_samples=self.limits.queue_samples, threads=self._threads, observer=self._observer,
            target_s=self._tuning.target_s,
        )  # fmt: skip

    @classmethod
    def open(cls, store: Path, **options: object) -> "Segmenter":
        """A segmenter with the newest version of every model in a store.

        A broken artifact is logged, listed in `refused` with the reason, and does not keep the others away.
        """
        segmenter = cls(**options)  # type: ignore[arg-type]
        for name in versions(store):
            try:
                segmenter.load(find_artifact(store, name))
            except BadArtifact as error:
                log.error("not served: %s", error)
                segmenter.refused[name] = str(error)
        return segmenter

    def load(self, directory: Path) -> Card:
        """Open an artifact, reproduce its golden window, warm it up, then make it available. Raises BadArtifact."""
        started = time.perf_counter()
        artifact = open_artifact(directory)

        def make_ready() -> Runtime:
            runtime = Runtime(artifact, device=self._device, threads=self._threads)
            runtime.check_golden()
            runtime.warm_up(self._tuning)
            self.scheduler.get_to_know(runtime)
            return runtime

        runtime = self.scheduler.call(make_ready)
        card = artifact.card
        loaded = self._runtimes.get(card.name, {}) | {card.version: runtime}
        newest = {version: loaded[version] for version in sorted(loaded)[-KEPT_VERSIONS:]}
        self._runtimes = self._runtimes | {card.name: newest}
        self._observer.model_loaded(card.name, seconds=time.perf_counter() - started)
        return card

    def unload(self, name: str) -> None:
        """Forget a model: requests that have it are still answered, and the last of them frees its memory."""
        self._runtimes = {known: loaded for known, loaded in self._runtimes.items() if known != name}

    def cards(self) -> list[Card]:
        """Cards of all loaded models, by name and version."""
        return [loaded[v].card for _, loaded in sorted(self._runtimes.items()) for v in sorted(loaded)]

    def find(self, name: str | None, version: int | None = None) -> Runtime:
        """A loaded model; None stands for the only one, and for its newest version. Raises UnknownModel, BadOption."""
        runtimes = self._runtimes  # loading and unloading put another dictionary in its place
        known = ", ".join(sorted(runtimes)) or "none"
        if name is None:
            if len(runtimes) != 1:
                raise BadOption(f"several models are served, so the option model is needed; there are {known}")
            (name,) = runtimes
        if name not in runtimes:
            raise UnknownModel(f"there is no model {name[:60]!r}; there are {known}")
        loaded = runtimes[name]
        if version is not None and version not in loaded:
            raise UnknownModel(f"{name} has no version {version}; loaded are {', '.join(map(str, sorted(loaded)))}")
        return loaded[max(loaded) if version is None else version]

    def check(
        self, height: int, width: int, options: SegmentOptions, *, limits: Limits | None = None
    ) -> tuple[Runtime, int, PromptSource | None]:
        """Everything that can be refused before the pixels are looked at; returns the model, S and the prompt."""
        limits = limits or self.limits
        runtime = self.find(options.model, options.version)
        card = runtime.card
        num_samples = check_options(options, card, limits)
        prompt = check_prompt(card, height, width, boxes=options.boxes, tags=options.tags, alpha=options.alpha)
        _check_windows(height, width, card, options.overlap, limits=limits)
        if PROBABILITIES in options.outputs:
            _check_probabilities(height, width, card, limits=limits)
        return runtime, num_samples, prompt

    def bands(
        self, image_HW3: Pixels, options: SegmentOptions, *, noise: NoiseSource | None = None,
        cancelled: threading.Event | None = None, deadline: float = float("inf"),
    ) -> BandStream:  # fmt: skip
        """The answer in bands of rows, for images that are not to be held in memory twice.

        noise: replaces the seeded noise, for protocols that prescribe their own. Raises any PenumbraError.
        """
        work = self._plan(image_HW3, options, limits=self.limits)
        work = replace(work, noise=noise or work.noise, cancelled=cancelled or work.cancelled, deadline=deadline)
        return BandStream(self.scheduler, work, abstain_above=threshold_of(work, options))

    def bands_from(
        self, y: int, image_HW3: Pixels, options: SegmentOptions, *, limits: Limits, cancelled: threading.Event
    ) -> BandStream:
        """Long work that goes on where it ended: the band that holds row y, and those after it.

        It is bounded by `limits` in place of the segmenter's own and takes no place in the queue, so the caller bounds
        how many run at a time.
        """
        if PROBABILITIES in options.outputs:
            raise BadOption(f"{PROBABILITIES} are only for images that are answered at once; leave them out")
        if options.deadline_ms is not None or options.anytime:
            raise BadOption("deadline_ms and anytime are only for images that are answered at once; leave them out")
        work = self._plan(image_HW3, options, limits=limits)
        first_y = work.plan.band_of(y)
        work = replace(work, cancelled=cancelled, first_row=work.plan.row_before(first_y), in_background=True)
        return BandStream(self.scheduler, work, abstain_above=threshold_of(work, options), first_y=first_y)

    def _plan(self, image_HW3: Pixels, options: SegmentOptions, *, limits: Limits) -> Work:
        image = check_array(image_HW3, limits)
        height, width = image.shape[:2]
        runtime, num_samples, prompt = self.check(height, width, options, limits=limits)
        sampling = runtime.card.sampling_with(prompt=prompt is not None)
        plan = cover(height, width, runtime.card.window, options.overlap)
        noise = SeededNoise(sampling, seed=options.seed, num_samples=num_samples)
        return Work(
            runtime, image, plan, noise, num_samples, prompt, priority=options.priority or NORMAL,
            anytime=options.anytime and sampling.kind in ("latent", "dropout"),
        )  # fmt: skip

    def segment(
        self, image_HW3: Pixels, options: SegmentOptions, *, noise: NoiseSource | None = None,
        cancelled: threading.Event | None = None, deadline: float = float("inf"),
    ) -> Prediction:  # fmt: skip
        """Labels and uncertainty of one image: uint8 RGB [H, W, 3]. Raises any PenumbraError."""
        bands = self.bands(image_HW3, options, noise=noise, cancelled=cancelled, deadline=deadline)
        height, width = image_HW3.shape[:2]
        labels_HW = np.empty((height, width), np.uint8)
        maps = {name: np.empty((height, width), np.float32) for name in options.maps}
        prob_KHW = None
        if PROBABILITIES in options.outputs:
            num_classes = bands.work.runtime.card.num_classes
            prob_KHW = np.empty((num_classes, height, width), np.float32)
        return collect(bands, options, labels_HW, maps, prob_KHW)

    def close(self) -> None:
        """Finish accepted work and release the models."""
        self.scheduler.close()
        for runtime in [r for loaded in self._runtimes.values() for r in loaded.values()]:
            runtime.close()

    def __enter__(self) -> "Segmenter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_windows(height: int, width: int, card: Card, overlap: float | None, *, limits: Limits) -> None:
    limit = min(limits.window_pixels, card.window.max_pixels or limits.window_pixels)
    if card.window.height == 0 and height * width > limit:
        raise TooLarge(
            f"{card.name} sees an image whole and this one has {width}x{height} = {height * width:,} pixels; the "
            f"limit for that is {limit:,}: send a smaller image or parts of it"
        )
    num_windows = count_windows(height, width, card.window, overlap)
    if num_windows > limits.windows:
        raise TooLarge(
            f"the image needs {num_windows} windows and the limit is {limits.windows}; lower the overlap, "
            "or send a smaller image or parts of it"
        )


def _check_probabilities(height: int, width: int, card: Card, *, limits: Limits) -> None:
    size = 4 * height * width * card.num_classes
    if size > limits.probability_bytes:
        raise TooLarge(
            f"the probabilities of {card.num_classes} classes at {width}x{height} px have {size:,} bytes and the limit "
            f"is {limits.probability_bytes:,}; send a smaller image or leave out {PROBABILITIES}"
        )


def collect(
    bands: BandStream, options: SegmentOptions, labels_HW: NDArray[np.uint8], maps: dict[str, FloatArray],
    prob_KHW: FloatArray | None = None,
) -> Prediction:  # fmt: skip
    """Run a stream to its end. Changes the arrays, whose rows are set band by band."""
    num_asked = bands.work.num_samples if options.anytime else None
    with closing(iter(bands)) as rows:  # type: ignore[type-var]
        for band in rows:
            place = slice(band.y0, band.y0 + len(band.labels))
            for name, values in maps.items():
                values[place] = band.maps[name]
            labels_HW[place] = band.labels
            if prob_KHW is not None:
                prob_KHW[:, place] = band.prob_hKW.swapaxes(0, 1)
    work, card = bands.work, bands.work.runtime.card
    members = card.sampling_with(prompt=work.prompt is not None).members
    warnings = warnings_of(card, work.plan)
    if num_asked and work.num_samples < num_asked:
        warnings += (f"the deadline left time for {work.num_samples} of the {num_asked} samples asked for",)
    abstained = None
    if options.max_risk is not None:
        warnings += calibration_warnings(card, work, overlap=options.overlap)
        step = work.plan.window_height
        withheld = sum(int((labels_HW[y : y + step] == IGNORE).sum()) for y in range(0, work.plan.height, step))
        abstained = withheld / (work.plan.height * work.plan.width)
    return Prediction(
        card, options.seed, work.num_samples, work.plan.num_windows, members, warnings,
        labels_HW, maps, bands.timing_ms, abstained, work.image_HW3, prob_KHW, num_asked,
    )  # fmt: skip


def threshold_of(work: Work, options: SegmentOptions) -> float | None:
    """Entropy in nats above which a label is withheld; None where no risk is bounded."""
    return None if options.max_risk is None else abstain_above(work.runtime.card, options.max_risk)


def withhold_void(band: Band, image: Pixels) -> None:
    """Where the image has no measurement there is no label. Changes the band's labels."""
    void_hW = image.void(slice(band.y0, band.y0 + len(band.labels))) if isinstance(image, Raster) else None
    if void_hW is not None:
        band.labels[void_hW] = IGNORE


def warnings_of(card: Card, plan: WindowPlan) -> tuple[str, ...]:
    """What a caller should know of an answer whose windows are not those the network's results hold for."""
    trained, run = card.window.trained, (plan.window_height, plan.window_width)
    if trained is None or run == trained:
        return ()
    return (
        f"the published results of {card.name} hold for windows of {trained[1]}x{trained[0]} px, and its answers "
        f"depend on their width; this image was run at {run[1]}x{run[0]}",
    )


def calibration_warnings(card: Card, work: Work, *, overlap: float | None) -> tuple[str, ...]:
    """What a caller should know of a `max_risk` that was calibrated on answers of another kind."""
    assert card.calibration
    num_samples = card.calibration.num_samples
    usual_overlap = overlap in (None, card.window.overlap)
    if work.num_samples == num_samples and usual_overlap and work.prompt is None:
        return ()
    return (
        f"max_risk of {card.name} was calibrated with {num_samples} samples, overlap {card.window.overlap:g} and no "
        "prompt; this answer was made otherwise, and its risk may be another",
    )
