"""Scores: what one number says of a whole picture, made of the sums that the read-out gives of every row.

    expected_error      mean of 1 - confidence: the share of its pixels that is wrong, as far as the model can tell
    novelty             share of the card's reference pictures that were less strange, by the mean of one map

Both are of the pixels that hold a measurement, whether their label is withheld or not.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penumbra.models.card import Card
from penumbra.serving.engine.plain import UNITS


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one picture; None where nothing was measured.

    novelty: None, too, where the card has no reference, or the answer was made otherwise than what it is measured
    against. mean: the picture's mean of `Card.map_of_novelty`.
    """

    expected_error: float | None = None
    novelty: float | None = None
    mean: float | None = None


def score(
    card: Card, sums_H2: NDArray[np.int64], num_measured: int, *, num_samples: int, is_usual: bool
) -> Scores:  # fmt: skip
    """Score a picture by the sums of its rows, as `penumbra.serving.engine.operators.read_out` has them.

    An entropy depends on samples, views, overlap and prompt, so that only equals are compared; a map of the model's
    own hardly does.
    """
    if not num_measured:
        return Scores()
    expected_error, mean = (sum(map(int, sums)) / (UNITS * num_measured) for sums in sums_H2.T)
    reference = card.novelty
    is_equal = card.map_of_novelty != "entropy" or is_usual
    if card.map_of_novelty == "entropy" and reference:
        is_equal &= num_samples == reference.num_samples
    novelty = bisect_left(reference.means, mean) / len(reference.means) if reference and is_equal else None
    return Scores(min(max(expected_error, 0.0), 1.0), novelty, mean)


def warn_of_strangeness(card: Card, scores: Scores) -> tuple[str, ...]:
    """Say in words that a picture is stranger than the card's threshold; nothing of one that is not."""
    reference = card.novelty
    if not reference or scores.novelty is None or scores.mean is None or scores.novelty <= reference.warn_above:
        return ()
    means, share, count = reference.means, reference.warn_above, reference.num_pictures
    usual = means[math.ceil(share * len(means)) - 1]
    more = "all" if scores.novelty == 1 else int(scores.novelty * count)
    is_nats = all(own.unit == "nats" for own in card.extra_maps if own.name == reference.map)
    return (
        f"this picture is stranger than {more} of the {count} pictures that {card.name} was calibrated on (its mean "
        f"{reference.map} is {scores.mean:.3g}{' nats' if is_nats else ''}, and {100 * share:g} % of theirs are at "
        f"most {usual:.3g}): its answer may be wrong, and its uncertainties too",
    )
