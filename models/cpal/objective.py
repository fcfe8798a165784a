"""Training of CPAL in two stages, one recipe each: maps from tags, then a segmentation network from their masks."""

from collections.abc import Mapping
from typing import Any

from penumbra.models.contract import Network
from penumbra.models.cpal.net import CamNetwork
from penumbra.models.cpal.objective_cam import CamObjective, read_cam_options
from penumbra.models.cpal.objective_masks import MaskObjective, read_mask_options


def build_objective(network: Network, average: Network, options: Mapping[str, Any]) -> CamObjective | MaskObjective:
    """The objective of the network's stage. Raises BadArtifact naming an unknown or mistyped option, BadOption."""
    if isinstance(network, CamNetwork) and isinstance(average, CamNetwork):
        return CamObjective(network, average, read_cam_options(options))
    return MaskObjective(network, average, read_mask_options(options))
