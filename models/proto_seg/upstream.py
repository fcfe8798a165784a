"""The published ProtoSeg files: the prototype network `hrnet_w48_proto` and its baseline `hrnet_w48` (Cityscapes).

The repository's `deeplab_v3` is read too; no weights of it are published. All are trained on pictures read as BGR, with
mean and deviation in RGB order.
"""

from collections.abc import Mapping

from torch import Tensor

from penumbra.models.card import InputSpec, Readout, WindowSpec
from penumbra.models.errors import BadCheckpoint
from penumbra.models.layout import Assembly, Layout, Parts, Protocol, Upstream, count_items, only_part, read_depth
from penumbra.models.proto_seg.net import ProtoConfig
from penumbra.models.proto_seg.trunks import DeepLabConfig, HrnetConfig

CONTAINERS = ("state_dict", "model")
TRUNK = {"backbone.": "trunk.backbone.", "cls_head.0.": "trunk.neck.0.", "cls_head.1.0.": "trunk.neck.1."}
PROTOTYPE = Layout(
    name="hrnet_w48_proto",
    markers=("prototypes", "mask_norm.weight", "cls_head.0.weight", "backbone.transition1.0.0.weight"),
    renames=TRUNK
    | {
        "prototypes": "head.prototypes_KMD",
        "proj_head.proj.": "head.project.",
        "feat_norm.": "head.feat_norm.",
        "mask_norm.": "head.mask_norm.",
    },
    containers=CONTAINERS,
    aliases={"proj_head.mlp2.": "proj_head.proj."},
)
BASELINE = Layout(
    name="hrnet_w48",
    markers=("cls_head.3.weight", "cls_head.0.weight", "backbone.transition1.0.0.weight"),
    absent=("prototypes",),
    renames=TRUNK | {"cls_head.3.": "head.classifier."},
    containers=CONTAINERS,
)
DEEPLAB = Layout(
    name="deeplab_v3",
    markers=("decoder.refine.2.weight", "backbone.resinit.conv1.weight"),
    renames={
        "backbone.resinit.conv1.": "trunk.backbone.conv1.0.",
        "backbone.resinit.bn1.": "trunk.backbone.conv1.1.",
        "backbone.resinit.conv2.": "trunk.backbone.conv1.3.",
        "backbone.resinit.bn2.": "trunk.backbone.conv1.4.",
        "backbone.resinit.conv3.": "trunk.backbone.conv1.6.",
        "backbone.resinit.bn3.": "trunk.backbone.bn1.",
        "backbone.layer": "trunk.backbone.layer",
        **{f"decoder.layer_aspp.b{i}.0.": f"trunk.aspp.branches.{i}.0." for i in range(4)},
        **{f"decoder.layer_aspp.b{i}.1.0.": f"trunk.aspp.branches.{i}.1." for i in range(4)},
        "decoder.layer_aspp.b4.1.": "trunk.aspp.pool.0.",
        "decoder.layer_aspp.b4.2.0.": "trunk.aspp.pool.1.",
        "decoder.layer_aspp.project.0.": "trunk.aspp.project.0.",
        "decoder.layer_aspp.project.1.0.": "trunk.aspp.project.1.",
        "decoder.refine.0.": "trunk.refine.0.",
        "decoder.refine.1.": "trunk.refine.1.",
        "decoder.refine.2.": "head.classifier.",
    },
    containers=CONTAINERS,
    train_only=("decoder.layer_dsn.",),
)

INPUT = InputSpec(order="BGR")
READOUT = Readout(align_corners=True)
"""Readout of all layouts, at window resolution."""
TRAINED = (1024, 2048)
ROW_WARNING = (
    "the embedding of a pixel depends on its whole row (published normalisation): "
    f"results hold for whole pictures of {TRAINED[0]}x{TRAINED[1]} px"
)


def assemble(parts: Parts) -> Assembly:
    """Read configuration and protocols off one file. Raises BadCheckpoint: a tensor that tells a size is odd."""
    name, tensors = only_part(parts)
    return {PROTOTYPE.name: _prototype, BASELINE.name: _baseline, DEEPLAB.name: _deeplab}[name](tensors)


def _prototype(tensors: Mapping[str, Tensor]) -> Assembly:
    num_classes, num_prototypes, _ = _shape(tensors, "head.prototypes_KMD", axes=3)
    config = ProtoConfig(num_classes, num_prototypes=num_prototypes, hrnet=_hrnet(tensors))
    protocol = Protocol(WindowSpec(0, 0, trained=TRAINED), READOUT)
    return Assembly(config, INPUT, published=protocol, ours=protocol, warnings=(ROW_WARNING,))


def _baseline(tensors: Mapping[str, Tensor]) -> Assembly:
    num_classes = _channels(tensors, "head.classifier.weight")
    return _parametric(ProtoConfig(num_classes, head="parametric", hrnet=_hrnet(tensors)))


def _deeplab(tensors: Mapping[str, Tensor]) -> Assembly:
    names = ("head.classifier.weight", "trunk.backbone.conv1.0.weight", "trunk.refine.0.weight")
    num_classes, width, channels = (_channels(tensors, name) for name in names)
    deeplab = DeepLabConfig(read_depth(tensors, "trunk.backbone.layer3."), width, channels)
    return _parametric(ProtoConfig(num_classes, head="parametric", trunk="deeplab", deeplab=deeplab))


def _parametric(config: ProtoConfig) -> Assembly:
    """Run the baseline as published, or as ours in windows of the training crops' height and width, 512x1024 px."""
    published, ours = Protocol(WindowSpec(0, 0), READOUT), Protocol(WindowSpec(512, 1024), READOUT)
    return Assembly(config, INPUT, published, ours)


def _hrnet(tensors: Mapping[str, Tensor]) -> HrnetConfig:
    backbone = "trunk.backbone."
    modules = (count_items(tensors, f"{backbone}stage{stage}.") for stage in (2, 3, 4))
    return HrnetConfig(
        width=_channels(tensors, f"{backbone}transition1.0.0.weight"),
        stem=_channels(tensors, f"{backbone}conv1.weight"),
        bottlenecks=count_items(tensors, f"{backbone}layer1."),
        modules=tuple(modules),  # type: ignore[arg-type]
        blocks=count_items(tensors, f"{backbone}stage2.0.branches.0."),
    )


def _channels(tensors: Mapping[str, Tensor], name: str) -> int:
    """Read the outputs of a convolution off its weight."""
    return _shape(tensors, name, axes=4)[0]


def _shape(tensors: Mapping[str, Tensor], name: str, *, axes: int) -> tuple[int, ...]:
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or min(shape) < 1:
        raise BadCheckpoint(f"{name} is {list(shape)}; {axes} axes, none of them empty, are wanted")
    return shape


UPSTREAM = Upstream((PROTOTYPE, BASELINE, DEEPLAB), assemble, source="tfzhou/ProtoSeg @1c4a778")
