"""The published ProtoSeg files: the prototype network `hrnet_w48_proto` and its baseline `hrnet_w48` (Cityscapes).

The repository's `deeplab_v3` is read too; no weights of it are published. All are trained on pictures read as BGR, with
mean and deviation in RGB order.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from penumbra.models.card import InputSpec, Readout, WindowSpec
from penumbra.models.errors import BadCheckpoint
from penumbra.models.layout import Assembly, Layout, Protocol, Upstream
from penumbra.models.proto_seg.deeplab import DeepLabConfig
from penumbra.models.proto_seg.hrnet import HrnetConfig
from penumbra.models.proto_seg.net import ProtoConfig

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
DEPTHS: dict[int, Literal[50, 101]] = {6: 50, 23: 101}
"""ResNet depth by the number of blocks in its third stage."""

INPUT = InputSpec(order="BGR")
READOUT = Readout(align_corners=True)
"""Readout of all layouts, at window resolution."""
TRAINED = (1024, 2048)
ROW_WARNING = (
    "the embedding of a pixel depends on its whole row (published normalisation): "
    f"results hold for whole pictures of {TRAINED[0]}x{TRAINED[1]} px"
)


def assemble(parts: Mapping[str, Mapping[str, Tensor]]) -> Assembly:
    """Configuration and protocols of one file. Raises BadCheckpoint: a tensor that tells a size is missing or odd."""
    if len(parts) != 1:
        raise BadCheckpoint(f"these are {len(parts)} ProtoSeg networks ({', '.join(parts)}); one file is wanted")
    ((name, tensors),) = parts.items()
    return {PROTOTYPE.name: _prototype, BASELINE.name: _baseline, DEEPLAB.name: _deeplab}[name](tensors)


def _prototype(tensors: Mapping[str, Tensor]) -> Assembly:
    num_classes, num_prototypes, _ = _shape(tensors, "head.prototypes_KMD", axes=3)
    config = ProtoConfig(num_classes, num_prototypes=num_prototypes, hrnet=_hrnet(tensors))
    protocol = Protocol(WindowSpec(0, 0, trained=TRAINED), READOUT)
    return Assembly(config, INPUT, published=protocol, ours=protocol, warnings=(ROW_WARNING,))


def _baseline(tensors: Mapping[str, Tensor]) -> Assembly:
    return _parametric(ProtoConfig(_num_classes(tensors), head="parametric", hrnet=_hrnet(tensors)))


def _deeplab(tensors: Mapping[str, Tensor]) -> Assembly:
    blocks = _count(tensors, "trunk.backbone.layer3.")
    if blocks not in DEPTHS:
        raise BadCheckpoint(f"the third stage has {blocks} blocks; {' or '.join(map(str, DEPTHS))} are wanted")
    width, channels = (_shape(tensors, f"trunk.{name}.0.weight", axes=4)[0] for name in ("backbone.conv1", "refine"))
    deeplab = DeepLabConfig(DEPTHS[blocks], width, channels)
    return _parametric(ProtoConfig(_num_classes(tensors), head="parametric", trunk="deeplab", deeplab=deeplab))


def _parametric(config: ProtoConfig) -> Assembly:
    """Ours: windows of the crops' height and width in training, 512x1024 px."""
    published, ours = Protocol(WindowSpec(0, 0), READOUT), Protocol(WindowSpec(512, 1024), READOUT)
    return Assembly(config, INPUT, published, ours)


def _num_classes(tensors: Mapping[str, Tensor]) -> int:
    return _shape(tensors, "head.classifier.weight", axes=4)[0]


def _hrnet(tensors: Mapping[str, Tensor]) -> HrnetConfig:
    return HrnetConfig(
        width=_shape(tensors, "trunk.backbone.transition1.0.0.weight", axes=4)[0],
        stem=_shape(tensors, "trunk.backbone.conv1.weight", axes=4)[0],
        bottlenecks=_count(tensors, "trunk.backbone.layer1."),
        modules=(
            _count(tensors, "trunk.backbone.stage2."),
            _count(tensors, "trunk.backbone.stage3."),
            _count(tensors, "trunk.backbone.stage4."),
        ),
        blocks=_count(tensors, "trunk.backbone.stage2.0.branches.0."),
    )


def _shape(tensors: Mapping[str, Tensor], name: str, *, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise BadCheckpoint(f"the file lacks the tensor {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or min(shape) < 1:
        raise BadCheckpoint(f"{name} is {list(shape)}; {axes} axes, none of them empty, are wanted")
    return shape


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many members the list called `prefix` has."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


UPSTREAM = Upstream((PROTOTYPE, BASELINE, DEEPLAB), assemble, source="tfzhou/ProtoSeg @1c4a778")
