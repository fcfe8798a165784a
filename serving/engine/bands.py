"""An answer's rows as they become final: windows in, bands of labels and maps out."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np

from penumbra.models.card import IGNORE
from penumbra.serving.engine.canvas import Canvas
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.scheduler import Scheduler
from penumbra.serving.engine.uncertainty import Band, abstain, read_out
from penumbra.serving.engine.work import Work

Progress = Callable[[int, int], object]
"""Takes how many windows are done, and how many there are."""


class BandStream:
    """The rows of one answer as they become final, and how long each phase took.

    The work is submitted when the first row is asked for and withdrawn when the caller stops, so that nothing stays
    in the queue that nobody waits for. Iterate once. abstain_above: entropy in nats above which a label is withheld.
    Pixels without a measurement (`Raster.void`) have the label IGNORE, and NaN for maps and probabilities. first_y:
    bands before this row are left out; not all of their windows are run. progress: called at first and after every
    window. timing_ms: `total` is clocked by whoever iterates.
    work: with the samples that the answer has. Where it is `anytime` they can become fewer while it runs; bands then
    come from the first one again, and those before are void.
    """

    def __init__(
        self, scheduler: Scheduler, work: Work, *, abstain_above: float | None = None, first_y: int = 0,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._scheduler, self.work, self._first_y = scheduler, work, first_y
        self._abstain_above, self._progress = abstain_above, progress or (lambda num_done, num_windows: None)
        self._num_done = work.plan.num_windows - work.num_windows
        self.timing_ms: dict[str, float] = {"queue": 0.0, "run": 0.0, "stitch": 0.0, "read_out": 0.0, "total": 0.0}

    def __iter__(self) -> Iterator[Band]:
        card = self.work.runtime.card
        names = [extra.name for extra in card.extra_maps]
        work = self.work
        new_canvas = partial(Canvas, work.plan, card.num_classes, num_extras=len(names), first_row=work.first_row)
        canvas = new_canvas()
        self._progress(self._num_done, work.plan.num_windows)
        with self._scheduler.submit(work) as finished_windows:
            for window, moments in finished_windows:
                if moments.num_samples != self.work.num_samples:
                    self.work, canvas, self._num_done = replace(work, num_samples=moments.num_samples), new_canvas(), 0
                self._num_done += 1
                self._progress(self._num_done, work.plan.num_windows)
                with self.clock("stitch"):
                    canvas.add(window, moments)
                for y0, merged_hKW, expected_hW, extras_hEW in canvas.finished(window):
                    if y0 < self._first_y:
                        continue
                    with self.clock("read_out"):
                        band = read_out(y0, merged_hKW, expected_hW, card=card, num_samples=self.work.num_samples)
                        band.maps.update(zip(names, extras_hEW.transpose(1, 0, 2), strict=True))
                        if self._abstain_above is not None:
                            abstain(band, above_nats=self._abstain_above)
                        withhold_void(band, work.image_HW3)
                    yield band
        self.timing_ms["queue"] = 1e3 * finished_windows.queue_s
        self.timing_ms["run"] = 1e3 * finished_windows.run_s

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the time spent in a `with` block to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timing_ms[phase] += 1e3 * (time.perf_counter() - started)


def withhold_void(band: Band, image: Raster) -> None:
    """Say nothing where the image has no measurement. Changes the band's labels, maps and probabilities."""
    void_hW = image.void(slice(band.y0, band.y0 + len(band.labels)))
    if void_hW is None:
        return
    band.labels[void_hW] = IGNORE
    for values_hW in band.maps.values():
        values_hW[void_hW] = np.nan
    band.prob_hKW.transpose(0, 2, 1)[void_hW] = np.nan
