"""`penumbra tune`: what is fastest on this machine, of all formats, precisions and sizes that the gate passes.

What is measured is what will be served: the engine with its scheduler and lanes answers whole pictures. Every candidate
is built and proved as an export is, and tried; the better half goes on to all sizes, each for a short time; the better
half of those for longer, until one is left (successive halving, Jamieson & Talwalkar 2016). An interruption, or the end
of the time, keeps the best so far.
"""

import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from penumbra.export.alarm import Overdue, until
from penumbra.export.bundle import export_checkpoint, verify_artifact
from penumbra.export.candidates import (
    Candidate,
    Row,
    Say,
    Setting,
    Sizes,
    find_candidates,
    find_checkpoint,
    find_loadable,
    find_sizes,
    settings_of,
)
from penumbra.export.golden import naming, read_picture
from penumbra.export.load import Answers, Load, Speed, digest, few
from penumbra.export.parity import Frame
from penumbra.models.card import Tuned, dump_card
from penumbra.models.errors import BadOption, PenumbraError, reason_of
from penumbra.models.files import drafted
from penumbra.serving.engine.allocator import resident_bytes
from penumbra.serving.engine.backends import BACKENDS
from penumbra.serving.engine.device import find_device, name_hardware
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Pixels
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import CARD, artifact_card, find_artifact, next_version, write_version
from penumbra.serving.files.predict import IN_MEMORY

BUSY = 0.5
"""Load for each core of the machine above which others are at work here."""
GAIN = 1.03
"""What a setting has to be faster by than what is served: less is the luck of a measurement."""
TURNS = 3
"""How often the best of each candidate are measured at last, in turns: what disturbs one disturbs the others."""
SPARE = 0.05
"""Share of the time that is left for ending: a batch at work, the files, the table."""
DRAWN = "drawn windows"
"""What the gate is held on where nobody gives it pictures."""
LATE = "was not tried, since half of the time was over"
GIVEN_UP = "was given up, since half of the time was over"


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How to tune. ends: when, a time of `time.perf_counter`.

    pictures: files that callers ask for and golden windows are cut from; without any, those of the frames, or drawn
    windows. frames: labelled pictures for the gate. judge: measures a loaded model's figures of accuracy, by name.
    checkpoint: None looks for it. backends: of which formats; none stands for all. machine_code: also those that are
    bound to this kind of machine. always: write the fastest of them also where what is there is faster. seconds: for
    which a setting is measured at first, and at most at a time. threads: of the server; 0 is one per core.
    """

    ends: float
    load: Load
    pictures: Sequence[Path] = ()
    frames: Sequence[Frame] = ()
    judge: Callable[[Segmenter], dict[str, float]] | None = None
    checkpoint: Path | None = None
    device: str = ""
    backends: Sequence[str] = ()
    machine_code: bool = False
    always: bool = False
    seconds: tuple[float, float] = (0.3, 4.0)
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tuning found. rows: the version before first, as it is served. chosen: which of them is the artifact of
    the directory, the first where none is faster. tuned: facts of the fastest of the others. refused: why, by name.
    is_complete: whether the search came to its end."""

    directory: Path
    tuned: Tuned
    rows: list[Row]
    chosen: Row
    refused: dict[str, str]
    is_complete: bool

    @property
    def front(self) -> list[Row]:
        """List the rows that none is better than in every way."""
        return [row for row in self.rows if not any(other.dominates(row) for other in self.rows)]


def tune_artifact(name: str, store: Path, options: TuneOptions, say: Say = print) -> Outcome:
    """Find what is fastest and write it as the model's next version. To be called from the main thread.

    say: takes a line about every step. Raises BadOption: there is no checkpoint, or nothing could be measured.
    """
    source = find_loadable(store, name, options.device, say, options.threads)
    card = artifact_card(source)
    options = replace(options, checkpoint=find_checkpoint(card, options.checkpoint))
    with drafted(store / name) as drafts:
        tuner = Tuner(source, drafts, options, say)
        left_s = options.ends - time.perf_counter()
        with until(options.ends - SPARE * left_s):
            if left_s > 0:
                tuner.search()
        return tuner.conclude()


