"""What a caller may ask for: one table of options that every surface reads, and the limits within which it may ask.

A row of the table is a field of `SegmentOptions` or `Style`. Beside its name, type and default it has an `Option`.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import KNOWN_MAPS, NUM_VIEWS, Card
from penumbra.models.errors import BadOption

DEFAULT = "default"
"""The output that stands for those of `DEFAULT_MAPS` that an answer has (`penumbra.models.card.Card.maps`)."""
DEFAULT_MAPS = ("confidence", "entropy", "mutual_information")
PROBABILITIES = "probabilities"
"""The output that has every class's mean probability, [K, H, W]: as large as K maps, for answers held in memory."""
RANKED_BY = ("expected_error", "novelty", "mutual_information")
"""Scores that `penumbra rank` looks for; the first if nothing is said."""
PILLOW_PIXELS = 178_956_970
"""Pillow opens no picture of more pixels."""
MAX_BOXES, LEAST_SCALE, MOST_SCALE = 1000, 0.01, 100
LEVELS = (32, 256, 65536)
"""Levels of grey in a map's picture. 32 are what an eye tells apart, at a tenth of the bytes of 65536."""
NUM_CANDIDATES = 32
"""Thresholds that a class may have. Where only a handful of a frame's pixels is answered, one of them decides its loss:
more candidates answer less, not more."""

Box = tuple[float, float, float, float, int | str]
"""x0, y0, x1, y1 and a class, as `penumbra.serving.engine.prompts` has it."""


