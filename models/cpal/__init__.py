"""CPAL (Tang et al., CVPR 2024): pseudo masks from image-level labels with context prototypes, and what they train."""

from penumbra.models.contract import Method, Network
from penumbra.models.cpal.config import CpalConfig
from penumbra.models.cpal.net import CamNetwork
from penumbra.models.cpal.segmentation import DeepLabV2Network, Wrn38Network
from penumbra.models.cpal.upstream import UPSTREAM

NETWORKS: dict[str, type[CamNetwork] | type[DeepLabV2Network] | type[Wrn38Network]] = {
    "cam": CamNetwork,
    "deeplabv2": DeepLabV2Network,
    "wrn38": Wrn38Network,
}
"""`CpalConfig.net` -> network."""


def build(config: CpalConfig) -> Network:
    """Build the network that `config.net` names. Raises BadOption when members or sampling do not fit it."""
    return NETWORKS[config.net](config)


METHOD = Method(name="cpal", config=CpalConfig, build=build, upstream=UPSTREAM)
