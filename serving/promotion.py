"""What a candidate has shown beside the served version, and whether that is enough to take its place."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penumbra.models.errors import BadOption, NotPromoted
from penumbra.serving.compare import Compared

LEAST_PICTURES, LEAST_PIXELS = 100, 1_000_000
"""Neighbouring pixels flip together, so it is pictures that count; of a million pixels 0.01 % are a hundred."""
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
UNITS = {"flips": "", "entropy": " nats", "latency": " times", "failures": ""}
"""The figures that a condition may name, with their units."""
CONDITION = re.compile(rf"({'|'.join(UNITS)})(<=?|>=?)([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(%?)")


@dataclass(slots=True)
class Figures:
    """What was measured since the candidate came; `penumbra.serving.shadow` guards it."""

    num_pictures: int = 0
    num_failed: int = 0
    num_dropped: int = 0
    num_pixels: int = 0
    num_flipped: int = 0
    entropy_nats: float = 0.0
    """The sum of the pictures' shifts."""
    served_s: float = 0.0
    candidate_s: float = 0.0

    def add(self, compared: Compared) -> None:
        self.num_pictures += 1
        self.num_pixels += compared.num_pixels
        self.num_flipped += compared.num_flipped
        self.entropy_nats += compared.entropy_nats
        self.served_s, self.candidate_s = self.served_s + compared.seconds[0], self.candidate_s + compared.seconds[1]

    @property
    def values(self) -> dict[str, float]:
        """The figures by name: shares, nats, and the candidate's time over the served version's, which is not a number,
        so that it meets no condition, until one was measured."""
        return {
            "flips": self.num_flipped / max(self.num_pixels, 1),
            "entropy": self.entropy_nats / max(self.num_pictures, 1),
            "latency": self.candidate_s / self.served_s if self.served_s else math.nan,
            "failures": self.num_failed / max(self.num_failed + self.num_pictures, 1),
        }

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {_shown(name, value)}" for name, value in self.values.items())
        return f"{shown}; measured on {self.extent}"

    @property
    def extent(self) -> str:
        return f"{self.num_pictures:,} pictures with {self.num_pixels:,} pixels"


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "not measured"
    return f"{value:.3g}{UNITS[name]}" if UNITS[name] else f"{100 * value:.3g} %"


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition holds a figure against a bound."""

    text: str
    figure: str
    holds: Callable[[float], bool]


def read_condition(text: str) -> Condition:
    """Read `flips < 0.5 %`. Raises BadOption."""
    found = CONDITION.fullmatch("".join(text.split()).lower())
    if not found:
        raise BadOption(
            f"the condition is {text[:60]!r}; one of {', '.join(UNITS)}, then <, <=, > or >= and a number, as in "
            "'flips < 0.5 %', is wanted"
        )
    figure, comparison, number, percent = found.groups()
    bound = float(number) / (100 if percent else 1)
    return Condition(" ".join(text.split()), figure, lambda value: COMPARISONS[comparison](value, bound))


def check_figures(figures: Figures, conditions: Sequence[Condition], what: str) -> None:
    """Raise NotPromoted: too little was measured, or a condition does not hold. what: names the candidate."""
    if figures.num_pictures < LEAST_PICTURES or figures.num_pixels < LEAST_PIXELS:
        raise NotPromoted(
            f"{what} was measured on {figures.extent} ({figures.num_failed} failed, {figures.num_dropped} were dropped "
            f"because the machine was busy); at least {LEAST_PICTURES:,} pictures with {LEAST_PIXELS:,} pixels are "
            "wanted, so let it run for longer or raise PENUMBRA_SHADOW_SHARE"
        )
    is_named = any(condition.figure == "failures" for condition in conditions)
    for condition in (*conditions, *(() if is_named else (read_condition("failures <= 0 %"),))):
        if not condition.holds(figures.values[condition.figure]):
            value = _shown(condition.figure, figures.values[condition.figure])
            raise NotPromoted(
                f"{what} is not promoted: {condition.text} does not hold, {condition.figure} is {value}, measured on "
                f"{figures.extent}"
            )
