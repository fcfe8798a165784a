"""From bands to one answer."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import Card
from penumbra.serving.engine.kernels import FloatArray
from penumbra.serving.engine.options import PROBABILITIES
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.request import Progress, QueuedRequest, Run
from penumbra.serving.engine.scores import Scores, score, warn_of_strangeness
from penumbra.serving.engine.uncertainty import NUM_COLUMNS, Band

Follow = Callable[[Band], object]
"""It is told of every band as it is finished; one that begins above the last one makes those before void."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A prediction is one image's answer at the image's size.

    labels_HW: uint8 class ids. maps: float32 [H, W] by name, uncertainties in nats
    (`penumbra.serving.engine.uncertainty`). timing_ms: milliseconds by phase. num_windows: windows that were run.
    members: names of the samples, where they have names. warnings: sentences about what the caller should know of this
    answer. num_void: pixels that hold no measurement; their label is IGNORE and all else NaN, and shares are of the
    others. abstained: share of the pixels whose label is IGNORE for `max_risk` or `max_class_risk`; None where neither
    was asked for. image: what it is an answer to. prob_KHW: mean probabilities of all classes, float32, where the
    output PROBABILITIES was asked for. num_asked: of samples, where `anytime` lets the answer have fewer. age_s: of an
    answer that was kept (`penumbra.serving.cache`). scores: what is said of the picture as a whole.
    views: in which every sample saw the windows; members are those of one.
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
    scores: Scores = field(default_factory=Scores)
    views: str = "none"

    @property
    def origin(self) -> dict[str, Any]:
        """Who answered, and with what: with the same image and options the answer is the same."""
        return {
            "model": self.card.name, "version": self.card.version, "seed": self.seed, "samples": self.num_samples
        } | ({"views": self.views} if self.views != "none" else {})  # fmt: skip

    @property
    def scored(self) -> dict[str, float | None]:
        """The scores by name; None where there is none."""
        return {"expected_error": self.scores.expected_error, "novelty": self.scores.novelty}

    @property
    def shares(self) -> dict[str, float]:
        """Those of the scores that there are, by name."""
        return {name: score for name, score in self.scored.items() if score is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """What an answer is of, and what its reader should know, as JSON has it."""
        return self.origin | {
            "members": list(self.members), "windows": self.num_windows, "size": list(self.labels_HW.shape),
            "units": "nats", "timing_ms": {phase: round(ms, 3) for phase, ms in self.timing_ms.items()},
            "warnings": list(self.warnings), "abstained": self.abstained, "void_pixels": self.num_void,
            "scores": self.scored,
        } | ({"samples_asked": self.num_asked} if self.num_asked else {})  # fmt: skip

    def _repr_html_(self) -> str:
        """What a notebook shows. The renderer is found then, since the engine is there without it."""
        shown: str = import_module("penumbra.serving.render.notebook").html_of(self)
        return shown


def collect(
    request: QueuedRequest, labels_HW: NDArray[np.uint8] | None = None, maps: dict[str, FloatArray] | None = None,
    sums_HN: NDArray[np.int64] | None = None, *, progress: Progress = lambda num_done, num_windows: None,
    follow: Follow = lambda band: None, run: Run = QueuedRequest.bands,
) -> Prediction:  # fmt: skip
    """Run a request to its end, and set the rows of labels, maps and sums band by band, by default in memory.

    run: what gives its bands. Raises any PenumbraError. Changes the arrays.
    """
    plan, card = request.plan, request.plan.card
    size = plan.windows.size
    labels_HW = np.empty(size, np.uint8) if labels_HW is None else labels_HW
    maps = {name: np.empty(size, np.float32) for name in plan.options.maps(card)} if maps is None else maps
    sums_HN = np.empty((size[0], NUM_COLUMNS), np.int64) if sums_HN is None else sums_HN
    has_prob = PROBABILITIES in plan.options.outputs
    prob_KHW = np.empty((card.num_classes, *size), np.float32) if has_prob else None
    with request.clock("total"), closing(run(request, progress)) as bands:
        for band in bands:
            rows = slice(band.y0, band.y0 + len(band.labels))
            for name in maps.keys() & band.maps.keys():  # `anytime` may come down to one sample, which has fewer maps
                maps[name][rows] = band.maps[name]
            if prob_KHW is not None and band.prob_hKW is not None:
                prob_KHW[:, rows] = band.prob_hKW.swapaxes(0, 1)
            sums_HN[rows] = band.sums_hN
            labels_HW[rows] = band.labels  # last: whoever goes on after a stop counts these
            follow(band)
    *sums, num_void, num_ignored = map(int, sums_HN[:].sum(0, dtype=object))
    num_measured = size[0] * size[1] - num_void
    abstained = (num_ignored - num_void) / max(num_measured, 1) if plan.options.risks else None
    scores = score(card, sums, num_measured, num_samples=request.num_samples, is_usual=plan.is_usual)
    warnings = (*warn_of_strangeness(card, scores), *_warnings(request))
    return Prediction(
        card, plan.options.seed, request.num_samples, plan.windows.num_windows, plan.sampling.members, warnings,
        labels_HW, {name: maps[name] for name in maps if name in card.maps(request.num_members)}, request.timing_ms,
        abstained, request.image_HWC, prob_KHW, plan.num_samples if plan.options.anytime else None, num_void=num_void,
        scores=scores, views=plan.views,
    )  # fmt: skip


def _warnings(request: QueuedRequest) -> tuple[str, ...]:
    """Say what a caller should know: of the image, and of windows, samples or a risk that are not the usual ones."""
    plan, card, options = request.plan, request.plan.card, request.plan.options
    warnings = request.image_HWC.warnings + plan.of_scale
    trained, run = card.window.trained, (plan.windows.window_height, plan.windows.window_width)
    if trained not in (None, run):
        warnings += (
            f"the published results of {card.name} hold for windows of {trained[1]}x{trained[0]} px, and its answers "
            f"depend on their width; this image was run at {run[1]}x{run[0]}",
        )
    if options.boxes and not card.prompt.partial:
        warnings += (
            f"{card.name} was trained with every object boxed, and reads what is in no box as absent; box all or none",
        )  # fmt: skip
    if request.num_samples < plan.num_samples:
        warnings += (
            f"the deadline left time for {request.num_samples} of the {plan.num_samples} samples asked for",
        )  # fmt: skip
    if not options.risks or card.calibration is None:
        return warnings
    if withheld := [one.name for k, one in enumerate(card.classes) if k in request.withheld]:
        asked = " and ".join(f"{name} of {getattr(options, name):g}" for name in options.risks)
        warnings += (f"{asked} withhold{'s' * (len(options.risks) < 2)} {', '.join(withheld)} altogether",)
    calibrated = card.calibration.num_samples
    in_views = f"views {card.views} " if card.views != plan.views else ""
    if request.num_samples != calibrated or not plan.is_usual:
        warnings += (
            f"{' and '.join(options.risks)} of {card.name} was calibrated with {calibrated} samples, overlap "
            f"{card.window.overlap:g}, {in_views}and no prompt; this answer was made otherwise, and its risk may be "
            "another",
        )
    return warnings
