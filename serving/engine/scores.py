"""Scores: what one number says of a whole picture, made of the sums that the read-out gives of every row.

    expected_error      mean of 1 - confidence: the share of its pixels that is wrong, as far as the model can tell
    novelty             share of the card's reference pictures that were less strange, by the means of some maps

Both are of the pixels that hold a measurement, whether their label is withheld or not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from penumbra.models.card import Card
from penumbra.serving.engine.plain import UNITS


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one picture; None where nothing was measured.

    novelty: None, too, where the card has no reference, or the answer was made otherwise than what it is measured
    against. means: the picture's of `Card.maps_of_novelty`.
    """

    expected_error: float | None = None
    novelty: float | None = None
    means: tuple[float, ...] = ()


def score(card: Card, sums: Sequence[int], num_measured: int, *, num_samples: int, is_usual: bool) -> Scores:
    """Score a picture by the sums of all of its rows, as `penumbra.serving.engine.operators.read_out` has them."""
    if not num_measured:
        return Scores()
    expected_error, *means = (total / (UNITS * num_measured) for total in sums)
    means, reference, novelty = means[: len(card.maps_of_novelty)], card.novelty, None
    if reference and (not reference.needs_equals or (is_usual and num_samples == reference.num_samples)):
        novelty = reference.share_below(means)
    return Scores(min(max(expected_error, 0.0), 1.0), novelty, tuple(means))


def warn_of_strangeness(card: Card, scores: Scores) -> tuple[str, ...]:
    """Say in words that a picture is stranger than the card's threshold; nothing of one that is not."""
    reference = card.novelty
    if not reference or scores.novelty is None or scores.novelty <= reference.warn_above:
        return ()
    share, count, strangeness = reference.warn_above, reference.num_pictures, reference.strangeness(scores.means)
    usual = reference.means[math.ceil(share * len(reference.means)) - 1]
    more = "all" if scores.novelty == 1 else int(scores.novelty * count)
    units = {"entropy": " nats"} | {extra.name: " nats" for extra in card.extra_maps if extra.unit == "nats"}
    means = zip(card.maps_of_novelty, scores.means, strict=True)
    shown = [f"{name} is {mean:.3g}{units.get(name, '')}" for name, mean in means if name in reference.maps]
    distance = f": up to {strangeness:.3g} deviations from theirs" if reference.scales else ""
    return (
        f"this picture is stranger than {more} of the {count} pictures that {card.name} was calibrated on (its mean "
        f"{', '.join(shown)}{distance}, and {100 * share:g} % of theirs are at most {usual:.3g}): its answer may be "
        "wrong, and its uncertainties too",
    )
