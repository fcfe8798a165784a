"""From bands to one answer: whole, or read while it is made."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import IGNORE, Card
from penumbra.serving.engine.bands import BandStream
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.options import PROBABILITIES, SegmentOptions
from penumbra.serving.engine.raster import Pixels, Raster
from penumbra.serving.engine.windows import WindowPlan
from penumbra.serving.engine.work import Work


@dataclass(frozen=True, slots=True)
class Prediction:
    """One image's answer at the image's size.

    labels_HW: uint8 class ids. maps: float32 [H, W] by name, uncertainties in nats
    (`penumbra.serving.engine.uncertainty`). timing_ms: milliseconds by phase. num_windows: windows that were run.
    members: names of the samples, where they have names. warnings: sentences about what the caller should know of this
    answer. num_void: pixels that hold no measurement; their label is IGNORE and all else NaN, and shares are of the
    others. abstained: share of the pixels whose label is IGNORE because of `max_risk`; None where that was not asked
    for. image: what it is an answer to. prob_KHW: mean probabilities of all classes, float32, where the output
    PROBABILITIES was asked for. num_asked: of samples, where `anytime` lets the answer have fewer. age_s: of an answer
    that was kept (`penumbra.serving.cache`).
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
    num_void: int = 0


@dataclass(frozen=True, slots=True)
class Arrays:
    """What a stream's rows are put into: labels [H, W], maps [H, W] by name, and probabilities [K, H, W] or None."""

    labels_HW: NDArray[np.uint8]
    maps: dict[str, FloatArray]
    prob_KHW: FloatArray | None = None


def new_arrays(bands: BandStream, options: SegmentOptions) -> Arrays:
    """Make arrays in memory, not yet filled."""
    plan, card = bands.work.plan, bands.work.runtime.card
    size = (plan.height, plan.width)
    prob_KHW = np.empty((card.num_classes, *size), np.float32) if PROBABILITIES in options.outputs else None
    return Arrays(np.empty(size, np.uint8), {name: np.empty(size, np.float32) for name in options.maps(card)}, prob_KHW)


def fill(bands: BandStream, arrays: Arrays) -> Generator[int]:
    """Run a stream, and set the arrays' rows band by band; yields how many are set."""
    with closing(iter(bands)) as rows:  # type: ignore[type-var]
        for band in rows:
            place = slice(band.y0, band.y0 + len(band.labels))
            for name, values in arrays.maps.items():
                if name in band.maps:  # `anytime` may come down to one sample, which has fewer maps
                    values[place] = band.maps[name]
            arrays.labels_HW[place] = band.labels  # last: whoever goes on after a stop counts these
            if arrays.prob_KHW is not None:
                arrays.prob_KHW[:, place] = band.prob_hKW.swapaxes(0, 1)
            yield place.stop


def collect(bands: BandStream, options: SegmentOptions, arrays: Arrays) -> Prediction:
    """Run a stream to its end. Changes the arrays."""
    with closing(Unfolding(bands, options, arrays)) as answer:
        return answer.finish()


class Rows:
    """An array [H, W] that is made while it is read: a slice of its rows is given once they are final."""

    def __init__(self, unfolding: "Unfolding", values: NDArray[Any]) -> None:
        self._unfolding, self._values = unfolding, values
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        self._unfolding.reach(rows.indices(self.shape[0])[1])
        return self._values[rows]


class Unfolding:
    """An answer whose first rows are read and written while its last windows run. Used by one thread.

    arrays: what its rows are put into.
    """

    def __init__(self, bands: BandStream, options: SegmentOptions, arrays: Arrays) -> None:
        self._bands, self._options, self._arrays = bands, options, arrays
        self._num_asked = bands.work.num_samples if options.anytime else None
        self._filling, self._num_rows = fill(bands, arrays), 0

    @property
    def begun(self) -> Prediction:
        """What can be said before the end; labels and maps are `Rows`, as all writers ask.

        How much is void or was withheld is not known yet. Not for `anytime`, whose rows may become void again.
        """
        assert not self._options.anytime
        labels_HW = cast(NDArray[np.uint8], Rows(self, self._arrays.labels_HW))
        maps = {name: cast(FloatArray, Rows(self, values)) for name, values in self._arrays.maps.items()}
        return self._describe(replace(self._arrays, labels_HW=labels_HW, maps=maps))

    def reach(self, num_rows: int) -> None:
        """Run until so many rows are final. Raises any PenumbraError."""
        with self._bands.clock("total"):
            while self._num_rows < num_rows:
                self._num_rows = next(self._filling)

    def finish(self) -> Prediction:
        """Run what nobody has read; the whole answer."""
        with self._bands.clock("total"):
            for _ in self._filling:
                pass
        prediction = self._describe(self._arrays)
        image, has_withheld = prediction.image, self._options.max_risk is not None
        if not has_withheld and not isinstance(image, Raster):
            return prediction
        (height, width), step = prediction.labels_HW.shape, self._bands.work.plan.window_height
        parts = [slice(y, y + step) for y in range(0, height, step)]
        num_ignored = sum(int((prediction.labels_HW[rows] == IGNORE).sum()) for rows in parts)
        if not has_withheld:
            return replace(prediction, num_void=num_ignored)
        num_void = sum(_count_void(image, rows) for rows in parts)
        num_measured = height * width - num_void
        return replace(prediction, num_void=num_void, abstained=(num_ignored - num_void) / max(num_measured, 1))

    def close(self) -> None:
        """Withdraw what has not run."""
        self._filling.close()

    def _describe(self, arrays: Arrays) -> Prediction:
        work, card = self._bands.work, self._bands.work.runtime.card
        members = card.sampling_with(prompt=work.prompt is not None).members
        has = card.maps(work.num_samples)
        maps = {name: values for name, values in arrays.maps.items() if name in has}
        of_image = work.image_HW3.warnings if isinstance(work.image_HW3, Raster) else ()
        warnings = of_image + warnings_of(card, work.plan)
        if self._num_asked and work.num_samples < self._num_asked:
            warnings += (f"the deadline left time for {work.num_samples} of the {self._num_asked} samples asked for",)
        if self._options.max_risk is not None:
            warnings += calibration_warnings(card, work, overlap=self._options.overlap)
        return Prediction(
            card, self._options.seed, work.num_samples, work.plan.num_windows, members, warnings, arrays.labels_HW,
            maps, self._bands.timing_ms, None, work.image_HW3, arrays.prob_KHW, self._num_asked,
        )  # fmt: skip


def _count_void(image: Pixels | None, rows: slice) -> int:
    """Pixels that hold no measurement, by the image itself: a label does not say why it is IGNORE, and a part of the
    answer may be another process's."""
    void_hW = image.void(rows) if isinstance(image, Raster) else None
    return 0 if void_hW is None else int(void_hW.sum())


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