@dataclass(frozen=True, slots=True)
class Option:
    """What the table says of an option beside its name, type and default.

    read: its value from its name and text; raises BadOption. schema: of JSON, with the default and the range. about:
    a sentence for callers. right: what is right, in words, where that does not depend on the model.
    """

    read: Callable[[str, str], Any]
    schema: Mapping[str, Any]
    about: str
    right: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raises BadOption where a value is no number, or out of the range."""
        least, most = self.schema.get("minimum", -math.inf), self.schema.get("maximum", math.inf)
        is_number = isinstance(value, Real) and least <= value <= most
        if not is_number or (value == least and self.schema.get("exclusiveMinimum")):
            shown = f"{value:.15g}" if isinstance(value, float) else repr(value)
            raise BadOption(f"{name} is {shown}; {self.right}")


def _row(default: object, read: Callable[[str, str], Any], about: str, *, right: str = "", **schema: Any) -> Any:
    """Make a field of an options class. schema: without the default."""
    shown = ",".join(default) if isinstance(default, tuple) else default
    schema |= {} if shown in (None, "") else {"default": shown}
    return field(default=default, metadata={"option": Option(read, schema, about, right)})


def _text(_: str, text: str) -> str:
    return text


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


def _number(name: str, text: str, right: str = "a number") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadOption(f"{name} is {text[:40]!r}; {right} is wanted")
    return value


def _truth(name: str, text: str) -> bool:
    if text.strip().lower() not in ("true", "false"):
        raise BadOption(f"{name} is {text[:40]!r}; true or false is wanted")
    return text.strip().lower() == "true"


def _boxes(name: str, text: str) -> tuple[Box, ...]:
    """Read a JSON list of [x0, y0, x1, y1, class]; the class is a name or an id."""
    rows = _json_list(name, text) if text.strip() else []
    if len(rows) > MAX_BOXES:
        raise BadOption(f"{name} has {len(rows)} entries; up to {MAX_BOXES} are possible")
    return tuple(read_box(name, row) for row in rows)


def read_box(name: str, row: Any) -> Box:
    """Read one box from parsed data. Raises BadOption."""
    right = f"{name} has {str(row)[:60]!r}; [x0, y0, x1, y1, class] with four numbers and a class name or id is wanted"
    if not isinstance(row, list) or len(row) != 5 or type(row[4]) not in (int, str):
        raise BadOption(right)
    if not all(type(value) in (int, float) and abs(value) < 2**63 for value in row[:4]):  # so no NaN
        raise BadOption(right)
    x0, y0, x1, y1 = map(float, row[:4])
    return x0, y0, x1, y1, row[4]


def _tags(name: str, text: str) -> tuple[str | int, ...]:
    """Read class names or ids: a JSON list, or a list with commas."""
    if not text.strip().startswith("["):
        return _names(name, text)
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


def _names(name: str, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _picture(name: str, text: str) -> str:
    if text == DEFAULT:
        raise BadOption(f"{name} is {DEFAULT!r}, which stands for several maps; name one of them")
    return text


def _views(name: str, text: str) -> str:
    if text not in NUM_VIEWS:
        raise BadOption(f"{name} is {text[:40]!r}; {', '.join(NUM_VIEWS)} are possible")
    return text


def _levels(name: str, text: str) -> int:
    if text not in map(str, LEVELS):
        raise BadOption(f"{name} is {text[:40]!r}; {', '.join(map(str, LEVELS))} are possible")
    return int(text)


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) < 10**9):
        raise BadOption(f"{name} is {text[:40]!r}; a whole number from 1 is wanted")
    return int(text[:12])


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """What is computed for one request; None means the card's default."""

    model: str | None = _row(None, _text, "Which model; may be left out when one is served.", type="string")
    version: int | None = _row(None, _integer, "Its version; the newest when left out.", type="integer")
    samples: int | None = _row(
        None, _integer, "How many samples to draw; fixed for models with members.", type="integer", minimum=1
    )
    seed: int = _row(
        0, _integer, "Seed of the noise; the same seed gives the same answer.", right="0 to 2^63 - 1 is possible",
        type="integer", minimum=0, maximum=2**63 - 1,
    )  # fmt: skip
    overlap: float | None = _row(
        None, _share, "Share of a window that its neighbour covers too.", right="0 to 0.9 is possible",
        type="number", minimum=0, maximum=0.9,
    )  # fmt: skip
    outputs: tuple[str, ...] = _row(
        (DEFAULT,), _names,
        f"Comma-separated maps: {', '.join(KNOWN_MAPS)}, or the model's own (extra_maps of its card). {DEFAULT} stands "
        f"for {', '.join(DEFAULT_MAPS)}, as far as the answer has them: one sample in one view has no "
        "mutual_information, and only it has a seam.", type="string",
    )  # fmt: skip
    scale: float | str | None = _row(
        None, lambda name, text: text if text == "card" else _number(name, text, "a number, or card,"),
        "How many of the network's pixels one of the picture's becomes: a factor, or card for the scale "
        "that the model's card names. By default a picture that is far off it is run at the card's.",
        right="0.01 to 100 is possible, or card", type="string", minimum=LEAST_SCALE, maximum=MOST_SCALE,
    )  # fmt: skip
    bands: tuple[str, ...] = _row(
        (), _names, "Which of the picture's bands are the model's, in its order: comma-separated numbers from 1, or "
        "names.", type="string",
    )  # fmt: skip
    boxes: tuple[Box, ...] = _row(
        (), _boxes, "For models that take boxes: JSON list of [x0, y0, x1, y1, class name or id], px.", type="string"
    )
    tags: tuple[str | int, ...] = _row(
        (), _tags, "For models that take tags: the classes in the picture, comma-separated or JSON.", type="string"
    )
    views: str | None = _row(
        None, _views, "Views of every window, each a member of every sample: flip (2: as it is, left and right "
        "exchanged), d4 (8: flips and quarter turns, of square windows), scales (3: whole, 3/4, 1/2).",
        type="string", enum=tuple(NUM_VIEWS),
    )  # fmt: skip
    alpha: float | None = _row(
        None, _number, "Weight of the network that sees the boxes (self_correcting, linear).", type="number", minimum=0
    )
    max_risk: float | None = _row(
        None, _number, "Share of the pixels that may be answered and wrong; the most uncertain ones become 255. "
        "Calibrated models.", right="0 to 1 is possible", type="number", minimum=0, maximum=1,
    )  # fmt: skip
    max_class_risk: float | None = _row(
        None, _number, "For each class, share of what is called it that may be wrong; its most uncertain pixels, or "
        "all, become 255. Calibrated models.", right="0 to 1 is possible", type="number", minimum=0, maximum=1,
    )  # fmt: skip
    deadline_ms: float | None = _row(
        None, _number, "Milliseconds from the request's arrival after which its answer is of no use; 504 then, and its "
        "windows leave.", right="a number of milliseconds above 0 is wanted",
        type="number", minimum=0, exclusiveMinimum=True,
    )  # fmt: skip
    anytime: bool = _row(
        False, _truth, "Rather than miss the deadline, answer with fewer samples, and say how many.", type="boolean"
    )
    priority: int = _row(
        0, _integer, "1 is served first, 3 last, and 0 stands for 2; none waits for ever.",
        right="1 (first) to 3 (last) is possible, and 0 for 2", type="integer", minimum=0, maximum=3,
    )  # fmt: skip

    @property
    def risks(self) -> tuple[str, ...]:
        """Name the options that withhold labels, of those that are set."""
        return tuple(name for name in ("max_risk", "max_class_risk") if getattr(self, name) is not None)

    def num_samples(self, card: Card) -> int:
        """Say how many samples the answer has, unless `anytime` lets it have fewer."""
        usual = card.sampling_with(prompt=bool(self.boxes or self.tags)).default_samples
        return usual if self.samples is None else self.samples

    def num_members(self, card: Card) -> int:
        """Say how many members the answer is the mean of: every sample in every view."""
        return card.num_members(self.num_samples(card), self.views)

    def named(self, card: Card) -> tuple[str, ...]:
        """Name the outputs, each once."""
        usual = [name for name in card.maps(self.num_members(card)) if name in DEFAULT_MAPS]
        return tuple(dict.fromkeys(name for one in self.outputs for name in (usual if one == DEFAULT else [one])))

    def maps(self, card: Card) -> tuple[str, ...]:
        """Name the outputs that are [H, W]."""
        return tuple(name for name in self.named(card) if name != PROBABILITIES)

    def with_maps(self, names: tuple[str, ...]) -> "SegmentOptions":
        """Put maps before those asked for, each once."""
        return replace(self, outputs=tuple(dict.fromkeys((*names, *self.outputs))))


