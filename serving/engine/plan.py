"""What a request asks of a model, checked and laid out: made once, before its pixels are looked at."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from penumbra.models.card import NUM_VIEWS, Card, Sampling
from penumbra.models.errors import BadOption, TooLarge
from penumbra.serving.engine.canvas import Wanted, ring_height, rows_of_piece
from penumbra.serving.engine.layout import Place
from penumbra.serving.engine.moments import channels
from penumbra.serving.engine.noise import NoiseSource, SeededNoise
from penumbra.serving.engine.options import PROBABILITIES, Limits, SegmentOptions, abstain_above, check_options
from penumbra.serving.engine.prompts import Boxes, PromptSource, check_prompt
from penumbra.serving.engine.runtime import Runtime
from penumbra.serving.engine.scale import CARD, find_scale, size_at
from penumbra.serving.engine.windows import WindowPlan, count_windows, cover, plan_bytes


@dataclass(frozen=True, slots=True, eq=False)
class RequestPlan:
    """A request that can be answered has a model, options with their defaults set, windows, noise and a prompt.

    of_scale: what its caller should know of the scale at which it is run. share: how many turns it has where a request
    of a single window has one.
    """

    runtime: Runtime
    options: SegmentOptions
    windows: WindowPlan
    noise: NoiseSource
    prompt: PromptSource | None = None
    of_scale: tuple[str, ...] = ()
    share: int = 1

    @property
    def card(self) -> Card:
        return self.runtime.card

    @property
    def num_samples(self) -> int:
        return self.options.num_samples(self.card)

    @property
    def views(self) -> str:
        return self.options.views or self.card.views

    @property
    def num_views(self) -> int:
        return NUM_VIEWS[self.views]

    @property
    def sampling(self) -> Sampling:
        return self.card.sampling_with(prompt=self.prompt is not None)

    def num_bytes(self, lanes: int, *, on_disk: bool = False) -> int:
        """Predict the memory that the request takes beside its body: the picture, the answer, the canvas, and windows
        that wait to be stitched, of which a single one is the canvas. Samples take none of their own, for they are
        added up as they come. Rows are read out a band at a time, of a single window all at once. An answer of another
        size is resized a piece at a time, by way of two others and of the rows of the canvas that it lies between; on a
        GPU all pieces of a window leave together. on_disk: picture and answer are not held."""
        windows, card = self.windows, self.card
        floats = len(self.options.maps(card)) + (card.num_classes if PROBABILITIES in self.options.outputs else 0)
        pixel_bytes = card.input.num_bands * np.dtype(card.input.dtype).itemsize + 1 + 4 * floats
        waiting = min(windows.num_windows, (lanes + 1) * self.runtime.windows_per_batch + 1)
        canvas = ring_height(windows, 1) * windows.width if windows.num_windows > 1 else 0
        stats = waiting * windows.window_height * windows.window_width + canvas
        (height, width), rows = windows.size, _most_rows(windows)
        band_bytes = rows * width * (1 + 4 * floats)
        if windows.answer:
            rows = min(rows, rows_of_piece(windows))
            band_bytes = band_bytes if self.runtime.stays_on_device else rows * width * (1 + 4 * floats)
            near = rows * windows.height // height + 2
            stats += 3 * rows * width + (near + 3 * rows) * windows.width
        return (not on_disk) * height * width * pixel_bytes + band_bytes + 4 * channels(card) * stats

    @property
    def is_usual(self) -> bool:
        """Tell whether the answer is made as in a calibration: with the card's overlap and views, and no prompt."""
        is_usual = self.options.overlap in (None, self.card.window.overlap) and self.options.scale in (None, CARD)
        return is_usual and self.views == self.card.views and self.prompt is None

    @property
    def is_anytime(self) -> bool:
        """Tell whether fewer samples, the same of every window, are better than a missed deadline."""
        return self.options.anytime and self.sampling.is_stochastic

    @property
    def wanted(self) -> Wanted:
        """Say what of the answer is read out, and above which entropy in nats the label of a class is withheld."""
        options = self.options
        return Wanted(options.named(self.card), abstain_above(self.card, options.max_risk, options.max_class_risk))


