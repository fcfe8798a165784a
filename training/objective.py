"""All that the loop knows of a method is its objective, which turns a batch into losses."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penumbra.models.contract import Network, Views
from penumbra.models.errors import BadOption


class Objective(nn.Module):
    """The form of every method's objective: a module that holds the network, its average, and own state.

    forward(batch, progress, generator) -> named scalars; `total` is minimised, the rest is only reported.
    progress: share of the schedule that is over, [0, 1]. generator: the only source of randomness.
    """

    network: Network
    average: Network

    def forward(self, batch: Views, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        raise NotImplementedError


def build_objective(method: str, network: Network, average: Network, options: Mapping[str, Any]) -> Objective:
    """Call `models.<method>.objective.build_objective`. Raises BadOption if the method cannot be trained here."""
    try:
        module = importlib.import_module(f"penumbra.models.{method}.objective")
    except ModuleNotFoundError as error:
        if error.name != f"penumbra.models.{method}.objective":
            raise
        raise BadOption(f"the method {method!r} has no objective; it can be imported but not trained") from None
    objective: Objective = module.build_objective(network, average, options)
    return objective


def update_average(average: nn.Module, network: nn.Module, *, decay: float) -> None:
    """Set average = decay * average + (1 - decay) * network, in place, for weights and float buffers."""
    ours, theirs = average.state_dict(), network.state_dict()
    for key, value in ours.items():
        if value.is_floating_point():
            value.lerp_(theirs[key].to(value.dtype), 1 - decay)
        else:
            value.copy_(theirs[key])