@dataclass(frozen=True, slots=True)
class Style:
    """How an answer is shown."""

    picture: str = _row(
        "labels", _picture, "What a PNG or TIFF shows: labels, overlay, or the name of a map.", type="string"
    )
    levels: int = _row(65536, _levels, "Grey levels of a map's PNG.", type="integer", enum=LEVELS)
    min_pixels: int = _row(1, _count, "GeoJSON leaves smaller regions out.", type="integer", minimum=1)

    @property
    def maps(self) -> tuple[str, ...]:
        """Name the maps that the picture needs."""
        return () if self.picture in ("labels", "overlay") else (self.picture,)


OPTIONS: dict[str, Option] = {
    row.name: row.metadata["option"] for kind in (SegmentOptions, Style) for row in fields(kind)
}
"""The table, by name."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Published bounds; docs/use/limits.md says of what. queue_samples counts windows x samples not yet answered, and
    memory_bytes what `RequestPlan.num_bytes` predicts. large_share: of turns, where a request of a single window has
    one. model_bytes: of models in memory; 0 is none."""

    pixels: int = 64_000_000
    samples: int = 64
    queue_samples: int = 65_536
    window_pixels: int = 2**22
    probability_bytes: int = 2**28
    large_share: int = 1
    memory_bytes: int = 2**32
    model_bytes: int = 0


