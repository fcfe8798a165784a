"""References: what answers are measured against, the frames of a calibration and the pictures of novelty."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from penumbra.models.exported import Positive

Share = Annotated[float, Field(gt=0, le=1)]
MOST_MEANS = 1_001
"""A novelty is told to a thousandth at the finest, so its reference needs no more quantiles."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the option `max_risk` rests on: entropy thresholds found on frames that taught the network nothing.

    risks: ascending, each the share of a picture's pixels that are wrong and not abstained from, at most, in
    expectation over pictures like the calibration frames (Angelopoulos et al. 2022). entropy_nats: by risk, the
    entropy above which a pixel is abstained from. num_frames: how many were calibrated on. num_samples: S then.
    data: which frames they were. class_risks, class_entropy_nats: the same of the option `max_class_risk`, which bounds
    for each class the wrong share of what is called it; by risk, then by class, and None where a class is withheld.
    """

    risks: tuple[float, ...]
    entropy_nats: tuple[float, ...]
    num_frames: Positive
    num_samples: Positive
    data: str
    class_risks: tuple[float, ...] = ()
    class_entropy_nats: tuple[tuple[float | None, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Novelty:
    """What the score `novelty` of an answer is measured against: pictures like those the model is meant for.

    map: whose mean over a picture says how strange it is: `density` where the model has one, else `entropy`. scales:
    mean and standard deviation of the reference pictures' mean entropies, and of their means of the map, where both say
    it; empty where the map does alone. means: ascending, the strangeness of the reference pictures, at most 1,001
    quantiles of it. warn_above: the novelty above which an answer carries a warning. num_pictures: how many the
    quantiles are of. num_samples: S then. data: which pictures they were.
    """

    map: str
    means: tuple[float, ...]
    num_pictures: Positive
    num_samples: Positive
    data: str
    warn_above: Annotated[float, Field(gt=0, le=1)] = 0.99
    scales: tuple[tuple[float, float], ...] = ()

    @property
    def maps(self) -> tuple[str, ...]:
        """Name the maps whose means over a picture say how strange it is."""
        return maps_of_novelty(self.map) if self.scales else (self.map,)

    @property
    def needs_equals(self) -> bool:
        """Whether answers must be made alike to be compared: samples, views, overlap and prompt change an entropy, and
        hardly a map of the model's own."""
        return "entropy" in self.maps

    def strangeness(self, means: Sequence[float]) -> float:
        """Say how strange a picture is by its means of `maps_of_novelty`: the last of them or, where there are scales,
        the larger of how far its entropy is above the usual and how far its other map is to either side, in deviations.
        """
        if not self.scales:
            return means[-1]
        entropy, own = ((mean - centre) / spread for mean, (centre, spread) in zip(means, self.scales, strict=True))
        return max(entropy, abs(own))

    def share_below(self, means: Sequence[float]) -> float:
        """Give the share of the reference pictures that were less strange than one of these means."""
        return bisect_left(self.means, self.strangeness(means)) / len(self.means)


def maps_of_novelty(own: str) -> tuple[str, ...]:
    """Name the maps whose means are taken of every picture: the entropy, and the model's own one, if it is another."""
    return tuple(dict.fromkeys(("entropy", own)))


def failures_of_references(
    calibration: Calibration | None, novelty: Novelty | None, *, num_classes: int, maps: tuple[str, ...]
) -> dict[str, bool]:
    """Tell which sentences hold of what answers are measured against. maps: those that novelty may go by."""
    return {
        f"calibration is {calibration}; ascending risks between 0 and 1, each with a threshold, or one of each of the "
        f"{num_classes} classes, are wanted":
            calibration is not None and not _is_sound(calibration, num_classes),
        f"novelty.map is {novelty and novelty.map}; it can be {' or '.join(maps)}":
            novelty is not None and novelty.map not in maps,
        f"has {len(novelty.means) if novelty else 0} novelty.means; 1 to {MOST_MEANS:,} are wanted, ascending":
            novelty is not None and not (0 < len(novelty.means) <= MOST_MEANS and _is_ascending(novelty.means)),
        f"novelty.scales are {novelty and novelty.scales}; none or, where its map is not the entropy, two means, each "
        "with a deviation above 0, are wanted":
            novelty is not None and novelty.scales != () and not (
                len(novelty.scales) == len(novelty.maps) == 2 and all(spread > 0 for _, spread in novelty.scales)
            ),
    }  # fmt: skip


def _is_ascending(values: Iterable[float]) -> bool:
    return all(before <= after for before, after in pairwise(values))


def _is_sound(calibration: Calibration, num_classes: int) -> bool:
    """Whether a larger risk never abstains from more, and every figure is possible."""
    marginal = [(nats,) for nats in calibration.entropy_nats]
    pairs = ((calibration.risks, marginal, 1), (calibration.class_risks, calibration.class_entropy_nats, num_classes))
    for risks, rows, length in pairs:
        columns = [[-1 if nats is None else nats for nats in column] for column in zip(*rows, strict=False)]
        if not (
            list(risks) == sorted(set(risks))
            and all(0 < risk < 1 for risk in risks)
            and [len(row) for row in rows] == [length] * len(risks)
            and all(nats is None or nats >= 0 for row in rows for nats in row)
            and all(map(_is_ascending, columns))
        ):
            return False
    return bool(calibration.risks or calibration.class_risks)
