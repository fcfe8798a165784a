"""What a caller may ask for, and the limits within which it may ask."""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from penumbra.models.card import Card
from penumbra.models.errors import BadOption
from penumbra.serving.engine.prompts import MAX_BOXES, Box

DEFAULT = "default"
"""The output that stands for those of `DEFAULT_MAPS` that an answer has (`penumbra.models.card.Card.maps`)."""
DEFAULT_MAPS = ("confidence", "entropy", "mutual_information")
PROBABILITIES = "probabilities"
"""The output that has every class's mean probability, [K, H, W]: as large as K maps, for answers held in memory."""
PILLOW_PIXELS = 178_956_970
"""Pillow opens no picture of more pixels."""


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """Options of one request; None means the card's default.

    samples: S. seed: of the noise, 0 .. 2^63 - 1; the same seed gives the same answer. overlap: share of a
    window covered again by its neighbour, 0 .. 0.9. outputs: which maps of `penumbra.serving.engine.uncertainty`, or of
    the model's own, DEFAULT for the usual ones, and whether PROBABILITIES. boxes, tags: prompts
    (`penumbra.serving.engine.prompts`), for models that take them; alpha: weight of the network that sees the boxes in
    a linear self-correction. max_risk: share of the pixels that may be answered and wrong, 0 .. 1; the most uncertain
    ones then become `penumbra.models.card.IGNORE`, for models whose card is calibrated.
    deadline_ms: from a request's arrival; later than that its answer is of no use to the caller. anytime: answer with
    fewer samples, the first ones of the same seed, where all would take longer. priority: 1 (first) to 3 (last), and 0
    for the middle.
    """

    model: str | None = None
    version: int | None = None
    samples: int | None = None
    seed: int = 0
    overlap: float | None = None
    outputs: tuple[str, ...] = (DEFAULT,)
    boxes: tuple[Box, ...] = ()
    tags: tuple[str | int, ...] = ()
    alpha: float | None = None
    max_risk: float | None = None
    deadline_ms: float | None = None
    anytime: bool = False
    priority: int = 0

    def num_samples(self, card: Card) -> int:
        """The number of samples of the answer, unless `anytime` lets it have fewer."""
        usual = card.sampling_with(prompt=bool(self.boxes or self.tags)).default_samples
        return usual if self.samples is None else self.samples

    def named(self, card: Card) -> tuple[str, ...]:
        """The outputs by name, each once."""
        usual = [name for name in card.maps(self.num_samples(card)) if name in DEFAULT_MAPS]
        return tuple(dict.fromkeys(name for asked in self.outputs for name in (usual if asked == DEFAULT else [asked])))

    def maps(self, card: Card) -> tuple[str, ...]:
        """The outputs [H, W] by name."""
        return tuple(name for name in self.named(card) if name != PROBABILITIES)

    def with_default_maps(self) -> "SegmentOptions":
        """The same with the default maps beside those asked for: class tables have their means."""
        return self.with_maps((DEFAULT,))

    def with_maps(self, names: tuple[str, ...]) -> "SegmentOptions":
        return replace(self, outputs=tuple(dict.fromkeys((*names, *self.outputs))))


@dataclass(frozen=True, slots=True)
class Limits:
    """Published bounds. queue_samples counts windows x samples that were accepted and not yet answered.

    window_pixels: of one window; it bounds the memory of models that see an image whole. probability_bytes: of the
    output PROBABILITIES.
    """

    pixels: int = 64_000_000
    windows: int = 4096
    samples: int = 64
    queue_samples: int = 65_536
    window_pixels: int = 2**22
    probability_bytes: int = 2**28


def parse_options(fields: Mapping[str, str], *, beside: tuple[str, ...] = ()) -> SegmentOptions:
    """Read options from text, as they come in a query, a form or on a command line.

    beside: names of what the caller has read already. Raises BadOption naming the option, its value and what would
    be right.
    """
    readers: dict[str, Callable[[str, str], Any]] = {
        "model": lambda _, text: text, "version": _integer, "samples": _integer, "seed": _integer, "overlap": _share,
        "outputs": _maps, "boxes": _boxes, "tags": _tags, "alpha": _number, "max_risk": _number,
        "deadline_ms": _number, "anytime": _truth, "priority": _integer,
    }  # fmt: skip
    for name in fields:
        if name not in (*readers, *beside):
            raise BadOption(f"there is no option {name[:40]!r}; known are {', '.join((*readers, *beside))}")
    return SegmentOptions(**{name: readers[name](name, text) for name, text in fields.items() if name in readers})


def _integer(name: str, text: str) -> int:
    digits = text.strip()
    if not digits.isascii() or not digits.removeprefix("-").isdigit():
        raise BadOption(f"{name} is {text[:40]!r}; a whole number is wanted")
    if len(digits) > 19:
        raise BadOption(f"{name} is {text[:40]!r}; a whole number of at most 19 digits is wanted")
    return int(digits)


