"""The form of every objective with a term beyond the labels: L = L_s + w(t) * L_u.

w(t) grows linearly between two points of the schedule, and before the first only L_s is computed.
DEVIATION: the papers' w is constant, since they start from ImageNet weights; ours start from random ones.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from penumbra.models.blocks.losses import ramp
from penumbra.models.contract import Views
from penumbra.models.cps.net import CpsNetwork
from penumbra.models.cps.objectives.terms import supervision


class Weighting(Protocol):
    """weight: the final w. start, full: shares of the schedule where it begins to grow and is reached."""

    @property
    def weight(self) -> float: ...
    @property
    def start(self) -> float: ...
    @property
    def full(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Ramped:
    """The options of an objective that has no others: see `Weighting`."""

    weight: float = 1.5
    start: float = 0.1
    full: float = 0.3


class SemiSupervised(nn.Module):
    """Holds the network and its running average, which is served but teaches nobody. For the loop only."""

    def __init__(self, network: CpsNetwork, average: CpsNetwork, options: Weighting) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        weight = ramp(progress, self.options.start, self.options.full) * self.options.weight
        if weight == 0:
            supervised = self.supervise(batch)
            return {"total": supervised, "supervised": supervised}
        supervised, unsupervised = self.losses(batch)
        return {"total": supervised + weight * unsupervised, "supervised": supervised, "unsupervised": unsupervised}

    def supervise(self, batch: Views) -> Tensor:
        """L_s alone."""
        return supervision(self.network.encode(batch.image_B3hw), batch.label_Bhw)

    def losses(self, batch: Views) -> tuple[Tensor, Tensor]:
        """L_s and L_u."""
        raise NotImplementedError
