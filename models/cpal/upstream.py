"""Published files of CPAL's base and segmentation networks: SIPE's localisation net, DeepLabV2-R101, DeepLabV1-WRN38.

CPAL itself has published no weights. Shapes tell the number of classes (VOC 20 + 1, COCO 80 + 1)
and the width.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from penumbra.models.card import InputSpec, Readout, WindowSpec
from penumbra.models.cpal.config import CpalConfig, deeplabv2, sipe, wrn38
from penumbra.models.layout import Assembly, Layout, Parts, Protocol, Upstream, only_part

STAGES = {"0.0.": "conv1.", "0.1.": "bn1."} | {f"{n}.0.": f"layer{n}." for n in (1, 2, 3, 4)}
"""SIPE stores its backbone three times; this is how the two further copies call a stage."""
HEADS = ("classifier.", "side1.", "side2.", "side3.", "side4.")

SIPE = Layout(
    name="sipe",
    markers=("resnet50.conv1.weight", "side1.weight", "classifier.weight"),
    renames={"resnet50.": "backbone.", "classifier.": "classifier."}
    | {f"side{n + 1}.": f"sides.{n}." for n in range(4)},
    containers=("net", "state_dict", "model"),
    aliases={f"stage{theirs}": f"resnet50.{ours}" for theirs, ours in STAGES.items()}
    | {f"backbone.{theirs}": f"resnet50.{ours}" for theirs, ours in STAGES.items()}
    | {f"newly_added.{i}.": head for i, head in enumerate(HEADS)},
)
DEEPLABV2 = Layout(
    name="deeplabv2", markers=("base.layer1.conv1.conv.weight", "base.aspp.c0.weight"), renames={"base.": "base."}
)
WRN38 = Layout(
    name="wrn38",
    markers=("backbone.conv1a.weight", "cls_conv.weight"),
    renames={name: name for name in ("backbone.", "conv_fov.", "bn_fov.", "conv_fov2.", "bn_fov2.", "cls_conv.")},
)

WHOLE = WindowSpec(0, 0, blend="uniform")
POSITIONS = 2**13
"""Size of the largest feature map whose affinity, a number for every pair of positions (256 MB), is made."""
WINDOWS = WindowSpec(512, 512)
CAFFE = InputSpec(mean=(104.008, 116.669, 122.675), std=(1.0, 1.0, 1.0), scale=1.0, order="BGR")


def assemble(parts: Parts) -> Assembly:
    """Make one network of one file."""
    layout, tensors = only_part(parts)
    return {"sipe": _localisation, "deeplabv2": _deeplabv2, "wrn38": _wrn38}[layout](tensors)


def _localisation(tensors: Mapping[str, Tensor]) -> Assembly:
    config = replace(sipe(len(tensors["classifier.weight"]) + 1), width=len(tensors["backbone.conv1.weight"]))
    ours = replace(config, scales=(1.0,), members=("cam", "is_cam"))
    return Assembly(config, InputSpec(), published=_whole(config), ours=_whole(ours), ours_config=ours)


def _whole(config: CpalConfig) -> Protocol:
    """See images whole, of as many pixels as their largest scale's map at stride 16 may have positions."""
    max_pixels = int(POSITIONS * (16 / max(config.scales)) ** 2)
    return Protocol(replace(WHOLE, max_pixels=max_pixels), Readout(align_corners=False))


def _deeplabv2(tensors: Mapping[str, Tensor]) -> Assembly:
    config = deeplabv2(len(tensors["base.aspp.c0.weight"]))
    config = replace(config, width=len(tensors["base.layer1.conv1.conv.weight"]))
    ours = replace(config, members=tuple(f"scale{scale:g}" for scale in config.scales))
    readout = Readout(align_corners=False)
    return Assembly(config, CAFFE, Protocol(WHOLE, readout), Protocol(WINDOWS, readout), ours_config=ours)


def _wrn38(tensors: Mapping[str, Tensor]) -> Assembly:
    config = replace(wrn38(len(tensors["cls_conv.weight"])), width=len(tensors["backbone.conv1a.weight"]))
    warning = "the published evaluation averages logits over six scales with flips and a CRF; here is its single pass"
    return Assembly(config, InputSpec(), Protocol(WHOLE), Protocol(WINDOWS), warnings=(warning,))


UPSTREAM = Upstream(
    layouts=(SIPE, DEEPLABV2, WRN38),
    assemble=assemble,
    source="chenqi1126/SIPE@e0c6a3b, kazuto1011/deeplab-pytorch@4219467, YudeWang/semantic-segmentation-codebase",
)
