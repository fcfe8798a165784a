"""Cross probability consistency, which CPS is compared with (Chen et al. 2021, sec. 4): soft instead of hard labels.

    L = L_s + lambda * mean over pixels of d(p1, p2), p_i = softmax(branch_i(x)), x labelled and unlabelled pictures
    l2   d = |p1 - p2|^2
    kl   d = KL(p1 || p2) + KL(p2 || p1)

The gradient flows into both branches. The code is not released: lambda and that KL is symmetric are our choices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from penumbra.models.blocks.losses import at_size
from penumbra.models.contract import Views
from penumbra.models.cps.net import CpsNetwork
from penumbra.models.cps.objectives.semi_supervised import Ramped, SemiSupervised
from penumbra.models.cps.objectives.terms import mean_where, supervision, two_views


@dataclass(frozen=True, slots=True)
class CrossProbabilityOptions(Ramped):
    """distance: d. weight: lambda."""

    distance: Literal["l2", "kl"] = "l2"


class CrossProbabilityObjective(SemiSupervised):
    """Two branches that agree on probabilities."""

    def __init__(self, network: CpsNetwork, average: CpsNetwork, options: CrossProbabilityOptions) -> None:
        super().__init__(network, average, options)
        self.distance = DISTANCES[options.distance]

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        image_B3hw, known_Bhw = two_views(batch)
        logits = self.network.encode(image_B3hw)
        supervised = supervision([x[: len(batch.image_B3hw)] for x in logits], batch.label_Bhw)
        one_BKhw, two_BKhw = (at_size(x, known_Bhw) for x in logits)
        return supervised, mean_where(self.distance(one_BKhw, two_BKhw), known_Bhw)


def squared_distance(one_BKhw: Tensor, two_BKhw: Tensor) -> Tensor:
    """|p1 - p2|^2 of two sets of logits, per pixel, [0, 2]."""
    return (one_BKhw.softmax(1) - two_BKhw.softmax(1)).square().sum(1)


def symmetric_divergence(one_BKhw: Tensor, two_BKhw: Tensor) -> Tensor:
    """KL(p1 || p2) + KL(p2 || p1) = sum_k (p1 - p2) (log p1 - log p2) of two sets of logits, per pixel, nats."""
    log_p1, log_p2 = one_BKhw.log_softmax(1), two_BKhw.log_softmax(1)
    return ((log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)).sum(1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": squared_distance, "kl": symmetric_divergence}