def parse_options(texts: Mapping[str, str]) -> SegmentOptions:
    """Read what is to be computed from text, as it comes in a query, a form or on a command line.

    Raises BadOption naming the option, its value and what would be right; also for a name that is not in the table.
    """
    for name in texts:
        if name not in OPTIONS:
            raise BadOption(f"there is no option {name[:40]!r}; known are {', '.join(OPTIONS)}")
    return SegmentOptions(**_read(SegmentOptions, texts))


def parse_style(texts: Mapping[str, str]) -> Style:
    """Read a style from text; other options are left alone. Raises BadOption."""
    return Style(**_read(Style, texts))


def _read(kind: type[SegmentOptions | Style], texts: Mapping[str, str]) -> dict[str, Any]:
    own = {row.name for row in fields(kind)}
    return {name: OPTIONS[name].read(name, text) for name, text in texts.items() if name in own}


def check_options(options: SegmentOptions, card: Card, limits: Limits) -> int:
    """Check options against a model and the limits; returns the number of samples to draw. Raises BadOption."""
    for name, option in OPTIONS.items():
        value = getattr(options, name, None)
        if option.right and value is not None and (name, value) != ("scale", "card"):
            option.check(name, value)
    abstain_above(card, options.max_risk, options.max_class_risk)
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
    views = card.views if options.views is None else _views("views", options.views)
    if not card.fits(views):
        raise BadOption(
            f"views is {views}, which turns windows on their side, and those of {card.name} are "
            f"{card.window.width}x{card.window.height}; flip and scales are possible"
        )
    known = (*card.maps(options.num_members(card)), DEFAULT, PROBABILITIES)
    for name in options.outputs:
        if name not in known:
            has = f"{card.name} has {', '.join(known)} where samples is {samples} and views is {views}"
            raise BadOption(f"there is no output {name[:40]!r}; {has}")
    return samples


def abstain_above(card: Card, max_risk: float | None, max_class_risk: float | None = None) -> tuple[float, ...]:
    """Find for each class the entropy in nats above which its pixels are withheld; nothing where no risk is bounded.

    It is that of the largest calibrated risk within the one asked for; of two, a class has the largest candidate within
    both; and -inf if it is withheld. Raises BadOption: no share, a card without calibration, or a risk below all that
    are calibrated.
    """
    above_K: tuple[float, ...] = ()
    if max_risk is not None:
        row = _calibrated_within(card, "max_risk", max_risk)
        assert card.calibration
        above_K = (card.calibration.entropy_nats[row],) * card.num_classes
    if max_class_risk is not None:
        row = _calibrated_within(card, "max_class_risk", max_class_risk)
        assert card.calibration
        marginal = above_K[0] if above_K else math.inf
        within = [nats for nats in class_candidates(card.num_classes).tolist() if nats <= marginal]
        most = max(within, default=-math.inf) if above_K else math.inf
        own = card.calibration.class_entropy_nats[row]
        above_K = tuple(-math.inf if nats is None else min(nats, most) for nats in own)
    return above_K


def class_candidates(num_classes: int) -> NDArray[np.float32]:
    """List the entropies in nats that may be a class's threshold, laid down before any frame is seen. Between them its
    risk is not known (`penumbra.training.conformal`)."""
    return np.linspace(0, 1.01 * math.log(num_classes), NUM_CANDIDATES + 1, dtype=np.float32)[1:]


def _calibrated_within(card: Card, name: str, risk: float) -> int:
    """Find the place of the largest calibrated risk that is not above this one. Raises BadOption."""
    OPTIONS[name].check(name, risk)
    calibration = card.calibration
    risks = () if calibration is None else calibration.risks if name == "max_risk" else calibration.class_risks
    if not risks:
        raise BadOption(
            f"{name} is {risk}; {card.name} is not calibrated for it, so leave it out or calibrate the model"
        )
    if not (within := bisect_right(risks, risk)):
        known = ", ".join(f"{one:g}" for one in risks)
        raise BadOption(f"{name} is {risk}; {card.name} is calibrated for {known}, so ask for at least the first")
    return within - 1