def _share(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadOption(f"{name} is {text[:40]!r}; a number from 0 to 0.9 is wanted") from None


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadOption(f"{name} is {text[:40]!r}; a number is wanted")
    return value


def _truth(name: str, text: str) -> bool:
    if text.strip().lower() not in ("true", "false"):
        raise BadOption(f"{name} is {text[:40]!r}; true or false is wanted")
    return text.strip().lower() == "true"


def _boxes(name: str, text: str) -> tuple[Box, ...]:
    """A JSON list of [x0, y0, x1, y1, class]; the class is a name or an id."""
    rows = _json_list(name, text) if text.strip() else []
    if len(rows) > MAX_BOXES:
        raise BadOption(f"{name} has {len(rows)} entries; up to {MAX_BOXES} are possible")
    return tuple(read_box(name, row) for row in rows)


def read_box(name: str, row: Any) -> Box:
    """One box from parsed data. Raises BadOption."""
    wanted = f"{name} has {str(row)[:60]!r}; [x0, y0, x1, y1, class] with four numbers and a class name or id is wanted"
    if not isinstance(row, list) or len(row) != 5 or type(row[4]) not in (int, str):
        raise BadOption(wanted)
    if not all(type(value) in (int, float) and math.isfinite(value) for value in row[:4]):
        raise BadOption(wanted)
    x0, y0, x1, y1 = map(float, row[:4])
    return x0, y0, x1, y1, row[4]


def _tags(name: str, text: str) -> tuple[str | int, ...]:
    """Class names or ids: a JSON list, or a list with commas."""
    if not text.strip().startswith("["):
        return _maps(name, text)
    tags = _json_list(name, text)
    for tag in tags:
        if type(tag) not in (int, str):
            raise BadOption(f"{name} has {str(tag)[:40]!r}; a class name or id is wanted")
    return tuple(tags)


def _json_list(name: str, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise BadOption(f"{name} is {text[:60]!r}; a JSON list is wanted")
    return value


def _maps(name: str, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_options(options: SegmentOptions, card: Card, limits: Limits) -> int:
    """Check options against a model and the limits; returns the number of samples to draw. Raises BadOption."""
    if not 0 <= options.seed < 2**63:
        raise BadOption(f"seed is {options.seed}; 0 to 2^63 - 1 is possible")
    if options.overlap is not None and not 0 <= options.overlap <= 0.9:
        raise BadOption(f"overlap is {options.overlap}; 0 to 0.9 is possible")
    if options.max_risk is not None:
        abstain_above(card, options.max_risk)
    if options.deadline_ms is not None and not options.deadline_ms > 0:
        raise BadOption(f"deadline_ms is {options.deadline_ms:g}; a number of milliseconds above 0 is wanted")
    if not 0 <= options.priority <= 3:
        raise BadOption(f"priority is {options.priority}; 1 (first) to 3 (last) is possible, and 0 for 2")
    sampling = card.sampling_with(prompt=bool(options.boxes or options.tags))
    samples = options.num_samples(card)
    fixed = sampling.kind in ("members", "single")
    if fixed and samples != sampling.default_samples:
        what = f"has {len(sampling.members)} members" if sampling.kind == "members" else "is not sampled"
        raise BadOption(
            f"samples is {samples}; {card.name} {what}, so samples is {sampling.default_samples} or left out"
        )
    if not 1 <= samples <= limits.samples:
        raise BadOption(f"samples is {samples}; 1 to {limits.samples} is possible")
    known = (*card.maps(samples), DEFAULT, PROBABILITIES)
    for name in options.outputs:
        if name not in known:
            has = f"{card.name} has {', '.join(known)} where samples is {samples}"
            raise BadOption(f"there is no output {name[:40]!r}; {has}")
    return samples


def abstain_above(card: Card, max_risk: float) -> float:
    """Entropy in nats above which a pixel is abstained from: that of the largest calibrated risk within `max_risk`.

    Raises BadOption: no share, a card without calibration, or a risk below all that are calibrated.
    """
    if not 0 <= max_risk <= 1:
        raise BadOption(f"max_risk is {max_risk}; 0 to 1 is possible")
    if card.calibration is None:
        raise BadOption(
            f"max_risk is {max_risk}; {card.name} is not calibrated, so leave it out or calibrate the model"
        )
    within = bisect_right(card.calibration.risks, max_risk)
    if within == 0:
        known = ", ".join(f"{risk:g}" for risk in card.calibration.risks)
        raise BadOption(f"max_risk is {max_risk}; {card.name} is calibrated for {known}, so ask for at least the first")
    return card.calibration.entropy_nats[within - 1]
