"""What a caller may ask for, and the limits within which it may ask."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.card import Card
from models.errors import BadOption
from serving.engine.uncertainty import MAPS

DEFAULT_MAPS = ("confidence", "entropy", "mutual_information")


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """Options of one request; None means the card's default.

    samples: S. seed: of the noise, 0 .. 2^63 - 1; the same seed gives the same answer. overlap: share of a
    window covered again by its neighbour, 0 .. 0.9. outputs: which maps of `serving.engine.uncertainty`.
    """

    model: str | None = None
    version: int | None = None
    samples: int | None = None
    seed: int = 0
    overlap: float | None = None
    outputs: tuple[str, ...] = DEFAULT_MAPS


@dataclass(frozen=True, slots=True)
class Limits:
    """Published bounds. queue_samples counts windows x samples that were accepted and not yet answered."""

    pixels: int = 64_000_000
    windows: int = 4096
    samples: int = 64
    queue_samples: int = 65_536


def parse_options(fields: Mapping[str, str]) -> SegmentOptions:
    """Read options from text, as they come in a query, a form or on a command line.

    Raises BadOption naming the option, its value and what would be right.
    """
    readers: dict[str, Callable[[str, str], Any]] = {
        "model": _text, "version": _integer, "samples": _integer, "seed": _integer, "overlap": _share, "outputs": _maps,
    }  # fmt: skip
    for name in fields:
        if name not in readers:
            raise BadOption(f"there is no option {name[:40]!r}; known are {', '.join(readers)}")
    return SegmentOptions(**{name: readers[name](name, text) for name, text in fields.items()})


def _text(_: str, text: str) -> str:
    return text


def _integer(name: str, text: str) -> int:
    digits = text.strip()
    if not digits.isascii() or not digits.removeprefix("-").isdigit() or len(digits) > 19:
        raise BadOption(f"{name} is {text[:40]!r}; a whole number is wanted")
    return int(digits)


def _share(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadOption(f"{name} is {text[:40]!r}; a number from 0 to 0.9 is wanted") from None


def _maps(name: str, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_options(options: SegmentOptions, card: Card, limits: Limits) -> int:
    """Check options against a model and the limits; returns the number of samples to draw. Raises BadOption."""
    if not 0 <= options.seed < 2**63:
        raise BadOption(f"seed is {options.seed}; 0 to 2^63 - 1 is possible")
    if options.overlap is not None and not 0 <= options.overlap <= 0.9:
        raise BadOption(f"overlap is {options.overlap}; 0 to 0.9 is possible")
    for name in options.outputs:
        if name not in MAPS:
            raise BadOption(f"there is no output {name[:40]!r}; known are {', '.join(MAPS)}")
    samples = card.sampling.default_samples if options.samples is None else options.samples
    fixed = card.sampling.kind in ("members", "single")
    if fixed and samples != card.sampling.default_samples:
        what = f"has {len(card.sampling.members)} members" if card.sampling.members else "is not sampled"
        raise BadOption(
            f"samples is {samples}; {card.name} {what}, so samples is {card.sampling.default_samples} or left out"
        )
    if not 1 <= samples <= limits.samples:
        raise BadOption(f"samples is {samples}; 1 to {limits.samples} is possible")
    return samples
