"""From bands to one answer."""

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import IGNORE, Card
from penumbra.serving.engine.bands import BandStream
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Raster
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
    image: Raster | None = None
    prob_KHW: FloatArray | None = None
    num_asked: int | None = None
    age_s: float | None = None
    num_void: int = 0

    @property
    def origin(self) -> dict[str, Any]:
        """Who answered, and with what: with the same image and options the answer is the same."""
        return {
            "model": self.card.name, "version": self.card.version, "seed": self.seed, "samples": self.num_samples
        }  # fmt: skip

    @property
    def facts(self) -> dict[str, Any]:
        """What an answer is of, and what its reader should know, as JSON has it."""
        return self.origin | {
            "members": list(self.members), "windows": self.num_windows, "size": list(self.labels_HW.shape),
            "units": "nats", "timing_ms": {phase: round(ms, 3) for phase, ms in self.timing_ms.items()},
            "warnings": list(self.warnings), "abstained": self.abstained, "void_pixels": self.num_void,
        } | ({"samples_asked": self.num_asked} if self.num_asked else {})  # fmt: skip


def collect(
    bands: BandStream, options: SegmentOptions, labels_HW: NDArray[np.uint8], maps: dict[str, FloatArray],
    prob_KHW: FloatArray | None = None,
) -> Prediction:  # fmt: skip
    """Run a request to its end, and set the rows of labels and maps band by band. Changes the arrays.

    Raises any PenumbraError.
    """
    num_asked = bands.work.num_samples if options.anytime else None
    with bands.clock("total"), closing(iter(bands)) as finished:  # type: ignore[type-var]
        for band in finished:
            rows = slice(band.y0, band.y0 + len(band.labels))
            for name in maps.keys() & band.maps.keys():  # `anytime` may come down to one sample, which has fewer maps
                maps[name][rows] = band.maps[name]
            if prob_KHW is not None:
                prob_KHW[:, rows] = band.prob_hKW.swapaxes(0, 1)
            labels_HW[rows] = band.labels  # last: whoever goes on after a stop counts these
    work = bands.work
    card, image = work.runtime.card, work.image_HW3
    maps = {name: values for name, values in maps.items() if name in card.maps(work.num_samples)}
    members = card.sampling_with(prompt=work.prompt is not None).members
    num_void, abstained = _count_ignored(labels_HW, image, work.plan, has_withheld=options.max_risk is not None)
    return Prediction(
        card, options.seed, work.num_samples, work.plan.num_windows, members, _warnings(work, options, num_asked),
        labels_HW, maps, bands.timing_ms, abstained, image, prob_KHW, num_asked, num_void=num_void,
    )  # fmt: skip


def _count_ignored(
    labels_HW: NDArray[np.uint8], image: Raster, plan: WindowPlan, *, has_withheld: bool
) -> tuple[int, float | None]:
    """Pixels that hold no measurement, and the share of the others whose label was withheld, if any could be.

    By the image itself, where both can be: a label does not say why it is IGNORE, and a part of the answer may be
    another process's.
    """
    num_ignored, num_void = 0, 0
    for y in range(0, plan.height, plan.window_height):
        rows = slice(y, y + plan.window_height)
        num_ignored += int((labels_HW[rows] == IGNORE).sum())
        void_hW = image.void(rows) if has_withheld else None
        num_void += 0 if void_hW is None else int(void_hW.sum())
    if not has_withheld:
        return num_ignored, None
    num_measured = plan.height * plan.width - num_void
    return num_void, (num_ignored - num_void) / max(num_measured, 1)


def _warnings(work: Work, options: SegmentOptions, num_asked: int | None) -> tuple[str, ...]:
    card, image = work.runtime.card, work.image_HW3
    warnings = image.warnings + warnings_of(card, work.plan)
    if num_asked and work.num_samples < num_asked:
        warnings += (f"the deadline left time for {work.num_samples} of the {num_asked} samples asked for",)
    if options.max_risk is not None:
        warnings += calibration_warnings(card, work, overlap=options.overlap)
    return warnings


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