def resolve(options: SegmentOptions, card: Card, limits: Limits) -> SegmentOptions:
    """Set the model's name, version, samples and views in options. Raises BadOption for what no image mends."""
    samples = check_options(options, card, limits)
    return replace(options, model=card.name, version=card.version, samples=samples, views=options.views or card.views)


def plan_request(
    runtime: Runtime, options: SegmentOptions, height: int, width: int, *, limits: Limits, place: Place | None = None
) -> RequestPlan:  # fmt: skip
    """Lay out the windows of an image of this size and place. options: as `resolve` gives them.

    Raises BadOption for a prompt that does not fit the image, and TooLarge.
    """
    card = runtime.card
    prompt = check_prompt(card, height, width, boxes=options.boxes, tags=options.tags, alpha=options.alpha)
    factor, of_scale = find_scale(card, options.scale, height, width, place)
    run = size_at(factor, height, width)
    if isinstance(prompt, Boxes):
        prompt = replace(prompt, boxes_N5=prompt.boxes_N5 * ([run[1] / width, run[0] / height] * 2 + [1]))
    _check_windows(*run, card, options, limits=limits)
    size = 4 * height * width * card.num_classes
    if PROBABILITIES in options.outputs and size > limits.probability_bytes:
        raise TooLarge(
            f"the probabilities of {card.num_classes} classes at {width}x{height} px have {size:,} bytes and the limit "
            f"is {limits.probability_bytes:,}; send a smaller image or leave out {PROBABILITIES}"
        )
    sampling = card.sampling_with(prompt=prompt is not None)
    noise = SeededNoise(sampling, seed=options.seed, num_samples=options.num_samples(card))
    windows = cover(*run, card.window, options.overlap)
    if run != (height, width):
        windows = replace(windows, answer=(height, width))
    share = min(windows.num_windows, limits.large_share)
    return RequestPlan(runtime, options, windows, noise, prompt, of_scale, share)


def check_long(options: SegmentOptions) -> None:
    """Raise BadOption for what only images have that are answered at once."""
    requested = {
        PROBABILITIES: PROBABILITIES in options.outputs, "deadline_ms": options.deadline_ms is not None,
        "anytime": options.anytime,
    }  # fmt: skip
    if names := [name for name, is_requested in requested.items() if is_requested]:
        raise BadOption(f"{' and '.join(names)} can be had only for images that are answered at once; leave it out")


def _check_windows(height: int, width: int, card: Card, options: SegmentOptions, *, limits: Limits) -> None:
    limit = min(limits.window_pixels, card.window.max_pixels or limits.window_pixels)
    if card.window.height == 0 and height * width > limit:
        raise TooLarge(
            f"{card.name} sees an image whole and this one has {width}x{height} = {height * width:,} pixels; the "
            f"limit for that is {limit:,}: send a smaller image or parts of it"
        )
    if (needed := plan_bytes(height, width, card.window, options.overlap)) > limits.memory_bytes:
        raise TooLarge(
            f"the plan of windows alone takes {needed:,} bytes and the limit of all memory (memory_bytes) is "
            f"{limits.memory_bytes:,}; lower the scale or the overlap, or send parts of the image"
        )
    num_windows = count_windows(height, width, card.window, options.overlap)
    num_samples, num_members = options.num_samples(card), options.num_members(card)
    if num_windows * num_members > limits.queue_samples:
        views = f" x {num_members // num_samples} views" if num_members > num_samples else ""
        raise TooLarge(
            f"the image needs {num_windows} windows x {num_samples} samples{views} = {num_windows * num_members:,} "
            f"window-samples and the limit of the queue (limit_queue_samples) is {limits.queue_samples:,}; lower the "
            f"overlap or the samples{', leave out the views' if views else ''}, or send a smaller image or parts of it"
        )


def _most_rows(windows: WindowPlan) -> int:
    """Count the rows of an answer of another size that a row of windows finishes, at most."""
    ends = [windows.rows_above(y) for y in (*windows.starts_y[1:], windows.height)]
    return max(b - a for a, b in pairwise((0, *ends)))
