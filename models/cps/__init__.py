"""Cross Pseudo Supervision (Chen, Yuan, Zeng, Wang, CVPR 2021): two networks supervising each other."""

from penumbra.models.contract import Method
from penumbra.models.cps.net import CpsConfig, CpsNetwork
from penumbra.models.cps.upstream import UPSTREAM

METHOD = Method(name="cps", config=CpsConfig, build=CpsNetwork, upstream=UPSTREAM)
