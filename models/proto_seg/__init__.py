"""ProtoSeg (Zhou, Wang, Konukoglu, Van Gool, CVPR 2022): classes as sets of prototypes, without learned classifier."""

from penumbra.models.contract import Method
from penumbra.models.proto_seg.net import ProtoConfig, build_network
from penumbra.models.proto_seg.upstream import UPSTREAM

METHOD = Method(name="proto_seg", config=ProtoConfig, build=build_network, upstream=UPSTREAM)
