"""Self-correcting networks (Ibrahim et al., CVPR 2020): boxes round objects correct a DeepLabv3+."""

from penumbra.models.contract import Method
from penumbra.models.self_correcting.net import SelfCorrectingConfig, build
from penumbra.models.self_correcting.upstream import UPSTREAM

METHOD = Method(
    name="self_correcting",
    citation=(
        "Ibrahim, Vahdat, Ranjbar, Macready. Semi-Supervised Semantic Image Segmentation with Self-correcting "
        "Networks. CVPR 2020."
    ),
    config=SelfCorrectingConfig,
    build=build,
    upstream=UPSTREAM,
)
