"""The engine's front: pictures in, predictions out. The server uses exactly this, and so can a notebook.

from penumbra.serving.engine.segmenter import Segmenter
with Segmenter.open(Path("store")) as segmenter:
    prediction = segmenter.segment(image_HWC, SegmentOptions(model="np_semiseg-camvid", samples=8))
    prediction.labels_HW, prediction.maps["mutual_information"]
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from penumbra.models.card import Card
from penumbra.models.errors import BadArtifact, BadOption, NotReady, PenumbraError, TooLarge, UnknownModel
from penumbra.serving.engine.allocator import keep_freed_memory
from penumbra.serving.engine.answer import Prediction, collect
from penumbra.serving.engine.backends import first_words
from penumbra.serving.engine.decode import check_array
from penumbra.serving.engine.device import find_device, name_hardware, stays_on
from penumbra.serving.engine.layout import Place, Reading
from penumbra.serving.engine.noise import NoiseSource
from penumbra.serving.engine.options import Limits, SegmentOptions
from penumbra.serving.engine.plan import RequestPlan, check_long, plan_request, resolve
from penumbra.serving.engine.quota import num_cores
from penumbra.serving.engine.raster import Pixels
from penumbra.serving.engine.request import QueuedRequest
from penumbra.serving.engine.residency import Observer, Residency
from penumbra.serving.engine.runtime import Runtime, Tuning, is_out_of_memory
from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.signature import PublicKeys
from penumbra.serving.engine.store import find_artifact, open_artifact, versions
from penumbra.serving.engine.throughput import Cores

log = logging.getLogger("penumbra")

KEPT_VERSIONS = 2
"""How many of a model are kept: the newest, and the one before it for callers who name it. Older ones would fill the
memory; one that is loaded by its number stays until the next is loaded."""


def may_pass(error: Exception) -> bool:
    """Tell whether what kept a model from being loaded may pass: memory is short, or the disk fails."""
    fault = error.__context__
    is_disk = isinstance(fault, OSError) and not isinstance(fault, (FileNotFoundError, PermissionError))
    return is_disk or is_out_of_memory(error) or (fault is not None and is_out_of_memory(fault))


class Segmenter(AbstractContextManager["Segmenter"]):
    """A segmenter has the loaded models and the scheduler that runs them. Methods may be called from any thread."""

    def __init__(
        self, *, limits: Limits | None = None, device: str | None = None, threads: int | None = None,
        lanes: int | None = None, tuning: Tuning | None = None, observer: Observer | None = None,
        trusted_keys: PublicKeys | None = None,
    ) -> None:  # fmt: skip
        """device: "cpu" or "cuda[:n]", by default CUDA where there is one. threads: of all inference, by default one
        per core this process may use. lanes: batches at a time, by default one per thread on a CPU and two on a GPU, of
        which one runs while the next is queued.
        trusted_keys: artifacts that none of them has signed are refused; None takes any."""
        keep_freed_memory()
        self.limits = limits or Limits()
        self._device = find_device(device or "")
        self._tuning = tuning or Tuning()
        self._trusted_keys = trusted_keys
        self._has_lanes = bool(lanes)
        """Whether their number was said, so that no model brings its own."""
        threads = threads or num_cores()
        lanes = min(lanes or (2 if stays_on(self._device) else threads), threads)
        is_shared = self._tuning.deterministic or stays_on(self._device)  # all of a GPU is every batch's
        self.cores = Cores(threads, lanes, widen=not is_shared)
        self._observer = observer
        self._tables = threading.Lock()
        """Held by whoever puts other tables in the place of these two, which are never changed: readers need none."""
        self._runtimes: Mapping[str, Mapping[int, Runtime]] = {}
        self.refused: Mapping[str, str] = {}
        self.residency = Residency(self.limits.model_bytes, load=self._bring_back, observer=observer)
        self.scheduler = Scheduler(
            queue_samples=self.limits.queue_samples, cores=self.cores, observer=self._observer,
            target_s=self._tuning.target_s, in_order=stays_on(self._device), residency=self.residency,
        )  # fmt: skip

    @classmethod
    def open(
        cls, store: str | Path, *, find: Callable[[Path, str], Path] = find_artifact, **options: object
    ) -> "Segmenter":
        """Make a segmenter with one version of every model in a store, the newest unless `find` finds another.

        A broken artifact is logged, listed in `refused` with the reason, and does not keep the others away.
        """
        segmenter, store = cls(**options), Path(store)  # type: ignore[arg-type]
        for name, numbers in versions(store).items():
            directory = store / name / str(numbers[-1])
            try:
                directory = find(store, name)
                segmenter.load(directory)
            except BadArtifact as error:
                segmenter.refuse(directory, error)
        return segmenter

    def refuse(self, directory: Path, error: BadArtifact) -> str:
        """Log why an artifact is not served, and keep it in `refused`, for callers: without this machine's paths."""
        log.error("not served: %s", error)
        name = directory.parent.name
        why = " ".join(str(error).replace(f"{directory.parent}/", f"{name}/").split())
        with self._tables:
            self.refused = {**self.refused, name: why}
        return why

    def accept(self, name: str) -> None:
        """Forget why a model was refused."""
        with self._tables:
            self.refused = {known: why for known, why in self.refused.items() if known != name}

    def load(self, directory: str | Path) -> Card:
        """Open an artifact, reproduce its golden window, warm it up, then make it available. Raises BadArtifact."""
        started = time.perf_counter()
        directory = Path(directory)
        artifact = open_artifact(directory, trusted_keys=self._trusted_keys)

        def make_ready() -> Runtime:
            tuning = self._tuning_of(artifact.card)
            torch.set_num_threads(self.cores.threads)  # of those backends that bring their own, too
            runtime = Runtime(artifact, device=self._device)
            runtime.check_golden(least := self.lane_cores(tuning.lanes))
            torch.set_num_threads(least or self.cores.least)  # sizes are chosen for a server that has much to do
            runtime.warm_up(tuning)
            self.scheduler.record_speed(runtime)
            self.residency.add(runtime, directory, load_s=time.perf_counter() - started)
            return runtime

        card = artifact.card
        try:
            runtime = self.scheduler.call(make_ready)
        except PenumbraError:
            raise
        except Exception as error:  # whatever a graph raises
            log.error("%s failed while it was loaded", card.name, exc_info=error)
            why = "does not fit into the memory that is free" if is_out_of_memory(error) else "cannot be run"
            raise BadArtifact(f"{card.name} {why} on {self._device}; the server's log says more") from None
        with self._tables:
            loaded = {**self._runtimes.get(card.name, {}), card.version: runtime}
            kept = {version: loaded[version] for version in {*sorted(loaded)[-KEPT_VERSIONS:], card.version}}
            self._runtimes = {**self._runtimes, card.name: kept}
        self._note_loaded(card, time.perf_counter() - started)
        return card

    def _note_loaded(self, card: Card, seconds: float) -> None:
        if self._observer:
            self._observer.model_loaded(card.name, seconds=seconds)
        log.info("%s version %d is served; it was loaded in %.1f s", card.name, card.version, seconds)

    def _bring_back(self, runtime: Runtime, directory: Path) -> None:
        """Load a model again from the artifact that it was. Raises NotReady, and refuses the model unless that may
        pass: memory is short, or the disk fails."""
        card, started = runtime.card, time.perf_counter()
        try:
            artifact = open_artifact(directory, trusted_keys=self._trusted_keys)
            if artifact.card != card:
                raise BadArtifact(f"{directory} is another artifact than the one that was loaded; load it again")
            torch.set_num_threads(self.cores.threads)
            tuning = self._tuning_of(card)
            runtime.come_back(artifact, tuning, self.lane_cores(tuning.lanes))
            self._note_loaded(card, time.perf_counter() - started)
        except Exception as error:  # whatever a graph raises
            log.error("%s version %d cannot be loaded again", card.name, card.version, exc_info=error)
            if not may_pass(error) and self._runtimes.get(card.name, {}).get(card.version) is runtime:
                is_newest = card.version == max(self._runtimes.get(card.name, {}), default=card.version)
                self.unload(card.name, card.version)
                why = first_words(error) if isinstance(error, BadArtifact) else "the server's log says more"
                if is_newest:  # what is refused by its name is what callers without a version would have
                    self.refuse(directory, BadArtifact(f"{directory} cannot be loaded again: {why}"))
            raise NotReady(
                f"{card.name} version {card.version} left memory and cannot be loaded again; ask another replica"
            ) from None

    def is_in_memory(self, card: Card) -> bool:
        """Tell whether a model that is served can be run at once; else its first request loads it again."""
        runtime = self._runtimes.get(card.name, {}).get(card.version)
        return runtime is not None and self.residency.is_in(runtime)

    def lane_cores(self, lanes: int) -> int:
        """Count the cores of a lane while all are at work, of a model that was tuned for so many (`Tuning.lanes`); 0
        beside a GPU, where calls go one by one."""
        return 0 if stays_on(self._device) else self.cores.least_of(lanes)

    def _tuning_of(self, card: Card) -> Tuning:
        """Follow what a model was tuned to on this very machine, as far as nothing else is said."""
        tuned, said = card.tuned, self._tuning
        if not tuned:
            return said
        if not self.is_tuned_here(card):
            log.warning(
                "%s version %d was tuned on %s with %d threads, and this is %s with %d: it runs, with sizes of batches "
                "that are found here; `penumbra tune %s` chooses for this machine", card.name, card.version,
                tuned.processor, tuned.threads, name_hardware(self._device), self.cores.threads, card.name,
            )  # fmt: skip
            return said
        return replace(
            said, windows_per_batch=said.windows_per_batch or tuned.windows_per_batch,
            samples_per_call=said.samples_per_call or tuned.samples_per_call,
            lanes=0 if self._has_lanes else tuned.lanes,
        )  # fmt: skip

    def is_tuned_here(self, card: Card) -> bool:
        """Tell whether a model was tuned, and on the processor and threads that it has here."""
        tuned, here = card.tuned, (name_hardware(self._device), self.cores.threads)
        return tuned is not None and (tuned.processor, tuned.threads) == here

    def unload(self, name: str, version: int | None = None) -> None:
        """Forget a model, or one version: requests that have it are still answered, and the last frees its memory."""
        with self._tables:
            loaded = self._runtimes.get(name, {})
            rest = {} if version is None else {known: loaded[known] for known in loaded if known != version}
            others = {known: versions for known, versions in self._runtimes.items() if known != name}
            self._runtimes = {**others, name: rest} if rest else others

    def cards(self) -> list[Card]:
        """List the cards of all loaded models, by name and version."""
        return [loaded[v].card for _, loaded in sorted(self._runtimes.items()) for v in sorted(loaded)]

    def find(self, name: str | None, version: int | None = None) -> Runtime:
        """Find a loaded model; None is the only one, and its newest version. Raises UnknownModel, BadOption."""
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

    def reading(self, options: SegmentOptions) -> Reading:
        """Say what the model of these options reads of an image. Raises UnknownModel, BadOption."""
        return Reading(self.find(options.model, options.version).card.input, options.bands)

    def plan(
        self, height: int, width: int, options: SegmentOptions, *, limits: Limits | None = None,
        place: Place | None = None,
    ) -> RequestPlan:  # fmt: skip
        """Plan a request for an image of this size and place. Raises all that can be refused before the pixels are
        looked at."""
        limits = limits or self.limits
        runtime = self.find(options.model, options.version)
        options = resolve(options, runtime.card, limits)
        return plan_request(runtime, options, height, width, limits=limits, place=place)

    def bands(
        self, image_HWC: Pixels, options: SegmentOptions, *, noise: NoiseSource | None = None,
        cancelled: threading.Event | None = None, deadline: float = float("inf"),
    ) -> QueuedRequest:  # fmt: skip
        """Answer in bands of rows, for images that are not to be held in memory twice: [H, W, C] of the card's
        bands and type (uint8 RGB).

        noise: replaces the seeded noise, for protocols that prescribe their own. Raises any PenumbraError.
        """
        image = check_array(image_HWC, self.limits, self.reading(options))
        plan = self.plan(*image.shape[:2], options, place=image.place)
        plan = replace(plan, noise=noise or plan.noise)
        self.check_memory(plan)
        return QueuedRequest(self.scheduler, plan, image, cancelled=cancelled, deadline=deadline)

    def check_memory(self, plan: RequestPlan, *, on_disk: bool = False, more: int = 0) -> None:
        """Raise TooLarge for more memory than all may have. on_disk: as in `RequestPlan.num_bytes`. more: bytes that
        writing the answer takes beside it."""
        needed, most = plan.num_bytes(self.cores.lanes, on_disk=on_disk) + more, self.limits.memory_bytes
        if needed > most:
            raise TooLarge(
                f"the request takes {needed:,} bytes of memory and the limit of all together (memory_bytes) is "
                f"{most:,}; give a smaller image or parts of it, run it at a smaller scale, or ask for fewer maps"
            )

    def bands_from(
        self, y: int, image_HWC: Pixels, options: SegmentOptions, *, limits: Limits, cancelled: threading.Event
    ) -> QueuedRequest:
        """Go on with long work where it ended: from the band that holds row y.

        The work is bounded by `limits` in place of the segmenter's own and takes no place in the queue, so the caller
        bounds how many run at a time.
        """
        check_long(options)
        image = check_array(image_HWC, limits, self.reading(options))
        plan = self.plan(*image.shape[:2], options, limits=limits, place=image.place)
        return QueuedRequest(self.scheduler, plan, image, cancelled=cancelled, from_y=y)

    def segment(
        self, image_HWC: Pixels, options: SegmentOptions, *, noise: NoiseSource | None = None,
        cancelled: threading.Event | None = None, deadline: float = float("inf"),
    ) -> Prediction:  # fmt: skip
        """Give labels and uncertainty of an image [H, W, C] of the card's bands and type. Raises any PenumbraError."""
        return collect(self.bands(image_HWC, options, noise=noise, cancelled=cancelled, deadline=deadline))

    def close(self) -> None:
        """Finish accepted work."""
        self.scheduler.close()

    def __exit__(self, *_: object) -> None:
        self.close()
