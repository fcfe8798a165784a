"""The files of the unofficial PyTorch code, up to three of them, and the networks they make together.

The authors released neither code nor weights. Tensors stand under `model_state_dict`, beside pickled settings.
"""

import dataclasses
from collections.abc import Mapping

from penumbra.models.card import InputSpec, Readout, WindowSpec
from penumbra.models.errors import BadCheckpoint
from penumbra.models.layout import Assembly, Layout, Parts, Protocol, Upstream
from penumbra.models.self_correcting.net import BACKBONE, SelfCorrectingConfig

PRIMARY, ANCILLARY, CORRECTION = "primary network", "ancillary network", "correction network"
CONTAINERS = ("model_state_dict",)
MARKERS = ("encoder.layer0.0.weight", "decoder.classifier.weight")
BOXES = "bb_encoder.attn_low.0.weight"
DEEPLAB = {
    "encoder.layer0.0.": "backbone.conv1.",
    "encoder.layer0.1.": "backbone.bn1.",
    "encoder.layer": "backbone.layer",
    "encoder.aspp.conv1x1.": "aspp.branches.0.",
    "encoder.aspp.atrous6.": "aspp.branches.1.",
    "encoder.aspp.atrous12.": "aspp.branches.2.",
    "encoder.aspp.atrous18.": "aspp.branches.3.",
    "encoder.aspp.global_pool.1.": "aspp.pool.0.",
    "encoder.aspp.global_pool.2.": "aspp.pool.1.",
    "encoder.aspp.project.": "aspp.project.",
    "decoder.project_low.": "low.",
    "decoder.refine.": "fuse.",
    "decoder.classifier.": "classifier.",
}
GATES = {"bb_encoder.attn_low.0.": "ancillary.low_gate.conv.", "bb_encoder.attn_high.0.": "ancillary.high_gate.conv."}
CLASSIFIERS = {
    PRIMARY: "primary.classifier.weight",
    ANCILLARY: "ancillary.deeplab.classifier.weight",
    CORRECTION: "correction.2.weight",
}
PROTOCOL = Protocol(WindowSpec(512, 512), Readout(align_corners=False))
WARNING = (
    "the code of these files evaluates on pictures squashed to 512x512 px and names no results; "
    "windows of 512x512 px of the picture as it is are used instead"
)


def assemble(parts: Parts) -> Assembly:
    """Make the primary; with the ancillary the linear correction, with the correction network the convolutional one.

    Raises BadCheckpoint: a part is missing, or two parts differ in their classes or their depth.
    """
    names = " and the ".join(parts)
    if PRIMARY not in parts:
        raise BadCheckpoint(f"there is the {names} but no {PRIMARY}; it answers without boxes, and is needed")
    if CORRECTION in parts and ANCILLARY not in parts:
        raise BadCheckpoint(f"there is the {names} but no {ANCILLARY}; the correction joins both")
    classifiers = {name: part[CLASSIFIERS[name]] for name, part in parts.items()}
    num_classes = _same("classes", {name: weight.shape[0] for name, weight in classifiers.items()})
    deeplabs = {name: part for name, part in parts.items() if name != CORRECTION}
    is_deep = {name: any(".layer3.6." in key for key in part) for name, part in deeplabs.items()}  # 23 blocks, not 6
    depth = _same("ResNet layers", {name: 101 if deep else 50 for name, deep in is_deep.items()})
    config = SelfCorrectingConfig(
        num_classes,
        backbone=dataclasses.replace(BACKBONE, depth=depth),
        ancillary=ANCILLARY in parts,
        correction="convolutional" if CORRECTION in parts else "linear" if ANCILLARY in parts else "none",
        correction_hidden=classifiers[CORRECTION].shape[1] if CORRECTION in parts else 128,
    )
    return Assembly(config, InputSpec(), published=PROTOCOL, ours=PROTOCOL, warnings=(WARNING,))


def _same(what: str, numbers: Mapping[str, int]) -> int:
    if len(set(numbers.values())) > 1:
        listed = ", ".join(f"{number} in the {name}" for name, number in numbers.items())
        raise BadCheckpoint(f"the number of {what} differs: {listed}; files of one training are wanted")
    return numbers[PRIMARY]


UPSTREAM = Upstream(
    layouts=(
        Layout(
            name=PRIMARY,
            markers=MARKERS,
            absent=(BOXES,),
            renames={theirs: f"primary.{ours}" for theirs, ours in DEEPLAB.items()},
            containers=CONTAINERS,
        ),
        Layout(
            name=ANCILLARY,
            markers=(*MARKERS, BOXES),
            renames={theirs: f"ancillary.deeplab.{ours}" for theirs, ours in DEEPLAB.items()} | GATES,
            containers=CONTAINERS,
        ),
        Layout(
            name=CORRECTION,
            markers=("net.0.weight", "net.2.weight"),
            renames={"net.": "correction."},
            containers=CONTAINERS,
        ),
    ),
    assemble=assemble,
    source="github.com/HusamettinYilmazz/Self-Correcting-Network @e218e73307a9336f8059458eb5480a0185a8d6be",
)