class Tuner:
    """A tuner proves and measures candidates; `conclude` may be called wherever `search` was interrupted."""

    def __init__(self, source: Path, drafts: Path, options: TuneOptions, say: Say) -> None:
        self._source, self._drafts, self._options, self._say = source, drafts, options, say
        self._card, self._device = artifact_card(source), find_device(options.device)
        self._next = next_version(source.parents[1], self._card.name)
        self._now = Candidate("as it is", "", "", source, self._card.export)
        self._candidates = find_candidates(
            options.backends or BACKENDS, self._device, machine_code=options.machine_code
        )
        self._alive: list[Setting] = []
        self._finalists: list[Setting] = []
        """What was measured in turns at last."""
        self._all_sizes: list[Sizes] = []
        self._threads, self._is_complete = 1, False
        self._files = list(options.pictures) or self._save_frames()
        self._pictures: list[Pixels] = [read_picture(path, self._card) for path in few(self._files)]
        self._frames = few(options.frames)
        if options.pictures:
            self._frames += [(picture, None) for picture in self._pictures]

    def _save_frames(self) -> list[Path]:
        """Make files of labelled pictures: an export cuts its golden windows out of files."""
        frames = few(self._options.frames)
        paths = [self._drafts / f"{i}.png" for i in range(len(frames))]
        for path, (image_HWC, _) in zip(paths, frames, strict=True):
            if image_HWC.shape[2] != 3 or image_HWC[:1, :1].dtype != "uint8":
                raise BadOption("frames that are not red, green and blue as uint8 make no files; give pictures too")
            Image.fromarray(image_HWC[:, :]).save(path)
        return paths

    def search(self) -> None:
        """Prove every candidate, then halve what is left until one setting remains."""
        load = os.getloadavg()[0]
        if load > BUSY * (os.cpu_count() or 1):  # both of the machine, of which a container has a part
            self._say(
                f"this machine is busy (its load is {load:.1f}): what is measured is what others leave, and noisy"
            )
        self._try(self._now, [None])
        self._say(f"{self._now}: {self._speed_of((self._now, None))}")
        half_time = (self._options.ends + time.perf_counter()) / 2
        for candidate in self._candidates:
            if not candidate.refused and time.perf_counter() > half_time:
                candidate.refused = LATE
            if not candidate.refused:
                with until(half_time, Overdue) if candidate.precision == "int8" else nullcontext():
                    self._prove(candidate, search_s=(half_time - time.perf_counter()) / 2)
            if not candidate.refused and not candidate.settings:
                candidate.refused = GIVEN_UP
            self._say(f"{candidate}: {candidate.refused or self._speed_of(self._best_of(candidate))}")
        ranked = sorted(self._alive, key=self._speed_of, reverse=True)
        better = list(dict.fromkeys(candidate for candidate, _ in ranked))
        better = better[: max(2, -(-len(better) // 2))]
        self._halve([(candidate, sizes) for candidate in better for sizes in self._all_sizes])
        # The best first: where the time ends within a turn, what was measured longest is what is best so far.
        self._alive = sorted((self._best_of(one) for one in better if one.settings), key=self._rank_of, reverse=True)
        for _ in range(TURNS):
            self._measure_all([(self._now, None), *self._alive], self._options.seconds[1] / TURNS)
            self._alive = [setting for setting in self._alive if self._measured(setting)]
        self._finalists, self._is_complete = self._alive, True

    def _prove(self, candidate: Candidate, *, search_s: float) -> None:
        """Export a candidate through the gate, and try it with as many and as few lanes as there are."""
        options, card = self._options, self._card
        assert options.checkpoint
        try:
            candidate.directory = export_checkpoint(
                options.checkpoint, self._drafts, backend=candidate.backend, precision=candidate.precision,
                device=str(self._device), frames=self._frames, views=card.views,
                pictures=self._files, search_s=search_s,
            )  # fmt: skip
            candidate.facts = artifact_card(candidate.directory).export
            assert card.export and candidate.facts
            if candidate.facts.checkpoint != card.export.checkpoint:
                raise BadOption(f"was built from {options.checkpoint}, which has been changed meanwhile")
            # The rest of the card is the store's, which may have been calibrated since.
            own = replace(card, version=int(candidate.directory.name), export=candidate.facts)
            (candidate.directory / CARD).write_text(dump_card(own), "utf-8")
            most = self._all_sizes[-1]
            first = [most._replace(windows_per_batch=1, lanes=n) for n in sorted({1, most.lanes}, reverse=True)]
            try:
                self._try(candidate, first)
            except PenumbraError:  # as where there is no memory for so many samples at a time
                if most.samples_per_call == 1:
                    raise
                candidate.settings.clear()
            if not candidate.settings:  # here and not above, where the exception still holds what was loaded
                self._try(candidate, [one._replace(samples_per_call=1) for one in first])
        except KeyboardInterrupt:  # what is measured by half is not compared
            candidate.settings.clear()
            raise
        except Exception as error:  # whatever an exporter or a graph raises, it is this candidate that is refused
            candidate.refused = reason_of(error).removeprefix(f"{card.name} does not reproduce its checkpoint: ")
            candidate.settings.clear()
            return
        self._alive += [(candidate, sizes) for sizes in candidate.settings]

    def _try(self, candidate: Candidate, sizes: Sequence[Sizes | None]) -> None:
        """Measure a candidate for the first time, and what it takes of memory, and how right it is."""
        gc.collect()  # what an export leaves behind is not the candidate's
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        before = self._taken_bytes()
        with self._loaded(candidate) as segmenter:
            runtime = segmenter.find(self._card.name)
            self._threads, self._all_sizes = segmenter.cores.threads, find_sizes(runtime, segmenter.cores)
            self._pictures = self._pictures or [one.image_HWC for one in runtime.golden_inputs()]
            for path, picture in zip(few(self._files), self._pictures, strict=False):
                with naming(path):  # else one that is too large for the model would end the search at any time
                    where, options = getattr(picture, "place", None), SegmentOptions(model=self._card.name)
                    segmenter.check_memory(segmenter.plan(picture.shape[0], picture.shape[1], options, place=where))
            for one in sizes:
                self._measure(segmenter, (candidate, one), self._options.seconds[0])
            candidate.memory_mb = (self._taken_bytes() - before) / 2**20
            candidate.figures = self._options.judge(segmenter) if self._options.judge else {}

    def _taken_bytes(self) -> int:
        """Memory that this process holds, on its GPU too."""
        return resident_bytes() + (torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0)

    def _halve(self, settings: list[Setting]) -> None:
        """Measure all settings, keep the better half, and so on, for the longer the fewer there are."""
        least_s, most_s = self._options.seconds
        times = len(self._options.load.callers(self._threads))
        for num_before in itertools.count():
            if len(settings) <= 1:
                break
            left_s = self._options.ends - time.perf_counter()
            seconds = left_s / len(settings) / times / (math.ceil(math.log2(len(settings))) + 1)
            self._say(f"{len(settings)} settings of {len({candidate for candidate, _ in settings})} candidates")
            self._alive = settings
            unmeasured = [setting for setting in settings if len(self._measured(setting)) <= num_before]
            self._measure_all(unmeasured, min(max(seconds, least_s), most_s))
            settings = [setting for setting in settings if self._measured(setting)]
            self._alive = settings = sorted(settings, key=self._speed_of, reverse=True)[: -(-len(settings) // 2)]

    def _measure_all(self, settings: Sequence[Setting], seconds: float) -> None:
        """Measure settings of candidates; what fails leaves the race."""
        for candidate, together in itertools.groupby(settings, key=lambda setting: setting[0]):
            group = list(together)
            with self._sparing(group), self._loaded(candidate) as segmenter:
                for setting in group:
                    with self._sparing([setting]):
                        self._measure(segmenter, setting, seconds)

    @contextmanager
    def _sparing(self, settings: Sequence[Setting]) -> Iterator[None]:
        """Go on where settings of a candidate fail, without them; what is served keeps what was measured before."""
        try:
            yield
        except Exception as error:  # whatever a graph raises in sizes that are new to it
            (candidate, sizes), *others = settings
            self._say(f"{candidate} fails in {'all sizes' if others else sizes or 'its own sizes'}: {reason_of(error)}")
            for _, one in settings if candidate is not self._now else ():
                candidate.settings.pop(one, None)
                candidate.refused = "" if candidate.settings else reason_of(error)

    def _measure(self, segmenter: Segmenter, setting: Setting, seconds: float) -> None:
        """Have callers ask of a candidate in sizes."""
        (candidate, sizes), name = setting, self._card.name
        if sizes:
            runtime = segmenter.find(name)
            runtime.windows_per_batch, runtime.samples_per_call, runtime.lanes = sizes
            runtime.prepare(segmenter.lane_cores(sizes.lanes))
        answers = self._options.load.measure(segmenter, name, self._pictures, seconds=seconds)
        candidate.settings.setdefault(sizes, []).append(answers)

    @contextmanager
    def _loaded(self, candidate: Candidate, lanes: int = 0) -> Iterator[Segmenter]:
        """Load a candidate, whose sizes `_measure` sets; what is served now finds its own."""
        tuning = Tuning() if candidate is self._now else Tuning(1, 1, lanes)
        options = self._options
        with Segmenter(limits=IN_MEMORY, device=options.device, tuning=tuning, threads=options.threads) as segmenter:
            segmenter.load(candidate.directory)
            yield segmenter

    def _measured(self, setting: Setting) -> list[Answers]:
        return setting[0].settings.get(setting[1], [])

    def _speed_of(self, setting: Setting) -> Speed:
        return self._options.load.speed(found) if (found := self._measured(setting)) else Speed(0.0, math.inf)

    def _best_of(self, candidate: Candidate) -> Setting:
        """Choose a candidate's fastest setting."""
        return max(settings_of([candidate]), key=self._rank_of)

    def _rank_of(self, setting: Setting) -> tuple[float, Speed]:
        """Rank finalists first, which were measured in turns, then those that went furthest: the luck of a short
        measurement is no speed."""
        return math.inf if setting in self._finalists else len(self._measured(setting)), self._speed_of(setting)

    def _best(self) -> Setting:
        """Choose the fastest of what is still in the race. Raises BadOption: nothing was measured, or is in time."""
        measured = [one for one in self._alive if self._measured(one)] or settings_of(self._candidates)
        if not measured:
            reasons = [f"{candidate} {candidate.refused}" for candidate in self._candidates if candidate.refused]
            untried = any(candidate.refused in ("", LATE, GIVEN_UP) for candidate in self._candidates)
            why = (
                "nothing could be measured in this time; give it more --minutes" if untried else "nothing can be served"
            )
            raise BadOption("; ".join([why, *reasons]))
        best = max(measured, key=self._rank_of)
        if not self._speed_of(best).windows_per_s:
            raise BadOption(f"nothing answers within {self._options.load.target_ms:g} ms here; raise --target-ms")
        return best

    def _best_in_its_sizes(self) -> Setting:
        """Choose the fastest that reproduces its checkpoint in the sizes that it is to run in. Raises BadOption."""
        while True:
            candidate, sizes = best = self._best()
            assert sizes
            try:
                verify_artifact(candidate.directory, str(self._device), sizes[:2])
                with self._loaded(candidate, sizes.lanes):  # which proves it on a lane's share of the cores
                    return best
            except Exception as error:  # whatever a graph raises in a batch that the engine may have halved
                why, (windows, samples, _) = reason_of(error), sizes
            self._say(f"{candidate} with {windows} windows and {samples} samples a call is refused: {why}")
            settings = candidate.settings.items()
            candidate.settings = {one: measured for one, measured in settings if one and one[:2] != sizes[:2]}
            candidate.refused = "" if candidate.settings else why
            self._alive = settings_of(self._candidates)

    @property
    def _gate(self) -> str:
        """Say what the gate was held on."""
        labelled = sum(label_HW is not None for _, label_HW in self._frames)
        kinds = {"labelled frame": labelled, "picture": len(self._frames) - labelled}
        return " and ".join(f"{num} {kind}{'s' * (num > 1)}" for kind, num in kinds.items() if num) or DRAWN

    def conclude(self) -> Outcome:
        """Write the fastest as the next version, unless what is there is as fast. Raises BadOption: there is none."""
        load, card, store = self._options.load, self._card, self._source.parents[1]
        best = self._best_in_its_sizes()
        for candidate in self._candidates:
            if not candidate.settings and not candidate.refused:
                candidate.refused = "was not tried, since the search was ended"
        proved = [candidate for candidate in (self._now, *self._candidates) if candidate.settings]
        rows = [self._row(best if best[0] is candidate else self._best_of(candidate)) for candidate in proved]
        fastest = rows[proved.index(best[0])]
        refused = {str(candidate): candidate.refused for candidate in self._candidates if candidate.refused}
        over = {row.name: str(row) for row in rows} | refused
        assert best[0].facts and fastest.sizes
        tuned = Tuned(
            name_hardware(self._device), self._threads, *fastest.sizes, load.kind, load.target_ms,
            fastest.windows_per_s, fastest.p95_ms, fastest.memory_mb, self._gate, over, digest(self._pictures),
        )  # fmt: skip
        as_it_is = self._speed_of((self._now, None)).windows_per_s
        if not self._options.always and fastest.windows_per_s <= GAIN * as_it_is:
            return Outcome(self._source, tuned, rows, rows[0], refused, self._is_complete)
        newest = find_artifact(store, card.name)
        if int(newest.name) >= self._next:  # written meanwhile, as by a calibration
            card = artifact_card(newest)
            if card.export is None or card.export.checkpoint != best[0].facts.checkpoint:
                raise BadOption(
                    f"{card.name} version {newest.name} is of another checkpoint and was written meanwhile; tune that"
                )
            if card.tuned and card.tuned != self._card.tuned:
                raise BadOption(f"{card.name} version {newest.name} was tuned meanwhile; tune again to compare with it")
        card = replace(card, version=next_version(store, card.name), export=replace(best[0].facts, tuned=tuned))
        directory = store / card.name / str(card.version)
        write_version(best[0].directory, directory, card)
        return Outcome(directory, tuned, rows, fastest, refused, self._is_complete)

    def _row(self, setting: Setting) -> Row:
        candidate, sizes = setting
        assert candidate.facts
        parity, now = candidate.facts.parity, self._now.figures
        changes = {name: value - now[name] for name, value in candidate.figures.items()}
        return Row(
            str(candidate), sizes, *self._speed_of(setting), candidate.memory_mb, parity.label_flips_percent,
            parity.variance_ratio, changes,
        )  # fmt: skip
