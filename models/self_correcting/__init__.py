"""Self-correcting networks (Ibrahim et al., CVPR 2020): boxes round objects correct a DeepLabv3+."""

from penumbra.models.contract import Method
from penumbra.models.self_correcting.net import SelfCorrectingConfig, build
from penumbra.models.self_correcting.upstream import UPSTREAM

METHOD = Method(name="self_correcting", config=SelfCorrectingConfig, build=build, upstream=UPSTREAM)
