"""NP-SemiSeg (Wang, Massiceti, Hu, Pavlovic, Lukasiewicz, ICML 2023): a neural-process head, one latent per image."""

from penumbra.models.contract import Method
from penumbra.models.np_semiseg.net import NpConfig, NpNetwork
from penumbra.models.np_semiseg.upstream import UPSTREAM

METHOD = Method(name="np_semiseg", config=NpConfig, build=NpNetwork, upstream=UPSTREAM)
