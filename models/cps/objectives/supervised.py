"""The baseline of every semi-supervised method: labelled pictures alone.

    L = sum over branches of CE(branch(labelled), Y*), Y* the ground truth

Unlabelled views are drawn, so that the labelled ones are the same as in a semi-supervised run, and never looked at.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penumbra.models.contract import Views
from penumbra.models.cps.net import CpsNetwork
from penumbra.models.cps.objectives.terms import supervision


@dataclass(frozen=True, slots=True)
class SupervisedOptions:
    """There is nothing to choose."""


class SupervisedObjective(nn.Module):
    """Holds the network and its running average. For the loop only."""

    def __init__(self, network: CpsNetwork, average: CpsNetwork, options: SupervisedOptions) -> None:
        super().__init__()
        self.network, self.average, self.options = network, average, options

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        supervised = supervision(self.network.encode(batch.image_B3hw), batch.label_Bhw)
        return {"total": supervised, "supervised": supervised}
