"""All that the loop knows of a method is its objective, which turns a batch into losses."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from penumbra.models.contract import Network
from penumbra.models.errors import BadOption


@runtime_checkable
class Finishing(Protocol):
    """An objective that is not done with its last step: it fits what is not learnt by gradients."""

    def finish(self, labelled: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit to labelled pictures: image_B3hw, normalised, and label_Bhw. Of both networks, as a step does."""


@runtime_checkable
class Staged(Protocol):
    """An objective that trains some parts of the network later than others."""

    def begin_of(self, part: nn.Module) -> float:
        """Return the share of the schedule after which `part` is trained."""


def build_objective(method: str, network: Network, average: Network, options: Mapping[str, Any]) -> nn.Module:
    """Build a method's objective, a module that holds the network, its average, and own state.

    forward(batch, progress, generator) -> named scalars; `total` is minimised, the rest is only reported.
    progress: share of the schedule that is over, [0, 1]. generator: the only source of randomness.
    Raises BadOption if the method cannot be trained here.
    """
    name = f"penumbra.models.{method}.objective"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise BadOption(f"the method {method!r} has no objective; it can be imported but not trained") from None
    return module.build_objective(network, average, options)


def update_average(average: nn.Module, network: nn.Module, *, decay: float) -> None:
    """Set average = decay * average + (1 - decay) * network, in place, for weights and float buffers."""
    ours, theirs = average.state_dict(), network.state_dict()
    for key, value in ours.items():
        if value.is_floating_point():
            value.lerp_(theirs[key].to(value.dtype), 1 - decay)
        else:
            value.copy_(theirs[key])
